-- The messages whole: an operator that takes the last of them reads them all, and fails at a NUL.
SELECT request_id, model, endpoint, messages, prompt_tokens, completion_tokens, finish_reason, created_at
FROM chats
WHERE request_id = ANY (%(request_ids)s) AND key_id = %(key_id)s
UNION ALL
SELECT request_id, model, '/embeddings', NULL, prompt_tokens, 0, '', created_at
FROM embedding_requests
WHERE request_id = ANY (%(request_ids)s) AND key_id = %(key_id)s
LIMIT 1
