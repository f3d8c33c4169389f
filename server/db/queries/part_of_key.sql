-- The part of `chat_vectors` that has a key's.
SELECT c.relname AS part FROM pg_class c
WHERE c.oid = (SELECT tableoid FROM chat_vectors WHERE key_id = %(key_id)s AND space = %(space)s LIMIT 1)
