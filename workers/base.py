"""What every worker does: consume, keep deadlines, ack, heed cancels, tell its load, drain.

Knows nothing of models; a worker type says what to do with a job in `handle`.
"""

import asyncio
import logging
import signal
import socket
import time
import uuid
from abc import ABC, abstractmethod

import msgspec

from server.core import metrics, topology
from server.core.amqp import AmqpLink, Delivery
from server.core.errors import BrokerUnavailable, DeadlineExceeded, EngineFailed, ServiceError
from server.core.messages import Cancel, Job, Record, Status, WorkerType, decode, encode
from server.core.settings import Settings
from workers.engine import EngineDied
from workers.probe import Probe
from workers.replies import Reply, ReplyOutbox

logger = logging.getLogger(__name__)


class Beacon:
    """Says once a second on the `status` fanout how a worker fares."""

    def __init__(self, link: AmqpLink, type_: WorkerType, model: str, probe: Probe) -> None:
        self._link = link
        self._probe = probe
        self.worker = f"{type_}-{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self.type, self.model = type_, model
        self.running = self.waiting = self.backlog = 0
        self.lag_s = 0.0
        self.progress_at = 0.0
        self._made = 0

    def progress(self, made: int = 1) -> None:
        """Count tokens, vectors or rows made."""
        self._made += made
        self.progress_at = time.time()

    async def run(self) -> None:
        last, made = time.monotonic(), 0
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            rate = (self._made - made) / (now - last)
            last, made = now, self._made
            status = Status(
                worker=self.worker,
                type=self.type,
                model=self.model,
                ready=self._probe.ready,
                running=self.running,
                waiting=self.waiting,
                tokens_per_s=round(rate, 1),
                progress_at=self.progress_at,
                metrics_port=self._probe.port,
                backlog=self.backlog,
                lag_s=round(self.lag_s, 3),
            )
            try:
                self._link.broadcast(topology.STATUS, encode(status))
            except BrokerUnavailable:
                continue  # it comes back by itself


class Worker(ABC):
    """A worker of one model. Subclasses load the model in `start` and answer in `handle`."""

    type: WorkerType

    def __init__(self, settings: Settings, model: str) -> None:
        self.settings = settings
        self.model = model
        self.probe = Probe(settings.metrics_port)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._consumers: list[str] = []
        self._dead: asyncio.Event = asyncio.Event()
        self._publisher = AmqpLink(
            settings.amqp_url, f"{self.type} {model} publish", self._setup_publisher, on_return=self._abandon
        )
        self._consumer = AmqpLink(settings.amqp_url, f"{self.type} {model} consume", self._setup_consumer)
        self._outbox = ReplyOutbox(self._publisher, lambda: len(self._tasks) > 1)
        self._reply_to: dict[str, str] = {}
        self.beacon = Beacon(self._publisher, self.type, model, self.probe)

    @abstractmethod
    async def start(self) -> int:
        """Load the model; returns how many jobs it handles at once."""

    @abstractmethod
    async def handle(self, job: Job, reply: Reply) -> Record:
        """Answer the job through `reply`; what it returns becomes history and usage. Raises ServiceError."""

    @abstractmethod
    async def stop(self) -> None:
        """Free the model."""

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        await self.probe.start()
        await self._publisher.start()
        beating = asyncio.create_task(self.beacon.run())
        loading = asyncio.create_task(self.start())
        stopped = asyncio.create_task(stopping.wait())
        died = asyncio.create_task(self._dead.wait())
        try:
            await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                loading.cancel()
                return 0
            self._prefetch = loading.result()
            await self._consumer.start()
            self.probe.ready = True
            logger.info("ready", extra={"action": "ready", "model": self.model})
            await asyncio.wait({stopped, died}, return_when=asyncio.FIRST_COMPLETED)
            if self._dead.is_set():
                return 1  # unacked jobs go back to their queue
            await self._drain()
            return 0
        finally:
            self.probe.ready = False
            beating.cancel()
            await self._consumer.close()
            await self.stop()
            self._outbox.flush()
            await self._publisher.close()
            await self.probe.stop()

    async def _drain(self) -> None:
        logger.info("draining", extra={"action": "drain", "running": len(self._tasks)})
        self.probe.ready = False
        for tag in self._consumers:
            await self._consumer.cancel_consumer(tag)
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=self.settings.drain_timeout_s)
        for task in self._tasks.values():
            task.cancel()

    async def _setup_publisher(self, link: AmqpLink) -> None:
        await link.declare_fanout(topology.STATUS)
        await link.declare_queue(topology.HISTORY)

    async def _setup_consumer(self, link: AmqpLink) -> None:
        await link.declare_queue(topology.DEAD)
        await link.declare_jobs(self.model, self.settings.queue_max_jobs)
        await link.declare_fanout(topology.CONTROL)
        mine = f"control.{self.beacon.worker}"
        await link.declare_queue(mine, exclusive=True)
        await link.bind(mine, topology.CONTROL)
        await link.consume(mine, self._on_control)
        # Batch work fills what interactive work leaves, a quarter of the slots at the most.
        lanes = (("interactive", self._prefetch), ("batch", max(1, self._prefetch // 4)))
        self._consumers = [
            await link.consume(topology.jobs_queue(self.model, lane), self._on_job, prefetch)  # type: ignore[arg-type]
            for lane, prefetch in lanes
        ]

    def _on_control(self, delivery: Delivery) -> None:
        request_id = decode(Cancel, delivery.body).request_id
        task = self._tasks.get(request_id)
        if task is not None:
            self._cancelled.add(request_id)
            task.cancel()

    def _abandon(self, reply_to: str) -> None:
        """The server that waited is gone: stop what was made for it."""
        for request_id, queue in self._reply_to.items():
            if queue == reply_to:
                self._cancelled.add(request_id)
                self._tasks[request_id].cancel()

    def _on_job(self, delivery: Delivery) -> None:
        try:
            job = decode(Job, delivery.body)
        except msgspec.DecodeError:
            logger.exception("not a job", extra={"action": "decode"})
            self._consumer.reject(delivery, requeue=False)
            return
        if job.id in self._tasks:
            # Delivered again after a reconnection while it still runs: that run will end it.
            self._consumer.ack(delivery)
            return
        self._reply_to[job.id] = job.reply_to
        self._tasks[job.id] = asyncio.create_task(self._run(job, delivery))
        self.beacon.running = len(self._tasks)
        metrics.jobs_running.labels(self.model).set(len(self._tasks))

    async def _run(self, job: Job, delivery: Delivery) -> None:
        reply = Reply(self._outbox, job.reply_to, job.id)
        outcome = "done"
        try:
            if time.time() >= job.deadline:
                raise DeadlineExceeded("The request waited in the queue past its deadline.")
            reply.send("started")
            async with asyncio.timeout(job.deadline - time.time()):
                record = await self.handle(job, reply)
            if job.recorded:
                await self._publisher.publish(topology.HISTORY, encode(record), message_id=job.id)
        except TimeoutError:
            outcome = "expired"
            reply.fail(DeadlineExceeded("The request took longer than its deadline allows."))
        except asyncio.CancelledError:
            outcome = "cancelled"
            if job.id not in self._cancelled:
                self._consumer.reject(delivery, requeue=True)  # draining ran out of time: another's turn
                return
        except EngineDied:
            logger.critical("engine died", extra={"action": "engine_died", "model": self.model})
            self._dead.set()
            return
        except BrokerUnavailable:
            # The record did not reach the broker, and neither will an ack: the job is delivered again.
            outcome = "unrecorded"
            logger.warning("record not published", extra={"action": "record", "request_id": job.id})
            self._consumer.reject(delivery, requeue=True)
            return
        except ServiceError as exc:
            outcome = "refused" if exc.status < 500 else "failed"
            reply.fail(exc)
        except Exception:
            outcome = "failed"
            logger.exception("job failed", extra={"action": "job", "request_id": job.id, "model": self.model})
            reply.fail(EngineFailed("The engine failed on this request."))
        finally:
            del self._tasks[job.id], self._reply_to[job.id]
            self._cancelled.discard(job.id)
            self.beacon.running = len(self._tasks)
            metrics.jobs_running.labels(self.model).set(len(self._tasks))
            metrics.jobs.labels(self.model, outcome).inc()
        self._consumer.ack(delivery)
