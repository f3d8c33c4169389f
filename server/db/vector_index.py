"""An HNSW index for a key whose chats have become too many to be searched exactly.

One a key and space, partial, made here while the service runs, rather than one over all vectors:
- a key below the limit costs nothing: no graph to insert into, no graph to search;
- a search in it sees the key's own vectors alone, where one in an index of all would have to wade through everybody
  else's, and in the end find fewer than it was asked for;
- spaces differ in their dimensions, which an index has to fix.
The price: a statement that defines, at run time, by a role that owns the table; and searches that are planned with
the key in sight (`prepare=False`), because a prepared plan could not know which index holds this key.
"""

import hashlib
import logging
import time
from dataclasses import dataclass

from psycopg import sql

from server.db.pool import Connection, Pool, connection, load_queries

logger = logging.getLogger(__name__)

EXACT_LIMIT = 5_000
"""Vectors of one key that are searched exactly. Of 1,024 dimensions that many take as long as a search of the index
(7 ms on one core of a Xeon, all in memory), which hardly grows with their number: see benchmarks/similar.py."""
MAX_DIMENSIONS = 4000
"""What pgvector indexes of `halfvec`."""
BUILDING = 0x76656374
"""The advisory lock of whoever builds: one index at a time, whatever the number of archivists."""


@dataclass(frozen=True, slots=True)
class Outgrown:
    """A key with `vectors` vectors in a space, more than are searched exactly, and no index yet."""

    key_id: int
    space: str
    dimensions: int
    vectors: int

    @property
    def index(self) -> str:
        return f"chat_vectors_{self.key_id}_{hashlib.sha256(self.space.encode()).hexdigest()[:8]}"


class VectorIndexes:
    """`parallel`: processes that help to build. None by default: who builds has time, who waits for an answer has
    not; and they share memory in /dev/shm, of which containers have little."""

    def __init__(self, pool: Pool, exact_limit: int = EXACT_LIMIT, parallel: int = 0) -> None:
        self._pool = pool
        self._exact_limit = exact_limit
        self._parallel = parallel
        self._queries = load_queries()

    async def outgrown(self, space: str) -> list[Outgrown]:
        """The keys that wait for an index, the largest first. Raises DatabaseUnavailable."""
        parameters = {"space": space, "limit": self._exact_limit, "max_dimensions": MAX_DIMENSIONS}
        async with connection(self._pool) as conn:
            rows = await (await conn.execute(self._queries["outgrown"], parameters)).fetchall()
        return [Outgrown(**row) for row in rows]

    async def build(self, key: Outgrown) -> bool:
        """Make the key's index, which takes some seconds for 5,000 vectors; writes go on meanwhile.

        False where another archivist is building. Raises DatabaseUnavailable.
        """
        began = time.monotonic()
        where = {"key_id": key.key_id, "space": key.space}
        async with connection(self._pool) as conn:
            cursor = await conn.execute("SELECT pg_try_advisory_lock(%s) AS mine", [BUILDING])
            if not (await cursor.fetchall())[0]["mine"]:
                return False
            try:
                if not await self._is_there(conn, key):
                    rows = await (await conn.execute(self._queries["part_of_key"], where)).fetchall()
                    await conn.execute("SET statement_timeout = 0")
                    await conn.execute(f"SET max_parallel_maintenance_workers = {self._parallel}")
                    await conn.execute(self._definition(key, rows[0]["part"]))
                await conn.execute(self._queries["mark_indexed"], where)
            finally:
                await conn.execute("RESET statement_timeout")
                await conn.execute("RESET max_parallel_maintenance_workers")
                await conn.execute("SELECT pg_advisory_unlock(%s)", [BUILDING])
        took_s = round(time.monotonic() - began, 1)
        logger.info("index built", extra={"action": "index", "vectors": key.vectors, "took_s": took_s})
        return True

    async def _is_there(self, conn: Connection, key: Outgrown) -> bool:
        """Whether the index is there already, and only lacks its mark. One that was cut short is removed."""
        rows = await (await conn.execute(self._queries["index_state"], {"name": key.index})).fetchall()
        if rows and not rows[0]["indisvalid"]:
            await conn.execute(sql.SQL("DROP INDEX CONCURRENTLY {}").format(sql.Identifier(key.index)))
            return False
        return bool(rows)

    def _definition(self, key: Outgrown, part: str) -> sql.Composed:
        return sql.SQL(self._queries["create_vector_index"].decode()).format(
            name=sql.Identifier(key.index),
            part=sql.Identifier(part),
            dimensions=sql.Literal(key.dimensions),
            key_id=sql.Literal(key.key_id),
            space=sql.Literal(key.space),
        )
