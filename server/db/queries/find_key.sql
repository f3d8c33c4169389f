SELECT id, name, hash, is_admin, revoked_at, weight FROM api_keys WHERE hash = %(hash)s
