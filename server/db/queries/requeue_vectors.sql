-- The first time a space is met (the model was changed), every chat waits for a vector in it.
WITH met AS (
    INSERT INTO vector_spaces (space) VALUES (%(space)s) ON CONFLICT DO NOTHING RETURNING space
)
INSERT INTO chat_vectors_pending (chat_id)
SELECT c.id FROM chats c, met
ON CONFLICT DO NOTHING
