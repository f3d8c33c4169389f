-- Every chat without a vector in this space waits for one: those of the time of another model, and those that another
-- archivist took for its own model meanwhile.
INSERT INTO chat_vectors_pending (chat_id)
SELECT c.id FROM chats c
WHERE NOT EXISTS (SELECT FROM chat_vectors v WHERE v.chat_id = c.id AND v.space = %(space)s)
ON CONFLICT DO NOTHING
