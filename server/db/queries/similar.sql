-- Exact search over one key's vectors in one space. Each distance is computed once: what is made of it, and what is
-- left out for it, comes after the LIMIT. A zero vector has no direction and is like nothing; its distance is NaN,
-- which sorts last. Opposites count as unlike, so that a threshold of 0 leaves nothing else out.
SELECT c.id, c.session_id, c.messages, c.created_at, nearest.similarity
FROM (
    SELECT chat_id, distance, greatest(0, least(1, 1 - distance)) AS similarity
    FROM (
        SELECT chat_id, embedding <=> %(query)b::halfvec AS distance
        FROM chat_vectors
        WHERE key_id = %(key_id)s AND space = %(space)s
        ORDER BY distance
        LIMIT %(limit)s
    ) measured
    WHERE distance <> 'NaN'
) nearest JOIN chats c ON c.id = nearest.chat_id
WHERE nearest.similarity >= %(threshold)s
ORDER BY nearest.distance, c.id DESC
