"""Two workers, one of which loses its connection to the broker and lives on, or its life to another that says something
else: what a client was told, what is in history and what is billed are of one answer, whichever worker made it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from server.process import Child
from tests.faults.broker import Proxy
from tests.faults.chats import OPENAI, Stream, body, is_cut_off
from tests.faults.life import counting, numbers
from tests.faults.rig import MODEL, Rig, history, until


@asynccontextmanager
async def service(parts: Rig, *argv: str) -> AsyncIterator[tuple[httpx.AsyncClient, Proxy, Child]]:
    """A server, an archivist, and one worker (`python -m ARGV`) that reaches the broker through something that can be
    cut."""
    proxy = Proxy(parts.amqp_url)
    await proxy.start()
    try:
        url, _ = await parts.server()
        await parts.archive()
        worker = await parts.run("first", *argv, AMQP_URL=proxy.url)
        async with parts.client(url) as client:
            await until(lambda: ready(client, 1))
            yield client, proxy, worker
    finally:
        await proxy.stop()


WORDS = 40
"""Of the first worker's answers, 50 ms each; the second one's have three times as many."""


def saying(words: int) -> tuple[str, ...]:
    return ("benchmarks.echo", "--model", MODEL, "--words", str(words), "--pause", "0.05")


async def ready(client: httpx.AsyncClient, count: int) -> bool:
    workers = (await client.get("/health")).json()["workers"]
    return sum(worker["ready"] for worker in workers if worker["type"] == "chat") == count


async def busy(client: httpx.AsyncClient, besides: str = "") -> str:
    """The name of a worker that has a job in hand."""
    workers = (await client.get("/health")).json()["workers"]
    return next((w["worker"] for w in workers if w["running"] and w["worker"] != besides), "")


async def none_busy(client: httpx.AsyncClient) -> bool:
    return await ready(client, 1) and not await busy(client)


async def entries(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    return list((await client.get("/chat/history")).json())


async def is_told_once(client: httpx.AsyncClient, text: str) -> dict[str, Any]:
    """History and usage know the one answer that the client got."""
    (entry,) = await until(lambda: history(client, 1))
    assert entry["messages"][-1]["content"] == text
    usage = (await client.get("/usage")).json()
    assert usage["total_requests"] == 1, usage
    assert usage["total_tokens"] == 1 + len(text) // 3, usage
    return dict(entry)


async def test_the_answer_of_the_worker_that_was_cut_off_does_not_count(parts: Rig) -> None:
    async with service(parts, *saying(WORDS)) as (client, proxy, first):
        # Given a chat in the hands of a worker that loses its connections, and goes on
        asked = asyncio.create_task(client.post(OPENAI, json=body()))
        first_name = await until(lambda: busy(client))
        proxy.refuse()
        # When another takes its job, and the first, which is done or soon will be, is back before that one's end
        await parts.run("second", *saying(3 * WORDS))
        await until(lambda: busy(client, besides=first_name))
        await proxy.start()
        # Then the second answers, and that is what is kept and billed
        answer = await asked
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "abc" * 3 * WORDS
        await is_told_once(client, "abc" * 3 * WORDS)
        # And stays so: the first, which was done long before, says nothing of it
        await asyncio.sleep(1)
        await is_told_once(client, "abc" * 3 * WORDS)
        assert not first.exited
        first.process.kill()  # or it would wait for its job to come back


async def test_the_only_worker_is_given_its_job_again_and_its_answer_counts(parts: Rig) -> None:
    async with service(parts, *saying(WORDS)) as (client, proxy, _):
        # Given a stream in its hands that no other run could go on with
        stream = Stream(client, temperature=1)
        await stream.begun()
        # When its connections are cut
        assert proxy.cut()
        # Then the stream goes on, as a whole, and is kept once
        await stream.end(30)
        assert stream.done, stream.events[-1]
        assert stream.text == "abc" * WORDS
        await is_told_once(client, "abc" * WORDS)
        await asyncio.sleep(1)
        await is_told_once(client, "abc" * WORDS)


@pytest.mark.parametrize("stopped", ["left", "deleted"])
async def test_what_is_stopped_while_its_worker_is_cut_off_is_stopped_when_it_is_back(parts: Rig, stopped: str) -> None:
    async with service(parts, "tests.faults.counting", "--model", MODEL) as (client, proxy, _):
        # Given a stream of 20 s, whose worker loses its connections
        stream = Stream(client, temperature=1, max_tokens=1000)
        await stream.begun()
        proxy.refuse()
        # When it is stopped, which the worker cannot hear
        if stopped == "left":
            stream.leave()
        else:
            assert (await client.delete(f"/v1/requests/{stream.request_id}")).json()["status"] == "running"
        await asyncio.sleep(0.5)
        await proxy.start()
        # Then it is once the worker is back: what was made by then is recorded and billed
        (entry,) = await until(lambda: history(client, 1), 10)
        assert entry["finish_reason"] == "cancelled"
        assert 0 < entry["usage"]["completion_tokens"] < 1000
        assert (await client.get("/usage")).json()["total_tokens"] == entry["usage"]["total_tokens"]
        await until(lambda: none_busy(client))


async def test_a_stream_ends_where_another_worker_says_something_else(parts: Rig) -> None:
    url, _ = await parts.server()
    await parts.archive()
    async with parts.client(url) as client:
        # Given a stream that another run should be able to go on with
        first = await counting(parts, "first")
        await until(lambda: ready(client, 1))
        stream = Stream(client, temperature=0, max_tokens=1000)
        await stream.begun()
        # When its worker dies, and the one that takes its job says something else
        await parts.run("second", *saying(10 * WORDS))
        first.process.kill()
        # Then it ends with an error, and nothing of that was told
        await stream.end(30)
        assert is_cut_off(stream)
        assert numbers(1000).startswith(stream.text)
        # And the other one is stopped, long before its end: nothing is kept as an answer
        await until(lambda: none_busy(client), 5)
        assert [entry for entry in await entries(client) if entry["finish_reason"] != "cancelled"] == []
