"""What every worker does with a job: keep deadlines, heed cancels, answer, record, ack; and with itself: tell its load,
drain, end when its model does.

Knows nothing of models; a worker type says what to do with a job in `handle`.
"""

import asyncio
import contextlib
import logging
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from server.core import metrics, spans, topology, tracing
from server.core.amqp import AmqpLink, Delivery
from server.core.continuation import may_continue
from server.core.errors import AnswerLost, BrokerUnavailable, Cancelled, DeadlineExceeded, EngineFailed, ServiceError
from server.core.messages import Cancel, FrameKind, Job, Record, WorkerType, decode, encode_frames
from server.core.settings import Settings
from server.core.signals import stop_event
from workers.beacon import Beacon
from workers.intake import Intake
from workers.probe import Probe
from workers.records import send_record
from workers.replies import Reply, ReplyOutbox
from workers.runs import Run
from workers.serving import EngineDied

logger = logging.getLogger(__name__)

FEEL_S = 0.4
"""How often it is looked whether the servers that wait are still there, for answers that send nothing for long."""
WAITED_S = 1.0
"""A job older than this when it is taken may have lost its client meanwhile."""
HEAR_S = 0.25
"""For a server to say that nobody waits for a job any more."""
HALT_S = 3.0
"""For an engine that was told to stop to hand over what it has made, and for that to be recorded; then it is taken by
force, and what it has made is not recorded. Longer than a process stands still that others keep from its core."""
HALT_EVERY_S = 0.05

TOLD_HUNG_S = 6.0
"""A model that owes an answer for this long, and does nothing, is not ready."""
ENDED_HUNG_S = 10.0
"""And after this long it is ended, so that its jobs go to another worker, or to this one when it was started again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a job ended well: the last frame's `kind` and `data`, and what is kept of it."""

    kind: FrameKind
    data: bytes
    record: Record


class Worker(ABC):
    """A worker of one model. Subclasses load the model in `start` and answer in `handle`."""

    type: WorkerType
    provider = "unknown"
    """What makes the answers, for `gen_ai.provider.name`."""

    def __init__(self, settings: Settings, model: str) -> None:
        self.settings = settings
        self.model = model
        self.probe = Probe(settings.host, settings.metrics_port)
        self._cancelled_early: dict[str, float] = {}
        self._halting: set[asyncio.Task[None]] = set()
        self._listening_since = 0.0
        self._died = asyncio.Event()
        self._publisher = AmqpLink(
            settings.amqp_url, f"{self.type} {model} publish", self._setup_publisher, on_return=self._abandon
        )
        self._consumer = AmqpLink(
            settings.amqp_url, f"{self.type} {model} consume", self._setup_consumer, on_lost=lambda: self._intake.lost()
        )
        self._outbox = ReplyOutbox(self._publisher, lambda: self.beacon.running > 1, self._give_up)
        self.beacon = Beacon(self._publisher, self.type, model, self.probe)
        self._intake = Intake(self.beacon, self._consumer, self._publisher, self._run, self._refuse)
        metrics.begin_worker(self.type, model)

    @abstractmethod
    async def start(self) -> int:
        """Load the model; returns how many jobs it handles at once. May block the event loop."""

    @abstractmethod
    async def handle(self, job: Job, reply: Reply) -> Answer:
        """Answer the job; what comes before the last frame goes through `reply`. Raises ServiceError."""

    async def halt(self, job: Job) -> bool:
        """Have `handle` return soon with what it has made so far; asked until it has. False where that cannot be: it is
        cancelled then."""
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
            self._intake.open(slots)
            self.beacon.slots = slots
            stopping = stop_event()
            await self._publisher.start()
            await self._consumer.start()
            return await self._serve(stopping)
        finally:
            self.probe.ready = False
            self._outbox.flush()  # so that what is done is settled while it can be
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
                self._intake.narrow()
            if self._died.is_set():
                logger.critical("engine died", extra={"action": "engine_died", "model": self.model})
                await self._intake.close()
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
        logger.info("draining", extra={"action": "drain", "running": len(self._intake.runs)})
        self.probe.ready = False
        self.beacon.say()
        await self._intake.close()
        runs = {run.task: run for run in self._intake.runs.values() if run.task is not None}
        if runs:
            _, late = await asyncio.wait(runs, timeout=self.settings.drain_timeout_s)
            alone = [task for task in late if _ends_here(runs[task])]
            for task in alone:  # others cannot go on with it: it ends here, and is recorded as far as it came
                self._end(runs[task], AnswerLost("The worker is stopping, and has no time left for the rest."))
            if alone:
                await asyncio.wait(alone, timeout=HALT_S)
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
        if not self._intake.closed:
            await self._intake.consume(link)
        self._intake.back()

    def _on_control(self, delivery: Delivery) -> None:
        cancel = decode(Cancel, delivery.body)
        request_id = cancel.request_id
        if run := self._intake.runs.get(request_id):
            run.unwanted |= cancel.unwanted
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
        for run in list(self._intake.runs.values()):
            if run.job.reply_to == reply_to:
                self._end(run, Cancelled("The server that waited is gone."))

    async def _feel_for_servers(self) -> None:
        """A frame comes back from a server that is gone; while an answer is made that is not streamed there is none."""
        while True:
            await asyncio.sleep(FEEL_S)
            for reply_to in {run.job.reply_to for run in self._intake.runs.values()}:
                with contextlib.suppress(BrokerUnavailable):
                    self._publisher.send(reply_to, encode_frames([]))

    def _end(self, run: Run, why: ServiceError) -> None:
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
        else:
            self._intake.skip(run)

    async def _halt(self, run: Run) -> None:
        assert run.task is not None
        until = time.monotonic() + HALT_S
        # Again and again: an engine may not have all of it yet, or no more, while its last words are on their way.
        while run.handling and time.monotonic() < until and await self.halt(run.job):
            await asyncio.wait({run.task}, timeout=HALT_EVERY_S)
        if run.handling:
            run.task.cancel()

    def _give_up(self, request_id: str) -> None:
        """No more can be held of its answer."""
        if run := self._intake.runs.get(request_id):
            self._end(run, Cancelled("No more of the answer can be held for the broker."))

    def _refuse(self, run: Run) -> None:
        """Of a job that comes: whether it was cancelled before."""
        if self._cancelled_early.pop(run.job.id, None) is not None:
            self._end(run, Cancelled("The request was cancelled."))

    async def _run(self, run: Run) -> None:
        with spans.process(run.job, run.source.queue, run.delivery.attempt, run.taken_ns) as span:
            span.event("begun")
            outcome = await self._finish(run)
            span.tell({"qwen3.outcome": outcome})
            if outcome in ("failed", "expired"):
                span.fail(outcome)

    async def _finish(self, run: Run) -> str:
        """Do the job, settle it and make room for the next; returns the outcome's name."""
        started = time.monotonic()
        outcome = "failed"
        settle: Callable[[Delivery], None] | None = self._consumer.ack
        try:
            outcome = await self._answer(run)
        except asyncio.CancelledError:
            outcome = "cancelled"
            settle = self._intake.give_back  # another worker's turn, as draining ran out of time; or it has it already
        except EngineDied:
            self._died.set()
            settle = None  # neither acked nor given back: the broker takes it back when this process ends
        finally:
            if run.used and run.job.lane == "interactive":
                self.beacon.took(time.monotonic() - started)
            self._intake.ended(run, more=not self._died.is_set())
            metrics.jobs.labels(self.model, outcome).inc()
            if settle is not None:
                self._outbox.after(partial(settle, run.delivery))
        return outcome

    async def _answer(self, run: Run) -> str:
        """Do the job and tell its end; returns the outcome's name. Raises CancelledError or EngineDied."""
        job = run.job
        reply = Reply(self._outbox, job.reply_to, job.id)
        if time.time() >= job.deadline:
            reply.fail(DeadlineExceeded("The request waited in the queue past its deadline."))
            return "expired"
        if run.stopped is None:
            await self._feel_for(job)
            if not self._consumer.holds(run.delivery):
                return "lost"  # others have it, or it comes again
            reply.send("started", self.beacon.worker.encode())
            await self._hear_whether_wanted(run)
        if run.stopped is not None:
            reply.fail(run.stopped)
            return "cancelled"
        run.reply, run.handling = reply, True
        late = DeadlineExceeded("The request was not answered before its deadline.")
        left_s = min(job.deadline - time.time(), self.settings.request_timeout_s)
        deadline = asyncio.get_running_loop().call_later(left_s, self._end, run, late)
        answer: Answer | None = None
        error: ServiceError | None = None
        try:
            with spans.generate(job, self.provider, tracing.current().traceparent) as span:
                answer = await self.handle(job, reply)
                spans.generated(span, answer.record)
        except asyncio.CancelledError:
            if run.stopped is None or run.dropped:
                raise
        except EngineDied:
            raise
        except ServiceError as exc:
            error = exc
        except Exception:
            logger.exception("job failed", extra={"action": "job", "request_id": job.id, "model": self.model})
            error = EngineFailed("The engine failed on this request.")
        finally:
            run.handling = False
            deadline.cancel()
        # Of an answer that another worker makes as well, one counts: that of the one that was given the job last.
        await run.ours.wait()
        if error is not None:
            reply.fail(error)
            return "refused" if error.status < 500 else "failed"
        recorded = None
        if answer is not None:
            run.used = answer.record.prompt_tokens + answer.record.completion_tokens
        if answer is not None and job.recorded and not run.unwanted:
            whole = run.stopped is None
            record = answer.record if whole else replace(answer.record, finish_reason="cancelled")
            recorded = send_record(
                self._publisher, record, tracing.current().traceparent or job.traceparent, run.counts
            )
        # The record left before the last frame does: whoever has the whole answer has it in history too.
        if run.stopped is not None:
            reply.fail(run.stopped)
        elif answer is not None:
            reply.send(answer.kind, answer.data)
        if recorded is not None and await recorded:
            reply.repeat()  # a connection that lost the record may have lost the frames before it as well
        return "done" if run.stopped is None else "expired" if run.stopped is late else "cancelled"

    async def _feel_for(self, job: Job) -> None:
        """Notice, before the work, that the server is gone that waits for a job, where it has waited long."""
        if time.time() - job.created_at < WAITED_S:
            return  # it is noticed while the job runs
        try:
            await self._publisher.settle(job.reply_to, encode_frames([]))
        except ServiceError:
            # Nobody can be asked. The connection that the job came by may be gone too, which is noticed a moment later:
            # where this process stood still, others have the job, and may have begun it.
            await asyncio.sleep(FEEL_S)

    async def _hear_whether_wanted(self, run: Run) -> None:
        """Let the server say, before the work, that nobody waits any more, where this worker may not have heard it or
        the job was refused and taken all the same; or that a stream that was begun elsewhere cannot go on."""
        before = max(self._listening_since, self._publisher.unblocked_at)
        if run.job.created_at < before or run.delivery.attempt > 1 or run.source.lane is None:
            self._outbox.flush()
            await asyncio.sleep(HEAR_S)


def _ends_here(run: Run) -> bool:
    """Whether nobody else can go on with it."""
    return bool(run.reply and run.reply.told and run.job.body.get("stream")) and not may_continue(run.job)


def _exit_at_once(_number: int, _frame: object) -> None:
    raise SystemExit(0)
