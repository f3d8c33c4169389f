"""Keys and their rates over a real database: what is cached, who is told of a change, what is counted."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import conninfo

from server import keys
from server.core.errors import DatabaseUnavailable, RecordRefused
from server.db.listen import listen
from server.db.outage import Outage
from server.db.pool import Pool, make_pool, migrate
from server.db.store import KeyRow, Row, Store
from server.keys import CHANNEL, KeyCache
from server.rate import RateLimiter
from tests.integration.test_amqp import until


class WatchedStore:
    """The real store; counts what it is asked, and can be cut off from its database."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.lookups = self.counts = 0
        self.down = False
        self.before_answer: Callable[[], Any] | None = None

    async def ping(self) -> None:
        if self.down:
            raise DatabaseUnavailable("cut off")

    async def find_key(self, hash_: bytes) -> KeyRow | None:
        self.lookups += 1
        if self.down:
            raise DatabaseUnavailable("cut off")
        row = await self._store.find_key(hash_)
        if self.before_answer is not None:
            await self.before_answer()
        return row

    async def count_requests(self, requests: dict[int, int]) -> list[Row]:
        self.counts += 1
        if self.down:
            raise DatabaseUnavailable("cut off")
        return await self._store.count_requests(requests)


@dataclass
class Key:
    id: int
    hash: bytes


@pytest.fixture
async def key(store: Store) -> Key:
    hash_ = secrets.token_bytes(32)
    made = await store.create_key("test", hash_)
    assert made is not None
    return Key(made, hash_)


@pytest.fixture
def watched(store: Store) -> WatchedStore:
    return WatchedStore(store)


class Heard(KeyCache):
    """A cache that says whether it listens, and how often it was told of a change."""

    listening = False
    told = 0

    def on_listening(self) -> None:
        super().on_listening()
        self.listening = True

    def on_lost(self) -> None:
        super().on_lost()
        self.listening = False

    def on_notified(self, payload: str) -> None:
        super().on_notified(payload)
        self.told += 1


@asynccontextmanager
async def listening(watched: WatchedStore, url: str) -> AsyncIterator[Heard]:
    cache = Heard(watched, Outage(watched.ping))  # type: ignore[arg-type]
    task = asyncio.create_task(listen(url, CHANNEL, cache))
    await until(lambda: cache.listening)
    yield cache
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not cache.listening


@pytest.fixture
async def cache(watched: WatchedStore, database_url: str) -> AsyncIterator[Heard]:
    async with listening(watched, database_url) as made:
        yield made


async def end_listeners(pool: Pool) -> None:
    """End every connection that listens, as an administrator would."""
    async with pool.connection() as conn:
        await conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'listen api_keys'"
        )


async def valid(cache: KeyCache, key: Key) -> bool:
    row = await cache.find(key.hash)
    assert row is not None
    return row.revoked_at is None


async def test_a_key_is_asked_for_once(cache: Heard, watched: WatchedStore, key: Key) -> None:
    assert all([await valid(cache, key) for _ in range(10)])
    assert watched.lookups == 1


async def test_a_revoked_key_is_forgotten_at_once_and_no_other(
    cache: Heard, watched: WatchedStore, store: Store, key: Key, key_id: int
) -> None:
    # Given two keys in use
    other = Key(key_id, b"")
    async with store._pool.connection() as conn:
        row = await (await conn.execute("SELECT hash FROM api_keys WHERE id = %s", [key_id])).fetchone()
    assert row is not None
    other.hash = row["hash"]
    assert await valid(cache, key)
    assert await valid(cache, other)
    # When one is revoked
    await store.revoke_key(key.id)
    await until(lambda: cache.told == 1)
    # Then it is known, and the other was not asked for again
    asked = watched.lookups
    assert not await valid(cache, key)
    assert await valid(cache, other)
    assert watched.lookups == asked + 1


async def test_a_key_that_is_deleted_by_hand_is_forgotten(cache: Heard, pool: Pool, key: Key) -> None:
    assert await valid(cache, key)
    async with pool.connection() as conn:
        await conn.execute("DELETE FROM api_keys WHERE id = %s", [key.id])
    await until(lambda: cache.told == 1)
    assert await cache.find(key.hash) is None


async def test_all_keys_are_forgotten_when_they_are_truncated(pool: Pool, database_url: str) -> None:
    # Given a database of its own, and a key in it that is in use
    async with pool.connection() as conn:
        await conn.execute("CREATE DATABASE truncated")
    url = conninfo.make_conninfo(database_url, dbname="truncated")
    migrate(database_url.replace("/postgres?", "/truncated?"))
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        hash_ = secrets.token_bytes(32)
        await conn.execute("INSERT INTO api_keys (name, hash) VALUES ('k', %s)", [hash_])
        own = make_pool(url, max_size=1)
        await own.open(wait=True)
        async with listening(WatchedStore(Store(own)), url) as cache:
            assert await cache.find(hash_) is not None
            # When the table is emptied
            await conn.execute("TRUNCATE api_keys CASCADE")
            await until(lambda: cache.told == 1)
            # Then the key is unknown
            assert await cache.find(hash_) is None
        await own.close()


async def test_an_unknown_key_is_asked_for_each_time_and_let_in_once_it_is_made(
    cache: Heard, watched: WatchedStore, store: Store
) -> None:
    hash_ = secrets.token_bytes(32)
    for _ in range(3):
        assert await cache.find(hash_) is None
    assert watched.lookups == 3
    # And nothing is kept of it
    assert not cache._kept
    await store.create_key("new", hash_)
    assert await cache.find(hash_) is not None


async def test_a_weight_counts_as_soon_as_it_is_given(cache: Heard, store: Store, key: Key) -> None:
    # Given a key with the weight that keys have unless told otherwise
    async def weight() -> int:
        row = await cache.find(key.hash)
        assert row is not None
        return row.weight

    assert await weight() == 1
    # When it is given another, then whoever had it cached is told
    assert await store.weigh_key(key.id, 3)
    await until(lambda: cache.told == 1)
    assert await weight() == 3
    # And no key has none, or all the turns
    for wrong in (0, 101):
        with pytest.raises(RecordRefused):
            await store.weigh_key(key.id, wrong)
    assert not await store.weigh_key(2**40, 2)
    heavy = await store.create_key("heavy", hash_ := secrets.token_bytes(32), weight=5)
    row = await store.find_key(hash_)
    assert row is not None
    assert (row.id, row.weight) == (heavy, 5)


async def test_a_revocation_while_the_listener_is_cut_off_is_not_missed(
    cache: Heard, watched: WatchedStore, store: Store, pool: Pool, key: Key
) -> None:
    assert await valid(cache, key)
    # When the listening connection is ended, and the key revoked before there is another
    await end_listeners(pool)
    await until(lambda: not cache.listening)
    await store.revoke_key(key.id)
    # Then it is refused while nobody listens, and once somebody does again, who was never told of it
    assert not await valid(cache, key)
    await until(lambda: cache.listening)
    assert cache.told == 0
    assert not await valid(cache, key)


async def test_what_was_known_before_a_gap_is_asked_for_again_after_it(
    cache: Heard, watched: WatchedStore, store: Store, pool: Pool, key: Key
) -> None:
    # Given a key that nobody uses while the listener is cut off
    assert await valid(cache, key)
    await end_listeners(pool)
    await until(lambda: not cache.listening)
    await store.revoke_key(key.id)
    await until(lambda: cache.listening)
    # Then its first use after that is refused
    assert cache.told == 0
    assert not await valid(cache, key)


async def test_an_answer_older_than_a_change_is_not_kept(
    cache: Heard, watched: WatchedStore, store: Store, key: Key
) -> None:
    # Given a lookup that has read the key as valid, and is overtaken by its revocation
    async def revoke() -> None:
        await store.revoke_key(key.id)
        await until(lambda: cache.told == 1)

    watched.before_answer = revoke
    await cache.find(key.hash)
    watched.before_answer = None
    # Then the next request is refused
    assert not await valid(cache, key)


async def test_a_key_is_not_trusted_for_ever(
    cache: Heard, watched: WatchedStore, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given that the notifications of a connection that seems well never come
    assert await valid(cache, key)
    monkeypatch.setattr(keys, "CONFIRMED_FOR_S", 0.0)
    assert await valid(cache, key)
    assert watched.lookups == 2


async def test_keys_in_use_are_let_in_while_the_database_is_down(
    cache: Heard, watched: WatchedStore, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a key in use, and a database that is gone
    assert await valid(cache, key)
    cache.on_lost()
    watched.down = True
    # Then the key is let in, and the database is asked once in a while only
    assert await valid(cache, key)
    assert await valid(cache, key)
    assert watched.lookups == 2
    # And no other, of which it is not asked either
    with pytest.raises(DatabaseUnavailable):
        await cache.find(secrets.token_bytes(32))
    assert watched.lookups == 2
    # And not for ever
    monkeypatch.setattr(keys, "GRACE_S", 0.0)
    with pytest.raises(DatabaseUnavailable):
        await cache.find(key.hash)


async def test_wrong_keys_and_many_keys_fill_nothing(
    cache: Heard, store: Store, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_KEYS", 3)
    for index in range(6):
        hash_ = secrets.token_bytes(32)
        await store.create_key(f"k{index}", hash_)
        await cache.find(hash_)
        await cache.find(secrets.token_bytes(32))
    assert len(cache._kept) == 3


def rate_limiter(store: Store | WatchedStore, limit: int) -> RateLimiter:
    return RateLimiter(store, limit, Outage(store.ping))  # type: ignore[arg-type]


async def beginning_of_a_minute() -> None:
    if time.time() % 60 > 50:
        await asyncio.sleep(60 - time.time() % 60)


async def test_every_request_is_counted_once_by_all_servers_together(
    watched: WatchedStore, store: Store, key: Key, key_id: int
) -> None:
    await beginning_of_a_minute()
    # Given two servers' limiters, and two keys
    one, two = rate_limiter(watched, 50), rate_limiter(store, 50)
    # When many requests of both come at once
    asked = [limiter.count(id_) for _ in range(20) for limiter in (one, two) for id_ in (key.id, key_id)]
    states = await asyncio.gather(*asked)
    # Then each has its own place in its key's count
    for turn in (0, 1):
        counted = [state.requests for state in states[turn::2] if state is not None]
        assert sorted(counted) == list(range(1, 41))
    assert {state.remaining for state in states if state is not None} == set(range(10, 50))
    # And many were counted by one statement
    assert watched.counts < 10
    # And a minute's end is told
    assert all(state is not None and time.time() < state.reset_at <= time.time() + 61 for state in states)


async def test_a_new_minute_begins_at_one(store: Store, pool: Pool, key: Key) -> None:
    limiter = rate_limiter(store, 50)
    for _ in range(3):
        await limiter.count(key.id)
    async with pool.connection() as conn:
        await conn.execute("UPDATE rate_windows SET minute = minute - interval '1 min' WHERE key_id = %s", [key.id])
    state = await limiter.count(key.id)
    assert state is not None
    assert state.requests == 1


async def test_a_statement_of_the_minute_before_takes_nothing_back(store: Store, pool: Pool, key: Key) -> None:
    # Given a count that another server has begun in the next minute already
    limiter = rate_limiter(store, 50)
    await limiter.count(key.id)
    async with pool.connection() as conn:
        await conn.execute("UPDATE rate_windows SET minute = minute + interval '1 min' WHERE key_id = %s", [key.id])
    state = await limiter.count(key.id)
    assert state is not None
    assert state.requests == 2


async def test_a_revoked_key_is_not_counted(store: Store, key: Key) -> None:
    limiter = rate_limiter(store, 50)
    assert await limiter.count(key.id) is not None
    await store.revoke_key(key.id)
    assert await limiter.count(key.id) is None
    assert await limiter.count(10**12) is None


async def test_a_request_that_leaves_takes_no_others_count(store: Store, key: Key) -> None:
    await beginning_of_a_minute()
    limiter = rate_limiter(store, 50)
    leaving = asyncio.create_task(limiter.count(key.id))
    staying = asyncio.create_task(limiter.count(key.id))
    await asyncio.sleep(0)
    leaving.cancel()
    state = await staying
    assert state is not None
    assert state.requests == 2
    assert await limiter.count(key.id) is not None


async def test_without_a_database_each_server_counts_for_itself(
    watched: WatchedStore, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    await beginning_of_a_minute()
    limiter = rate_limiter(watched, 2)
    watched.down = True
    states = [await limiter.count(key.id) for _ in range(3)]
    assert [state.requests for state in states if state is not None] == [1, 2, 3]
    # And the database is not asked with each request
    assert watched.counts == 1
    # When it is back, that is noticed, and it counts again
    watched.down = False
    await until(lambda: limiter._outage._looking is None)
    state = await limiter.count(key.id)
    assert state is not None
    assert state.requests == 1
