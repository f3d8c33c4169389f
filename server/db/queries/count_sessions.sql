SELECT sessions FROM session_counts WHERE key_id = %(key_id)s
