WITH mine AS (
    INSERT INTO kept_answers AS k (key_id, idempotency_key, request_id, owner, fingerprint, expires_at)
    VALUES (%(key_id)s, %(name)s, %(request_id)s, %(owner)s, %(fingerprint)s, now() + make_interval(secs => %(ttl_s)s))
    ON CONFLICT (key_id, idempotency_key) DO UPDATE SET
        request_id = excluded.request_id,
        owner = excluded.owner,
        fingerprint = excluded.fingerprint,
        expires_at = excluded.expires_at,
        head = NULL,
        events = NULL
    WHERE k.expires_at < now()
    RETURNING request_id, fingerprint
)
SELECT request_id, fingerprint FROM mine
UNION ALL
SELECT request_id, fingerprint FROM kept_answers
WHERE key_id = %(key_id)s AND idempotency_key = %(name)s AND NOT EXISTS (SELECT FROM mine)
