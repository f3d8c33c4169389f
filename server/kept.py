"""Answers that are kept: for a request with an `Idempotency-Key`, one generation, whoever asks for it and how often.

Such a request is answered in a task of its own, apart from any connection, into a log of events with ids. Its clients
read from the log, here or through another server process (server/relays.py), from where they left off; when the last of
them leaves, a time of grace begins before it is given up. Once whole, the answer is in Postgres until it expires; one
that failed is forgotten, so that it can be tried again. Knows no dialect: an answer is what HTTP made of it.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect

from server.answers import Kept, Source, beyond
from server.core.errors import EngineFailed, InvalidRequest, NotFound, ServiceError, Unprocessable
from server.core.messages import Ask, Head, encode
from server.core.settings import Settings
from server.db.store import Store
from server.dispatch import Dispatcher
from server.errors import PREFIX, answer_to, dialect_of, error_body, error_response
from server.peers import MAX_PASSED_BYTES
from server.relays import Relays
from server.sse import SseResponse, event, unless_disconnected

logger = logging.getLogger(__name__)

MAX_KEY = 255
"""Characters of an Idempotency-Key, as Stripe has it."""
MAX_BYTES = MAX_PASSED_BYTES
"""Of an answer that is kept once it is whole; only vectors of very many texts are larger."""
FORGET_EVERY_S = 60.0
SETTLE_RETRY_S = 2.0
CLOSE_S = 2.0
REPLAYED = {"Idempotent-Replayed": "true"}

Make = Callable[[Callable[[], Awaitable[Any]]], Awaitable[Response]]
"""Answers the request; given what to receive from instead of its connection."""


class Keeper:
    def __init__(self, settings: Settings, store: Store, dispatcher: Dispatcher) -> None:
        self._ttl_s = settings.idempotency_ttl_s
        self._grace_s = settings.resume_grace_s
        self._store = store
        self._dispatcher = dispatcher
        self._making: dict[str, Kept] = {}
        self._relays = Relays(self._making, dispatcher)

    async def close(self, left_s: float) -> None:
        """What is made has so long to end, for others may read it, or its client may come back; then it is given up."""
        making = [kept.task for kept in self._making.values() if kept.task is not None]
        if making and left_s > 0:
            await asyncio.wait(making, timeout=left_s)
            if relays := self._relays.tasks():
                await asyncio.wait(relays, timeout=CLOSE_S)
        tasks = [task for task in making if not task.done()] + self._relays.tasks()
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
        kept = Kept(request.state.request_id, request.state.principal.key_id, self._grace_s)
        # Before the claim: whoever learns of that may ask for the answer at once.
        self._making[kept.request_id] = kept
        source, claimed = None, False
        try:
            source = await self._made_before(request, _key_of(request), _fingerprint(request, content))
            claimed = source is None
        finally:
            if not claimed:
                kept.log.end(lost=True)
                del self._making[kept.request_id]
        if source is not None:
            return await self._read(request, source, REPLAYED)
        kept.join()
        kept.task = asyncio.create_task(self._make(kept, request, make))
        try:
            head = await unless_disconnected(request, kept.log.begun())
        except BaseException:
            kept.leave()
            raise
        return await self._read(request, Source(head, kept.log.follow(0), kept.leave))

    async def _made_before(self, request: Request, name: str, fingerprint: bytes) -> Source | None:
        """The answer to the first request with this Idempotency-Key; None if this one is the first, and has claimed it.

        Raises ServiceError.
        """
        key_id, request_id, after = request.state.principal.key_id, request.state.request_id, last_event_id(request)
        while True:
            owner = self._dispatcher.inbox.queue
            claimed = await self._store.claim_answer(key_id, name, fingerprint, (request_id, owner, self._ttl_s))
            if claimed["fingerprint"] != fingerprint:
                raise Unprocessable(
                    "Idempotency-Key: stands for another request already. Send that one again, or choose another key.",
                    param="Idempotency-Key",
                )
            first: str = claimed["request_id"]
            if first == request_id:
                break
            if source := await unless_disconnected(request, self._find(first, key_id, after)):
                request.state.request_id = first
                return source
            if await self._store.take_over_answer(first, request_id, owner):
                break
        if after:
            await self._store.release_answer(request_id)
            raise NotFound("Last-Event-ID: there is no answer to go on with any more. Ask without it.")
        return None

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
        """The answer of a request of this key, wherever it is or is made. Waits for its head. Raises ServiceError."""
        kept = self._making.get(request_id)
        if kept is not None and kept.key_id == key_id:
            kept.join()
            try:
                head = await kept.log.begun()
                return Source(head, kept.log.follow(beyond(head, after)), kept.leave)
            except BaseException:
                kept.leave()
                raise
        row = await self._store.find_answer(key_id, request_id)
        if row is None:
            return None
        if row["head"] is not None:
            head = Head(**row["head"])
            return Source(head, _each(row["events"][beyond(head, after) :]), lambda: None)
        return await self._relays.fetch(Ask("", request_id, key_id, "", "events", after, row["owner"]))

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
    try:
        body = orjson.dumps(orjson.loads(content), option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:  # it reads what nests deeper than it writes
        body = content
    return hashlib.sha256(request.url.path.removeprefix(PREFIX).encode() + b"\0" + body).digest()
