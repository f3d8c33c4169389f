SELECT id, name, is_admin, created_at, revoked_at, weight FROM api_keys ORDER BY id
