"""The archivist: every write of chats, usage and vectors.

Takes finished requests from the `history` queue, writes them in batches, then has the chats embedded at
low priority. Nothing is acked before Postgres has it, so while Postgres is down the records wait.
"""

import asyncio
import logging
import signal
import time
import uuid
from typing import Any

import msgspec
import numpy as np

from server.core import metrics, topology
from server.core.amqp import AmqpLink, Delivery
from server.core.errors import DatabaseUnavailable, ServiceError
from server.core.inbox import Inbox
from server.core.messages import Job, Record, decode, decode_embeddings
from server.core.registry import ModelSpec, Registry
from server.core.settings import Settings
from server.db.pool import make_pool
from server.db.store import Store
from workers.base import Beacon
from workers.probe import Probe

logger = logging.getLogger(__name__)

PREFETCH = 256
"""Records written in one transaction at the most."""
VECTOR_BATCH = 32
RETRY_S = 2.0
EMBED_TIMEOUT_S = 120.0


def searchable_text(messages: list[dict[str, Any]]) -> str:
    """What of a chat its vector is made of: the last thing asked, and the answer."""
    asked: dict[str, Any] = next((m for m in reversed(messages) if m.get("role") == "user"), {})
    answered = messages[-1] if messages and messages[-1].get("role") == "assistant" else {}
    return "\n".join(filter(None, (_plain(asked.get("content")), _plain(answered.get("content"))))) or " "


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""


class Archivist:
    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._settings = settings
        self._embedding: ModelSpec | None = registry.default("embedding")
        self.probe = Probe(settings.metrics_port)
        self._pool = make_pool(settings.database_url, max_size=3)
        self._store = Store(self._pool)
        models = [self._embedding.id] if self._embedding else []
        self._inbox = Inbox(settings.amqp_url, "archive", models, settings.queue_max_jobs)
        self._history = AmqpLink(settings.amqp_url, "archive history", self._setup)
        self._beacon = Beacon(self._inbox.publisher, "archive", "", self.probe)
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self._to_embed = asyncio.Event()
        self._writing = asyncio.Lock()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        await self.probe.start()
        await self._pool.open()
        await self._inbox.start()
        await self._history.start()
        if (embedding := self._embedding) is not None:
            await self._retry(lambda: self._store.requeue_vectors(embedding.id))
        tasks = [asyncio.create_task(job) for job in (self._beacon.run(), self._write_all(), self._embed_all())]
        stopped = asyncio.create_task(stopping.wait())
        self.probe.ready = True
        logger.info("ready", extra={"action": "ready"})
        try:
            await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            return 0
        finally:
            self.probe.ready = False
            async with self._writing:  # the batch in hand is finished; what is not acked comes again
                for task in tasks:
                    task.cancel()
            await self._history.close()
            await self._inbox.close()
            await self._pool.close()
            await self.probe.stop()

    async def _setup(self, link: AmqpLink) -> None:
        await link.declare_queue(topology.HISTORY)
        await link.declare_queue(topology.DEAD)
        await link.consume(topology.HISTORY, self._arrived.put_nowait, PREFETCH)

    async def _retry(self, call: Any) -> Any:
        """Until Postgres is back: the records wait in their queue meanwhile."""
        while True:
            try:
                return await call()
            except DatabaseUnavailable:
                logger.warning("waiting for the database", extra={"action": "archive"})
                await asyncio.sleep(RETRY_S)

    async def _write_all(self) -> None:
        while True:
            deliveries = [await self._arrived.get()]
            while not self._arrived.empty() and len(deliveries) < PREFETCH:
                deliveries.append(self._arrived.get_nowait())
            async with self._writing:
                await self._write(deliveries)
            self._beacon.backlog = self._arrived.qsize()
            self._to_embed.set()

    async def _write(self, deliveries: list[Delivery]) -> None:
        records: list[tuple[Delivery, Record]] = []
        for delivery in deliveries:
            try:
                records.append((delivery, decode(Record, delivery.body)))
            except msgspec.DecodeError:
                await self._bury(delivery)
        try:
            await self._retry(lambda: self._store.write([record for _, record in records]))
        except Exception:
            # One record that Postgres will never take must not hold up the others: find it.
            logger.exception("batch not written, trying one by one", extra={"action": "archive"})
            for delivery, record in records:
                await self._write_one(delivery, record)
            return
        for delivery, record in records:
            self._written(delivery, record)

    async def _write_one(self, delivery: Delivery, record: Record) -> None:
        try:
            await self._retry(lambda: self._store.write([record]))
        except Exception:
            logger.exception("record refused", extra={"action": "archive", "request_id": record.request_id})
            await self._bury(delivery)
        else:
            self._written(delivery, record)

    def _written(self, delivery: Delivery, record: Record) -> None:
        self._history.ack(delivery)
        self._beacon.progress()
        self._beacon.lag_s = max(time.time() - record.finished_at, 0)
        metrics.history_lag.observe(self._beacon.lag_s)
        metrics.history_records.labels(record.type).inc()

    async def _bury(self, delivery: Delivery) -> None:
        """To the dead letters: a person looks at it, nothing is lost."""
        await self._inbox.publisher.publish(topology.DEAD, delivery.body)
        self._history.ack(delivery)

    async def _embed_all(self) -> None:
        """Give each new chat its vector; what fails is tried again after a while."""
        if self._embedding is None:
            return
        while True:
            try:
                while await self._embed_some(self._embedding):
                    pass
            except ServiceError as exc:
                logger.warning("vectors wait", extra={"action": "vectors", "error": type(exc).__name__})
                await asyncio.sleep(RETRY_S)
                continue
            self._to_embed.clear()
            try:
                await asyncio.wait_for(self._to_embed.wait(), 10)
            except TimeoutError:
                continue

    async def _embed_some(self, model: ModelSpec) -> bool:
        """Embed one batch of chats; false when none waits."""
        chats = await self._store.pending_chats(VECTOR_BATCH)
        if not chats:
            return False
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
            result = decode_embeddings((await waiter.next()).data)
        finally:
            self._inbox.release(job.id)
        vectors = np.frombuffer(result.vectors, "<f4").reshape(len(chats), result.dimensions)
        await self._store.write_vectors(chats, model.id, vectors)
        metrics.vectors_written.labels(model.id).inc(len(chats))
        return True
