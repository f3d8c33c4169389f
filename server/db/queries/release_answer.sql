DELETE FROM kept_answers WHERE request_id = %(request_id)s AND head IS NULL
