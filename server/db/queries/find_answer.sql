SELECT head, events FROM kept_answers
WHERE request_id = %(request_id)s AND key_id = %(key_id)s AND head IS NOT NULL AND expires_at > now()
