INSERT INTO api_keys (name, hash, is_admin, weight) VALUES (%(name)s, %(hash)s, %(is_admin)s, %(weight)s)
ON CONFLICT (hash) DO NOTHING
RETURNING id
