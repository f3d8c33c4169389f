SELECT id, name, is_admin, created_at, revoked_at FROM api_keys ORDER BY id
