DELETE FROM kept_answers WHERE expires_at < now()
