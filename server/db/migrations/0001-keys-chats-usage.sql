-- Keys, chats, vectors and the roll-ups that `/usage`, `/chat/stats` and `/chat/sessions` read.
-- depends:

CREATE EXTENSION IF NOT EXISTS vector;

CREATE TABLE api_keys (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    hash bytea NOT NULL UNIQUE CHECK (length(hash) = 32),
    is_admin boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);

-- One row a key, overwritten each minute. Losing it in a crash forgives at most one minute's count.
CREATE UNLOGGED TABLE rate_windows (
    key_id bigint PRIMARY KEY REFERENCES api_keys,
    minute timestamptz NOT NULL,
    requests integer NOT NULL
);

CREATE TABLE chats (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    request_id text NOT NULL UNIQUE,
    key_id bigint NOT NULL REFERENCES api_keys,
    session_id text NOT NULL,
    model text NOT NULL,
    endpoint text NOT NULL,
    -- json, not jsonb: it keeps what was said byte for byte, \u0000 included, which jsonb refuses.
    messages json NOT NULL,
    prompt_tokens integer NOT NULL,
    completion_tokens integer NOT NULL,
    finish_reason text NOT NULL,
    created_at timestamptz NOT NULL
);
CREATE INDEX chats_by_key ON chats (key_id, id DESC);
CREATE INDEX chats_by_session ON chats (key_id, session_id, id DESC);
CREATE INDEX chats_by_model ON chats (key_id, model, id DESC);

-- Narrow and in line, so that an exact search over one key's chats reads little. Vectors of different
-- models cannot be compared: each row says whose space it is in.
CREATE TABLE chat_vectors (
    chat_id bigint NOT NULL REFERENCES chats ON DELETE CASCADE,
    key_id bigint NOT NULL,
    space text NOT NULL,
    embedding halfvec NOT NULL,
    PRIMARY KEY (chat_id, space)
);
ALTER TABLE chat_vectors ALTER COLUMN embedding SET STORAGE PLAIN;
CREATE INDEX chat_vectors_by_key ON chat_vectors (key_id, space);

-- The spaces that all chats have been queued for.
CREATE TABLE vector_spaces (
    space text PRIMARY KEY,
    queued_at timestamptz NOT NULL DEFAULT now()
);

-- Chats that wait for their vector: filled with the chat, emptied with the vector.
CREATE TABLE chat_vectors_pending (
    chat_id bigint PRIMARY KEY REFERENCES chats ON DELETE CASCADE
);

CREATE TABLE embedding_requests (
    request_id text PRIMARY KEY,
    key_id bigint NOT NULL REFERENCES api_keys,
    model text NOT NULL,
    texts integer NOT NULL,
    prompt_tokens integer NOT NULL,
    created_at timestamptz NOT NULL
);

CREATE TABLE sessions (
    key_id bigint NOT NULL REFERENCES api_keys,
    session_id text NOT NULL,
    chats bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (key_id, session_id)
);
CREATE INDEX sessions_by_activity ON sessions (key_id, updated_at DESC, session_id);

-- A row a key, day (UTC), model and type: what reads cost grows with days and models, not with requests.
CREATE TABLE usage_daily (
    key_id bigint NOT NULL REFERENCES api_keys,
    day date NOT NULL,
    model text NOT NULL,
    type text NOT NULL,
    requests bigint NOT NULL,
    texts bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    PRIMARY KEY (key_id, day, model, type)
);

-- One row a key, so that counting its sessions costs nothing.
CREATE TABLE session_counts (
    key_id bigint PRIMARY KEY REFERENCES api_keys,
    sessions bigint NOT NULL
);
