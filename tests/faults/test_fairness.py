"""One key floods: another key's request starts within two engine slots, and shares follow the keys' weights."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.faults.life import CHAT, Life, life, say
from tests.faults.rig import Rig, until

FLOOD = 240
TOKENS = (60, 69, 78, 87, 96)
"""Of a flooding job, at 20 ms each: long beside the way to a worker. They differ, so that slots are not freed all at
once."""


async def waiting(client: httpx.AsyncClient) -> int:
    """Requests of this server that no worker has begun."""
    page = (await client.get("/metrics")).text
    return next(int(float(line.split()[-1])) for line in page.splitlines() if line.startswith("qwen3_requests_waiting"))


@asynccontextmanager
async def flooding(running: Life) -> AsyncIterator[None]:
    """One key's jobs, hundreds of which wait at both servers and at the workers; ended with the test."""
    # With connections of their own: a client has no more than 100 unless it is told otherwise.
    headers, unbounded = running.client.headers, httpx.Limits(max_connections=None)
    clients = [
        httpx.AsyncClient(base_url=url, headers=headers, limits=unbounded, trust_env=False) for url in running.urls
    ]
    jobs = [
        asyncio.create_task(
            clients[n % len(clients)].post(CHAT, json=say("flood", max_tokens=TOKENS[n % len(TOKENS)]), timeout=100)
        )
        for n in range(FLOOD)
    ]
    try:
        await until(lambda: all_wait([running.client, running.other], FLOOD // 2))
        yield
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        for client in clients:
            await client.aclose()


async def all_wait(clients: list[httpx.AsyncClient], count: int) -> bool:
    return sum([await waiting(client) for client in clients]) >= count


async def begun_before(running: Life, client: httpx.AsyncClient, name: str) -> int:
    """How many jobs workers began between the moment that a request came to its server and its own beginning."""
    assert (await client.post(CHAT, json=say(name, max_tokens=5))).status_code == 200
    begun = running.told("begun")
    (mine,) = [told for told in begun if told["asked"] == name]
    return sum(mine["asked_at"] < told["at"] < mine["at"] for told in begun)


async def idle(running: Life) -> bool:
    return await nobody_waits(running) and await running.running() == 0


async def test_another_keys_request_starts_within_two_slots(parts: Rig) -> None:
    # Given one key with hundreds of requests at two servers, for a worker with four slots
    other_key = await parts.new_key("other")
    async with life(parts, slots=4) as running:
        async with flooding(running):
            # When another key asks, by either server, then its request is among the next that are begun
            for number, url in enumerate(running.urls * 3):
                async with parts.client(url, other_key) as client:
                    assert await begun_before(running, client, f"mine {number}") <= 2
            assert await all_wait([running.client, running.other], 100)  # the flood went on meanwhile
        # And when its clients have left, nothing of it is begun any more, once all have been told: until then the slot
        # of one that was stopped goes to another whose client has left too, which is not known yet
        await until(lambda: idle(running))
        begun = len(running.begun())
        assert begun < FLOOD
        for client in (running.client, running.other):
            assert (await client.post(CHAT, json=say("after", max_tokens=5))).status_code == 200
        assert running.begun()[begun:] == ["after", "after"]


async def nobody_waits(running: Life) -> bool:
    return not await waiting(running.client) + await waiting(running.other)


async def test_two_workers_take_turns_alike(parts: Rig) -> None:
    # Given the flood at two workers, one of which came when it had begun
    other_key = await parts.new_key("other")
    async with life(parts, slots=2) as running, flooding(running):
        await running.new_worker(slots=2)
        begun = len(running.begun())
        await until(lambda: len(running.begun()) > begun + 6)
        # Then each of them starts another key's request within two of its slots
        for number, url in enumerate(running.urls * 2):
            async with parts.client(url, other_key) as client:
                assert await begun_before(running, client, f"mine {number}") <= 4


@pytest.mark.parametrize(("weight", "tokens"), [(3, {"more": 10, "less": 10}), (1, {"more": 10, "less": 32})])
async def test_shares_follow_weights_and_tokens(parts: Rig, weight: int, tokens: dict[str, int]) -> None:
    # Given two keys that both have more to do than can be done, one of them with three times the weight of the other,
    # or with jobs of a third of the tokens: 11 and 33 with the one of the prompt
    keys = {"more": await made_key(parts, "more", "--weight", str(weight)), "less": await made_key(parts, "less")}
    async with life(parts, slots=2) as running:
        jobs: list[asyncio.Task[Any]] = []
        clients = [(name, parts.client(url, key)) for url in running.urls for name, key in keys.items()]
        for number in range(120):
            name, client = clients[number % len(clients)]
            jobs.append(asyncio.create_task(client.post(CHAT, json=say(name, max_tokens=tokens[name]))))
        await until(lambda: len(running.begun()) >= 50, 60)
        # Then of what is begun, the first few aside, three in four are that one's
        shares = running.begun()[10:50]
        assert 26 <= shares.count("more") <= 34, shares
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        for _, client in clients:
            await client.aclose()


async def made_key(parts: Rig, name: str, *options: str) -> str:
    """A key, as a person makes it."""
    command = await parts.run(f"key-{name}", "server", "keys", "create", name, *options)
    assert await command.process.wait() == 0
    return (parts.folder / f"key-{name}.log").read_text().split()[0]


async def test_what_waits_at_a_worker_that_stops_is_done_by_another(parts: Rig) -> None:
    async with life(parts, slots=1) as running:
        # Given jobs that wait at a worker behind one that takes long
        first = asyncio.create_task(running.client.post(CHAT, json=say("first", max_tokens=150)))
        await until(running.begun)
        names = [f"waits {number}" for number in range(10)]
        others = [asyncio.create_task(running.client.post(CHAT, json=say(name, max_tokens=5))) for name in names]
        await until(lambda: all_wait([running.client], 10))
        # When the worker is told to stop, and another one comes
        await running.new_worker(slots=1)
        running.worker.process.send_signal(signal.SIGTERM)
        # Then all are answered, each was begun once, and the worker ended well
        answers = await asyncio.gather(first, *others)
        assert [answer.status_code for answer in answers] == [200] * 11
        assert sorted(running.begun()) == sorted(["first", *names])
        assert await running.worker.process.wait() == 0
