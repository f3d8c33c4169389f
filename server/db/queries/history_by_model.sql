SELECT id, session_id, model, messages, prompt_tokens, completion_tokens, finish_reason, created_at
FROM chats
WHERE key_id = %(key_id)s AND model = %(model)s
ORDER BY id DESC
LIMIT %(limit)s OFFSET %(offset)s
