-- The messages whole: an operator that takes the last of them reads them all, and fails at a NUL.
SELECT request_id, model, endpoint, messages, prompt_tokens, completion_tokens, finish_reason, created_at, 0 AS texts
FROM chats
WHERE request_id = ANY (%(request_ids)s) AND key_id = %(key_id)s
UNION ALL
-- Many texts are several jobs, and as many rows.
SELECT min(request_id), model, '/embeddings', NULL, sum(prompt_tokens), 0, '', min(created_at), sum(texts)
FROM embedding_requests
WHERE request_id = ANY (%(request_ids)s) AND key_id = %(key_id)s
GROUP BY model
LIMIT 1
