"""Clients and servers that go away: what was made for them is recorded, and what was not is never made."""

import asyncio
import os
import signal
import time
from typing import Any

import httpx
import pytest

from tests.faults.dialects import STREAMING, body_of
from tests.faults.life import CHAT, Life, events, life, numbers, say
from tests.faults.rig import Rig, until

STOPPED_S = 1.0


async def stopped(running: Life, since: float, count: int = 1) -> None:
    """So many jobs are stopped within a second of this time, as their worker has it."""
    await until(lambda: len(running.stopped()) == count)
    assert max(running.stopped()) - since < STOPPED_S
    await until(lambda: _idle(running))


async def _idle(running: Life) -> bool:
    return await running.running() == 0


async def recorded(running: Life, count: int = 1) -> list[int]:
    """Tokens of each of so many chats, all cancelled; each is billed for what it holds."""
    entries = await until(lambda: _history(running, count))
    made = [entry["usage"]["completion_tokens"] for entry in entries]
    assert [entry["finish_reason"] for entry in entries] == ["cancelled"] * count
    said = [entry["messages"][-1] for entry in entries]
    assert said == [{"role": "assistant", "content": numbers(tokens)} for tokens in made]
    assert await running.usage() == (count, count + sum(made))
    return made


@pytest.mark.parametrize("stream", [True, False])
async def test_clients_leave_while_their_answers_are_made(parts: Rig, stream: bool) -> None:
    async with life(parts) as running:
        # Given an answer in the making in each dialect
        asking = [
            asyncio.create_task(running.client.post(path, json=body_of(path, path, stream=stream)))
            for path in STREAMING
        ]
        await until(lambda: len(running.begun()) == len(STREAMING))
        await asyncio.sleep(1)
        # When their clients leave
        for task in asking:
            task.cancel()
        left = time.time()
        await asyncio.gather(*asking, return_exceptions=True)
        # Then they are stopped within a second, and recorded and billed as far as they came
        await stopped(running, left, len(STREAMING))
        made = await recorded(running, len(STREAMING))
        assert all(10 <= tokens <= 150 for tokens in made)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_is_killed_while_an_answer_is_made(parts: Rig, stream: bool) -> None:
    async with life(parts) as running:
        asking = asyncio.create_task(running.client.post(CHAT, json=say("count", stream=stream)))
        await until(running.begun)
        await asyncio.sleep(1)
        os.kill(running.servers[0].process.pid, signal.SIGKILL)
        await stopped(running, time.time())
        (made,) = await recorded(running)
        assert 10 <= made <= 150
        with pytest.raises(httpx.TransportError):
            await asking


async def test_a_client_leaves_while_it_is_queued(parts: Rig) -> None:
    async with life(parts, slots=1) as running:
        # Given a worker that has its hands full, and requests in each dialect that wait for it
        holding = asyncio.create_task(running.client.post(CHAT, json=say("hold", stream=True)))
        await until(running.begun)
        waiting = [
            asyncio.create_task(running.client.post(path, json=body_of(path, path, stream=stream)))
            for path in STREAMING
            for stream in (True, False)
        ]
        await until(lambda: _queued(running, len(waiting)))
        # When all their clients leave, then that of the answer in the making, and another comes
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until(lambda: _queued(running, 0))
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
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
            (made,) = await recorded(running)
            assert 10 <= made <= 150
            # And streamed it ends with an event that says so
            async with client.stream("POST", CHAT, json=say("count", stream=True)) as response:
                told = [event.data async for event in events(response)]
                ended = time.time()
        assert "before its deadline" in told[-1]
        assert len(told) > 10
        await stopped(running, ended, 2)


async def _queued(running: Life, count: int) -> bool:
    return await running.queued() == count


async def _history(running: Life, count: int) -> list[dict[str, Any]] | None:
    entries = await running.history()
    return entries if len(entries) >= count else None
