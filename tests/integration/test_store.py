"""The store against a real Postgres: what is kept once, counted once, and seen by its own key only."""

import asyncio
import hashlib
import secrets
import time
from dataclasses import replace

import numpy as np
import pytest

from server.core.errors import DatabaseUnavailable, RecordRefused
from server.core.messages import Record
from server.db.pool import Pool, connection, make_pool, migrate
from server.db.store import HistoryFilter, SimilarQuery, Store

ALL = HistoryFilter(limit=100, offset=0)


def chat(key_id: int, **fields: object) -> Record:
    now = time.time()
    made = Record(
        request_id=secrets.token_hex(8),
        type="chat",
        key_id=key_id,
        model="m",
        endpoint="/chat",
        prompt_tokens=3,
        completion_tokens=4,
        created_at=now,
        finished_at=now,
        session_id="s",
        messages=[{"role": "user", "content": "hello"}],
        finish_reason="stop",
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def embedding(key_id: int, **fields: object) -> Record:
    return chat(key_id, **{"type": "embedding", "completion_tokens": 0, "messages": [], "finish_reason": "", **fields})


def test_migrating_twice_changes_nothing(database_url: str) -> None:
    assert migrate(database_url) == []


async def test_a_record_delivered_again_counts_once(store: Store, key_id: int) -> None:
    # Given three records, one of them twice in the same batch
    first, second = chat(key_id), chat(key_id, session_id="t")
    records = [first, second, first, embedding(key_id, model="e", texts=2)]
    # When the batch is written twice, and at the same time
    written = await asyncio.gather(store.write(records), store.write(records))
    # Then each is there once, in history and in every sum
    assert sum(written) == 3
    assert len(await store.history(key_id, ALL)) == 2
    assert await store.count_sessions(key_id) == 2
    rows = {row["type"]: row for row in await store.usage(key_id)}
    assert (rows["chat"]["requests"], rows["chat"]["prompt_tokens"], rows["chat"]["completion_tokens"]) == (2, 6, 8)
    assert (rows["embedding"]["requests"], rows["embedding"]["texts"]) == (1, 2)


async def test_sessions_and_days_add_up(store: Store, key_id: int) -> None:
    now = time.time()
    await store.write([chat(key_id, created_at=now - 400 * 86400), chat(key_id, created_at=now)])
    await store.write([chat(key_id, created_at=now)])
    (row,) = await store.usage(key_id)
    assert (row["requests"], row["requests_today"], row["requests_this_month"]) == (3, 2, 2)
    (session,) = await store.sessions(key_id, 10, 0)
    assert session["chats"] == 3
    assert (session["updated_at"] - session["created_at"]).days == 400


async def test_text_comes_back_as_it_was(store: Store, key_id: int) -> None:
    text = "NUL \x00, quote ' \" \\ \\u0000, 😀, \u202e, line\nbreak"
    await store.write([chat(key_id, messages=[{"role": "user", "content": text}])])
    (row,) = await store.history(key_id, ALL)
    assert row["messages"] == [{"role": "user", "content": text}]


async def test_similar_is_exact_ordered_and_the_keys_own(store: Store, key_id: int) -> None:
    # Given 300 chats of one key with random vectors, another key's chat that is nearer than all of them,
    # vectors in other spaces, of other dimensions too, and one without a direction
    rng = np.random.default_rng(0)
    await store.write([chat(key_id) for _ in range(300)])
    rows = await store.history(key_id, HistoryFilter(limit=300, offset=0))
    rows = [{"id": row["id"], "key_id": key_id} for row in rows]
    vectors = rng.normal(size=(300, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    await store.write_vectors(rows, "e", vectors)
    query = vectors[7] + 0.1 * vectors[8]
    query /= np.linalg.norm(query)
    stranger = await store.create_key("other", hashlib.sha256(secrets.token_bytes()).digest())
    assert stranger is not None
    await store.write([chat(stranger)])
    (foreign,) = await store.history(stranger, ALL)
    await store.write_vectors([{"id": foreign["id"], "key_id": stranger}], "e", query[None])
    await store.write_vectors(rows[:5], "another", np.tile(query, (5, 1)))
    await store.write_vectors(rows[5:9], "short", np.eye(4, 32, dtype=np.float32))
    await store.write([chat(key_id, session_id="zero")])
    (zero,) = await store.history(key_id, HistoryFilter(limit=1, offset=0, session_id="zero"))
    await store.write_vectors([{"id": zero["id"], "key_id": key_id}], "e", np.zeros((1, 64), dtype=np.float32))
    # When the key searches
    found = await store.similar(key_id, SimilarQuery("e", query, 10, 0.0))
    # Then it gets the ten that an exact search over its own gets, with the cosine (half precision)
    cosines = vectors @ query
    best = np.argsort(-cosines)[:10]
    assert [row["id"] for row in found] == [rows[i]["id"] for i in best]
    assert [row["similarity"] for row in found] == pytest.approx(cosines[best], abs=2e-3)
    # The one without a direction is like nothing, though everything else is listed
    assert len(await store.similar(key_id, SimilarQuery("e", query, 1000, 0.0))) == 300
    # And the threshold cuts
    threshold = float((cosines[best[2]] + cosines[best[3]]) / 2)
    assert len(await store.similar(key_id, SimilarQuery("e", query, 10, threshold))) == 3


async def test_pending_vectors_are_the_chats_without_one(store: Store, key_id: int) -> None:
    await store.write([chat(key_id), chat(key_id)])
    mine = [row for row in await store.pending_chats(1000) if row["key_id"] == key_id]
    assert len(mine) == 2
    await store.write_vectors(mine, "e", np.eye(2, 8, dtype=np.float32))
    assert not [row for row in await store.pending_chats(1000) if row["key_id"] == key_id]
    # Another model's vectors are wanted as well, of each chat once
    space = secrets.token_hex(4)
    assert await store.requeue_vectors(space) >= 2
    assert len([row for row in await store.pending_chats(1000) if row["key_id"] == key_id]) == 2
    assert await store.requeue_vectors(space) == 0
    # One that will never have a vector is left out
    await store.drop_pending(mine[0]["id"])
    assert len([row for row in await store.pending_chats(1000) if row["key_id"] == key_id]) == 1
    # And when the first model is back, what was said in the time of the other
    await store.write_vectors(mine, space, np.eye(2, 8, dtype=np.float32))
    await store.write([chat(key_id)])
    (new,) = [row for row in await store.pending_chats(1000) if row["key_id"] == key_id]
    await store.write_vectors([new], space, np.eye(1, 8, dtype=np.float32))
    await store.requeue_vectors("e")
    assert [row for row in await store.pending_chats(1000) if row["key_id"] == key_id] == [new]


async def test_data_that_postgres_refuses_is_told_apart_from_a_failure(store: Store, key_id: int) -> None:
    with pytest.raises(RecordRefused, match="ForeignKeyViolation"):
        await store.write([chat(key_id), chat(10**12)])
    with pytest.raises(RecordRefused):
        await store.write([chat(key_id, model="a\x00b")])
    assert await store.history(key_id, ALL) == []


async def test_a_connection_that_was_ended_is_replaced_unseen(database_url: str, pool: Pool) -> None:
    # Given a store with one connection, which Postgres ends while nobody uses it
    own = make_pool(database_url, max_size=1)
    await own.open(wait=True)
    async with own.connection() as conn:
        row = await (await conn.execute("SELECT pg_backend_pid() AS pid")).fetchone()
    assert row is not None
    async with pool.connection() as conn:
        await conn.execute("SELECT pg_terminate_backend(%s)", [row["pid"]])
    await asyncio.sleep(0.2)
    # When the store is asked, then it answers, over another
    assert await Store(own).list_keys() is not None
    async with own.connection() as conn:
        now = await (await conn.execute("SELECT pg_backend_pid() AS pid")).fetchone()
    assert now is not None
    assert now["pid"] != row["pid"]
    await own.close()


async def test_a_database_that_is_not_there_is_an_error_of_ours() -> None:
    pool = make_pool("postgresql://nobody@127.0.0.1:1/none")
    await pool.open(wait=False)
    with pytest.raises(DatabaseUnavailable, match="database is not reachable"):
        await Store(pool).ping()
    assert not await Store(pool).answers()
    await pool.close()
    with pytest.raises(DatabaseUnavailable):
        migrate("postgresql://nobody@127.0.0.1:1/none")


async def test_no_page_of_history_reads_more_than_it_shows(database_url: str, store: Store, key_id: int) -> None:
    # Given a key with many chats, of which an old session and a rare model have few
    rare = [chat(key_id, session_id="old", model="m" if index else "rare") for index in range(4)]
    await store.write([*rare, *(chat(key_id, session_id=f"s{index % 50}") for index in range(4000))])
    pool = make_pool(database_url, max_size=1)  # one connection, so that it knows what was read in it
    await pool.open(wait=True)
    async with connection(pool) as conn:
        # And most others with a single one: a plan made for any key then expects that
        new = "INSERT INTO api_keys (name, hash) SELECT 'one', sha256(random()::text::bytea)"
        keys = await (await conn.execute(f"{new} FROM generate_series(1, 3000) RETURNING id")).fetchall()
    await store.write([chat(row["id"], session_id="old", model="rare") for row in keys])
    async with connection(pool) as conn:
        await conn.execute("ANALYZE chats")
    filters = [HistoryFilter(20, 0), HistoryFilter(20, 0, session_id="old"), HistoryFilter(20, 0, model="rare")]
    for filter_, shown in zip([*filters, HistoryFilter(20, 0, "rare", "old")], (20, 4, 1, 1), strict=True):
        # When a page is asked for often enough for its statement to be prepared, and planned for any filter
        before = await rows_read(pool)
        for _ in range(20):
            assert len(await Store(pool).history(key_id, filter_)) == shown
        # Then the rows read are those shown; by model within a session, at the most the session's
        assert await rows_read(pool) - before <= 20 * max(shown, 4)
    await pool.close()


async def rows_read(pool: Pool) -> int:
    """Rows of chats that were fetched so far, by a scan of the table or of an index."""
    async with connection(pool) as conn:
        await conn.execute("SELECT pg_stat_force_next_flush()")
        query = "SELECT seq_tup_read + idx_tup_fetch AS rows FROM pg_stat_user_tables WHERE relname = 'chats'"
        return int((await (await conn.execute(query)).fetchall())[0]["rows"])


async def test_many_texts_are_several_rows_and_one_request(store: Store, key_id: int) -> None:
    # Given a request of two jobs, the smaller of which is written first
    request_id = secrets.token_hex(16)
    ids = [f"{request_id}-again", request_id, f"{request_id}.1"]
    await store.write([embedding(key_id, request_id=f"{request_id}.1", texts=44, prompt_tokens=44)])
    row = await store.find_request(key_id, ids)
    assert row is not None
    assert (row["request_id"], row["texts"], row["prompt_tokens"]) == (f"{request_id}.1", 44, 44)
    # When both are; then it is found as one
    await store.write([embedding(key_id, request_id=request_id, texts=256, prompt_tokens=300)])
    row = await store.find_request(key_id, ids)
    assert row is not None
    assert (row["request_id"], row["texts"], row["prompt_tokens"]) == (request_id, 300, 344)
    assert (row["messages"], row["finish_reason"], row["endpoint"]) == (None, "", "/embeddings")
    assert await store.find_request(key_id + 1, ids) is None
