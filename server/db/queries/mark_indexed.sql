UPDATE vector_counts SET indexed = true WHERE key_id = %(key_id)s AND space = %(space)s
