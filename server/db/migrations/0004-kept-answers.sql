-- The answers of requests with an Idempotency-Key: claimed before they are made, filled once they are whole.
-- depends: 0003-key-changes

CREATE TABLE kept_answers (
    key_id bigint NOT NULL REFERENCES api_keys,
    idempotency_key text NOT NULL,
    request_id text NOT NULL UNIQUE,
    -- SHA-256 of what was asked: the same key with another request is refused.
    fingerprint bytea NOT NULL,
    head json,
    events bytea[],
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (key_id, idempotency_key)
);
CREATE INDEX kept_answers_by_expiry ON kept_answers (expires_at);
