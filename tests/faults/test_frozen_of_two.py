"""One of two chat workers freezes: the other takes over what it had, and once it moves again nothing is there twice."""

import asyncio
import os
import signal
import time
from typing import Any

import httpx

from tests.faults.chats import Stream, ask, is_cut_off
from tests.faults.life import begun, counting, numbers
from tests.faults.rig import Rig, until

NAMED_S = 15.0
"""Within which readiness names it."""
TAKEN_OVER_S = 25.0
"""The broker misses it after 15 s at the most, and the rest of an answer is short."""
LONG = 600
"""Tokens: 12 s and more."""


async def chat_workers(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    return [worker for worker in (await client.get("/health")).json()["workers"] if worker["type"] == "chat"]


async def ready(client: httpx.AsyncClient, count: int) -> list[str] | None:
    """The names of so many ready workers."""
    names = [worker["worker"] for worker in await chat_workers(client) if worker["ready"]]
    return names if len(names) == count else None


async def idle(client: httpx.AsyncClient, count: int) -> bool:
    workers = await chat_workers(client)
    return len(workers) == count and not any(worker["running"] or worker["waiting"] for worker in workers)


async def named(client: httpx.AsyncClient, name: str) -> httpx.Response | None:
    answer = await client.get("/health/ready")
    told = [problem for problem in answer.json()["problems"] if f"chat worker {name}" in problem]
    return answer if told else None


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def text_from(first: int, count: int) -> str:
    return "".join(f" {first + n}" for n in range(count))


async def test_with_chats_in_hand(parts: Rig) -> None:
    url, _ = await parts.server()
    await parts.archive()
    async with parts.client(url) as client:
        # Given a worker with streams and a whole chat in hand, and another one
        frozen = await counting(parts, "frozen")
        (name,) = await until(lambda: ready(client, 1))
        greedy = Stream(client, text="greedy", temperature=0, max_tokens=LONG)
        sampled = Stream(client, text="sampled", temperature=1, max_tokens=LONG)
        whole = asyncio.create_task(ask(client, text="whole", temperature=1, max_tokens=LONG))
        await greedy.begun()
        await sampled.begun()
        other = await counting(parts, "other")
        await until(lambda: ready(client, 2))
        await until(lambda: len(greedy.events) > LONG / 4)
        assert sorted(begun(parts, "frozen")) == ["greedy", "sampled", "whole"]
        # When the one freezes
        os.kill(frozen.process.pid, signal.SIGSTOP)
        frozen_at = time.monotonic()
        new = [asyncio.create_task(ask(client, text=f"new {n}", temperature=1, max_tokens=20)) for n in range(8)]
        streams = [Stream(client, text=f"stream {n}", temperature=1, max_tokens=20) for n in range(8)]
        # Then readiness names it, and stays: the other one answers
        told = await until(lambda: named(client, name), NAMED_S)
        assert time.monotonic() - frozen_at < NAMED_S
        assert told.status_code == 200, told.text
        # And the other answers what comes now, and what came while nobody knew
        for answer in await asyncio.wait_for(asyncio.gather(*new), TAKEN_OVER_S):
            assert said(answer) == text_from(other.process.pid, 20)
        for stream in streams:
            await stream.end(TAKEN_OVER_S)
            assert stream.done, stream.events
            assert stream.text == text_from(other.process.pid, 20)
        await until(lambda: "whole" in begun(parts, "other"), TAKEN_OVER_S)
        # When it moves again, while the other still does its work
        assert not whole.done()
        os.kill(frozen.process.pid, signal.SIGCONT)
        await until(lambda: ready(client, 2))
        assert not whole.done()
        # Then each has one answer, or an error
        answer = await whole
        await greedy.end(TAKEN_OVER_S)
        await sampled.end(TAKEN_OVER_S)
        assert said(answer) == text_from(other.process.pid, LONG)
        assert greedy.done
        assert greedy.text == numbers(LONG)
        assert is_cut_off(sampled)
        assert text_from(frozen.process.pid, LONG).startswith(sampled.text)
        # And history and usage have each of them once, as it was told
        await until(lambda: idle(client, 2), TAKEN_OVER_S)
        await asyncio.sleep(2)
        entries = (await client.get("/chat/history?limit=100")).json()
        kept = {entry["messages"][0]["content"]: entry for entry in entries}
        assert len(kept) == len(entries)
        assert set(kept) == {"greedy", "whole", *(f"{kind} {n}" for kind in ("new", "stream") for n in range(8))}
        assert kept["whole"]["messages"][-1]["content"] == said(answer)
        assert kept["greedy"]["messages"][-1]["content"] == numbers(LONG)
        assert {entry["finish_reason"] for entry in entries} == {"stop"}
        usage = (await client.get("/usage")).json()
        assert usage["total_requests"] == len(entries)
        assert usage["total_tokens"] == sum(entry["usage"]["total_tokens"] for entry in entries)


async def test_while_it_is_idle(parts: Rig) -> None:
    url, _ = await parts.server()
    await parts.archive()
    async with parts.client(url) as client:
        # Given two workers of which one freezes without anything in hand
        frozen = await counting(parts, "frozen")
        (name,) = await until(lambda: ready(client, 1))
        other = await counting(parts, "other")
        await until(lambda: ready(client, 2))
        os.kill(frozen.process.pid, signal.SIGSTOP)
        frozen_at = time.monotonic()
        # Then it is named all the same, and chats are answered
        told = await until(lambda: named(client, name), NAMED_S)
        assert time.monotonic() - frozen_at < NAMED_S
        assert told.status_code == 200, told.text
        asked = [asyncio.create_task(ask(client, text=f"new {n}", temperature=1, max_tokens=150)) for n in range(8)]
        # And when it moves again, what was sent to it meanwhile is not begun a second time
        await until(lambda: len(begun(parts, "other")) == 8, TAKEN_OVER_S)
        os.kill(frozen.process.pid, signal.SIGCONT)
        first = text_from(other.process.pid, 150)
        for answer in await asyncio.wait_for(asyncio.gather(*asked), TAKEN_OVER_S):
            assert said(answer) == first
        await until(lambda: idle(client, 2), TAKEN_OVER_S)
        await asyncio.sleep(2)
        entries = (await client.get("/chat/history?limit=100")).json()
        assert [entry["messages"][-1]["content"] for entry in entries] == [first] * 8
        assert begun(parts, "frozen") == []
        assert (await client.get("/usage")).json()["total_requests"] == 8
        # And it has its share of what comes then
        answers = await asyncio.gather(*(ask(client, text="later", temperature=1, max_tokens=20) for _ in range(16)))
        firsts = {said(answer) for answer in answers}
        assert firsts == {text_from(child.process.pid, 20) for child in (frozen, other)}
