-- Until the end of the transaction. In the order of the distances, and on past the first candidates where they do
-- not suffice.
SELECT set_config('hnsw.ef_search', %(ef_search)s::text, true), set_config('hnsw.iterative_scan', 'strict_order', true)
