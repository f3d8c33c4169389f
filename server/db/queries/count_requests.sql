-- Requests of several keys counted in the running minute, in one statement; no row for a key that may not ask any more.
-- Counts in the order of the keys, so that two servers never wait for each other.
INSERT INTO rate_windows (key_id, minute, requests)
SELECT id, date_trunc('minute', now()), given.requests
FROM unnest(%(key_ids)s::bigint[], %(requests)s::integer[]) AS given (id, requests)
JOIN api_keys USING (id)
WHERE revoked_at IS NULL
ORDER BY id
ON CONFLICT (key_id) DO UPDATE SET
    -- A statement that began before the minute's turn may come after one that began behind it.
    requests = excluded.requests
        + CASE WHEN excluded.minute > rate_windows.minute THEN 0 ELSE rate_windows.requests END,
    minute = greatest(excluded.minute, rate_windows.minute)
RETURNING key_id, requests, extract(epoch FROM minute)::bigint + 60 AS reset_at
