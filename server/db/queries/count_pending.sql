SELECT count(*) FROM (SELECT FROM chat_vectors_pending LIMIT 10000) AS waiting
