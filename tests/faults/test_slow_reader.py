"""A reader that stops reading: what is kept for it is bounded, it is cut, and the others notice nothing."""

import asyncio
import json
import re
import socket
import time
from contextlib import ExitStack

import httpx
import psutil

from server.core.messages import Record
from tests.faults.raw import connect
from tests.faults.rig import MODEL, Rig, until

FLOOD = "qwen3-flood"
WORDS = 60_000
"""Of an answer: as a stream about 12 MB."""
STALLED = 12
STALLED_READER_S = 3
BUFFER_BYTES = 256 * 1024
ASKED_EACH = 40
SLOWEST_S = 20
"""For a chat that takes milliseconds. Generous: it only tells waiting for the stalled readers from none."""


def question(model: str, key: str) -> bytes:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def connections(server: psutil.Process, port: int) -> int:
    """Clients that the server still has."""
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in server.net_connections("tcp"))


async def cancelled(client: httpx.AsyncClient) -> float:
    """Jobs that the flooding worker was told to stop, as it counts them."""
    workers = (await client.get("/health")).json()["workers"]
    port = next(worker["metrics_port"] for worker in workers if worker["model"] == FLOOD)
    metrics = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    found = re.search(r'^qwen3_jobs_total\{model="qwen3-flood",outcome="cancelled"\} (\S+)', metrics, re.MULTILINE)
    return float(found[1]) if found else 0


async def test_stalled_readers_are_cut_and_the_others_unharmed(parts: Rig) -> None:
    # Given a service with two models, one of which says very much
    parts.serve(**{MODEL: {}, FLOOD: {}})
    bounds = {"STALLED_READER_S": str(STALLED_READER_S), "STREAM_BUFFER_BYTES": str(BUFFER_BYTES)}
    url, child = await parts.server(**bounds)
    port = int(url.rpartition(":")[2])
    server = psutil.Process(child.process.pid)
    await parts.echo()
    await parts.run("flood", "benchmarks.echo", "--model", FLOOD, "--words", str(WORDS))

    async def chat(client: httpx.AsyncClient) -> float:
        began = time.monotonic()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")
        return time.monotonic() - began

    async with parts.client(url) as client:

        async def both() -> bool:
            workers = (await client.get("/health")).json()["workers"]
            return {worker["model"] for worker in workers if worker["ready"]} == {MODEL, FLOOD}

        await until(both)
        # And a reader of such an answer who does read: it gets all of it
        body = {"model": FLOOD, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        whole = (await client.post("/v1/chat/completions", json=body)).text
        assert whole.count('"content":"abc"') == WORDS
        assert whole.endswith("data: [DONE]\n\n")
        alone = sorted([await chat(client) for _ in range(ASKED_EACH)])
        before = server.memory_info().rss
        # When many ask for it and do not read
        with ExitStack() as stack:
            stalled: list[socket.socket] = []
            for _ in range(STALLED):
                stalled.append(stack.enter_context(connect(port, receive_buffer=4096)))
                stalled[-1].sendall(question(FLOOD, parts.key))
            most = 0
            beside: list[float] = []
            while len(beside) < ASKED_EACH:
                beside += await asyncio.gather(*(chat(client) for _ in range(4)))
                most = max(most, server.memory_info().rss)

            # Then they are cut, though none of them ever said a word more,
            async def cut() -> bool:
                nonlocal most
                most = max(most, server.memory_info().rss)
                return connections(server, port) <= 5  # the client's own

            await until(cut, timeout_s=10 * STALLED_READER_S)
        # what they had asked for is made no further,
        assert await until(lambda: cancelled(client)) == STALLED
        # little more was kept than the bound for each, of the 12 MB and more that each would have had,
        grown = most - before
        assert grown < STALLED * 4 * BUFFER_BYTES + 16 * 1024**2, f"grew by {grown / 1024**2:.0f} MiB"
        # and each of the others had its answer in the meantime.
        beside.sort()
        assert beside[-1] < SLOWEST_S
        at = int(0.95 * ASKED_EACH) - 1
        print(f"p95 {alone[at] * 1000:.0f} ms alone, {beside[at] * 1000:.0f} ms beside; grew {grown / 1024**2:.0f} MiB")
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
    # When it is asked for and not read
    with connect(port, receive_buffer=4096) as connection:
        connection.sendall(asking)
        await asyncio.sleep(1)
        assert connections(server, port) == 1
        # Then the connection is cut
        await until(lambda: connections(server, port) == 0, timeout_s=10 * STALLED_READER_S)
    # But who reads it slowly, for longer than that, gets all of it
    with connect(port, receive_buffer=4096) as connection:
        connection.sendall(asking)
        got = 0
        began = time.monotonic()
        while got < 12 * 1024 * 1024 and (piece := await asyncio.to_thread(connection.recv, 65536)):
            got += len(piece)
            if time.monotonic() - began < 4 * STALLED_READER_S:
                await asyncio.sleep(0.2)
        assert got >= 12 * 1024 * 1024
