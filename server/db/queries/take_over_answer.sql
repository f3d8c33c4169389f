UPDATE kept_answers SET request_id = %(by)s WHERE request_id = %(request_id)s AND head IS NULL
