SELECT session_id, chats, prompt_tokens, completion_tokens, created_at, updated_at
FROM sessions
WHERE key_id = %(key_id)s
ORDER BY updated_at DESC, session_id
LIMIT %(limit)s OFFSET %(offset)s
