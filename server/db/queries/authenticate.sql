-- The key with this hash and, unless it is revoked, its request counted in the running minute. One round trip.
WITH found AS (
    SELECT id, name, hash, is_admin, revoked_at FROM api_keys WHERE hash = %(hash)s
), counted AS (
    INSERT INTO rate_windows (key_id, minute, requests)
    SELECT id, date_trunc('minute', now()), 1 FROM found WHERE revoked_at IS NULL AND %(limit)s > 0
    ON CONFLICT (key_id) DO UPDATE SET
        requests = CASE WHEN rate_windows.minute = excluded.minute THEN rate_windows.requests + 1 ELSE 1 END,
        minute = excluded.minute
    RETURNING requests, extract(epoch FROM minute)::bigint + 60 AS reset_at
)
SELECT found.id, found.name, found.hash, found.is_admin, found.revoked_at, counted.requests, counted.reset_at
FROM found LEFT JOIN counted ON true
