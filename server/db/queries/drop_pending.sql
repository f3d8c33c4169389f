-- A chat whose text the model will never take.
DELETE FROM chat_vectors_pending WHERE chat_id = %(chat_id)s
