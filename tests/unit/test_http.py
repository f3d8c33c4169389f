"""The HTTP server's bounds on a client that takes nothing of its answer, and its patience with one that asks nothing;
tests/faults has its bounds on what a client sends.
"""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from server.core.http import Bounds, HttpServer, Shared

STALLED_S = 0.6
SIZE = 6 * 1024 * 1024
"""Of an answer: more than the system's own buffers take."""


class Answers:
    """`whole` at once and `piecewise` as fast as it is taken; `ended` once the latter is over."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def whole(self, _request: Request) -> Response:
        return PlainTextResponse(b"x" * SIZE)

    async def piecewise(self, _request: Request) -> Response:
        return StreamingResponse(self._pieces())

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            for _ in range(SIZE // 1024):
                yield b"x" * 1024
        finally:
            self.ended.set()


@pytest.fixture
async def answers() -> Answers:
    return Answers()


@pytest.fixture
async def server(answers: Answers) -> AsyncIterator[HttpServer]:
    routes = [Route("/whole", answers.whole), Route("/piecewise", answers.piecewise)]
    made = HttpServer(Starlette(routes=routes), "127.0.0.1", 0, shared=Shared(Bounds(stalled_reader_s=STALLED_S)))
    serving = asyncio.create_task(made.serve())
    while not made.started:
        await asyncio.sleep(0.01)
    yield made
    made.should_exit = True
    await serving


def ask(server: HttpServer, path: str) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server.servers[0].sockets[0].getsockname())
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return connection


async def gone(server: HttpServer) -> None:
    async with asyncio.timeout(20 * STALLED_S):
        while server.server_state.connections:
            await asyncio.sleep(0.02)


async def test_an_idle_connection_is_kept_longer_than_httpx_keeps_it(server: HttpServer) -> None:
    # Given a client that closes the connection itself, unless it asks again before
    with ask(server, "/nowhere") as connection:
        await asyncio.sleep(5.5)
        # Then it is answered when it does so at the last moment
        connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await gone(server)
        assert connection.recv(4096).count(b"404 Not Found") == 2


@pytest.mark.parametrize("path", ["/whole", "/piecewise"])
async def test_who_takes_nothing_is_cut(server: HttpServer, answers: Answers, path: str) -> None:
    # Given a client that asks for much and reads nothing
    with ask(server, path):
        await asyncio.sleep(STALLED_S / 2)
        assert server.server_state.connections
        # Then it is cut, though it still is there, and what is made for it ends
        await gone(server)
        if path == "/piecewise":
            await asyncio.wait_for(answers.ended.wait(), 5)


@pytest.mark.parametrize("path", ["/whole", "/piecewise"])
async def test_who_reads_slowly_is_not(server: HttpServer, path: str) -> None:
    # Given a client that takes a little now and then, for much longer than a stalled one may
    with ask(server, path) as connection:
        got = 0
        loop = asyncio.get_running_loop()
        slow_until = loop.time() + 6 * STALLED_S
        connection.setblocking(False)
        while got < SIZE:
            piece = await asyncio.wait_for(loop.sock_recv(connection, 65536), 10)
            assert piece, f"cut after {got} bytes"
            got += len(piece)
            if loop.time() < slow_until:
                await asyncio.sleep(STALLED_S / 4)
