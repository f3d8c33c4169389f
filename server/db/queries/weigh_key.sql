UPDATE api_keys SET weight = %(weight)s WHERE id = %(id)s RETURNING id
