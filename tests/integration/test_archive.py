"""The archivist over a real broker and database, with an embedding model that is no model."""

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator

import numpy as np
import psycopg
import pytest

from server.core import topology
from server.core.amqp import AmqpLink, Delivery
from server.core.messages import EmbeddingResult, Frame, Job, Record, decode, encode, encode_embeddings, encode_frames
from server.core.registry import ModelSpec, Registry
from server.core.settings import Settings
from server.db.store import HistoryFilter, SimilarQuery, Store
from tests.integration.test_amqp import until
from workers.archive import BATCH, Archivist

MODEL = ModelSpec(id="fake-embedding", name="Fake", type="embedding", source="./none", context_length=16)
ALL = HistoryFilter(limit=100, offset=0)


@pytest.fixture
async def publisher(settings: Settings) -> AsyncIterator[AmqpLink]:
    """Where records are published; it also embeds, each text as its length says."""

    def embed(delivery: Delivery) -> None:
        job = decode(Job, delivery.body)
        rows = [np.eye(16, dtype="<f4")[len(text) % 16] for text in job.body["input"]]
        result = EmbeddingResult(MODEL.id, 16, len(rows), np.stack(rows).tobytes())
        link.send(job.reply_to, encode_frames([Frame(job.id, "run", 0, "result", encode_embeddings(result))]))
        link.ack(delivery)

    async def setup(own: AmqpLink) -> None:
        await own.declare_queue(topology.HISTORY)
        await own.declare_queue(topology.DEAD)
        await own.declare_jobs(MODEL.id, settings.queue_max_jobs)
        await own.consume(topology.jobs_queue(MODEL.id, "batch"), embed, prefetch=4)

    link = AmqpLink(settings.amqp_url, "test", setup)
    await link.start()
    yield link
    await link.close()


@contextlib.asynccontextmanager
async def archivist(settings: Settings, *models: ModelSpec) -> AsyncIterator[Archivist]:
    made = Archivist(settings, Registry(models))
    running = asyncio.create_task(made.run())
    await until(lambda: made.probe.ready or running.done())
    try:
        yield made
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0


def record(key_id: int, content: str) -> Record:
    now = time.time()
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]
    return Record(
        secrets.token_hex(8), "chat", key_id, "m", "/chat", 1, 1, now, now, "s", messages, finish_reason="stop"
    )


async def test_records_become_rows_and_vectors_once(
    settings: Settings, publisher: AmqpLink, store: Store, key_id: int
) -> None:
    # Given records that were published before the archivist started, one of them twice
    records = [record(key_id, "x" * (index + 1)) for index in range(10)]
    for one in [*records, records[0]]:
        await publisher.publish(topology.HISTORY, encode(one), message_id=one.request_id)
    async with archivist(settings, MODEL):
        # Then each becomes one row
        async with asyncio.timeout(10):
            while len(rows := await store.history(key_id, ALL)) < 10:
                await asyncio.sleep(0.05)
        assert len(rows) == 10
        # And is found by its vector
        query = SimilarQuery(MODEL.vector_space, np.eye(16, dtype=np.float32)[3], 5, 0.9)
        async with asyncio.timeout(10):
            while not (found := await store.similar(key_id, query)):
                await asyncio.sleep(0.05)
        assert [row["messages"][0]["content"] for row in found] == ["xxx"]
    assert (await publisher.declare_queue(topology.HISTORY, passive=True))[0] == 0


async def test_chats_are_kept_where_there_is_no_embedding_model(
    settings: Settings, publisher: AmqpLink, store: Store, key_id: int
) -> None:
    async with archivist(settings):
        await asyncio.sleep(0.2)
        await publisher.publish(topology.HISTORY, encode(record(key_id, "a")))
        async with asyncio.timeout(10):
            while not await store.history(key_id, ALL):
                await asyncio.sleep(0.05)


async def test_what_an_older_version_left_is_kept(
    settings: Settings, publisher: AmqpLink, store: Store, key_id: int
) -> None:
    await publisher.declare_queue(topology.HISTORY_BEFORE)
    await publisher.publish(topology.HISTORY_BEFORE, encode(record(key_id, "before")))
    async with archivist(settings), asyncio.timeout(10):
        while not await store.history(key_id, ALL):
            await asyncio.sleep(0.05)
    assert (await publisher.declare_queue(topology.HISTORY_BEFORE, passive=True))[0] == 0


async def test_a_record_nobody_can_write_does_not_hold_up_the_others(
    settings: Settings, publisher: AmqpLink, store: Store, key_id: int
) -> None:
    dead: list[bytes] = []
    await publisher.consume(topology.DEAD, lambda delivery: dead.append(delivery.body))
    # Given rubbish, and a record of a key that does not exist, between good ones
    rubbish, orphan = b"{" + secrets.token_bytes(4), encode(record(10**12, "orphan"))
    good = [encode(record(key_id, "a")), encode(record(key_id, "b"))]
    for body in (good[0], rubbish, orphan, good[1]):
        await publisher.publish(topology.HISTORY, body)
    async with archivist(settings, MODEL):
        # Then the good ones are written and the others lie in the dead letters
        async with asyncio.timeout(10):
            while len(await store.history(key_id, ALL)) < 2:
                await asyncio.sleep(0.05)
        await until(lambda: rubbish in dead and orphan in dead)


async def test_nothing_is_acked_before_postgres_has_it(
    settings: Settings, publisher: AmqpLink, store: Store, key_id: int
) -> None:
    # Given more records than fit in a batch, rubbish before them, and a Postgres that takes none
    bodies = [encode(record(key_id, f"{index}")) for index in range(BATCH + 50)]
    bodies.insert(0, b"{rubbish")
    async with await psycopg.AsyncConnection.connect(settings.database_url) as blocking:
        await blocking.execute("LOCK TABLE chats IN SHARE MODE")
        for body in bodies:
            await publisher.publish(topology.HISTORY, body)
        async with archivist(settings):
            await asyncio.sleep(1)
    # When the archivist has gone without a word, then all but the rubbish wait in the queue again
    assert (await publisher.declare_queue(topology.HISTORY, passive=True))[0] == len(bodies) - 1
    # And are written by the next one
    async with archivist(settings):
        async with asyncio.timeout(10):
            while len(await store.history(key_id, HistoryFilter(limit=1000, offset=0))) < len(bodies) - 1:
                await asyncio.sleep(0.05)
    assert (await publisher.declare_queue(topology.HISTORY, passive=True))[0] == 0
