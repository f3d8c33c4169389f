SELECT dimensions, indexed FROM vector_counts WHERE key_id = %(key_id)s AND space = %(space)s
