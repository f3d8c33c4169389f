SELECT owner, head, events FROM kept_answers
WHERE request_id = %(request_id)s AND key_id = %(key_id)s AND expires_at > now()
