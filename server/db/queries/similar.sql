-- Exact search over one key's vectors. The threshold stands outside: inside, it could meet vectors of
-- another model's dimensions. Opposites count as unlike, so that a threshold of 0 leaves nothing out.
SELECT c.id, c.session_id, c.messages, c.created_at, nearest.similarity
FROM (
    SELECT chat_id, embedding <=> %(query)s::halfvec AS distance,
           greatest(0, least(1, 1 - (embedding <=> %(query)s::halfvec))) AS similarity
    FROM chat_vectors
    WHERE key_id = %(key_id)s AND model = %(model)s AND dimensions = %(dimensions)s
    ORDER BY distance
    LIMIT %(limit)s
) nearest JOIN chats c ON c.id = nearest.chat_id
WHERE nearest.similarity >= %(threshold)s
ORDER BY nearest.distance, c.id DESC
