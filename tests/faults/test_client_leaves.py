"""Clients and servers that go away: what was made for them is recorded, and what was not is never made."""

import asyncio
import os
import signal
import time

import httpx
import pytest

from tests.faults.life import CHAT, Life, events, life, numbers, say
from tests.faults.rig import Rig, until

STOPPED_S = 1.0


async def stopped(running: Life) -> float:
    """Seconds until no worker has a job in hand."""
    began = time.monotonic()
    await until(lambda: _idle(running))
    return time.monotonic() - began


async def _idle(running: Life) -> bool:
    return await running.running() == 0


async def recorded(running: Life) -> int:
    """Tokens of the one chat, which was cancelled; it is billed for what it holds."""
    (entry,) = await until(running.history)
    assert entry["finish_reason"] == "cancelled"
    count: int = entry["usage"]["completion_tokens"]
    assert entry["messages"][-1] == {"role": "assistant", "content": numbers(count)}
    assert await running.usage() == (1, 1 + count)
    return count


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_leaves_while_its_answer_is_made(parts: Rig, stream: bool) -> None:
    async with life(parts) as running:
        # Given an answer in the making
        asking = asyncio.create_task(running.client.post(CHAT, json=say("count", stream=stream)))
        await until(running.begun)
        await asyncio.sleep(1)
        # When its client leaves
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        # Then it is stopped within a second, and recorded and billed as far as it came
        assert await stopped(running) < STOPPED_S
        assert 10 <= await recorded(running) <= 150


@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_is_killed_while_an_answer_is_made(parts: Rig, stream: bool) -> None:
    async with life(parts) as running:
        asking = asyncio.create_task(running.client.post(CHAT, json=say("count", stream=stream)))
        await until(running.begun)
        await asyncio.sleep(1)
        os.kill(running.servers[0].process.pid, signal.SIGKILL)
        assert await stopped(running) < STOPPED_S
        assert 10 <= await recorded(running) <= 150
        with pytest.raises(httpx.TransportError):
            await asking


async def test_a_client_leaves_while_it_is_queued(parts: Rig) -> None:
    async with life(parts, slots=1) as running:
        # Given a worker that has its hands full, and two requests that wait for it
        holding = asyncio.create_task(running.client.post(CHAT, json=say("hold", stream=True)))
        await until(running.begun)
        waiting = [
            asyncio.create_task(running.client.post(CHAT, json=say(name, stream=stream)))
            for name, stream in (("streamed", True), ("whole", False))
        ]
        await until(lambda: _queued(running, 2))
        # When all their clients leave, and another comes
        for task in (*waiting, holding):
            task.cancel()
        await asyncio.gather(*waiting, holding, return_exceptions=True)
        answer = await running.client.post(CHAT, json=say("next", max_tokens=3))
        # Then those that waited are never begun, nor billed
        assert answer.json()["choices"][0]["message"]["content"] == numbers(3)
        assert running.begun() == ["hold", "next"]
        entries = await until(lambda: _history(running, 2))
        assert [entry["finish_reason"] for entry in entries] == ["stop", "cancelled"]
        assert (await running.usage())[0] == 2


async def test_a_server_is_killed_while_its_requests_are_queued(parts: Rig) -> None:
    async with life(parts, slots=1) as running:
        holding = asyncio.create_task(running.other.post(CHAT, json=say("hold", max_tokens=100)))
        await until(running.begun)
        waiting = asyncio.create_task(running.client.post(CHAT, json=say("orphan")))
        await until(lambda: _queued(running, 1))
        os.kill(running.servers[0].process.pid, signal.SIGKILL)
        assert (await holding).status_code == 200
        assert (await running.other.post(CHAT, json=say("next", max_tokens=3))).status_code == 200
        assert running.begun() == ["hold", "next"]
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_client_leaves_while_no_worker_is_there_to_hear_it(parts: Rig) -> None:
    async with life(parts, slots=1) as running:
        # Given a request that waits for a worker that is killed
        holding = asyncio.create_task(running.client.post(CHAT, json=say("hold", stream=True)))
        await until(running.begun)
        waiting = asyncio.create_task(running.client.post(CHAT, json=say("left")))
        await until(lambda: _queued(running, 1))
        await running.worker.stop(timeout_s=0)
        # When the clients leave before there is another one
        for task in (holding, waiting):
            task.cancel()
        await asyncio.gather(holding, waiting, return_exceptions=True)
        await asyncio.sleep(1.5)
        await running.new_worker(slots=1)
        # Then it begins with the next request
        assert (await running.client.post(CHAT, json=say("next", max_tokens=3))).status_code == 200
        assert running.begun() == ["hold", "next"]


async def test_an_answer_that_takes_too_long_is_recorded_as_far_as_it_came(parts: Rig) -> None:
    async with life(parts) as running:
        url, _ = await parts.server("impatient", REQUEST_TIMEOUT_S="1.5")
        async with parts.client(url) as client:
            answer = await client.post(CHAT, json=say("count"))
            assert answer.status_code == 504
            assert 10 <= await recorded(running) <= 150
            # And streamed it ends with an event that says so
            async with client.stream("POST", CHAT, json=say("count", stream=True)) as response:
                told = [event.data async for event in events(response)]
        assert "before its deadline" in told[-1]
        assert len(told) > 10
        assert await stopped(running) < STOPPED_S


async def _queued(running: Life, count: int) -> bool:
    return await running.queued() == count


async def _history(running: Life, count: int) -> list[dict[str, object]] | None:
    entries = await running.history()
    return entries if len(entries) >= count else None
