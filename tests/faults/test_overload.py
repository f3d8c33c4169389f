"""Ten times more load than capacity: refused early and with a truthful Retry-After, and what is taken is answered.

The worker's capacity is known: its slots over what a job takes.
"""

import asyncio
import itertools
import time
from dataclasses import dataclass, field

import httpx
import psutil

from tests.faults.life import CHAT, Life, life, say
from tests.faults.rig import Rig, until
from tests.faults.test_fairness import nobody_waits, waiting

SLOTS = 4
TOKENS = 20
"""At 20 ms each, and what it costs the worker: about 9 jobs a second with four slots."""
TIMEOUT_S = 6.0
OVERLOAD_S = 15.0
BOUND = 200


@dataclass
class Load:
    """What became of requests: when each was sent and answered, by status."""

    answered: list[tuple[float, float]] = field(default_factory=list)
    refused: list[tuple[float, float, int]] = field(default_factory=list)
    """Sent at, answered at, Retry-After."""
    failed: list[str] = field(default_factory=list)
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    async def ask(self, client: httpx.AsyncClient) -> None:
        sent_at = time.time()
        name = f"{next(self.numbers)} {sent_at}"
        answer = await client.post(CHAT, json=say(name, max_tokens=TOKENS))
        now = time.time()
        if answer.status_code == 200:
            self.answered.append((sent_at, now))
        elif answer.status_code in (429, 503):
            self.refused.append((sent_at, now, int(answer.headers["retry-after"])))
        else:
            self.failed.append(f"{answer.status_code} after {now - sent_at:.1f} s: {answer.text}")

    def rate(self, start: float, end: float) -> float:
        """Answers a second in this time."""
        return sum(start <= at < end for _, at in self.answered) / (end - start)


async def peak(clients: list[httpx.AsyncClient]) -> float:
    """Answers a second while as many ask as there are slots, and a few more."""
    load = Load()

    async def keep_asking(client: httpx.AsyncClient) -> None:
        while True:
            await load.ask(client)

    asking = [asyncio.create_task(keep_asking(clients[n % len(clients)])) for n in range(SLOTS + 2)]
    await asyncio.sleep(1)
    start = time.time()
    await asyncio.sleep(6)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    return load.rate(start, start + 6)


async def overload(clients: list[httpx.AsyncClient], load: Load, per_s: float) -> None:
    """Send so many a second, however they fare, until all of them are answered."""
    asked = []
    start = time.time()
    for number in range(int(OVERLOAD_S * per_s)):
        await asyncio.sleep(start + number / per_s - time.time())
        asked.append(asyncio.create_task(load.ask(clients[number % len(clients)])))
    await asyncio.gather(*asked)


async def late_beginnings(running: Life, late: list[str]) -> None:
    """Collects the jobs that are seen to begin after their deadline."""
    seen = len(running.begun())
    while True:
        await asyncio.sleep(0.05)
        now, lines = time.time(), running.begun()
        late += [line for line in lines[seen:] if now > float(line.split()[1]) + TIMEOUT_S + 0.3]
        seen = len(lines)


async def most_waiting(running: Life, most: list[int]) -> None:
    while True:
        most[0] = max(most[0], await waiting(running.client) + await waiting(running.other))
        await asyncio.sleep(0.5)


async def test_ten_times_more_load_than_capacity(parts: Rig) -> None:
    # Given two servers and a worker whose capacity was measured, and the keys of five clients
    keys = [await parts.new_key(f"client {n}") for n in range(5)]
    settings = {"REQUEST_TIMEOUT_S": str(TIMEOUT_S), "QUEUE_MAX_JOBS": str(BOUND)}
    async with life(parts, slots=SLOTS, **settings) as running:
        clients = [parts.client(url, key) for key in keys for url in running.urls]
        most_possible = await peak(clients)
        await until(lambda: nobody_waits(running))
        memory = [psutil.Process(server.process.pid).memory_info().rss for server in running.servers]
        # When ten times as much is asked
        load, late, most = Load(), list[str](), [0]
        watching = [
            asyncio.create_task(late_beginnings(running, late)),
            asyncio.create_task(most_waiting(running, most)),
        ]
        start = time.time()
        await overload(clients, load, 10 * most_possible)
        drained = time.time()
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        told = [retry for sent, _, retry in load.refused if sent > start + OVERLOAD_S - 2]
        took = sorted(at - sent for sent, at, _ in load.refused)
        grown = [
            (psutil.Process(server.process.pid).memory_info().rss - before) / 2**20
            for server, before in zip(running.servers, memory, strict=True)
        ]
        goodput = load.rate(start + 3, start + OVERLOAD_S)
        print(
            f"peak {most_possible:.1f}/s, goodput {goodput:.1f}/s, refused {len(load.refused)}: "
            f"median {1000 * took[len(took) // 2]:.0f} ms, p95 {1000 * took[len(took) * 95 // 100]:.0f} ms; "
            f"most waiting {most}, grown {grown} MiB, told {min(told)} to {max(told)} s, "
            f"drained {drained - start - OVERLOAD_S:.1f} s after, failed {load.failed}"
        )
        # Then most is refused, at once
        assert len(load.refused) > 5 * len(load.answered)
        assert took[len(took) * 95 // 100] <= 0.1
        # And what was taken is answered, as fast as can be, but for what an estimate took too much; nothing is begun
        # too late
        assert all(failure.startswith("504") for failure in load.failed)
        assert len(load.failed) <= 0.05 * len(load.answered)
        assert goodput >= 0.9 * most_possible
        assert late == []
        # And nothing grows with the load
        assert most[0] <= 2 * BOUND
        assert max(grown) < 64
        # And what they were told is true: so long it took until those before them were begun
        waited_s = drained - start - OVERLOAD_S
        assert 0.4 * waited_s - 1 <= sum(told) / len(told) <= 2 * waited_s + 1
        for client in clients:
            await client.aclose()


async def test_a_full_queue_says_how_long_it_takes(parts: Rig) -> None:
    # Given a queue with room for 20 of one key, and jobs that take half a second, one at a time
    async with life(parts, slots=1, QUEUE_MAX_JOBS="40") as running:
        asking = [asyncio.create_task(running.client.post(CHAT, json=say("x", max_tokens=25))) for _ in range(21)]
        await until(lambda: len(running.begun()) >= 8)  # so that the worker has said how long they take
        # When more come than it takes, then they are told when those before them will have been begun
        left = len([task for task in asking if not task.done()])
        many = [running.client.post(CHAT, json=say("more", max_tokens=1)) for _ in range(8)]
        refused = [answer for answer in await asyncio.gather(*many) if answer.status_code == 429]
        assert refused
        for answer in refused:
            assert 0.5 * left * 0.5 <= int(answer.headers["retry-after"]) <= 2 * left * 0.6 + 4
            assert "Too many requests of this key wait" in answer.json()["error"]["message"]
        # And who comes back then is taken at once
        await asyncio.sleep(int(refused[0].headers["retry-after"]))
        answer = await running.client.post(CHAT, json=say("back", max_tokens=1))
        assert answer.status_code == 200
        await asyncio.gather(*asking)


async def test_a_stream_in_the_queue_is_told_where_it_stands(parts: Rig) -> None:
    # Given a worker with one slot, and jobs of a second each before
    async with life(parts, slots=1) as running:
        before = [asyncio.create_task(running.client.post(CHAT, json=say("x", max_tokens=50))) for _ in range(8)]
        await until(running.begun)
        # When a stream waits for longer than a moment
        lines = []
        asked_at, positions = time.monotonic(), []
        async with running.client.stream("POST", CHAT, json=say("mine", max_tokens=3, stream=True)) as response:
            begun_at = time.monotonic()
            request_id = response.headers["x-request-id"]
            for client in (running.client, running.other):  # whichever server is asked
                found = (await client.get(f"/v1/requests/{request_id}")).json()
                assert found["status"] == "queued"
                positions.append(found["queue_position"])
                assert 0 < found["estimated_wait_s"] < 20
            lines = [line async for line in response.aiter_lines() if line]
            ended_at = time.monotonic()
        # Then it begins with comments that say where it stands and how long that takes, ever less
        comments = [line for line in lines if line.startswith(": position ")]
        assert lines[: len(comments)] == comments
        places = [int(comment.split()[2].rstrip(",")) for comment in comments]
        assert places == sorted(places, reverse=True)
        assert places[0] > places[-1]
        assert places[0] >= positions[0] >= positions[1] >= 1
        assert 2 <= begun_at - asked_at < 5
        about_s = [int(comment.split("about ")[1].split()[0]) for comment in comments]
        assert 0.5 * (ended_at - begun_at) - 1 <= about_s[0] <= 2 * (ended_at - begun_at) + 1
        # And the answer follows
        assert lines[-1] == "data: [DONE]"
        assert "".join(lines).count('"content"') == 3
        await asyncio.gather(*before)


async def test_a_short_wait_is_a_status_and_no_comment(parts: Rig) -> None:
    async with life(parts, slots=1) as running:
        before = asyncio.create_task(running.client.post(CHAT, json=say("x", max_tokens=25)))
        await until(running.begun)
        answer = await running.client.post(CHAT, json=say("mine", max_tokens=3, stream=True))
        assert ": position" not in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
        await before
