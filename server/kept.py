"""Answers that are kept: for a request with an `Idempotency-Key`, one generation, whoever asks for it and how often.

Such a request is answered in a task of its own, apart from any connection, into a log of events with ids. Its clients
read from the log, here or through another server process (server/peers.py), from where they left off; when the last of
them leaves, a time of grace begins before it is given up. Once whole, the answer is in Postgres until it expires; one
that failed is forgotten, so that it can be tried again. Knows no dialect: an answer is what HTTP made of it.
"""

import asyncio
import contextlib
import hashlib
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect

from server.core.errors import AnswerLost, EngineFailed, InvalidRequest, NotFound, ServiceError, Unprocessable
from server.core.messages import Ask, ErrorFrame, FrameKind, Head, decode, encode
from server.core.settings import Settings
from server.db.store import Store
from server.dispatch import Dispatcher
from server.errors import PREFIX, answer_to, dialect_of, error_body, error_response
from server.peers import ANSWER_S, MAX_PASSED_BYTES
from server.sse import SseResponse, event, unless_disconnected

logger = logging.getLogger(__name__)

MAX_KEY = 255
"""Characters of an Idempotency-Key, as Stripe has it."""
MAX_BYTES = MAX_PASSED_BYTES
"""Of an answer that is kept once it is whole; only vectors of very many texts are larger."""
TAKEN_OVER_AFTER = 2
"""Asks without an answer, after which whoever made an answer is taken for dead. More than one, because a process hears
of a request's claim before it has the request in hand."""
BEAT_S = 2.0
"""How often a process that passes an answer on says that it lives, while there is nothing to pass on."""
LOST_S = 10.0
"""Without a word from it, that process is taken for dead."""
FORGET_EVERY_S = 60.0
SETTLE_RETRY_S = 2.0
CLOSE_S = 2.0
MAX_RELAYED = 1000
"""Events in one message."""
LOST = "The answer was given up before it was whole. Ask again."
REPLAYED = {"Idempotent-Replayed": "true"}

Make = Callable[[Callable[[], Awaitable[Any]]], Awaitable[Response]]
"""Answers the request; given what to receive from instead of its connection."""


class Log:
    """An answer as it is made: its head, then its events (of one that is not streamed its body, as the only one)."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.events: list[bytes] = []
        self.over = False
        self.lost = False
        """Whether its end is not the answer's."""
        self._news = asyncio.Event()

    def begin(self, head: Head) -> None:
        self.head = head
        self._tell()

    def add(self, event: bytes) -> None:
        self.events.append(event)
        self._tell()

    def end(self, *, lost: bool = False) -> None:
        self.over, self.lost = True, lost
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def news(self) -> None:
        await self._news.wait()

    async def begun(self) -> Head:
        """Raises AnswerLost."""
        while self.head is None:
            if self.over:
                raise AnswerLost(LOST, retry_after_s=1)
            await self.news()
        return self.head

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """The events beyond the first `after`, as they come, to the end. Raises AnswerLost."""
        while True:
            for made in self.events[after:]:
                after += 1
                yield made
            if len(self.events) <= after:
                if self.lost:
                    raise AnswerLost(LOST)
                if self.over:
                    return
                await self.news()


class Kept:
    """A request in the making, and how many read its answer. Without a reader it ends after `grace_s`."""

    def __init__(self, request_id: str, key_id: int, grace_s: float) -> None:
        self.request_id = request_id
        self.key_id = key_id
        self.log = Log()
        self.task: asyncio.Task[None] | None = None
        self.settled = False
        """Whether Postgres has the answer, or knows that there is none."""
        self._grace_s = grace_s
        self._readers = 0
        self._giving_up: asyncio.TimerHandle | None = None

    def join(self) -> None:
        self._readers += 1
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def leave(self) -> None:
        self._readers -= 1
        if not self._readers and not self.log.over and self.task is not None:
            self._giving_up = asyncio.get_running_loop().call_later(self._grace_s, self.task.cancel)


@dataclass(frozen=True, slots=True)
class Source:
    """Where an answer is read from: its head, its events from some point on, and what to do when the reader leaves."""

    head: Head
    events: AsyncGenerator[bytes, None]
    leave: Callable[[], None]


class Keeper:
    def __init__(self, settings: Settings, store: Store, dispatcher: Dispatcher) -> None:
        self._ttl_s = settings.idempotency_ttl_s
        self._grace_s = settings.resume_grace_s
        self._store = store
        self._dispatcher = dispatcher
        self._peers = dispatcher.peers
        self._making: dict[str, Kept] = {}
        self._relays: dict[str, tuple[Ask, asyncio.Task[None]]] = {}
        self._peers.on_events = self._on_ask
        dispatcher.inbox.on_return = self._on_return

    async def close(self, left_s: float) -> None:
        """What is made has so long to end, for others may read it, or its client may come back; then it is given up."""
        making = [kept.task for kept in self._making.values() if kept.task is not None]
        if making and left_s > 0:
            await asyncio.wait(making, timeout=left_s)
            if self._relays:
                await asyncio.wait([task for _, task in self._relays.values()], timeout=CLOSE_S)
        tasks = [task for task in making if not task.done()] + [task for _, task in self._relays.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_S)
            for task in late:
                task.cancel()  # from waiting for Postgres
        await asyncio.gather(*tasks, return_exceptions=True)

    async def forget(self) -> None:
        """Remove what has expired, for as long as this process runs."""
        while True:
            await asyncio.sleep(FORGET_EVERY_S)
            try:
                await self._store.forget_answers()
            except ServiceError:
                continue  # it is not there; what has expired is not used either

    async def answer(self, request: Request, content: bytes, make: Make) -> Response:
        """The answer to a request with an Idempotency-Key: made now, or once before. Raises ServiceError."""
        name, after = _key_of(request), last_event_id(request)
        key_id: int = request.state.principal.key_id
        request_id: str = request.state.request_id
        fingerprint = _fingerprint(request, content)
        while True:
            claimed = await self._store.claim_answer(key_id, name, fingerprint, (request_id, self._ttl_s))
            if claimed["fingerprint"] != fingerprint:
                raise Unprocessable(
                    "Idempotency-Key: stands for another request already. Send that one again, or choose another key.",
                    param="Idempotency-Key",
                )
            first: str = claimed["request_id"]
            if first == request_id:
                break
            for _ in range(TAKEN_OVER_AFTER):
                if source := await unless_disconnected(request, self._find(first, key_id, after)):
                    request.state.request_id = first
                    return await self._read(request, source, REPLAYED)
            if await self._store.take_over_answer(first, request_id):
                break
        if after:
            await self._store.release_answer(request_id)
            raise NotFound("Last-Event-ID: there is no answer to go on with any more. Ask without it.")
        kept = self._making[request_id] = Kept(request_id, key_id, self._grace_s)
        kept.join()
        kept.task = asyncio.create_task(self._make(kept, request, make))
        try:
            head = await unless_disconnected(request, kept.log.begun())
        except BaseException:
            kept.leave()
            raise
        return await self._read(request, Source(head, kept.log.follow(0), kept.leave))

    async def resume(self, request: Request, request_id: str) -> Response:
        """The answer of a kept request by its id, from the Last-Event-ID on. Raises NotFound."""
        finding = self._find(request_id, request.state.principal.key_id, last_event_id(request))
        source = await unless_disconnected(request, finding)
        if source is None:
            raise NotFound(
                f"There is no answer kept for a request {ascii(request_id[:64])[1:-1]} of this key. "
                "Answers are kept for requests with an Idempotency-Key."
            )
        request.state.request_id = request_id
        return await self._read(request, source, REPLAYED)

    async def _find(self, request_id: str, key_id: int, after: int) -> Source | None:
        """The answer of a request of this key, wherever it is. Waits for its head."""
        kept = self._making.get(request_id)
        if kept is not None and kept.key_id == key_id:
            kept.join()
            try:
                return Source(await kept.log.begun(), kept.log.follow(after), kept.leave)
            except BaseException:
                kept.leave()
                raise
        if row := await self._store.find_answer(key_id, request_id):
            return Source(Head(**row["head"]), _each(row["events"][after:]), lambda: None)
        here = self._peers.inbox.queue
        return await self._elsewhere(Ask(uuid.uuid4().hex, request_id, key_id, here, "events", after))

    async def _elsewhere(self, ask: Ask) -> Source | None:
        """The answer that another process makes; None if none does."""
        with ExitStack() as stack:
            waiter = stack.enter_context(self._peers.asking(ask, timeout_s=self._dispatcher.timeout_s))
            stack.callback(self._peers.tell, replace(ask, what="leave"))
            try:
                async with asyncio.timeout(ANSWER_S):
                    frame = await waiter.next()
                while not frame.data:  # it is there, and waits for its head as well
                    async with asyncio.timeout(LOST_S):
                        frame = await waiter.next()
            except TimeoutError:
                return None
            keeping = stack.pop_all()

        async def events() -> AsyncGenerator[bytes, None]:
            while True:
                try:
                    async with asyncio.timeout(LOST_S):
                        piece = await waiter.next()
                except TimeoutError as exc:
                    raise AnswerLost("The process that made the answer was lost. Ask again.") from exc
                if piece.kind == "done":
                    return
                if piece.data:
                    yield piece.data

        return Source(decode(Head, frame.data), events(), keeping.close)

    async def _read(self, request: Request, source: Source, headers: dict[str, str] | None = None) -> Response:
        """The response that gives a client what the source holds."""
        head = source.head
        told = head.headers | (headers or {})
        if head.keep_alive:
            return SseResponse(_told(request, source.events), told, source.leave, keep_alive=head.keep_alive.encode())
        try:
            body = await unless_disconnected(request, _joined(source.events))
        finally:
            source.leave()
        return Response(body, head.status, told, media_type=head.media_type)

    async def _make(self, kept: Kept, request: Request, make: Make) -> None:
        """Have the answer made, whether or not anybody reads it, and keep it if it is whole."""
        log, response, whole = kept.log, Response(), False
        try:
            response = await _made(request, make)
            log.begin(_head_of(response))
            if isinstance(response, SseResponse):
                async for piece in response.events:
                    for one in piece.split(b"\n\n")[:-1]:  # a piece may be several events
                        if not one.startswith(b":"):  # comments are for the moment
                            log.add(b"id: %d\n%b\n\n" % (len(log.events) + 1, one))
            else:
                log.add(bytes(response.body))
            state = self._dispatcher.state(kept.request_id, kept.key_id)
            whole = response.status_code < 400 and state is not None and state.status == "completed"
            # Before its end is told: who has the whole answer gets it again, wherever it is asked for.
            await self._settle(kept, whole=whole)
            log.end()
        finally:
            if not log.over:
                log.end(lost=True)
            if isinstance(response, SseResponse):
                response.on_close()
                await response.events.aclose()
            while not kept.settled:
                await self._settle(kept, whole=whole)
                await asyncio.sleep(0 if kept.settled else SETTLE_RETRY_S)
            del self._making[kept.request_id]

    async def _settle(self, kept: Kept, *, whole: bool) -> None:
        """Keep a whole answer, and let go of what is none, so that it is made anew when it is asked for again."""
        log = kept.log
        try:
            if whole and log.head is not None and sum(map(len, log.events)) <= MAX_BYTES:
                await self._store.save_answer(kept.request_id, encode(log.head), log.events)
            else:
                await self._store.release_answer(kept.request_id)
            kept.settled = True
        except ServiceError as exc:
            extra = {"action": "keep", "request_id": kept.request_id, "error": type(exc).__name__}
            logger.warning("answer not kept yet", extra=extra)

    def _on_ask(self, ask: Ask) -> None:
        if ask.what == "leave":
            if ask.id in self._relays:
                self._relays[ask.id][1].cancel()
            return
        kept = self._making.get(ask.request_id)
        if kept is not None and kept.key_id == ask.key_id:
            self._relays[ask.id] = (ask, asyncio.create_task(self._relay(kept, ask)))

    def _on_return(self, queue: str) -> None:
        """The process that asked is gone."""
        for ask, task in self._relays.values():
            if ask.reply_to == queue:
                task.cancel()

    async def _relay(self, kept: Kept, ask: Ask) -> None:
        """Pass an answer on to the process that asked for it."""
        log, sent, seq, begun = kept.log, ask.after, 0, False
        kept.join()
        try:
            while True:
                pieces: list[tuple[FrameKind, bytes]] = []
                if log.head is not None:
                    pieces = [] if begun else [("chunk", encode(log.head))]
                    begun = True
                    pieces += [_passed(made) for made in log.events[sent : sent + MAX_RELAYED]]
                    sent += len(log.events[sent : sent + MAX_RELAYED])
                more = sent < len(log.events)
                over = log.over and not more
                if over:
                    pieces.append(("error", encode(ErrorFrame(503, LOST))) if log.lost else ("done", b""))
                pieces = pieces or [("chunk", b"")]  # says that it lives
                self._peers.answer(ask, seq, pieces)
                seq += len(pieces)
                if over:
                    return
                if not more:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(BEAT_S):
                            await log.news()
        finally:
            del self._relays[ask.id]
            kept.leave()


def _passed(made: bytes) -> tuple[FrameKind, bytes]:
    if len(made) <= MAX_PASSED_BYTES:
        return ("chunk", made)
    return ("error", encode(ErrorFrame(503, "The answer is too large to be had by way of another process.")))


async def _made(request: Request, make: Make) -> Response:
    """The response to a request that no connection waits for."""
    try:
        return await make(_never)
    except (ServiceError, RequestValidationError, ClientDisconnect) as exc:
        return answer_to(request, exc)
    except Exception:
        # The outermost handler, here as for a request that a connection waits for.
        logger.exception("unexpected error", extra={"action": "request", "request_id": request.state.request_id})
        return error_response(EngineFailed("Something went wrong here. The server's log has the details."), request)


async def _never() -> Any:
    """What is received from a client that stays and says no more."""
    await asyncio.Event().wait()


def _head_of(response: Response) -> Head:
    told = {
        name: value
        for name, value in response.headers.items()
        if name.startswith("x-") or name in ("retry-after", "www-authenticate")
    }
    keep_alive = response.keep_alive.decode() if isinstance(response, SseResponse) else ""
    return Head(response.status_code, told, response.media_type or "", keep_alive)


async def _each(events: list[bytes]) -> AsyncGenerator[bytes, None]:
    for made in events:
        yield made


async def _joined(events: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([made async for made in events])


async def _told(request: Request, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The events, and at last an error in the dialect's shape if the answer is lost."""
    try:
        async for made in events:
            yield made
    except ServiceError as exc:
        dialect = dialect_of(request.url.path, request.headers)
        data = orjson.dumps(error_body(exc, dialect, request.state.request_id))
        yield event(data, b"error" if dialect == "anthropic" else b"")


def _key_of(request: Request) -> str:
    name: str = request.headers["idempotency-key"]
    if not 1 <= len(name) <= MAX_KEY or not name.isascii() or not name.isprintable():
        raise InvalidRequest(
            f"Idempotency-Key: 1 to {MAX_KEY} printable ASCII characters, the same for every try of one request.",
            param="Idempotency-Key",
        )
    return name


def last_event_id(request: Request) -> int:
    """The number of events that the client has. Raises InvalidRequest."""
    given = request.headers.get("last-event-id", "0")
    if not given.isdecimal() or not given.isascii() or len(given) > 9:
        raise InvalidRequest("Last-Event-ID: the id of an event of this answer, a number.", param="Last-Event-ID")
    return int(given)


def _fingerprint(request: Request, content: bytes) -> bytes:
    """What makes two requests the same: where they go and what they say, in whatever order."""
    body = orjson.dumps(orjson.loads(content), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(request.url.path.removeprefix(PREFIX).encode() + b"\0" + body).digest()
