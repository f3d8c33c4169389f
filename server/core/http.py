"""uvicorn as one part of a process that decides itself when and how it ends, and with bounds that uvicorn lacks.

What a client may hold without doing its part is bounded in bytes, in time and in number: a head or a body that never
comes to its end, an answer that nobody reads, connections on which nothing is asked.
"""

import asyncio
import contextlib
import fcntl
import logging
import math
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's head that has not come to its end. A smaller one that is too large still gets an answer in shape."""

MAX_PIPELINED = 16
"""Requests sent ahead of the answer to the one before. No client of today does so, and each is kept until its turn."""

IDLE_S = 75
"""How long a connection is kept on which nothing is asked. Clients and proxies should be the first to close theirs
(httpx, and with it both SDKs, after 5 s; nginx and most balancers after 60): what comes while a server closes is lost.
"""

HARDENING = (
    # What is told here is a key's own business: no cache keeps it, no page of another site embeds or frames it.
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
"""On every answer that does not say otherwise itself. HTTPS is the proxy's in front, and so is HSTS."""

Refusal = Callable[[int, str, str], bytes]
"""The JSON of an error by status, message and the path that was asked for (empty: none was understood)."""


def _plain(_status: int, message: str, _path: str) -> bytes:
    return b'{"error": "%b"}' % message.encode()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one process grants its clients; each time in seconds."""

    max_connections: int = 1024
    receive_timeout_s: float = 60.0
    stalled_reader_s: float = 30.0


class Idle:
    """Connections on which nothing is being answered, the one that has been so for longest first."""

    def __init__(self) -> None:
        self._connections: dict[BoundedProtocol, None] = {}

    def add(self, connection: "BoundedProtocol") -> None:
        self._connections[connection] = None

    def remove(self, connection: "BoundedProtocol") -> None:
        self._connections.pop(connection, None)

    def cut_oldest(self) -> bool:
        """Whether there was one to cut."""
        for connection in self._connections:
            if not connection.transport.get_write_buffer_size():  # else its client still reads an answer
                self.remove(connection)
                connection.transport.abort()
                return True
        return False


@dataclass(slots=True)
class Shared:
    """What all connections of a server know."""

    bounds: Bounds
    refusal: Refusal = _plain
    idle: Idle = field(default_factory=Idle)


LINGER_S = 1.0
"""Nobody came for this long: whoever asks for readiness as often has heard, and keeps away."""
LINGER_MAX_S = 5.0
"""Who still comes after this long does not ask."""


class BoundedProtocol(HttpToolsProtocol):
    """Ends connections whose client does not do its part; uvicorn would wait for ever, and keep all that comes."""

    def __init__(self, shared: Shared, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._shared = shared
        self._bounds = shared.bounds
        self._gathered = 0  # bytes since there last was a request, or some of its body
        self._in_head = True
        self._receiving: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        full = len(self.connections) > self._bounds.max_connections
        if full and not self._shared.idle.cut_oldest():
            self._refuse(
                HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections. Try again shortly.", b"retry-after: 1\r\n"
            )
            return
        self._shared.idle.add(self)
        self._start_receiving()

    def data_received(self, data: bytes) -> None:
        if self._receiving is None and (self.cycle is None or self.cycle.response_complete):
            self._start_receiving()  # what comes may be line breaks, which begin nothing
        self._gathered += len(data)
        super().data_received(data)
        if self._gathered > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"The head is larger than {MAX_HEAD_BYTES} bytes.")

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, "This is not valid HTTP/1.1.")

    def on_message_begin(self) -> None:
        self._in_head = True
        if self._receiving is None:
            self._start_receiving()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # A body in chunks may have more headers after it. They were checked by nobody, so they are none.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._gathered = 0
        self._start_receiving()  # anew, for the body
        self._shared.idle.remove(self)
        if not self.flow.write_paused:
            self._stop_watching()  # what this request is answered would be taken for what was not read
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self._gathered = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_receiving()
        super().on_message_complete()
        if self.cycle.response_complete:  # answered before it was here: the wait for the next request begins
            self._start_receiving()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else the next request was here already
            self._shared.idle.add(self)
        self._watch_writing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.idle.remove(self)
        self._stop_receiving()
        self._stop_watching()
        super().connection_lost(exc)

    def _start_receiving(self) -> None:
        self._stop_receiving()
        self._receiving = self.loop.call_later(self._bounds.receive_timeout_s, self._received_too_slowly)

    def _stop_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _received_too_slowly(self) -> None:
        self._receiving = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False  # who reads the body has a timeout of its own, and answers in shape

    def _watch_writing(self) -> None:
        """While something waits to be sent, look now and then whether the client takes any of it."""
        if self._writing is None:
            self._unsent = self._not_taken()
            if self._unsent:
                self._writing = self.loop.call_later(self._bounds.stalled_reader_s, self._look_at_writing)

    def _stop_watching(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _look_at_writing(self) -> None:
        self._writing = None
        if self._not_taken() >= self._unsent:
            logger.info("reader stalled", extra={"action": "cut", "unsent_bytes": self._unsent})
            self.transport.abort()
        else:
            self._watch_writing()

    def _not_taken(self) -> int:
        """Bytes that wait here and, as soon as some do, in the system's buffer; 0 if none wait here.

        That buffer may have megabytes: of a slow reader it alone moves for long.
        """
        waiting: int = self.transport.get_write_buffer_size()
        if not waiting:
            return 0
        try:
            told = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        except OSError:
            return waiting
        return waiting + int.from_bytes(told, sys.byteorder)

    def _refuse(self, status: HTTPStatus, message: str, headers: bytes = b"") -> None:
        """Answer what never became a request, and end the connection."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            path = getattr(self, "url", b"").decode("ascii", "replace").partition("?")[0]
            body = self._shared.refusal(status, message, path)
            head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (
                status,
                status.phrase.encode(),
                len(body),
            )
            hardening = b"".join(b"%b: %b\r\n" % pair for pair in HARDENING)
            self.transport.write(head + headers + hardening + b"connection: close\r\n\r\n" + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """Leaves the signals to its process, which drains first and exits 0. Stop it with `should_exit`."""

    def __init__(
        self, app: ASGIApp, host: str, port: int, drain_timeout_s: float = 0, shared: Shared | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=partial(BoundedProtocol, shared or Shared(Bounds())),  # type: ignore[arg-type]  # it is only called
            ws="none",
            proxy_headers=False,  # nothing here asks who or where a client is
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=math.ceil(drain_timeout_s),
        )
        super().__init__(config)

    async def drain(self, timeout_s: float, *, shared: bool) -> None:
        """Let clients and balancers notice that this server leaves, then finish what runs and stop.

        A client may send on a connection at the moment that it is closed, and would see it reset. So none is closed
        while requests still come; each answer says `Connection: close` meanwhile, and readiness that it is over. Where
        the listening socket is `shared` new connections wait in it for another process, else they are still taken.
        """
        began = time.monotonic()
        if shared:
            for server in self.servers:
                server.close()
        longest_s, seen = min(LINGER_MAX_S, timeout_s / 2), -1
        while seen != self.server_state.total_requests and time.monotonic() - began < longest_s:
            seen = self.server_state.total_requests
            await asyncio.sleep(min(LINGER_S, longest_s))
        self.config.timeout_graceful_shutdown = math.ceil(timeout_s - (time.monotonic() - began))
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
