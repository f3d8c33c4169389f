-- The newest first: what was just said is what is searched for.
SELECT c.id, c.key_id, c.request_id, c.messages
FROM chat_vectors_pending p JOIN chats c ON c.id = p.chat_id
ORDER BY p.chat_id DESC
LIMIT %(limit)s
