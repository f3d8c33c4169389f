"""The archivist: every write of chats, usage and vectors.

Takes finished requests from the `history` queue and writes them in batches; `workers.vectors` then makes the chats
searchable. Nothing is acked before Postgres has it, so while Postgres is down the records wait.
"""

import asyncio
import logging
import os
import time

import msgspec

from server.core import metrics, queued, spans, topology
from server.core.amqp import AmqpLink, Delivery
from server.core.errors import DatabaseFull, DatabaseUnavailable, RecordRefused, ServiceError
from server.core.inbox import Inbox
from server.core.messages import Record, decode
from server.core.registry import Registry
from server.core.settings import Settings
from server.core.signals import stop_event
from server.db.pool import DISK_FULL, make_pool
from server.db.store import Store
from server.db.vector_index import VectorIndexes
from workers.beacon import Beacon
from workers.probe import Probe
from workers.vectors import Vectors

logger = logging.getLogger(__name__)

BATCH = 256
"""Records written in one transaction at the most."""
PREFETCH = 2 * BATCH
"""So that the next batch is here by the time one is written."""
RETRY_S = 2.0
STOP_TIMEOUT_S = 5.0
FEW_CORES_NICE = 10
"""How far it steps back where it shares a core with those whom somebody waits for."""


class Archivist:
    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._few_cores = bool(settings.front)
        embedding = registry.default("embedding")
        self.probe = Probe(settings.host, settings.metrics_port)
        self._pool = make_pool(settings.database_url, max_size=3)  # records, vectors, an index being built
        self._store = Store(self._pool, timeout_s=None)
        self._models = [embedding.id] if embedding is not None else []
        self._inbox = Inbox(settings.amqp_url, "archive", self._models, settings.queue_max_jobs)
        self._history = AmqpLink(settings.amqp_url, "archive history", self._setup)
        self._beacon = Beacon(self._inbox.publisher, "archive", "", self.probe)
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self._writing = 0
        self._oldest_s: float | None = None
        """When the oldest of those that are being written ended, in Unix seconds."""
        metrics.begin_archive(embedding.id if embedding else None)
        self._vectors = (
            Vectors(embedding, self._store, VectorIndexes(self._pool), self._inbox) if embedding is not None else None
        )

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status."""
        if self._few_cores:
            os.nice(FEW_CORES_NICE)
        stopping = stop_event()
        await self.probe.start()
        await self._pool.open()
        await self._inbox.start()
        await self._history.start()
        writing = asyncio.create_task(self._write_all(stopping))
        others = [asyncio.create_task(self._beacon.run()), asyncio.create_task(self._tell())]
        if self._vectors is not None:
            others += [asyncio.create_task(self._vectors.embed_all()), asyncio.create_task(self._vectors.index_all())]
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
            self._beacon.say(leaving=True)
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

    async def _tell(self) -> None:
        """What waits, each second: a write may take as long as Postgres is away, or holds it up."""
        while True:
            self._beacon.backlog = self._writing + self._arrived.qsize()
            if self._oldest_s is not None:
                self._beacon.lag_s = max(time.time() - self._oldest_s, 0)
            queued.tell([w for w in self._inbox.waiting.values() if not w.started], self._models, "batch")
            await asyncio.sleep(queued.TELL_EVERY_S)

    async def _setup(self, link: AmqpLink) -> None:
        await link.declare_queue(topology.DEAD)
        # What an earlier connection delivered can no longer be acked, and comes again on this one.
        while not self._arrived.empty():
            self._arrived.get_nowait()
        for queue in (topology.HISTORY, topology.HISTORY_BEFORE):
            await link.declare_queue(queue)
            await link.consume(queue, lambda delivery: self._arrived.put_nowait(delivery), PREFETCH)

    async def _write_all(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            deliveries = await self._next_batch()
            self._writing = len(deliveries)
            if deliveries:
                await self._write(deliveries)
                if self._vectors is not None:
                    self._vectors.come.set()
            self._writing, self._oldest_s = 0, None

    async def _next_batch(self) -> list[Delivery]:
        """What has arrived, at most a transaction's worth; nothing, once in a while, when nothing comes."""
        try:
            deliveries = [await asyncio.wait_for(self._arrived.get(), 1)]
        except TimeoutError:
            return []
        while not self._arrived.empty() and len(deliveries) < BATCH:
            deliveries.append(self._arrived.get_nowait())
        return deliveries

    async def _write(self, deliveries: list[Delivery]) -> None:
        began_ns = time.time_ns()
        records: list[tuple[Delivery, Record]] = []
        for delivery in deliveries:
            try:
                records.append((delivery, decode(Record, delivery.body)))
            except msgspec.DecodeError:
                await self._bury(delivery)
        self._oldest_s = min((record.finished_at for _, record in records), default=None)
        if self._vectors is not None:
            self._vectors.remember([record for _, record in records])  # before the vectors' task can find them
        try:
            await self._store_when_possible([record for _, record in records])
        except RecordRefused:
            if len(records) == 1:
                spans.written([records[0][1]], topology.HISTORY, began_ns, "RecordRefused")
                await self._bury(records[0][0])
                return
            # One that Postgres will never take must not hold up the others: find it.
            for half in (records[: len(records) // 2], records[len(records) // 2 :]):
                await self._write([delivery for delivery, _ in half])
            return
        if records:
            # Batches are written in the order of their delivery: all that came before is written, or buried.
            self._history.ack(records[-1][0], through=True)
        spans.written([record for _, record in records], topology.HISTORY, began_ns)
        for _, record in records:
            self._beacon.lag_s = max(time.time() - record.finished_at, 0)
            metrics.history_lag.observe(self._beacon.lag_s)
            metrics.history_records.labels(record.type).inc()
            key = metrics.key_label(record.key_id)
            metrics.key_tokens.labels(key, "prompt").inc(record.prompt_tokens)
            metrics.key_tokens.labels(key, "completion").inc(record.completion_tokens)

    async def _store_when_possible(self, records: list[Record]) -> None:
        """Write them, however long Postgres is away: they wait in their queue meanwhile. Raises RecordRefused."""
        while records:
            try:
                self._beacon.progress(await self._store.write(records))
            except DatabaseUnavailable as exc:
                self._beacon.problem = (
                    DISK_FULL if isinstance(exc, DatabaseFull) else ""
                )  # else servers see it themselves
                await asyncio.sleep(RETRY_S)
            else:
                self._beacon.problem = ""
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
