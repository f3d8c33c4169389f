-- Exact search over one key's vectors. The threshold stands outside: inside, it could meet vectors of
-- another model's dimensions.
SELECT c.id, c.session_id, c.messages, c.created_at,
       greatest(0, least(1, 1 - nearest.distance)) AS similarity
FROM (
    SELECT chat_id, embedding <=> %(query)s::halfvec AS distance
    FROM chat_vectors
    WHERE key_id = %(key_id)s AND model = %(model)s AND dimensions = %(dimensions)s
    ORDER BY distance
    LIMIT %(limit)s
) nearest JOIN chats c ON c.id = nearest.chat_id
WHERE 1 - nearest.distance >= %(threshold)s
ORDER BY nearest.distance, c.id DESC
