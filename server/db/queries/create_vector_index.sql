-- A statement of definition takes no parameters: these are literals, quoted by the driver. Writes go on meanwhile.
CREATE INDEX CONCURRENTLY {name} ON {part} USING hnsw ((embedding::halfvec({dimensions})) halfvec_cosine_ops)
WHERE key_id = {key_id} AND space = {space}
