-- For as long as the connection lasts. Where compiling is on, as in a Postgres of somebody's own, it takes longer than
-- any statement here. Searches of an index go on past their first candidates where those do not suffice.
SELECT set_config('jit', 'off', false),
       set_config('hnsw.ef_search', '400', false),
       set_config('hnsw.iterative_scan', 'strict_order', false)
