INSERT INTO api_keys (name, hash, is_admin) VALUES (%(name)s, %(hash)s, %(is_admin)s)
ON CONFLICT (hash) DO NOTHING
RETURNING id
