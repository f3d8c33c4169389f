"""The jobs that a worker has taken from the broker: which of them wait, which is next, and where they go back to.

A job is delivered from its lane to wait for its turn, so that there a delivery is no beginning, and says nothing about
the job when its worker is lost. One whose workers were lost `TRIES_TOGETHER` times, begun or not, moves to the retries,
where each delivery is a beginning; if its worker is lost again, it is suspected, and run alone.
Knows neither models nor how a job is done.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from math import isqrt

import msgspec

from server.core import metrics, topology
from server.core.amqp import HEARTBEAT_S, AmqpLink, Delivery
from server.core.errors import BrokerUnavailable, ServiceError
from server.core.messages import Job, Lane, decode, encode
from workers.beacon import Beacon
from workers.runs import Run, Slots, Source

logger = logging.getLogger(__name__)

LOOKAHEAD = 1024
"""Jobs of a lane that a worker takes besides those it runs, to choose the next from by turns. What is not taken waits
in the order it came; servers let few jobs of a key come at once (server/admission.py), so that this holds all."""

BACK_S = 3.0 * HEARTBEAT_S
"""After a reconnection, for the broker to deliver again what was in hand: it may notice the loss later. What does not
come has been given to another worker."""

MOVE_RETRY_S = 1.0


class Intake:
    """`runs` are the jobs in hand by id, waiting ones included; `begin` does one of them, and calls `ended`. `refuse`
    stops one that comes and is not to be done. Once `closed`, nothing is taken any more."""

    def __init__(
        self,
        beacon: Beacon,
        consumer: AmqpLink,
        publisher: AmqpLink,
        begin: Callable[[Run], Coroutine[None, None, None]],
        refuse: Callable[[Run], None],
    ) -> None:
        self.runs: dict[str, Run] = {}
        self.slots: dict[Lane, Slots] = {}
        self.consumer, self.publisher = consumer, publisher
        self.closed = False
        self._beacon = beacon
        self._begin = begin
        self._refuse = refuse
        self._consumers: list[str] = []
        self._moving: set[asyncio.Task[None]] = set()
        self._missing: asyncio.TimerHandle | None = None
        self._apart = 0
        self._at_once = 1
        self._survived = 0
        self._wider: list[str] = []
        self._widening: asyncio.Task[None] | None = None
        model = beacon.model
        suspects = Source(topology.suspects_queue(model), None, topology.TRIES_ALONE)
        retries = Source(topology.retries_queue(model), None, topology.TRIES_FEW, suspects.queue)
        lanes: tuple[Lane, ...] = ("interactive", "batch")
        self.suspects, self.retries = suspects, retries
        self.lanes = {
            lane: Source(topology.jobs_queue(model, lane), lane, topology.TRIES_TOGETHER, retries.queue)
            for lane in lanes
        }
        self.open(1)

    def open(self, slots: int) -> None:
        """So many jobs are run at once. Batch work has slots of its own, a quarter as many, so that neither lane waits
        for the other."""
        self.slots = {"interactive": Slots(slots), "batch": Slots(max(1, slots // 4))}

    @property
    def running(self) -> int:
        return sum(slots.busy for slots in self.slots.values()) + self._apart

    async def consume(self, link: AmqpLink) -> None:
        """On a new connection."""
        held = sum(run.source is self.retries for run in self.runs.values())
        self._at_once, self._survived, self._wider = max(isqrt(self.slots["interactive"].count), held), 0, []
        # One suspect at a time: if it ends this worker, no other one counts a delivery.
        self._consumers = [
            await link.consume(self.suspects.queue, partial(self.take, self.suspects), 1),
            await link.consume(self.retries.queue, partial(self.take, self.retries), self._at_once),
        ]
        for lane, slots in self.slots.items():
            source = self.lanes[lane]
            # Consumers of a higher priority are served first: a job goes to wait at a worker only once none has room.
            self._consumers += [
                await link.consume(source.queue, partial(self.take, source), slots.count, priority=1),
                await link.consume(source.queue, partial(self.take, source), LOOKAHEAD),
            ]

    def take(self, source: Source, delivery: Delivery) -> None:
        try:
            job = decode(Job, delivery.body)
        except msgspec.DecodeError:
            logger.exception("not a job", extra={"action": "decode"})
            self.consumer.reject(delivery, requeue=False)
            return
        if job.model != self._beacon.model:
            logger.error("job of another model", extra={"action": "decode"})
            self.consumer.reject(delivery, requeue=False)
            return
        if run := self.runs.get(job.id):
            self._take_again(run, source, delivery)
            return
        if source.lane is not None:
            job = replace(job, lane=source.lane)
        if source.then and delivery.attempt > source.tries:
            moving = asyncio.create_task(self._move(job, source.then, delivery))
            self._moving.add(moving)  # or it may be collected before its end
            moving.add_done_callback(self._moving.discard)
            return
        run = self.runs[job.id] = Run(job, source, delivery)
        self._refuse(run)
        if source.lane is None or run.stopped is not None:
            self.start(run)
            self.count()
        else:
            self.slots[source.lane].turns.add(job.key_id, run, job.weight)
            self._start_next(source.lane)

    def _take_again(self, run: Run, source: Source, delivery: Delivery) -> None:
        """A job that is in hand."""
        if run.delivery.channel is delivery.channel:
            # A second copy: its worker was lost between moving it and acking it where it was.
            logger.warning("second job of one id", extra={"action": "copy", "request_id": run.job.id})
            self.consumer.ack(delivery)
        elif not run.dropped and source is run.source and delivery.attempt <= run.delivery.attempt + 1:
            run.delivery = delivery  # delivered again after a reconnection, while it still runs
            run.ours.set()
            if run.handling and run.reply is not None:
                run.reply.say_again_that_it_began()  # who left meanwhile could not have it stopped
        else:
            # Another worker has had it meanwhile, and whoever waits follows that one's answer: begin anew.
            assert run.task is not None  # what only waits is dropped with its connection
            if not run.dropped:
                run.drop()
            run.task.add_done_callback(lambda _task: self._take_anew(source, delivery))

    def _take_anew(self, source: Source, delivery: Delivery) -> None:
        if self.consumer.holds(delivery):
            self.take(source, delivery)

    def start(self, run: Run) -> None:
        if run.source.lane is None:
            self._apart += 1
        else:
            self.slots[run.source.lane].busy += 1
        if run.job.lane == "interactive":
            self._beacon.began(run.job.reply_to)
        run.task = asyncio.create_task(self._begin(run))

    def _start_next(self, lane: Lane) -> None:
        slots = self.slots[lane]
        while slots.busy < slots.count and len(slots.turns):
            run, charged = slots.turns.pop()
            run.charged = charged
            self.start(run)
        self.count()

    def ended(self, run: Run, *, more: bool) -> None:
        """A run is over; with `more`, the next is begun."""
        del self.runs[run.job.id]
        lane = run.source.lane
        self.slots[run.job.lane].turns.settle(run.job.key_id, run.charged, run.used)
        if lane is not None:
            self.slots[lane].busy -= 1
        else:
            self._apart -= 1
        if not more:
            return
        if lane is not None:
            self._start_next(lane)
        elif run.source is self.retries:
            self._widen()
        self.count()

    def skip(self, run: Run) -> None:
        """It is not to be done any more; if it waits, it is begun at once, without its turn, to be done with."""
        lane = run.source.lane
        if lane is not None and self.slots[lane].turns.remove(run.job.key_id, run):
            self.start(run)

    def lost(self) -> None:
        """The connection is lost: the broker gives what waits to somebody, and what runs as well, or to us again."""
        if self._missing is not None:
            self._missing.cancel()
        self._clear()
        for run in self.runs.values():
            run.ours.clear()

    def back(self) -> None:
        """There is a connection again."""
        if self.closed:
            self._drop_missing()  # nothing is taken any more: others are given what was in hand
        else:
            self._missing = asyncio.get_running_loop().call_later(BACK_S, self._drop_missing)

    def _drop_missing(self) -> None:
        for run in self.runs.values():
            if not run.ours.is_set():
                logger.warning("given to another", extra={"action": "drop", "request_id": run.job.id})
                run.drop()

    def _clear(self) -> list[Run]:
        """Those that wait, taken from their turns: they will not be started here."""
        waiting = [run for slots in self.slots.values() for run in slots.turns.clear()]
        for run in waiting:
            del self.runs[run.job.id]
        self.count()
        return waiting

    async def close(self) -> None:
        """Take nothing more, and leave what waits to others."""
        self.closed = True
        await self._cancel(self._consumers + self._wider)
        await asyncio.gather(*(self._pass_on(run) for run in self._clear()))

    async def _pass_on(self, run: Run) -> None:
        """To another worker. As a new message: a rejected one would count as a try, and this was none."""
        if not self.consumer.holds(run.delivery):
            return  # the broker gives it to another
        try:
            await self.publisher.publish(run.source.queue, run.delivery.body, message_id=run.job.id)
        except ServiceError:
            self.give_back(run.delivery)
        else:
            self.consumer.ack(run.delivery)

    async def _move(self, job: Job, queue: str, delivery: Delivery) -> None:
        """Move a job whose workers were lost. Held until the queue takes it: given back, it would count a delivery."""
        extra = {"action": "suspect", "request_id": job.id, "attempt": delivery.attempt, "queue": queue}
        logger.warning("moved", extra=extra)
        while self.consumer.holds(delivery):
            try:
                await self.publisher.publish(queue, encode(job), message_id=job.id)
            except ServiceError:
                await asyncio.sleep(MOVE_RETRY_S)
            else:
                self.consumer.ack(delivery)
                return

    def give_back(self, delivery: Delivery) -> None:
        self.consumer.reject(delivery, requeue=True)

    def _widen(self) -> None:
        """Of the retries twice as many are run at once each time that as many have left the worker alive: what one that
        kills has for company is suspected too, and run one by one."""
        self._survived += 1
        if self._survived < self._at_once or self.closed or (self._widening and not self._widening.done()):
            return
        more = min(self._at_once, self.slots["interactive"].count - self._at_once)
        if more > 0:
            self._at_once, self._survived = self._at_once + more, 0
            self._widening = asyncio.create_task(self._consume_more(more))

    async def _consume_more(self, count: int) -> None:
        with contextlib.suppress(BrokerUnavailable):
            take = partial(self.take, self.retries)
            self._wider.append(await self.consumer.consume(self.retries.queue, take, count))

    def narrow(self) -> None:
        """Few at once again, where there are no retries any more; asked once a second."""
        if self._wider and not any(run.source is self.retries for run in self.runs.values()):
            wider, self._wider = self._wider, []
            self._at_once, self._survived = isqrt(self.slots["interactive"].count), 0
            self._widening = asyncio.create_task(self._cancel(wider))

    async def _cancel(self, consumers: list[str]) -> None:
        for tag in consumers:
            with contextlib.suppress(BrokerUnavailable):  # then it ended with its connection
                await self.consumer.cancel_consumer(tag)

    def count(self) -> None:
        self._beacon.waiting = sum(len(slots.turns) for slots in self.slots.values())
        self._beacon.waiting_batch = len(self.slots["batch"].turns)
        self._beacon.running = self.running
        metrics.jobs_running.labels(self._beacon.model).set(self._beacon.running)
