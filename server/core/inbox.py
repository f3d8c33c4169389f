"""Where answers arrive: a process's own reply queue, and who waits for which request.

Used by the server for its clients' requests and by the archivist for its vectors.
"""

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

import msgspec

from server.core import prompt_tokens, spans, topology, tracing
from server.core.amqp import AmqpLink, Delivery
from server.core.continuation import Continuation, Differs, may_continue
from server.core.errors import (
    AnswerLost,
    BrokerUnavailable,
    ClientTooSlow,
    DeadlineExceeded,
    EngineFailed,
    PayloadTooLarge,
    from_status,
)
from server.core.messages import Cancel, ErrorFrame, Frame, Job, Lane, decode, decode_frames, encode

logger = logging.getLogger(__name__)

DEADLINE_GRACE_S = 2.0
"""How much longer than a job's deadline its waiter waits, so that the worker's own word on it arrives."""

CANCELLED_MAX = 10_000
"""How many cancels are remembered, for a worker that did not hear of one."""

GIVEN_UP = "given up"
"""In place of a run's name: of this one nothing comes."""


class Waiter:
    """The frames of one request, in order, as if there had been one run of its job.

    A job whose worker was lost is run again. If nothing was told of the first run, the second answers; else it goes
    on where the first ended, where it says the same again (continuation.py). Where it does not, and where a frame was
    lost, the request ends with an error: no text is ever repeated, missing or changed.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.span = tracing.current()
        self.sent = self.started = self.cancelled = False
        self.worker = ""
        """Who began it last, where it said so."""
        self.prompt_tokens = prompt_tokens.estimate(job.body, job.context)
        self.unread_bytes = 0
        self._run = ""
        self._runs: set[str] = set()
        """All that were followed so far."""
        self._seq = 0
        self._told = False
        self._handed: list[Frame] | None = [] if may_continue(job) else None
        self._again: Continuation | None = None
        self._frames: deque[Frame | Exception] = deque()
        self._reader: asyncio.Future[None] | None = None
        late = DeadlineExceeded("No worker answered before the request's deadline.")
        left_s = job.deadline + DEADLINE_GRACE_S - time.time()
        # One timer a request: a timeout around each frame would cost more than the frame.
        self._deadline = asyncio.get_running_loop().call_later(max(left_s, 0), self._add, late)

    def close(self) -> None:
        self._deadline.cancel()

    def put(self, item: Frame | Exception) -> None:
        """Take in what arrived for this request."""
        if isinstance(item, Frame):
            if item.run != self._run and not self._begin(item):
                return
            if item.kind == "started" and self._seq:
                return  # said again, by a worker that may not have heard that nobody waits any more
            if item.seq != self._seq:
                self._add(_cut_short())
                return
            self._seq += 1
            if item.kind == "started":
                return
            rest = item if self._again is None else self._new_of(item, self._again)
            if rest is None:
                return
            self._told = True
            if self._handed is not None:
                self._handed.append(rest)
            item = rest
        self._add(item)

    def _new_of(self, frame: Frame, again: Continuation) -> Frame | None:
        """What of a second run's frame was not told of the first."""
        try:
            return again.follow(frame)
        except Differs:
            logger.warning("the second run differs", extra={"action": "continue", "request_id": self.job.id})
            self._add(_cut_short())
            return None

    def _begin(self, frame: Frame) -> bool:
        """Follow the run of this frame from now on, if that is a new one."""
        if self._run == GIVEN_UP or frame.run in self._runs:
            return False  # of one that was given up
        self._runs.add(frame.run)
        if self._told and frame.kind != "error":
            if self._handed is None:
                self._add(_cut_short())
                return False
            self._again = Continuation(self.job, self._handed)
            extra = {"action": "continue", "request_id": self.job.id, "frames": len(self._handed)}
            logger.info("another worker goes on", extra=extra)
            self.span.event("another worker goes on")
        self._run, self.started = frame.run, True
        self.worker = frame.data.decode(errors="replace") if frame.kind == "started" else ""
        self._seq = min(frame.seq, 1)  # to lose the first frame, which says nothing, does no harm
        return True

    def give_up(self) -> None:
        """Forget what waits for a client that does not read; it finds an error there if it ever does."""
        self._frames.clear()
        self.unread_bytes = 0
        self._run, self._handed = GIVEN_UP, None
        self._add(ClientTooSlow("The answer was not read while it was made, and has ended."))

    def _add(self, item: Frame | Exception) -> None:
        self._frames.append(item)
        if isinstance(item, Frame):
            self.unread_bytes += len(item.data)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> Frame:
        """The next frame: chunk, usage, result or done. Does not yield to the loop where it has arrived already.

        Raises the ServiceError that the request ended with, or DeadlineExceeded.
        """
        while not self._frames:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item = self._frames.popleft()
        if isinstance(item, Exception):
            raise item
        self.unread_bytes -= len(item.data)
        if item.kind == "error":
            error = decode(ErrorFrame, item.data)
            raise from_status(error.status, error.message, error.param, error.code)
        return item


def _cut_short() -> AnswerLost:
    return AnswerLost("The worker was lost in the middle of the answer. Ask again.", retry_after_s=1)


class Inbox:
    """One process's reply queue. `waiting` holds the requests that are not over, by id; `on_begun` hears of each that a
    worker has begun.

    `also_consume` sets up what else the process reads on the same connection.
    """

    def __init__(
        self,
        amqp_url: str,
        name: str,
        models: list[str],
        queue_max_jobs: int,
        also_consume: Callable[[AmqpLink], Awaitable[None]] | None = None,
        max_unread_bytes: int = 1024 * 1024,
    ) -> None:
        self.queue = ""
        self._max_unread_bytes = max_unread_bytes
        self.on_begun: Callable[[str], None] = lambda request_id: None
        self._name = name
        self.waiting: dict[str, Waiter] = {}
        self._cancelled: dict[str, bool] = {}
        """The last ones, and whether nothing is to be recorded of them."""
        self._untold: list[str] = []
        self._models = models
        self._queue_max_jobs = queue_max_jobs
        self._also_consume = also_consume
        self.on_return: Callable[[str], None] = lambda queue: None
        """Told the reply queue of another process that is gone."""
        self.publisher = AmqpLink(
            amqp_url, f"{name} publish", self._setup_publisher, on_return=lambda queue: self.on_return(queue)
        )
        self.consumer = AmqpLink(amqp_url, f"{name} consume", self._setup_consumer, on_lost=self._fail_all)

    async def start(self) -> None:
        await asyncio.gather(self.publisher.start(), self.consumer.start())

    async def close(self) -> None:
        await asyncio.gather(self.publisher.close(), self.consumer.close())

    async def submit(self, job: Job, lane: Lane) -> Waiter:
        """Queue a job whose `reply_to` is this inbox. Raises QueueFull, BrokerUnavailable or PayloadTooLarge.

        Whoever submits calls `release` at the end, whatever the end is.
        """
        waiter = self.expect(job)
        try:
            await self.send(waiter, lane)
        except BaseException:
            self.release(job.id)
            raise
        return waiter

    def expect(self, job: Job) -> Waiter:
        """Wait for the answer to a job that is sent later. Raises BrokerUnavailable."""
        if not self.consumer.connected:
            raise BrokerUnavailable("The message broker is not reachable. Try again shortly.", retry_after_s=2)
        waiter = self.waiting[job.id] = Waiter(job)
        return waiter

    async def send(self, waiter: Waiter, lane: Lane) -> None:
        """Queue the job. Raises QueueFull, BrokerUnavailable, PayloadTooLarge or DeadlineExceeded."""
        job, queue = waiter.job, topology.jobs_queue(waiter.job.model, lane)
        with spans.publish(queue, job.id, job.traceparent) as span:
            if span.traceparent:
                job = replace(job, traceparent=span.traceparent)
            body = encode(job)
            if len(body) > topology.MAX_JOB_BYTES:  # JSON may grow: 1e15 is written out
                raise PayloadTooLarge(f"The request is larger than {topology.MAX_JOB_BYTES} bytes.")
            waiter.sent = True
            confirmed = self.publisher.publish_soon(queue, body, message_id=job.id, traceparent=job.traceparent)
            try:
                async with asyncio.timeout(job.deadline - time.time()):
                    await confirmed
            except (TimeoutError, BrokerUnavailable) as exc:
                if waiter.started:
                    return  # the broker has it, whatever it confirms
                self.cancel(job.id, unwanted=True)  # the broker may have it all the same, or read it yet
                if isinstance(exc, TimeoutError):
                    raise DeadlineExceeded("The message broker did not take the request in time.") from exc
                raise

    def release(self, request_id: str) -> None:
        if (waiter := self.waiting.pop(request_id, None)) is not None:
            waiter.close()

    def cancel(self, request_id: str, *, unwanted: bool = False) -> None:
        """Have a job stopped, whichever worker has it, or not begun, whichever takes it. Of what is `unwanted` nothing
        is recorded."""
        if (waiter := self.waiting.get(request_id)) is not None:
            waiter.cancelled = True
        unwanted = self._cancelled[request_id] = unwanted or self._cancelled.get(request_id, False)
        if len(self._cancelled) > CANCELLED_MAX:
            del self._cancelled[next(iter(self._cancelled))]
        try:
            self.publisher.broadcast(topology.CONTROL, encode(Cancel(request_id, unwanted)))
        except BrokerUnavailable:
            self._untold.append(request_id)

    def _tell_again(self) -> None:
        """What could not be told while there was no connection. Workers may have gone on meanwhile, on theirs."""
        untold, self._untold = self._untold, []
        for request_id in untold:
            self.cancel(request_id)

    async def _setup_publisher(self, link: AmqpLink) -> None:
        await link.declare_dead_letters()
        await link.declare_queue(topology.HISTORY)
        await link.declare_fanout(topology.CONTROL)
        await link.declare_fanout(topology.STATUS)  # of an archivist that is the first to come
        for model in self._models:
            await link.declare_jobs(model, self._queue_max_jobs)
        asyncio.get_running_loop().call_soon(self._tell_again)  # when the connection may be used

    async def _setup_consumer(self, link: AmqpLink) -> None:
        # A new name for each connection: the broker may hold on to the old one's queue for a while.
        self.queue = topology.replies_queue(f"{self._name}-{uuid.uuid4().hex[:12]}")
        await link.declare_queue(self.queue, exclusive=True)
        await link.consume(self.queue, self._on_frames)
        await link.listen(topology.DEAD_LETTERS, self._on_dead)
        if self._also_consume is not None:
            await self._also_consume(link)

    def _on_frames(self, delivery: Delivery) -> None:
        try:
            frames = decode_frames(delivery.body)
        except msgspec.DecodeError:
            logger.warning("not frames", extra={"action": "decode"})
            return
        for frame in frames:
            waiter = self.waiting.get(frame.request_id)
            if frame.kind == "started" and (waiter is None or waiter.cancelled):
                # By a worker that was not there to hear it the first time; or it was refused; or another has answered.
                self.cancel(frame.request_id, unwanted=waiter is None and frame.request_id not in self._cancelled)
            if waiter is not None:
                if waiter.unread_bytes > self._max_unread_bytes:
                    self._give_up(waiter)
                begun = waiter.started
                try:
                    waiter.put(frame)
                except Exception:
                    # The message carries frames of others, who must get them.
                    logger.exception("frame not understood", extra={"action": "answer", "request_id": frame.request_id})
                    waiter.put(_cut_short())
                if waiter.started and not begun:
                    self.on_begun(frame.request_id)

    def _give_up(self, waiter: Waiter) -> None:
        """Its client is not there to read, and may never be: what it asked for is made no further."""
        logger.info("answer not read", extra={"action": "cut", "request_id": waiter.job.id})
        waiter.give_up()
        self.cancel(waiter.job.id)

    def _on_dead(self, delivery: Delivery) -> None:
        """A job was given up on, perhaps one of this process."""
        try:
            job = decode(Job, delivery.body)
        except msgspec.DecodeError:
            return  # whoever could not read it has logged it
        if (waiter := self.waiting.get(job.id)) is not None:
            waiter.put(EngineFailed("The worker was lost each time it tried this request. It is not tried again."))

    def _fail_all(self) -> None:
        """The reply queue went with the connection: no answer can arrive any more."""
        for waiter in self.waiting.values():
            waiter.put(AnswerLost("The connection to the message broker was lost. Try again.", retry_after_s=2))
