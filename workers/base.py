"""What every worker does: consume, keep deadlines, ack, heed cancels, tell its load, drain.

Knows nothing of models; a worker type says what to do with a job in `handle`.
"""

import asyncio
import contextlib
import logging
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from server.core import metrics, spans, topology, tracing
from server.core.amqp import AmqpLink, Delivery
from server.core.errors import BrokerUnavailable, Cancelled, DeadlineExceeded, EngineFailed, ServiceError
from server.core.messages import Cancel, FrameKind, Job, Lane, Record, WorkerType, decode, encode, encode_frames
from server.core.settings import Settings
from server.core.signals import stop_event
from server.core.tracing import Span
from workers.beacon import Beacon
from workers.probe import Probe
from workers.replies import Reply, ReplyOutbox
from workers.serving import EngineDied
from workers.turns import Turns

logger = logging.getLogger(__name__)

RECORD_RETRY_S = 1.0
FEEL_S = 0.4
"""How often it is looked whether the servers that wait are still there, for answers that send nothing for long."""
WAITED_S = 1.0
"""A job older than this when it is taken may have lost its client meanwhile."""
HEAR_S = 0.25
"""For a server to say that nobody waits for a job any more."""
HALT_S = 0.5
"""For an engine that was told to stop to hand over what it has made; then it is taken by force."""

TOLD_HUNG_S = 6.0
"""A model that owes an answer for this long, and does nothing, is not ready."""
ENDED_HUNG_S = 10.0
"""And after this long it is ended, so that its jobs go to another worker, or to this one when it was started again."""

LOOKAHEAD = 1024
"""Jobs of a lane that a worker takes besides those it runs, to choose the next from by turns. What is not taken waits
in the order it came; servers let few jobs of a key come at once (server/admission.py), so that this holds all."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a job ended well: the last frame's `kind` and `data`, and what is kept of it."""

    kind: FrameKind
    data: bytes
    record: Record


@dataclass(slots=True)
class _Run:
    """A job in hand, waiting for its turn until it has a task. `delivery` is the latest one: after a reconnection the
    broker delivers it again. `taken_ns` is when the first came, in Unix nanoseconds. `charged` (beforehand) and `used`
    are tokens."""

    job: Job
    delivery: Delivery
    suspect: bool = False
    taken_ns: int = field(default_factory=time.time_ns)
    charged: float = 0.0
    used: int = 0
    task: asyncio.Task[None] | None = None
    reply: Reply | None = None
    handling: bool = False
    stopped: ServiceError | None = None
    """Why it is ended early: what it has made is recorded then as cancelled."""


@dataclass(slots=True)
class _Slots:
    """What a lane may run at once, and what waits for it."""

    count: int
    busy: int = 0
    turns: Turns[_Run] = field(default_factory=Turns)


class Worker(ABC):
    """A worker of one model. Subclasses load the model in `start` and answer in `handle`."""

    type: WorkerType
    provider = "unknown"
    """What makes the answers, for `gen_ai.provider.name`."""

    def __init__(self, settings: Settings, model: str) -> None:
        self.settings = settings
        self.model = model
        self.probe = Probe(settings.host, settings.metrics_port)
        self._runs: dict[str, _Run] = {}
        self._cancelled_early: dict[str, float] = {}
        self._consumers: list[str] = []
        self._halting: set[asyncio.Task[None]] = set()
        self._listening_since = 0.0
        self._died = asyncio.Event()
        self._slots: dict[Lane, _Slots] = {"interactive": _Slots(1), "batch": _Slots(1)}
        self._draining = False
        self._asides: set[asyncio.Task[None]] = set()
        self._publisher = AmqpLink(
            settings.amqp_url, f"{self.type} {model} publish", self._setup_publisher, on_return=self._abandon
        )
        self._consumer = AmqpLink(
            settings.amqp_url, f"{self.type} {model} consume", self._setup_consumer, on_lost=self._drop_waiting
        )
        self._outbox = ReplyOutbox(self._publisher, lambda: self.beacon.running > 1, self._give_up)
        self.beacon = Beacon(self._publisher, self.type, model, self.probe)
        metrics.begin_worker(self.type, model)

    @abstractmethod
    async def start(self) -> int:
        """Load the model; returns how many jobs it handles at once. May block the event loop."""

    @abstractmethod
    async def handle(self, job: Job, reply: Reply) -> Answer:
        """Answer the job; what comes before the last frame goes through `reply`. Raises ServiceError."""

    async def halt(self, job: Job) -> bool:
        """Have `handle` return soon with what it has made so far; False where that cannot be, and it is cancelled."""
        return False

    @abstractmethod
    async def stop(self) -> None:
        """Free the model."""

    def alive(self) -> bool:
        """Whether the model still works; asked once a second."""
        return True

    def hung_s(self) -> float:
        """For how long the model has owed an answer while it did nothing; asked once a second."""
        return 0.0

    def kill(self) -> None:
        """End a model that hangs, so that it is `alive` no more. Only where `hung_s` tells of one."""
        raise NotImplementedError

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status."""
        # While the model loads, nothing is worth finishing: the signal ends the process. The broker comes
        # after it, because loading may block the loop for longer than the broker waits for a heartbeat.
        signal.signal(signal.SIGTERM, _exit_at_once)
        await self.probe.start()
        try:
            slots = await self.start()
            # Batch work has slots of its own, a quarter as many, so that neither lane waits for the other.
            self._slots = {"interactive": _Slots(slots), "batch": _Slots(max(1, slots // 4))}
            self.beacon.slots = slots
            stopping = stop_event()
            await self._publisher.start()
            await self._consumer.start()
            return await self._serve(stopping)
        finally:
            self.probe.ready = False
            await self._consumer.close()
            await self.stop()
            self._outbox.flush()
            await self._publisher.close()
            await self.probe.stop()

    async def _serve(self, stopping: asyncio.Event) -> int:
        beating = asyncio.create_task(self.beacon.run())
        feeling = asyncio.create_task(self._feel_for_servers())
        stopped = asyncio.create_task(stopping.wait())
        died = asyncio.create_task(self._died.wait())
        self.probe.ready = True
        logger.info("ready", extra={"action": "ready", "model": self.model})
        try:
            while not (stopped.done() or died.done()):
                await asyncio.wait({stopped, died}, timeout=1, return_when=asyncio.FIRST_COMPLETED)
                self._look_after()
            if self._died.is_set():
                logger.critical("engine died", extra={"action": "engine_died", "model": self.model})
                await self._take_no_more()
                return 1  # unacked jobs go back to their queue
            await self._drain()
            self.beacon.say(leaving=True)
            return 0
        finally:
            for task in (beating, feeling, stopped, died):
                task.cancel()

    def _look_after(self) -> None:
        """A model that hangs is told of, then ended; one that has ended ends this worker."""
        if not self.alive():
            self._died.set()
            return
        hung_s = self.probe.hung_s = self.hung_s()
        self.probe.ready = hung_s < TOLD_HUNG_S
        self.beacon.problem = "" if self.probe.ready else f"its engine has not answered for {hung_s:.0f} s"
        if hung_s >= ENDED_HUNG_S:
            logger.critical("engine hangs", extra={"action": "engine_hangs", "model": self.model})
            self.kill()

    async def _drain(self) -> None:
        logger.info("draining", extra={"action": "drain", "running": len(self._runs)})
        self.probe.ready, self._draining = False, True
        self.beacon.say()
        await self._take_no_more()
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.settings.drain_timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _setup_publisher(self, link: AmqpLink) -> None:
        await link.declare_fanout(topology.STATUS)
        await link.declare_queue(topology.HISTORY)

    async def _setup_consumer(self, link: AmqpLink) -> None:
        await link.declare_jobs(self.model, self.settings.queue_max_jobs)
        await link.listen(topology.CONTROL, self._on_control)
        self._listening_since = time.time()
        if self._draining:
            return  # what this connection came back for is to finish what is in hand
        # One suspect at a time: if it ends this worker, no other one counts a delivery.
        suspects = topology.suspects_queue(self.model)
        self._consumers = [await link.consume(suspects, partial(self._on_job, None), 1)]
        for lane, slots in self._slots.items():
            queue, take = topology.jobs_queue(self.model, lane), partial(self._on_job, lane)
            # Consumers of a higher priority are served first: a job goes to wait at a worker only once none has room.
            self._consumers += [
                await link.consume(queue, take, slots.count, priority=1),
                await link.consume(queue, take, LOOKAHEAD),
            ]

    def _on_control(self, delivery: Delivery) -> None:
        request_id = decode(Cancel, delivery.body).request_id
        if run := self._runs.get(request_id):
            self._end(run, Cancelled("The request was cancelled."))
            return
        # Its job may still wait in the queue; remember it for as long as a job can.
        now = time.monotonic()
        self._cancelled_early[request_id] = now
        for id_, since in list(self._cancelled_early.items()):
            if now - since <= self.settings.request_timeout_s:
                break
            del self._cancelled_early[id_]

    def _abandon(self, reply_to: str) -> None:
        """The server that waited is gone: stop what was made for it."""
        for run in list(self._runs.values()):
            if run.job.reply_to == reply_to:
                self._end(run, Cancelled("The server that waited is gone."))

    async def _feel_for_servers(self) -> None:
        """A frame comes back from a server that is gone; while an answer is made that is not streamed there is none."""
        while True:
            await asyncio.sleep(FEEL_S)
            for reply_to in {run.job.reply_to for run in self._runs.values()}:
                with contextlib.suppress(BrokerUnavailable):
                    self._publisher.send(reply_to, encode_frames([]))

    def _end(self, run: _Run, why: ServiceError) -> None:
        """Stop a job that is in hand, for good: it is not tried again."""
        if run.stopped is not None:
            return
        run.stopped = why
        if run.reply is not None:
            run.reply.muted = True
        if run.handling:  # otherwise it is noticed before the work begins, or too late to matter
            halting = asyncio.create_task(self._halt(run))
            self._halting.add(halting)
            halting.add_done_callback(self._halting.discard)
        elif self._slots[run.job.lane].turns.remove(run.job.key_id, run):
            self._start(run)  # it is done with at once, without its turn

    async def _halt(self, run: _Run) -> None:
        assert run.task is not None
        if await self.halt(run.job):
            await asyncio.wait({run.task}, timeout=HALT_S)
        if run.handling:
            run.task.cancel()

    def _give_up(self, request_id: str) -> None:
        """No more can be held of its answer."""
        if run := self._runs.get(request_id):
            self._end(run, Cancelled("No more of the answer can be held for the broker."))

    def _on_job(self, lane: Lane | None, delivery: Delivery) -> None:
        """Take a job from a lane's queue, or (None) from the suspects', who remember their lane."""
        try:
            job = decode(Job, delivery.body)
        except msgspec.DecodeError:
            logger.exception("not a job", extra={"action": "decode"})
            self._consumer.reject(delivery, requeue=False)
            return
        if job.model != self.model:
            logger.error("job of another model", extra={"action": "decode"})
            self._consumer.reject(delivery, requeue=False)
            return
        if run := self._runs.get(job.id):
            if run.delivery.channel is delivery.channel:
                logger.error("second job of one id", extra={"action": "decode", "request_id": job.id})
                self._consumer.reject(delivery, requeue=False)
            else:
                run.delivery = delivery  # delivered again after a reconnection, while it still runs
            return
        if lane is not None:
            job = replace(job, lane=lane)
            if delivery.attempt > topology.TRIES_TOGETHER:
                aside = asyncio.create_task(self._set_aside(job, delivery))
                self._asides.add(aside)  # or it may be collected before its end
                aside.add_done_callback(self._asides.discard)
                return
        run = self._runs[job.id] = _Run(job, delivery, suspect=lane is None)
        if self._cancelled_early.pop(job.id, None) is not None:
            self._end(run, Cancelled("The request was cancelled."))
        if lane is None or run.stopped is not None:
            self._start(run)
            self._count()
        else:
            self._slots[lane].turns.add(job.key_id, run, job.weight)
            self._start_next(lane)

    def _start_next(self, lane: Lane) -> None:
        slots = self._slots[lane]
        while slots.busy < slots.count and len(slots.turns):
            run, charged = slots.turns.pop()
            run.charged = charged
            self._start(run)
        self._count()

    def _start(self, run: _Run) -> None:
        self._slots[run.job.lane].busy += 1
        if run.job.lane == "interactive":
            self.beacon.began(run.job.reply_to)
        run.task = asyncio.create_task(self._run(run))

    def _waiting(self) -> list[tuple[Lane, _Run]]:
        """Those that wait, taken from their turns: they will not be started here."""
        waiting = [(lane, run) for lane, slots in self._slots.items() for run in slots.turns.clear()]
        for _, run in waiting:
            del self._runs[run.job.id]
        self._count()
        return waiting

    def _drop_waiting(self) -> None:
        """The connection is lost: the broker has given them to somebody, or gives them to this worker again."""
        self._waiting()

    async def _take_no_more(self) -> None:
        """And leave what waits to others."""
        for tag in self._consumers:
            with contextlib.suppress(BrokerUnavailable):  # then it ended with its connection
                await self._consumer.cancel_consumer(tag)
        await asyncio.gather(*(self._pass_on(lane, run) for lane, run in self._waiting()))

    async def _pass_on(self, lane: Lane, run: _Run) -> None:
        """To another worker. As a new message: a rejected one would count as a try, and this was none."""
        try:
            queue = topology.jobs_queue(self.model, lane)
            await self._publisher.publish(queue, run.delivery.body, message_id=run.job.id)
        except ServiceError:
            self._give_back(run.delivery)
        else:
            self._consumer.ack(run.delivery)

    async def _set_aside(self, job: Job, delivery: Delivery) -> None:
        """Move a job whose workers were lost to the suspects."""
        logger.warning("suspected", extra={"action": "suspect", "request_id": job.id, "attempt": delivery.attempt})
        try:
            await self._publisher.publish(topology.suspects_queue(self.model), encode(job), message_id=job.id)
        except ServiceError:
            self._give_back(delivery)
        else:
            self._consumer.ack(delivery)

    async def _run(self, run: _Run) -> None:
        queue = topology.suspects_queue(self.model) if run.suspect else topology.jobs_queue(self.model, run.job.lane)
        with spans.process(run.job, queue, run.delivery.attempt, run.taken_ns) as span:
            span.event("begun")
            outcome = await self._finish(run)
            span.tell({"qwen3.outcome": outcome})
            if outcome in ("failed", "expired"):
                span.fail(outcome)

    async def _finish(self, run: _Run) -> str:
        """Do the job, settle it and make room for the next; returns the outcome's name."""
        started = time.monotonic()
        outcome = "failed"
        settle: Callable[[Delivery], None] | None = self._consumer.ack
        try:
            outcome = await self._answer(run)
        except asyncio.CancelledError:
            outcome = "cancelled"
            settle = self._give_back  # draining ran out of time: another worker's turn
        except EngineDied:
            self._died.set()
            settle = None  # neither acked nor given back: the broker takes it back when this process ends
        finally:
            del self._runs[run.job.id]
            if run.used and run.job.lane == "interactive":
                self.beacon.took(time.monotonic() - started)
            slots = self._slots[run.job.lane]
            slots.busy -= 1
            slots.turns.settle(run.job.key_id, run.charged, run.used)
            if not self._died.is_set():
                self._start_next(run.job.lane)
            metrics.jobs.labels(self.model, outcome).inc()
            if settle is not None:
                settle(run.delivery)
        return outcome

    async def _answer(self, run: _Run) -> str:
        """Do the job and tell its end; returns the outcome's name. Raises CancelledError or EngineDied."""
        job = run.job
        reply = Reply(self._outbox, job.reply_to, job.id)
        if time.time() >= job.deadline:
            reply.fail(DeadlineExceeded("The request waited in the queue past its deadline."))
            return "expired"
        if run.stopped is None:
            reply.send("started", self.beacon.worker.encode())
            await self._hear_whether_wanted(job)
        if run.stopped is not None:
            reply.fail(run.stopped)
            return "cancelled"
        run.reply, run.handling = reply, True
        late = DeadlineExceeded("The request was not answered before its deadline.")
        left_s = min(job.deadline - time.time(), self.settings.request_timeout_s)
        deadline = asyncio.get_running_loop().call_later(left_s, self._end, run, late)
        answer: Answer | None = None
        try:
            with spans.generate(job, self.provider, tracing.current().traceparent) as span:
                answer = await self.handle(job, reply)
                spans.generated(span, answer.record)
        except asyncio.CancelledError:
            if run.stopped is None:
                raise
        except EngineDied:
            raise
        except ServiceError as exc:
            reply.fail(exc)
            return "refused" if exc.status < 500 else "failed"
        except Exception:
            logger.exception("job failed", extra={"action": "job", "request_id": job.id, "model": self.model})
            reply.fail(EngineFailed("The engine failed on this request."))
            return "failed"
        finally:
            run.handling = False
            deadline.cancel()
        recorded = None
        if answer is not None:
            run.used = answer.record.prompt_tokens + answer.record.completion_tokens
        if answer is not None and job.recorded:
            whole = run.stopped is None
            record = answer.record if whole else replace(answer.record, finish_reason="cancelled")
            recorded = self._record(record, tracing.current().traceparent or job.traceparent)
        # The record left before the last frame does: whoever has the whole answer has it in history too.
        if run.stopped is not None:
            reply.fail(run.stopped)
        elif answer is not None:
            reply.send(answer.kind, answer.data)
        if recorded is not None:
            await recorded
        return "done" if run.stopped is None else "expired" if run.stopped is late else "cancelled"

    async def _hear_whether_wanted(self, job: Job) -> None:
        """Let those who wait for a job that has waited long say, before the work, that they do not any more."""
        if time.time() - job.created_at < WAITED_S:
            return  # its cancel would have come by now, or comes while it runs
        self._outbox.flush()
        try:
            await self._publisher.settle(job.reply_to, encode_frames([]))
        except ServiceError:
            return  # the connection is down: nobody can be asked
        if job.created_at < self._listening_since:
            # Its cancel may have been told before this worker listened; its server tells it again.
            await asyncio.sleep(HEAR_S)

    def _record(self, record: Record, parent: str) -> Awaitable[None]:
        """Send the record to history now; what is returned ends when the broker has it, however long that takes."""
        span = spans.publish(topology.HISTORY, record.request_id, parent)
        if trace := span.traceparent or parent:
            record = replace(record, traceparent=trace)
        try:
            first = self._publisher.publish_soon(
                topology.HISTORY, encode(record), message_id=record.request_id, traceparent=record.traceparent
            )
        except BrokerUnavailable as exc:
            first = asyncio.get_running_loop().create_future()
            first.set_exception(exc)
        return self._until_recorded(first, record, span)

    async def _until_recorded(self, confirmed: Awaitable[None], record: Record, span: Span) -> None:
        with span:
            while True:
                try:
                    await confirmed
                except ServiceError as exc:
                    # Not answered again: the answer is out. A second copy is told by its request id.
                    extra = {"action": "record", "request_id": record.request_id, "error": type(exc).__name__}
                    logger.warning("record not published yet", extra=extra)
                    await asyncio.sleep(RECORD_RETRY_S)
                    confirmed = self._publisher.publish(
                        topology.HISTORY, encode(record), message_id=record.request_id, traceparent=record.traceparent
                    )
                else:
                    return

    def _give_back(self, delivery: Delivery) -> None:
        self._consumer.reject(delivery, requeue=True)

    def _count(self) -> None:
        self.beacon.waiting = sum(len(slots.turns) for slots in self._slots.values())
        self.beacon.waiting_batch = len(self._slots["batch"].turns)
        self.beacon.running = sum(slots.busy for slots in self._slots.values())
        metrics.jobs_running.labels(self.model).set(self.beacon.running)


def _exit_at_once(_number: int, _frame: object) -> None:
    raise SystemExit(0)
