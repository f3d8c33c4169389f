"""A reader that stops reading: what is kept for it is bounded, it is cut, and the others notice nothing."""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager

import httpx
import psutil

from server.core.messages import Record
from tests.faults.raw import connect
from tests.faults.rig import MODEL, Rig, until

FLOOD = "qwen3-flood"
WORDS = 40_000
"""Of an answer: as a stream about 8 MB."""
READERS = 12
STALLED_READER_S = 3
BUFFER_BYTES = 256 * 1024
ASKED_EACH = 60
ROUNDS = 3
"""A busy machine may hold up one side of a comparison, but not each time the same."""


def question(model: str, key: str) -> bytes:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def connections(server: psutil.Process, port: int) -> int:
    """Clients that the server still has."""
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in server.net_connections("tcp"))


async def flood(client: httpx.AsyncClient, metric: str) -> float:
    """What the flooding worker says of itself."""
    workers = (await client.get("/health")).json()["workers"]
    port = next(worker["metrics_port"] for worker in workers if worker["model"] == FLOOD)
    metrics = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    found = re.search(f"^{re.escape(metric)} (\\S+)", metrics, re.MULTILINE)
    return float(found[1]) if found else 0


RUNNING, STOPPED = f'qwen3_jobs_running{{model="{FLOOD}"}}', f'qwen3_jobs_total{{model="{FLOOD}",outcome="cancelled"}}'


def hang_up(connection: socket.socket) -> None:
    """Which ends the thread that reads from it."""
    with connection, contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def readers(port: int, key: str, *, reading: bool) -> Iterator[None]:
    """Those who ask for the long answer, and read it, or nothing of it; gone at the end."""

    def read_all(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(2**20):
                pass

    with ExitStack() as stack:
        if reading:
            threads = stack.enter_context(ThreadPoolExecutor(READERS))
        for _ in range(READERS):
            connection = connect(port) if reading else connect(port, receive_buffer=4096)
            stack.callback(hang_up, connection)
            connection.sendall(question(FLOOD, key))
            if reading:
                threads.submit(read_all, connection)
        yield


async def chat(client: httpx.AsyncClient) -> float:
    """Seconds that a short one took."""
    began = time.monotonic()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")
    return time.monotonic() - began


async def p95(client: httpx.AsyncClient) -> float:
    took: list[float] = []
    while len(took) < ASKED_EACH:
        took += await asyncio.gather(*(chat(client) for _ in range(4)))
    return sorted(took)[int(0.95 * ASKED_EACH) - 1]


@asynccontextmanager
async def watched(server: psutil.Process) -> AsyncIterator[list[int]]:
    """The most memory that it had, in bytes."""
    most = [server.memory_info().rss]

    async def watch() -> None:
        while True:
            most[0] = max(most[0], server.memory_info().rss)
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        yield most
    finally:
        watching.cancel()


async def test_stalled_readers_are_cut_and_the_others_unharmed(parts: Rig) -> None:
    # Given a service with two models, one of which says very much
    parts.serve(**{MODEL: {}, FLOOD: {}})
    bounds = {"STALLED_READER_S": str(STALLED_READER_S), "STREAM_BUFFER_BYTES": str(BUFFER_BYTES)}
    url, child = await parts.server(**bounds)
    port = int(url.rpartition(":")[2])
    server = psutil.Process(child.process.pid)
    await parts.echo()
    await parts.run("flood", "benchmarks.echo", "--model", FLOOD, "--words", str(WORDS))

    async with parts.client(url) as client:

        async def both() -> bool:
            workers = (await client.get("/health")).json()["workers"]
            return {worker["model"] for worker in workers if worker["ready"]} == {MODEL, FLOOD}

        async def none_left() -> bool:
            return connections(server, port) <= 5  # the client's own

        async def none_running() -> bool:
            return await flood(client, RUNNING) == 0

        await until(both)
        # And a reader of such an answer who does read: it gets all of it
        body = {"model": FLOOD, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        whole = (await client.post("/v1/chat/completions", json=body)).text
        assert whole.count('"content":"abc"') == WORDS
        assert whole.endswith("data: [DONE]\n\n")
        for round_ in range(1, ROUNDS + 1):
            alone = await p95(client)
            # When many ask for it and read
            with readers(port, parts.key, reading=True):
                beside_readers = await p95(client)
            await until(none_left)
            await until(none_running)
            stopped = await flood(client, STOPPED)
            before = server.memory_info().rss
            # And when as many do not
            with readers(port, parts.key, reading=False):
                async with watched(server) as most:
                    beside_stalled = await p95(client)
                    # Then what they had asked for is made no further,
                    await until(none_running)
                    beside_silent = await p95(client)
                    # they are cut, though none of them ever said a word more,
                    await until(none_left, timeout_s=10 * STALLED_READER_S)
            assert await flood(client, STOPPED) - stopped == READERS
            # little more was kept than the bound for each, of the 8 MB and more that each would have had,
            grown = most[0] - before
            assert grown < READERS * 4 * BUFFER_BYTES + 16 * 1024**2, f"grew by {grown / 1024**2:.0f} MiB"
            # and the others noticed nothing: less than of readers, and nothing at all once they were stopped.
            compared = (
                f"p95 {alone:.3f} s alone, {beside_readers:.3f} s beside readers, "
                f"{beside_stalled:.3f} s beside stalled ones, {beside_silent:.3f} s once these were stopped"
            )
            print(f"{compared}; grew {grown / 1024**2:.0f} MiB")
            if beside_stalled <= 1.5 * beside_readers + 0.1 and beside_silent <= 1.5 * alone + 0.1:
                break
            assert round_ < ROUNDS, compared
        assert (await client.get("/health")).json()["rabbitmq_connected"]


async def test_what_was_answered_and_is_not_read_is_not_kept(parts: Rig) -> None:
    """Answers that are whole already have no generation to stop: only their connection holds them."""
    # Given a key whose history is large
    async with parts.store() as store:
        (key,) = await store.list_keys()
        said = [{"role": "user", "content": "x" * 1024 * 1024}]
        now = time.time()
        await store.write(
            [Record(f"r{n}", "chat", key["id"], MODEL, "/chat", 1, 1, now, now, "s", said) for n in range(12)]
        )
    url, child = await parts.server(STALLED_READER_S=str(STALLED_READER_S))
    port = int(url.rpartition(":")[2])
    server = psutil.Process(child.process.pid)
    asking = f"GET /chat/history HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {parts.key}\r\n\r\n".encode()
    # When it is asked for by one who reads nothing, and by one who reads slowly
    with connect(port, receive_buffer=4096) as stalled, connect(port, receive_buffer=4096) as slow:
        stalled.sendall(asking)
        slow.sendall(asking)
        cut = asyncio.Event()

        async def read_slowly() -> int:
            got = 0
            while got < 12 * 1024 * 1024 and (piece := await asyncio.to_thread(slow.recv, 65536)):
                got += len(piece)
                if not cut.is_set():
                    await asyncio.sleep(0.2)
            return got

        reading = asyncio.create_task(read_slowly())
        # Then the first one's connection is cut
        await until(lambda: connections(server, port) == 2)
        await until(lambda: connections(server, port) == 1, timeout_s=10 * STALLED_READER_S)
        # But the other, who has read for as long, gets all of it
        cut.set()
        assert await reading >= 12 * 1024 * 1024
