WITH incoming AS (
    SELECT * FROM unnest(%(chat_id)s::bigint[], %(key_id)s::bigint[], %(embedding)b::halfvec[])
        AS t (chat_id, key_id, embedding)
), inserted AS (
    INSERT INTO chat_vectors (chat_id, key_id, space, embedding)
    SELECT chat_id, key_id, %(space)s, embedding FROM incoming
    ON CONFLICT (chat_id, space, key_id) DO NOTHING
    RETURNING key_id
), counted AS (
    INSERT INTO vector_counts AS v (key_id, space, dimensions, vectors)
    SELECT key_id, %(space)s, %(dimensions)s, count(*) FROM inserted GROUP BY key_id ORDER BY key_id
    ON CONFLICT (key_id, space) DO UPDATE SET vectors = v.vectors + excluded.vectors
)
DELETE FROM chat_vectors_pending p USING incoming i WHERE p.chat_id = i.chat_id
