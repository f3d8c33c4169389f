UPDATE kept_answers SET request_id = %(by)s, owner = %(owner)s WHERE request_id = %(request_id)s AND head IS NULL
