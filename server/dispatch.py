"""From a validated request to its frames: admit, queue, match, cancel, and say where it stands.

Knows no HTTP and no dialect.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from server.admission import Line, Place
from server.core.amqp import AmqpLink
from server.core.errors import AnswerLost, BrokerUnavailable, Cancelled, NoWorker, QueueFull, ServiceError
from server.core.inbox import Inbox, Waiter
from server.core.messages import Api, ErrorFrame, Frame, Job, RequestState, RequestStatus, encode_frames
from server.core.registry import ModelSpec, Registry
from server.core.settings import Settings
from server.fleet import Fleet
from server.limits import MAX_EMBEDDING_INPUTS
from server.peers import Peers
from server.schemas.embeddings import MAX_TEXTS

ENDED_S = 600.0
"""How long it is remembered how a request ended that nothing else remembers."""
MAX_ENDED = 10_000
"""How many of them; the oldest are forgotten first."""

HEARD_S = 2.0
"""In which a broker takes a message that serves well; an answer to a probe cannot wait for longer."""
MAX_PARTS = -(-MAX_EMBEDDING_INPUTS // MAX_TEXTS)
"""Jobs of one request, at the most."""
LOOK_EVERY_S = 1.0
"""How often workers are looked at: as often as they tell of themselves."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a dialect wants done. `body` has the shape of `api` and is complete: the worker adds no defaults."""

    request_id: str
    spec: ModelSpec
    endpoint: str
    api: Api
    body: dict[str, Any]
    key_id: int
    session_id: str = ""
    recorded: bool = True
    traceparent: str = ""
    context: str = ""
    weight: int = 1


class Ticket:
    """A submitted call. Close it once its client is done or gone: an unfinished job is then cancelled."""

    def __init__(
        self, waiter: Waiter, line: Line, on_end: Callable[[Waiter, RequestStatus, ServiceError | None], None]
    ) -> None:
        self._waiter = waiter
        self._line = line
        self._on_end = on_end
        self._over = False
        self.request_id = waiter.job.id
        self.api: Api = waiter.job.api

    @property
    def place(self) -> Place | None:
        """Where it stands among those who wait for its model; None where a worker has begun it."""
        return self._line.place(self.request_id)

    async def next(self) -> Frame:
        """The next chunk, usage, result or done frame. Raises the ServiceError the request ended with."""
        try:
            frame = await self._waiter.next()
        except ServiceError as exc:
            self._end("cancelled" if isinstance(exc, Cancelled) else "failed", exc)
            raise
        if frame.kind in ("result", "done"):
            self._end("completed")
        return frame

    def close(self) -> None:
        self._end("cancelled")

    def _end(self, status: RequestStatus, error: ServiceError | None = None) -> None:
        if not self._over:
            self._over = True
            self._on_end(self._waiter, status, error)


async def _declare_nothing(_link: AmqpLink) -> None:
    """A connection that only asks."""


class Dispatcher:
    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.timeout_s = settings.request_timeout_s
        self.on_demand = settings.on_demand
        self._ended: OrderedDict[str, RequestState] = OrderedDict()
        self.fleet = Fleet()
        self._lines = {model.id: Line(settings.queue_max_jobs) for model in registry.models}
        self._workers: dict[str, set[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.peers = Peers(self.state, self.cancel)
        self.inbox = Inbox(
            settings.amqp_url,
            "server",
            [model.id for model in registry.models],
            settings.queue_max_jobs,
            also_consume=self._consume,
            max_unread_bytes=settings.stream_buffer_bytes,
        )
        self.peers.inbox = self.inbox
        self.inbox.on_begun = lambda request_id: self._let_go(self._line_of(request_id).left(request_id))
        # Its own connection: asking for a queue that is gone closes the channel it is asked on.
        self.scraper = AmqpLink(settings.amqp_url, "server metrics", _declare_nothing)

    async def _consume(self, link: AmqpLink) -> None:
        await self.fleet.consume(link)
        await self.peers.consume(link)

    async def start(self) -> None:
        """Raises BrokerUnavailable."""
        await asyncio.gather(self.inbox.start(), self.scraper.start())
        self._keep(self._watch_workers())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self.inbox.close(), self.scraper.close())

    def give_up(self) -> None:
        """This server's time is over: each request that is not answered yet ends with an error, and its job stops."""
        for waiter in self.inbox.waiting.values():
            waiter.put(AnswerLost("This server is stopping, and has no time left for the rest.", retry_after_s=1))

    @property
    def connected(self) -> bool:
        return self.inbox.publisher.connected and self.inbox.consumer.connected

    @property
    def blocked(self) -> str:
        """Why the broker takes nothing for now, nor tells of workers; empty where it does."""
        return self.inbox.publisher.blocked

    async def heard(self) -> bool:
        """Whether the broker takes messages now, found out by sending ourselves an empty one, within HEARD_S: who sends
        nothing is not told that it is blocked, and would take workers that cannot speak for gone."""
        try:
            async with asyncio.timeout(HEARD_S):
                await self.inbox.publisher.settle(self.inbox.queue, encode_frames([]))
        except (BrokerUnavailable, TimeoutError):
            return False
        return True

    async def submit(self, call: Call) -> Ticket:
        """Queue the call. Raises NoWorker, QueueFull or BrokerUnavailable."""
        absent = not self.fleet.has(call.spec.type, call.spec.id)
        if self.connected and absent and call.spec.id not in self.on_demand:
            raise NoWorker(
                f"No worker for {call.spec.id} is ready. It may still be starting: see /health.", retry_after_s=5
            )
        now = time.time()
        job = Job(
            id=call.request_id,
            model=call.spec.id,
            endpoint=call.endpoint,
            body=call.body,
            key_id=call.key_id,
            reply_to=self.inbox.queue,
            created_at=now,
            deadline=now + self.timeout_s,
            session_id=call.session_id,
            recorded=call.recorded,
            traceparent=call.traceparent,
            api=call.api,
            context=call.context,
            weight=call.weight,
        )
        line = self._lines[job.model]
        waiter = self.inbox.expect(job)
        try:
            if line.enter(job):
                await self._send(waiter)
        except BaseException:
            self.inbox.release(job.id)
            self._let_go(line.left(job.id))
            raise
        return Ticket(waiter, line, self._end)

    async def _send(self, waiter: Waiter) -> None:
        try:
            await self.inbox.send(waiter, "interactive")
        except QueueFull as exc:  # other servers have filled it
            raise self._lines[waiter.job.model].refusal("The queue of this model is full") from exc

    def _let_go(self, jobs: list[Job]) -> None:
        """Send jobs that have waited here for their turn."""
        for job in jobs:
            waiter = self.inbox.waiting.get(job.id)
            if waiter is not None and job.reply_to == self.inbox.queue:  # else its answer could not arrive any more
                self._keep(self._send_late(waiter))

    async def _send_late(self, waiter: Waiter) -> None:
        try:
            await self._send(waiter)
        except ServiceError as exc:
            waiter.put(exc)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch_workers(self) -> None:
        """Tell the lines how their workers fare, and let others go for those that a lost worker may have had."""
        while True:
            for model, line in self._lines.items():
                workers = [worker for worker in self.fleet.workers() if worker.model == model]
                line.hear(workers, self.inbox.queue)
                names = {worker.worker for worker in workers if worker.ready}
                if self._workers.get(model, set()) - names:
                    self._let_go(line.send_anew())
                self._workers[model] = names
            await asyncio.sleep(LOOK_EVERY_S)

    def _line_of(self, request_id: str) -> Line:
        return self._lines[self.inbox.waiting[request_id].job.model]

    def _end(self, waiter: Waiter, status: RequestStatus, error: ServiceError | None) -> None:
        """A request is over, for whoever waited for it; what a worker may still do for it stops."""
        self.inbox.release(waiter.job.id)
        self._let_go(self._lines[waiter.job.model].left(waiter.job.id))
        if status != "completed" and waiter.sent:
            self.inbox.cancel(waiter.job.id)
        now = time.time()
        if error is not None and error.status >= 500:
            waiter.span.fail(type(error).__name__)  # also in a stream, which has long begun with status 200
        waiter.span.tell({"qwen3.outcome": status})
        told = ErrorFrame(error.status, error.message, error.param, error.code) if error is not None else None
        self._ended[waiter.job.id] = replace(self._state(waiter), status=status, finished_at=now, error=told)
        while self._ended and (
            len(self._ended) > MAX_ENDED or next(iter(self._ended.values())).finished_at < now - ENDED_S
        ):
            self._ended.popitem(last=False)

    def state(self, request_id: str, key_id: int) -> RequestState | None:
        """Where a request of this key stands; None if this process never had it, or has forgotten it."""
        ids, waiting = ids_of(request_id), self.inbox.waiting
        going_on = [self._state(waiting[id_]) for id_ in ids if id_ in waiting]
        ended = [self._ended[id_] for id_ in ids if id_ in self._ended]
        # Of several jobs at once, the one that failed says how the request ended: the others were cancelled for it.
        worst = ("failed", "cancelled", "completed")
        ended.sort(key=lambda state: (state.request_id != again(request_id), worst.index(state.status)))
        found = next((state for state in going_on + ended if state.key_id == key_id), None)
        return None if found is None else replace(found, request_id=request_id)

    def cancel(self, request_id: str, key_id: int) -> RequestState | None:
        """Stop a request of this key, if this process has it. One that runs ends when its worker has said so."""
        for id_ in ids_of(request_id):
            waiter = self.inbox.waiting.get(id_)
            if waiter is not None and waiter.job.key_id == key_id:
                if waiter.sent:
                    self.inbox.cancel(id_)
                if not waiter.started:
                    waiter.put(Cancelled("The request was cancelled."))  # its turn may be long in coming
                    return replace(self._state(waiter), request_id=request_id, status="cancelled")
        return self.state(request_id, key_id)

    def queued(self) -> list[Waiter]:
        """The requests of this server that no worker has begun, wherever they wait: here, in the broker, or at a
        worker that looks ahead. Those whose worker is lost wait again."""
        # While the broker takes nothing, workers cannot say that they live.
        heard = None if self.blocked else {worker.worker for worker in self.fleet.workers()}
        return [waiter for waiter in self.inbox.waiting.values() if _waits(waiter, heard)]

    def _state(self, waiter: Waiter) -> RequestState:
        job = waiter.job
        status: RequestStatus = "running" if waiter.started else "queued"
        state = RequestState(job.id, job.key_id, status, job.model, job.endpoint, job.created_at)
        if (place := self._lines[job.model].place(job.id)) is not None:
            wait_s = None if place.wait_s is None else round(place.wait_s, 1)
            state = replace(state, queue_position=place.position, estimated_wait_s=wait_s)
        return state


def _waits(waiter: Waiter, heard: set[str] | None) -> bool:
    """Whether no worker has begun it, or only one that is not among those `heard` of (None: nobody can be)."""
    return not waiter.started or (heard is not None and waiter.worker != "" and waiter.worker not in heard)


def ids_of(request_id: str) -> list[str]:
    """The ids that a request's jobs may have."""
    return [again(request_id), *(part(request_id, number) for number in range(MAX_PARTS))]


def again(request_id: str) -> str:
    """Of the second job of a request that is asked again without past chats."""
    return f"{request_id}-again"


def part(request_id: str, number: int) -> str:
    """Of one of a request's jobs at once. The first bears the request's own id: usage counts that one as a request."""
    return f"{request_id}.{number}" if number else request_id
