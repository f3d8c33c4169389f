-- How many vectors each key has in each space, so that a search knows without counting which way to take.
-- depends: 0001-keys-chats-usage

-- `indexed` says that the key has an HNSW index of its own in this space. Written by the archivist alone; one of the
-- version before this does not count, which at worst leaves a key with the exact search for longer.
CREATE TABLE vector_counts (
    key_id bigint NOT NULL,
    space text NOT NULL,
    dimensions integer NOT NULL,
    vectors bigint NOT NULL,
    indexed boolean NOT NULL DEFAULT false,
    PRIMARY KEY (key_id, space)
);
INSERT INTO vector_counts (key_id, space, dimensions, vectors)
SELECT key_id, space, max(vector_dims(embedding)), count(*) FROM chat_vectors GROUP BY key_id, space;
