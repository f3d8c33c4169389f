SELECT key_id, space, dimensions, vectors FROM vector_counts
WHERE space = %(space)s AND vectors > %(limit)s AND dimensions <= %(max_dimensions)s AND NOT indexed
ORDER BY vectors DESC
