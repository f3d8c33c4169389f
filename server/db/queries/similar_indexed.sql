-- The same over the key's own HNSW index, which holds nothing but its vectors in this space: the condition is the
-- index's, word for word, and filters nothing. Zero vectors are not in it.
SELECT c.id, c.session_id, c.messages, c.created_at, nearest.similarity
FROM (
    SELECT chat_id, distance, greatest(0, least(1, 1 - distance)) AS similarity
    FROM (
        SELECT chat_id, embedding::halfvec({dimensions}) <=> %(query)b::halfvec({dimensions}) AS distance
        FROM chat_vectors
        WHERE key_id = %(key_id)s AND space = %(space)s
        ORDER BY distance
        LIMIT %(limit)s
    ) measured
    WHERE distance <> 'NaN'
) nearest JOIN chats c ON c.id = nearest.chat_id
WHERE nearest.similarity >= %(threshold)s
ORDER BY nearest.distance, c.id DESC
