-- Embedding requests and their usage, each request id once. A request of many texts is several jobs: the first
-- bears the request's id, the others `id.1`, `id.2`, …, so that it counts as one.
WITH incoming AS (
    SELECT * FROM unnest(
        %(request_id)s::text[], %(key_id)s::bigint[], %(model)s::text[], %(texts)s::int[],
        %(prompt_tokens)s::int[], %(created_at)s::float8[]
    ) AS t (request_id, key_id, model, texts, prompt_tokens, created_at)
), inserted AS (
    INSERT INTO embedding_requests (request_id, key_id, model, texts, prompt_tokens, created_at)
    SELECT request_id, key_id, model, texts, prompt_tokens, to_timestamp(created_at) FROM incoming
    ON CONFLICT (request_id) DO NOTHING
    RETURNING request_id, key_id, model, texts, prompt_tokens, created_at
), used AS (
    INSERT INTO usage_daily AS u (key_id, day, model, type, requests, texts, prompt_tokens, completion_tokens)
    SELECT key_id, (created_at AT TIME ZONE 'UTC')::date, model, 'embedding',
           count(*) FILTER (WHERE strpos(request_id, '.') = 0), sum(texts), sum(prompt_tokens), 0
    FROM inserted GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
    ON CONFLICT (key_id, day, model, type) DO UPDATE SET
        requests = u.requests + excluded.requests,
        texts = u.texts + excluded.texts,
        prompt_tokens = u.prompt_tokens + excluded.prompt_tokens
)
SELECT count(*) FROM inserted
