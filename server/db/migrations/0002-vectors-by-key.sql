-- Vectors of a key lie together, and are counted.
-- depends: 0001-keys-chats-usage

-- An exact search reads all vectors of one key. Scattered among everybody's, each costs a page of its own; in parts by
-- the key they lie next to each other (three to a page of 1024 dimensions), unless a part has two large keys.
-- While the archivist of the version before this still runs, its vectors wait: it names another primary key.
ALTER TABLE chat_vectors RENAME TO chat_vectors_scattered;
ALTER INDEX chat_vectors_pkey RENAME TO chat_vectors_scattered_pkey;
ALTER INDEX chat_vectors_by_key RENAME TO chat_vectors_scattered_by_key;
CREATE TABLE chat_vectors (
    chat_id bigint NOT NULL REFERENCES chats ON DELETE CASCADE,
    key_id bigint NOT NULL,
    space text NOT NULL,
    embedding halfvec NOT NULL,
    PRIMARY KEY (chat_id, space, key_id)
) PARTITION BY HASH (key_id);
ALTER TABLE chat_vectors ALTER COLUMN embedding SET STORAGE PLAIN;
CREATE INDEX chat_vectors_by_key ON chat_vectors (key_id, space);
DO $$
BEGIN
    FOR part IN 0..63 LOOP
        EXECUTE format(
            'CREATE TABLE chat_vectors_%s PARTITION OF chat_vectors FOR VALUES WITH (MODULUS 64, REMAINDER %s)', part, part
        );
    END LOOP;
END
$$;
INSERT INTO chat_vectors (chat_id, key_id, space, embedding)
SELECT chat_id, key_id, space, embedding FROM chat_vectors_scattered ORDER BY key_id, space, chat_id;
DROP TABLE chat_vectors_scattered;

-- So that a search knows without counting which way to take; `indexed`: the key has an HNSW index of its own in this
-- space (see server/db/vector_index.py).
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
