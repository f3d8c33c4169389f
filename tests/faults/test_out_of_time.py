"""SIGTERM to who has more in hand than fits into DRAIN_TIMEOUT_S: others go on with it, or its clients are told."""

import asyncio
import json
import os
import signal
import time

import httpx
import pytest

from tests.faults.chats import NATIVE, Stream, ask, is_cut_off, is_refused, kept
from tests.faults.life import begun, counting, numbers
from tests.faults.rig import Rig, until
from tests.faults.test_draining import kept_at_least, leave, not_ready, ready_workers, running


async def test_a_chat_worker_whose_chats_outlast_its_time(parts: Rig) -> None:
    """Three in hand take 10 s and more, of which it has 1."""
    url, _ = await parts.server()
    await parts.archive()
    tokens = 500
    async with parts.client(url) as client:
        # Given a worker that has as many chats as it runs at once, and more that wait for their turn there
        leaving = await counting(parts, "leaving", "--slots", "3", DRAIN_TIMEOUT_S="1")
        await until(lambda: ready_workers(client, 1))
        greedy = Stream(client, text="greedy", temperature=0, max_tokens=tokens)
        sampled = Stream(client, text="sampled", temperature=1, max_tokens=tokens)
        whole = asyncio.create_task(ask(client, text="whole", temperature=0, max_tokens=tokens))
        await until(lambda: len(begun(parts, "leaving")) == 3)
        waiting = [asyncio.create_task(ask(client, text=f"waiting {n}", max_tokens=5)) for n in range(2)]
        await greedy.begun()
        await sampled.begun()
        await counting(parts, "other")
        await until(lambda: ready_workers(client, 2))
        # When it is asked to stop
        at = time.monotonic()
        await leave(leaving)
        # Then it is gone once its time is over
        assert time.monotonic() - at < 1 + 10
        # And another worker goes on, with what waited and with what was begun
        for answer in await asyncio.wait_for(asyncio.gather(*waiting), 10):
            assert answer.status_code == 200, answer.text
        assert (await whole).json()["choices"][0]["message"]["content"] == numbers(tokens)
        await greedy.end(30)
        assert (greedy.text, greedy.done) == (numbers(tokens), True)
        # And the stream that nobody else can go on with ends with an error
        await sampled.end(20)
        assert is_cut_off(sampled)
        assert "stopping" in json.dumps(sampled.events[-1])
        assert {"whole", "greedy", "waiting 0", "waiting 1"} <= set(begun(parts, "other"))
        assert not set(begun(parts, "leaving")) - {"whole", "greedy", "sampled"}
        # And each is kept and counted once
        await until(lambda: running(client, 0))
        await until(lambda: kept_at_least(parts, 5))
        await asyncio.sleep(1)
        entries = (await client.get("/chat/history?limit=100")).json()
        ends = {entry["messages"][0]["content"]: entry["finish_reason"] for entry in entries}
        assert len(ends) == len(entries)
        assert ends == dict.fromkeys(("whole", "greedy", "waiting 0", "waiting 1"), "stop") | {"sampled": "cancelled"}
        (cut,) = [entry for entry in entries if entry["finish_reason"] == "cancelled"]
        assert cut["messages"][-1]["content"].startswith(sampled.text)
        usage = (await client.get("/usage")).json()
        assert usage["total_requests"] == len(entries)
        assert usage["total_tokens"] == sum(entry["usage"]["total_tokens"] for entry in entries)


async def test_a_server_whose_answers_outlast_its_time(parts: Rig) -> None:
    """They take 12 s and more, of which it has 6; for half of these it still takes requests."""
    url, server = await parts.server("leaving", DRAIN_TIMEOUT_S="6")
    other, _ = await parts.server("other")
    await parts.archive()
    await counting(parts, "counting")
    long = {"max_tokens": 600, "temperature": 0}
    async with parts.client(url) as client, parts.client(url) as idle, parts.client(other) as there:
        await until(lambda: ready_workers(client, 1))
        await until(lambda: ready_workers(there, 1))
        assert (await idle.get("/health/live")).status_code == 200
        # Given answers in the making, streamed and not
        streams = [Stream(client, text="stream", **long), Stream(client, path=NATIVE, text="native stream", **long)]
        wholes = [
            asyncio.create_task(ask(client, text="whole", **long)),
            asyncio.create_task(ask(client, path=NATIVE, text="native whole", **long)),
        ]
        await until(lambda: len(begun(parts, "counting")) == 4)
        for stream in streams:
            await stream.begun()
        # When it is asked to stop
        os.kill(server.process.pid, signal.SIGTERM)
        at = time.monotonic()
        # Then who comes before balancers can know is answered, and told to come elsewhere from now on
        await until(lambda: not_ready(client))
        late = await ask(idle, text="late", max_tokens=2)
        assert late.status_code == 200
        assert late.headers["connection"] == "close"
        # And soon nobody else is let in, on an old connection or a new one, while the answers go on
        await until(lambda: is_closed(client), 10)
        with pytest.raises(httpx.ConnectError):
            await idle.get("/health/live")
        assert not server.exited
        assert not any(task.done() for task in wholes)
        # And at the end of its time they end, each with an error that says so
        for stream in streams:
            await stream.end(10)
            assert is_cut_off(stream)
            assert "stopping" in json.dumps(stream.events[-1])
        for answer in await asyncio.wait_for(asyncio.gather(*wholes), 10):
            assert is_refused(answer)
        assert await asyncio.wait_for(server.process.wait(), 10) == 0, server.tail()
        assert time.monotonic() - at < 6 + 5
        # And what was made of them is kept and counted as cancelled, once

        async def kept_as(end: str, count: int) -> bool:
            return [row["finish_reason"] for row in await kept(parts)].count(end) == count

        await until(lambda: kept_as("cancelled", 4))
        await until(lambda: kept_as("stop", 1))
        await until(lambda: running(there, 0))
        entries = (await there.get("/chat/history?limit=100")).json()
        assert len(entries) == 5
        for entry in entries[:4]:
            assert numbers(600).startswith(entry["messages"][-1]["content"])
        texts = {entry["messages"][0]["content"]: entry["messages"][-1]["content"] for entry in entries}
        assert texts["stream"].startswith(streams[0].text)
        usage = (await there.get("/usage")).json()
        assert usage["total_tokens"] == sum(entry["usage"]["total_tokens"] for entry in entries)


async def is_closed(client: httpx.AsyncClient) -> bool:
    try:
        await client.get("/health/live")
    except httpx.TransportError:
        return True
    return False
