"""Where answers arrive: a process's own reply queue, and who waits for which request.

Used by the server for its clients' requests and by the archivist for its vectors.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable

import msgspec

from server.core import topology
from server.core.amqp import AmqpLink, Delivery
from server.core.errors import BrokerUnavailable, DeadlineExceeded, from_status
from server.core.messages import ErrorFrame, Frame, Job, Lane, decode, decode_frames, encode

logger = logging.getLogger(__name__)

DEADLINE_GRACE_S = 2.0
"""How much longer than a job's deadline its waiter waits, so that the worker's own word on it arrives."""


class Waiter:
    """The frames of one request, in order."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.started = False
        self._frames: asyncio.Queue[Frame | Exception] = asyncio.Queue()

    def put(self, item: Frame | Exception) -> None:
        self._frames.put_nowait(item)

    async def next(self) -> Frame:
        """The next frame that says something: chunk, usage, result or done.

        Raises the ServiceError that the request ended with, or DeadlineExceeded.
        """
        while True:
            left = self.job.deadline + DEADLINE_GRACE_S - time.time()
            try:
                item = await asyncio.wait_for(self._frames.get(), max(left, 0))
            except TimeoutError as exc:
                raise DeadlineExceeded("No worker answered before the request's deadline.") from exc
            if isinstance(item, Exception):
                raise item
            if item.kind == "error":
                error = decode(ErrorFrame, item.data)
                raise from_status(error.status, error.message, error.param)
            if item.kind == "started":
                self.started = True
            else:
                return item


class Inbox:
    """One process's reply queue. `waiting` holds the requests that are not over, by id.

    `also_consume` sets up what else the process reads on the same connection.
    """

    def __init__(
        self,
        amqp_url: str,
        name: str,
        models: list[str],
        queue_max_jobs: int,
        also_consume: Callable[[AmqpLink], Awaitable[None]] | None = None,
    ) -> None:
        self.queue = topology.replies_queue(f"{name}-{uuid.uuid4().hex[:12]}")
        self.waiting: dict[str, Waiter] = {}
        self._models = models
        self._queue_max_jobs = queue_max_jobs
        self._also_consume = also_consume
        self.publisher = AmqpLink(amqp_url, f"{name} publish", self._setup_publisher)
        self.consumer = AmqpLink(amqp_url, f"{name} consume", self._setup_consumer, on_lost=self._fail_all)

    async def start(self) -> None:
        await asyncio.gather(self.publisher.start(), self.consumer.start())

    async def close(self) -> None:
        await asyncio.gather(self.publisher.close(), self.consumer.close())

    async def submit(self, job: Job, lane: Lane) -> Waiter:
        """Queue a job whose `reply_to` is this inbox. Raises QueueFull or BrokerUnavailable.

        Whoever submits calls `release` at the end, whatever the end is.
        """
        if not self.consumer.connected:
            raise BrokerUnavailable("The message broker is not reachable. Try again shortly.", retry_after_s=2)
        waiter = self.waiting[job.id] = Waiter(job)
        try:
            await self.publisher.publish(topology.jobs_queue(job.model, lane), encode(job), message_id=job.id)
        except BaseException:
            self.release(job.id)
            raise
        return waiter

    def release(self, request_id: str) -> None:
        self.waiting.pop(request_id, None)

    async def _setup_publisher(self, link: AmqpLink) -> None:
        await link.declare_queue(topology.DEAD)
        await link.declare_queue(topology.HISTORY)
        await link.declare_fanout(topology.CONTROL)
        for model in self._models:
            await link.declare_jobs(model, self._queue_max_jobs)

    async def _setup_consumer(self, link: AmqpLink) -> None:
        await link.declare_queue(self.queue, exclusive=True)
        await link.consume(self.queue, self._on_frames)
        if self._also_consume is not None:
            await self._also_consume(link)

    def _on_frames(self, delivery: Delivery) -> None:
        try:
            frames = decode_frames(delivery.body)
        except msgspec.DecodeError:
            logger.exception("not frames", extra={"action": "decode"})
            return
        for frame in frames:
            waiter = self.waiting.get(frame.request_id)
            if waiter is not None:
                waiter.put(frame)

    def _fail_all(self) -> None:
        """The reply queue went with the connection: no answer can arrive any more."""
        for waiter in self.waiting.values():
            waiter.put(BrokerUnavailable("The connection to the message broker was lost. Try again.", retry_after_s=2))
