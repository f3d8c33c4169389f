"""uvicorn as one part of a process that decides itself when and how it ends, and with bounds that uvicorn lacks."""

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's head that has not come to its end. A smaller one that is too large still gets an answer in shape."""

HEAD_TIMEOUT_S = 60.0
"""For a request's head to come to its end, as nginx has it."""

LINGER_S = 1.0
"""Nobody came for this long: whoever asks for readiness as often has heard, and keeps away."""
LINGER_MAX_S = 5.0
"""Who still comes after this long does not ask."""

TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """Ends a connection whose request never begins; uvicorn would gather its head for ever, from anybody."""

    _gathered = 0
    """Bytes since there last was a request, or some of its body."""
    _timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._timeout = self.loop.call_later(HEAD_TIMEOUT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        self._gathered += len(data)
        super().data_received(data)
        if self._gathered > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        if self._timeout is None:
            self._timeout = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._gathered = 0
        self._stop_timeout()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._gathered = 0
        super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timeout()
        super().connection_lost(exc)

    def _stop_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None


class HttpServer(uvicorn.Server):
    """Leaves the signals to its process, which drains first and exits 0. Stop it with `should_exit`."""

    def __init__(self, app: ASGIApp, host: str, port: int, drain_timeout_s: float = 0) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=BoundedProtocol,
            ws="none",
            proxy_headers=False,  # nothing here asks who or where a client is
            log_config=None,
            access_log=False,
            server_header=False,
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
