UPDATE kept_answers SET head = %(head)s::json, events = %(events)s::bytea[] WHERE request_id = %(request_id)s
