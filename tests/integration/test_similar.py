"""Searches by meaning against an exact one in numpy, on every path: below the limit, with an index, and across."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from server.core.inbox import Inbox
from server.core.messages import Record
from server.core.registry import ModelSpec
from server.core.settings import Settings
from server.db.pool import Pool, connection, make_pool
from server.db.store import SimilarQuery, Store
from server.db.vector_index import BUILDING, Outgrown, VectorIndexes
from workers.vectors import Vectors

LIMIT = 500
"""Vectors that are searched exactly, here."""
DIMENSIONS = 48
RNG = np.random.default_rng(5)
CENTRES = RNG.normal(size=(40, DIMENSIONS))


def draw(count: int, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    """float32 (count, dimensions), L2-normalised, in clusters."""
    made = CENTRES[RNG.integers(40, size=count), :dimensions] + 0.5 * RNG.normal(size=(count, dimensions))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@dataclass
class Space:
    """A key's vectors in a space, in the database and here. `ids` are those of their chats."""

    store: Store
    key_id: int
    name: str = field(default_factory=lambda: f"space:{secrets.token_hex(4)}")
    vectors: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, DIMENSIONS), np.float32))
    ids: list[int] = field(default_factory=list)

    async def add(self, vectors: NDArray[np.float32]) -> None:
        for start in range(0, len(vectors), 500):
            part = vectors[start : start + 500]
            rows = await chats(self.store, self.key_id, len(part))
            await self.store.write_vectors(rows, self.name, part)
            self.ids += [row["id"] for row in rows]
        self.vectors = vectors if not len(self.vectors) else np.concatenate([self.vectors, vectors])

    async def found(self, query: NDArray[np.float32], limit: int = 10) -> list[int]:
        rows = await self.store.similar(self.key_id, SimilarQuery(self.name, query, limit, 0.0))
        similarities = [row["similarity"] for row in rows]
        assert similarities == sorted(similarities, reverse=True)
        return [row["id"] for row in rows]

    async def recall(self, limit: int = 10, queries: int = 50) -> float:
        """The share of the really nearest that a search brings, compared in the half precision they are kept in."""
        kept = self.vectors.astype(np.float16).astype(np.float32)
        hits = 0
        for query in draw(queries, self.vectors.shape[1]).astype(np.float16).astype(np.float32):
            nearest = np.argsort(-(kept @ query) / np.linalg.norm(kept, axis=1), kind="stable")[:limit]
            hits += len({self.ids[i] for i in nearest} & set(await self.found(query, limit)))
        return hits / (queries * limit)


async def chats(store: Store, key_id: int, count: int) -> list[dict[str, int]]:
    """Rows of `id, key_id` of new chats."""
    now, session = time.time(), secrets.token_hex(4)
    said = [{"role": "user", "content": "?"}]
    await store.write(
        [
            Record(secrets.token_hex(8), "chat", key_id, "m", "/chat", 1, 1, now, now, session, said, "stop")
            for _ in range(count)
        ]
    )
    async with connection(store._pool) as conn:
        query = "SELECT id, key_id FROM chats WHERE key_id = %s AND session_id = %s ORDER BY id"
        return await (await conn.execute(query, [key_id, session])).fetchall()


async def new_key(store: Store) -> int:
    made = await store.create_key("test", hashlib.sha256(secrets.token_bytes()).digest())
    assert made is not None
    return made


async def scans(pool: Pool, key: Outgrown) -> int:
    """How often the key's own index was searched."""
    async with connection(pool) as conn:
        await conn.execute("SELECT pg_stat_force_next_flush()")
        cursor = await conn.execute("SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = %s", [key.index])
        return sum(row["idx_scan"] for row in await cursor.fetchall())


async def oid(pool: Pool, key: Outgrown) -> int:
    async with connection(pool) as conn:
        cursor = await conn.execute("SELECT %s::regclass::oid AS oid", [key.index])
        return int((await cursor.fetchall())[0]["oid"])


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    """With a single connection, so that it knows what was searched in it."""
    made = make_pool(database_url, max_size=1)
    await made.open(wait=True)
    yield made
    await made.close()


@pytest.fixture
def indexes(pool: Pool) -> VectorIndexes:
    return VectorIndexes(pool, LIMIT)


@pytest.fixture
def space(store: Store, key_id: int) -> Space:
    return Space(store, key_id)


async def test_a_key_that_grows_across_the_limit_finds_the_same(
    space: Space, indexes: VectorIndexes, pool: Pool
) -> None:
    # Given a key at the limit: it is searched exactly, and asks for no index
    await space.add(draw(LIMIT))
    assert await space.recall() == 1
    assert await indexes.outgrown(space.name) == []
    # When it grows past it, it is still searched exactly until it has an index
    await space.add(draw(4 * LIMIT))
    (key,) = await indexes.outgrown(space.name)
    assert (key.key_id, key.dimensions, key.vectors) == (space.key_id, DIMENSIONS, 5 * LIMIT)
    assert await space.recall() == 1
    assert await scans(pool, key) == 0
    # Then the index is made, and searched
    assert await indexes.build(key)
    assert await indexes.outgrown(space.name) == []
    assert await space.recall() >= 0.97
    assert await scans(pool, key) >= 50
    # And what comes later is found in it too
    await space.add(draw(300))
    assert await space.recall() >= 0.97
    assert await space.recall(limit=100, queries=10) >= 0.97


async def test_indexed_keys_find_their_own_among_others(space: Space, indexes: VectorIndexes, store: Store) -> None:
    # Given two keys with an index each, one without, and one with three chats, all in the same space
    mine, other, small, tiny = space, *[Space(store, await new_key(store), space.name) for _ in range(3)]
    await mine.add(draw(3 * LIMIT))
    await other.add(draw(4 * LIMIT))
    await small.add(draw(LIMIT // 2))
    await tiny.add(draw(3))
    for key in await indexes.outgrown(space.name):
        assert await indexes.build(key)
    # Then each finds its own, whoever else is nearer
    for each in (mine, other):
        assert await each.recall() >= 0.97
    assert await small.recall() == 1
    # And one that asks for more than it has gets all of it
    assert sorted(await tiny.found(other.vectors[0], 100)) == tiny.ids
    assert sorted(await small.found(other.vectors[0], 1000)) == small.ids
    assert len(await mine.found(other.vectors[0], 1000)) == 1000


async def test_a_key_s_spaces_have_an_index_each(space: Space, indexes: VectorIndexes, store: Store) -> None:
    # Given the same chats in two spaces, of other dimensions, and in one of few vectors
    await space.add(draw(2 * LIMIT))
    short = Space(store, space.key_id, vectors=np.zeros((0, 16), np.float32))
    await short.add(draw(3 * LIMIT, 16))
    few = Space(store, space.key_id)
    await few.add(draw(20))
    for each in (space, short):
        (key,) = await indexes.outgrown(each.name)
        assert await indexes.build(key)
    # Then each is searched in its own
    assert await space.recall() >= 0.97
    assert await short.recall() >= 0.97
    assert await few.recall() == 1


async def test_with_an_index_too_zero_is_like_nothing_and_the_threshold_cuts(
    space: Space, indexes: VectorIndexes
) -> None:
    # Given an indexed key, with a vector without a direction before and after
    vectors = draw(2 * LIMIT)
    vectors[0] = 0
    await space.add(vectors)
    (key,) = await indexes.outgrown(space.name)
    await indexes.build(key)
    await space.add(np.zeros((1, DIMENSIONS), np.float32))
    # Then neither is found
    query = draw(1)[0]
    found = await space.found(query, 1000)
    assert not {space.ids[0], space.ids[-1]} & set(found)
    # And nothing below the threshold
    cosines = np.sort(vectors @ query)[::-1]
    threshold = float((cosines[4] + cosines[5]) / 2)
    rows = await space.store.similar(space.key_id, SimilarQuery(space.name, query, 100, threshold))
    assert len(rows) == 5
    assert [row["similarity"] for row in rows] == pytest.approx(cosines[:5], abs=2e-3)


async def test_an_index_that_was_cut_short_is_made_anew(space: Space, indexes: VectorIndexes, pool: Pool) -> None:
    # Given an index whose building was killed: it is there, not valid
    await space.add(draw(2 * LIMIT))
    (key,) = await indexes.outgrown(space.name)
    assert await indexes.build(key)
    async with connection(pool) as conn:
        await conn.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", [key.index])
        await conn.execute("UPDATE vector_counts SET indexed = false WHERE space = %s", [space.name])
    # When it is built again, then it is whole
    assert await indexes.build(key)
    async with connection(pool) as conn:
        cursor = await conn.execute("SELECT indisvalid FROM pg_index WHERE indexrelid = %s::regclass", [key.index])
        assert [row["indisvalid"] for row in await cursor.fetchall()] == [True]
    # And a whole one without its mark is not built again
    before = await oid(pool, key)
    async with connection(pool) as conn:
        await conn.execute("UPDATE vector_counts SET indexed = false WHERE space = %s", [space.name])
    assert await indexes.build(key)
    assert await oid(pool, key) == before
    assert await indexes.outgrown(space.name) == []
    assert await space.recall() >= 0.97


async def test_the_archivist_makes_the_index_one_at_a_time(
    space: Space, indexes: VectorIndexes, settings: Settings, store: Store, pool: Pool
) -> None:
    # Given a model whose space a key has outgrown, while another archivist builds
    model = ModelSpec(id="outgrown", name="o", type="embedding", source="./none", context_length=16)
    space.name = model.vector_space
    await space.add(draw(2 * LIMIT))
    (key,) = await indexes.outgrown(space.name)
    inbox = Inbox(settings.amqp_url, "test", [], 1)
    async with await psycopg.AsyncConnection.connect(settings.database_url) as another:
        await another.execute("SELECT pg_advisory_lock(%s)", [BUILDING])
        assert not await indexes.build(key)
    # When the archivist looks
    looking = asyncio.create_task(Vectors(model, store, indexes, inbox).index_all())
    # Then the key gets it
    async with asyncio.timeout(20):
        while await indexes.outgrown(space.name):
            await asyncio.sleep(0.05)
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    await space.recall()
    assert await scans(pool, key) > 0
