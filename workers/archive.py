"""The archivist: every write of chats, usage and vectors.

Takes finished requests from the `history` queue, writes them in batches, then has the chats embedded at
low priority. Nothing is acked before Postgres has it, so while Postgres is down the records wait.
"""

import asyncio
import contextlib
import logging
import time
import uuid

import msgspec
import numpy as np
from numpy.typing import NDArray

from server.core import metrics, topology
from server.core.amqp import AmqpLink, Delivery
from server.core.conversation import Message, answer, last_question
from server.core.errors import DatabaseUnavailable, EngineFailed, InvalidRequest, RecordRefused, ServiceError
from server.core.inbox import Inbox
from server.core.messages import Job, Record, decode, decode_embeddings, vectors_of
from server.core.registry import ModelSpec, Registry
from server.core.settings import Settings
from server.core.signals import stop_event
from server.db.pool import make_pool
from server.db.store import Row, Store
from workers.base import Beacon
from workers.probe import Probe

logger = logging.getLogger(__name__)

PREFETCH = 256
"""Records written in one transaction at the most."""
VECTOR_BATCH = 32
RETRY_S = 2.0
STOP_TIMEOUT_S = 5.0
EMBED_TIMEOUT_S = 120.0


def searchable_text(messages: list[Message]) -> str:
    """What of a chat its vector is made of: the last thing asked, and the answer."""
    return "\n".join(filter(None, (last_question(messages), answer(messages)))) or " "


class Archivist:
    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._embedding: ModelSpec | None = registry.default("embedding")
        self.probe = Probe(settings.host, settings.metrics_port)
        self._pool = make_pool(settings.database_url, max_size=3)
        self._store = Store(self._pool)
        models = [self._embedding.id] if self._embedding else []
        self._inbox = Inbox(settings.amqp_url, "archive", models, settings.queue_max_jobs)
        self._history = AmqpLink(settings.amqp_url, "archive history", self._setup)
        self._beacon = Beacon(self._inbox.publisher, "archive", "", self.probe)
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self._to_embed = asyncio.Event()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status."""
        stopping = stop_event()
        await self.probe.start()
        await self._pool.open()
        await self._inbox.start()
        await self._history.start()
        writing = asyncio.create_task(self._write_all(stopping))
        others = [asyncio.create_task(self._beacon.run())]
        if self._embedding is not None:
            others.append(asyncio.create_task(self._embed_all(self._embedding)))
        stopped = asyncio.create_task(stopping.wait())
        self.probe.ready = True
        logger.info("ready", extra={"action": "ready"})
        try:
            await asyncio.wait({stopped, writing, *others}, return_when=asyncio.FIRST_COMPLETED)
            # The batch in hand gets a moment; what is not acked is delivered again.
            await asyncio.wait({writing}, timeout=STOP_TIMEOUT_S)
            for done in (writing, *others):
                if done.done():
                    done.result()
            return 0
        finally:
            self.probe.ready = False
            for task in (writing, *others, stopped):
                task.cancel()
            await asyncio.gather(writing, *others, stopped, return_exceptions=True)
            await self._history.close()
            await self._inbox.close()
            await self._pool.close()
            await self.probe.stop()

    async def _setup(self, link: AmqpLink) -> None:
        await link.declare_queue(topology.HISTORY)
        await link.declare_queue(topology.DEAD)
        # What an earlier connection delivered can no longer be acked, and comes again on this one.
        self._arrived = asyncio.Queue()
        await link.consume(topology.HISTORY, lambda delivery: self._arrived.put_nowait(delivery), PREFETCH)

    async def _write_all(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            deliveries = await self._next_batch()
            if deliveries:
                await self._write(deliveries)
                self._to_embed.set()
            self._beacon.backlog = self._arrived.qsize()

    async def _next_batch(self) -> list[Delivery]:
        """What has arrived, at most a transaction's worth; nothing, once in a while, when nothing comes."""
        arrived = self._arrived
        try:
            deliveries = [await asyncio.wait_for(arrived.get(), 1)]
        except TimeoutError:
            return []
        while not arrived.empty() and len(deliveries) < PREFETCH:
            deliveries.append(arrived.get_nowait())
        return deliveries

    async def _write(self, deliveries: list[Delivery]) -> None:
        records: list[tuple[Delivery, Record]] = []
        for delivery in deliveries:
            try:
                records.append((delivery, decode(Record, delivery.body)))
            except msgspec.DecodeError:
                await self._bury(delivery)
        try:
            await self._store_when_possible([record for _, record in records])
        except RecordRefused:
            if len(records) == 1:
                await self._bury(records[0][0])
                return
            # One that Postgres will never take must not hold up the others: find it.
            for delivery, _ in records:
                await self._write([delivery])
            return
        for delivery, record in records:
            self._history.ack(delivery)
            self._beacon.lag_s = max(time.time() - record.finished_at, 0)
            metrics.history_lag.observe(self._beacon.lag_s)
            metrics.history_records.labels(record.type).inc()

    async def _store_when_possible(self, records: list[Record]) -> None:
        """Write them, however long Postgres is away: they wait in their queue meanwhile. Raises RecordRefused."""
        while records:
            try:
                self._beacon.progress(await self._store.write(records))
            except DatabaseUnavailable:
                self._beacon.lag_s = time.time() - min(record.finished_at for record in records)
                self._beacon.backlog = len(records) + self._arrived.qsize()
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _bury(self, delivery: Delivery) -> None:
        """To the dead letters, for a person to look at; nothing is lost."""
        logger.error("record refused", extra={"action": "archive"})
        try:
            await self._inbox.publisher.publish(topology.DEAD, delivery.body)
        except ServiceError:
            self._history.reject(delivery, requeue=True)
        else:
            self._history.ack(delivery)

    async def _embed_all(self, model: ModelSpec) -> None:
        """Give each new chat its vector; what fails is tried again after a while."""
        met = False
        while True:
            try:
                if not met:
                    await self._store.requeue_vectors(model.vector_space)
                    met = True
                self._to_embed.clear()  # before looking: what comes after is then not missed
                while chats := await self._store.pending_chats(VECTOR_BATCH):
                    await self._embed(model, chats)
            except ServiceError as exc:
                logger.warning("vectors wait", extra={"action": "vectors", "error": type(exc).__name__})
                await asyncio.sleep(RETRY_S)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._to_embed.wait(), 10)

    async def _embed(self, model: ModelSpec, chats: list[Row]) -> None:
        """Embed a batch; one that the model or Postgres will never take goes without. Raises Unavailable
        and what else may pass."""
        try:
            vectors = await self._vectors(model, chats)
            await self._store.write_vectors(chats, model.vector_space, vectors)
        except (InvalidRequest, EngineFailed, RecordRefused) as exc:
            if len(chats) > 1:
                for chat in chats:
                    await self._embed(model, [chat])
                return
            extra = {"action": "vectors", "chat": chats[0]["id"], "error": type(exc).__name__}
            logger.error("chat left without a vector", extra=extra)
            await self._store.drop_pending(chats[0]["id"])
            return
        metrics.vectors_written.labels(model.id).inc(len(chats))

    async def _vectors(self, model: ModelSpec, chats: list[Row]) -> NDArray[np.float32]:
        """float32 (n_chats, dimensions)."""
        now = time.time()
        job = Job(
            id=f"vectors-{uuid.uuid4().hex}",
            model=model.id,
            endpoint="archive",
            body={"input": [searchable_text(chat["messages"]) for chat in chats], "truncate": True},
            key_id=0,
            reply_to=self._inbox.queue,
            created_at=now,
            deadline=now + EMBED_TIMEOUT_S,
            recorded=False,
        )
        waiter = await self._inbox.submit(job, "batch")
        try:
            return vectors_of(decode_embeddings((await waiter.next()).data))
        finally:
            self._inbox.release(job.id)
