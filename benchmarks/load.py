"""Streamed chats over plain sockets, so that the client costs little beside the server it measures.

Reads events and no more of HTTP than it takes to tell where an answer ends.
"""

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

EVENT = b"data: "
LAST = b"data: [DONE]\n\n"
USAGE = re.compile(rb'"completion_tokens":(\d+)')


class Refused(RuntimeError):
    """The server answered with something else than a whole stream; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where streams are asked for, and with which body."""

    name: str
    url: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    def request(self) -> bytes:
        parts = urlsplit(self.url)
        content = json.dumps(self.body).encode()
        headers = {
            "Host": parts.netloc,
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **self.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {parts.path} HTTP/1.1\r\n{head}\r\n".encode() + content


@dataclass(slots=True)
class Load:
    """What a load made of its target. Times in seconds; `gaps_s` are between two arrivals within a stream."""

    streams: int
    tokens: int = 0
    elapsed_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.elapsed_s


class _Stream(asyncio.Protocol):
    """One answer, on a connection of its own: a kept one may be closed by a server that was held up."""

    def __init__(self, load: Load, request: bytes) -> None:
        self._load = load
        self._request = request
        self._asked_at = time.perf_counter()
        self._last_at = 0.0
        self._tail = b""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._last_at:
            self._load.gaps_s.append(now - self._last_at)
            self._last_at = now
        elif EVENT in data:
            self._load.ttft_s.append(now - self._asked_at)
            self._last_at = now
        # The end may be split over two reads; with it come the tokens' count and the body's last chunk.
        self._tail = (self._tail + data)[-2048:]
        if self._tail.endswith(b"0\r\n\r\n") or not self._last_at:
            self._end()

    def _end(self) -> None:
        counted = USAGE.findall(self._tail)
        if LAST in self._tail and counted:
            self._load.tokens += int(counted[-1])
            self.over.set_result(None)
        elif self._last_at or not self._tail.startswith(b"HTTP/1.1 200"):
            self.over.set_exception(Refused(self._tail.decode(errors="replace")))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(exc or Refused("the connection was closed"))


async def run(target: Target, streams: int, requests: int) -> Load:
    """Have `requests` answered, `streams` at a time. Raises Refused."""
    loop = asyncio.get_running_loop()
    load = Load(streams)
    parts = urlsplit(target.url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    request = target.request()
    left = requests

    async def ask_on() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            transport, stream = await loop.create_connection(lambda: _Stream(load, request), host, port)
            await stream.over
            transport.close()

    began = time.perf_counter()
    await asyncio.gather(*(ask_on() for _ in range(streams)))
    load.elapsed_s = time.perf_counter() - began
    return load
