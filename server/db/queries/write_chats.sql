-- Chats with everything that is counted from them, in one transaction. A request id counts once, however
-- often its record is delivered.
WITH incoming AS (
    SELECT * FROM unnest(
        %(request_id)s::text[], %(key_id)s::bigint[], %(session_id)s::text[], %(model)s::text[],
        %(endpoint)s::text[], %(messages)s::text[], %(prompt_tokens)s::int[], %(completion_tokens)s::int[],
        %(finish_reason)s::text[], %(created_at)s::float8[]
    ) AS t (request_id, key_id, session_id, model, endpoint, messages, prompt_tokens, completion_tokens,
            finish_reason, created_at)
), inserted AS (
    INSERT INTO chats (request_id, key_id, session_id, model, endpoint, messages, prompt_tokens,
                       completion_tokens, finish_reason, created_at)
    SELECT request_id, key_id, session_id, model, endpoint, messages::json, prompt_tokens,
           completion_tokens, finish_reason, to_timestamp(created_at)
    FROM incoming
    ON CONFLICT (request_id) DO NOTHING
    RETURNING id, key_id, session_id, model, prompt_tokens, completion_tokens, created_at
), pending AS (
    INSERT INTO chat_vectors_pending (chat_id) SELECT id FROM inserted
), touched AS (
    INSERT INTO sessions AS s (key_id, session_id, chats, prompt_tokens, completion_tokens, created_at, updated_at)
    SELECT key_id, session_id, count(*), sum(prompt_tokens), sum(completion_tokens), min(created_at), max(created_at)
    FROM inserted GROUP BY key_id, session_id ORDER BY key_id, session_id
    ON CONFLICT (key_id, session_id) DO UPDATE SET
        chats = s.chats + excluded.chats,
        prompt_tokens = s.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = s.completion_tokens + excluded.completion_tokens,
        created_at = least(s.created_at, excluded.created_at),
        updated_at = greatest(s.updated_at, excluded.updated_at)
    RETURNING key_id, (xmax = 0) AS is_new
), counted AS (
    INSERT INTO session_counts AS c (key_id, sessions)
    SELECT key_id, count(*) FROM touched WHERE is_new GROUP BY key_id ORDER BY key_id
    ON CONFLICT (key_id) DO UPDATE SET sessions = c.sessions + excluded.sessions
), used AS (
    INSERT INTO usage_daily AS u (key_id, day, model, type, requests, texts, prompt_tokens, completion_tokens)
    SELECT key_id, (created_at AT TIME ZONE 'UTC')::date, model, 'chat', count(*), 0,
           sum(prompt_tokens), sum(completion_tokens)
    FROM inserted GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
    ON CONFLICT (key_id, day, model, type) DO UPDATE SET
        requests = u.requests + excluded.requests,
        prompt_tokens = u.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = u.completion_tokens + excluded.completion_tokens
)
SELECT count(*) FROM inserted
