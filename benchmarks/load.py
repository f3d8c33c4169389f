"""Streamed chats over plain sockets, so that the client costs little beside the server it measures.

Reads events and no more of HTTP than it takes to tell where an answer ends.
"""

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any
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
    """One connection, one answer after the other."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport
        self._asked_at = self._last_at = 0.0
        self._tail = b""
        self._over: asyncio.Future[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[None]:
        """Send a request; resolves when its stream has ended. Raises Refused."""
        self._over = asyncio.get_running_loop().create_future()
        self._tail, self._last_at = b"", 0.0
        self._asked_at = time.perf_counter()
        self._transport.write(request)
        return self._over

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
            self._over.set_result(None)
        elif self._last_at or not self._tail.startswith(b"HTTP/1.1 200"):
            self._over.set_exception(Refused(self._tail.decode(errors="replace")))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over.done():
            self._over.set_exception(exc or Refused("the connection was closed"))


async def run(target: Target, streams: int, requests: int) -> Load:
    """Have `requests` answered over `streams` connections, each asking again once it has its answer."""
    loop = asyncio.get_running_loop()
    load = Load(streams)
    parts = urlsplit(target.url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    request = target.request()
    left = requests
    connections = [await loop.create_connection(lambda: _Stream(load), host, port) for _ in range(streams)]

    async def ask_all(stream: _Stream) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await stream.ask(request)

    began = time.perf_counter()
    await asyncio.gather(*(ask_all(stream) for _, stream in connections))
    load.elapsed_s = time.perf_counter() - began
    for transport, _ in connections:
        transport.close()
    return load
