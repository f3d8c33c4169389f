"""Server-sent events: the wire format, keep-alives, and noticing that the reader left."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""Below the idle timeouts of common proxies (nginx: 60 s)."""
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: bytes, name: bytes = b"") -> bytes:
    """One event. `data` is JSON without line breaks."""
    return (b"event: " + name + b"\ndata: " if name else b"data: ") + data + b"\n\n"


class SseResponse(Response):
    """Sends events as they come; calls `on_close` when they are over or the reader has left.

    A generator's own `finally` would not do: one that was never begun does not run it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        on_close: Callable[[], None],
        keep_alive: bytes = KEEP_ALIVE,
    ) -> None:
        self.events = events
        self.on_close = on_close
        self.keep_alive = keep_alive
        # X-Accel-Buffering keeps nginx from collecting the stream before it passes it on.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        watching = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except OSError as exc:
            raise ClientDisconnect from exc
        finally:
            self.on_close()
            sending.cancel()
            watching.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        quiet = _Quiet(send, self.keep_alive)
        try:
            async for body in self.events:
                quiet.broken_at = None
                await send({"type": "http.response.body", "body": body, "more_body": True})
                quiet.broken_at = quiet.now()
        finally:
            quiet.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Quiet:
    """Breaks a stream's silence with a comment. One timer a stream, which looks back when it fires: a timeout around
    each event would cost more than the event.

    `broken_at` is when the last event was sent, by the loop's clock; None while one is being sent.
    """

    def __init__(self, send: Send, comment: bytes) -> None:
        self._send = send
        self._comment = comment
        self._loop = asyncio.get_running_loop()
        self._sending: asyncio.Task[None] | None = None
        self.now = self._loop.time
        self.broken_at: float | None = self.now()
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._look)

    def close(self) -> None:
        self._timer.cancel()
        if self._sending is not None:
            self._sending.cancel()

    def _look(self) -> None:
        now = self.now()
        since = now if self.broken_at is None else self.broken_at
        if now - since >= KEEP_ALIVE_S:
            self._sending = self._loop.create_task(self._say())
            since = self.broken_at = now
        self._timer = self._loop.call_at(since + KEEP_ALIVE_S, self._look)

    async def _say(self) -> None:
        await self._send({"type": "http.response.body", "body": self._comment, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; cancels it and raises ClientDisconnect when the client leaves first."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
