-- Chats without a vector of this model (it was changed in models.yaml) wait for one again.
INSERT INTO chat_vectors_pending (chat_id)
SELECT c.id FROM chats c
WHERE NOT EXISTS (SELECT FROM chat_vectors v WHERE v.chat_id = c.id AND v.model = %(model)s)
ON CONFLICT DO NOTHING
