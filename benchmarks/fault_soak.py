"""Half an hour of chats while processes are killed and frozen: is any chat lost, doubled, or without an explanation?

Streamed chats are asked for at a fixed rate; some clients leave in the middle, some stop their request. Meanwhile one
fault follows the other: a worker, the API server, the broker or the database is killed, or frozen for a while, or many
more chats come at once, or bodies that are none. After each the service must become healthy again by itself. In the
end every request has to be explained:

answered   the whole text, the same as without faults, and exactly one record of it with the same text and counts
refused    a clear error before the answer, or as the last event of a stream: then at most one record
left       the client's own doing: at most one record
stopped    by DELETE: at most one record
"""

import argparse
import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
import uvloop
from tqdm import tqdm

from benchmarks import report
from benchmarks.stack import Service, service
from server.db.pool import make_pool
from server.fleet import STALE_S

QUESTIONS = ("What is the capital of France?", "Tell me about rivers.", "Say hello.")
CLEAR = {408, 429, 500, 502, 503, 504}
"""Statuses of a request that a fault ended; anything else that is not 200 is unexplained."""
EXPLAINED = ("answered", "refused", "left", "stopped")
HEALTHY_WITHIN_S = 180.0
HOSTILE = (b"", b"{", b"[]", b"\xff", b'{"messages": "hello"}', b'{"messages": [{"role": 1}]}', b"[" * 100_000)
ANSWER_WITHIN_S = 330.0
"""A little more than a request's own deadline."""
SETTLED_WITHIN_S = 120.0


def arguments() -> argparse.Namespace:
    top = report.parser(__doc__)
    top.add_argument("--models", type=Path, metavar="FILE", help="models.yaml")
    top.add_argument("--minutes", type=float, default=30)
    top.add_argument("--chats", type=float, default=3, metavar="RATE", help="streamed chats a second")
    top.add_argument("--leaving", type=float, default=0.1, metavar="SHARE", help="of clients that leave in the middle")
    top.add_argument("--stopped", type=float, default=0.1, metavar="SHARE", help="of requests, by DELETE")
    top.add_argument("--burst", type=int, default=200, metavar="COUNT", help="chats that come at once")
    top.add_argument("--pause", type=float, default=10, metavar="SECONDS", help="between recovery and the next fault")
    top.add_argument("--seed", type=int, default=0, help="of the faults' order")
    top.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS], help="these faults")
    return top.parse_args()


@dataclass(frozen=True, slots=True)
class Fault:
    """`victim` is a kind of process; `frozen_s` 0: it is killed. Without one it is the clients' doing."""

    name: str
    victim: str = ""
    frozen_s: float = 0.0


FAULTS = (
    Fault("chat worker killed", "chat"),
    Fault("engine killed", "engine"),
    Fault("embedding worker killed", "embedding"),
    Fault("archivist killed", "archive"),
    Fault("API server killed", "server"),
    Fault("broker killed", "rabbitmq"),
    Fault("database killed", "postgres"),
    Fault("chat worker frozen", "chat", 20),
    Fault("engine frozen", "engine", 20),
    Fault("archivist frozen", "archive", 20),
    Fault("embedding worker frozen", "embedding", 20),
    Fault("broker frozen", "rabbitmq", 10),
    Fault("database frozen", "postgres", 10),
    Fault("many at once"),
    Fault("hostile bodies"),
)


@dataclass(slots=True)
class Asked:
    """One request. `end`: what its client does before it is over. `outcome`: answered, refused, left, stopped, or what
    is unexplained about it."""

    question: str
    end: str = ""
    outcome: str = ""
    request_id: str = ""
    text: str = ""
    completion_tokens: int = 0
    took_s: float = 0.0


@dataclass(slots=True)
class Trial:
    """`expected` texts by question; `healed_s` of each fault: how long until the service was healthy again."""

    expected: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    healed_s: list[tuple[str, float]] = field(default_factory=list)


async def ask(client: aiohttp.ClientSession, model: str, one: Asked) -> None:
    """Have one question answered; fills in `one`."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": one.question}],
        "temperature": 0,
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.monotonic()
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            async with client.post("/v1/chat/completions", json=body) as response:
                one.request_id = response.headers.get("X-Request-Id", "")
                one.outcome = await (_read(client, response, one) if response.status == 200 else _refusal(response))
    except TimeoutError:
        one.outcome = "no end"
    except aiohttp.ClientError:
        one.outcome = "refused"  # the connection went with the server
    one.took_s = time.monotonic() - began


async def _refusal(response: aiohttp.ClientResponse) -> str:
    try:
        message = orjson.loads(await response.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{response.status} without an error"
    return "refused" if response.status in CLEAR else f"{response.status}: {message}"


async def _read(client: aiohttp.ClientSession, response: aiohttp.ClientResponse, one: Asked) -> str:
    stopping = False
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            return "answered"
        chunk = orjson.loads(data)
        if "error" in chunk:
            return "stopped" if stopping else "refused"
        for choice in chunk["choices"]:
            one.text += choice["delta"].get("content") or ""
        if chunk.get("usage"):
            one.completion_tokens = chunk["usage"]["completion_tokens"]
        if one.text and one.end == "leave":
            return "left"
        if one.text and one.end == "stop" and not stopping:
            stopping = True
            async with client.delete(f"/v1/requests/{one.request_id}") as stopped:
                await stopped.read()
    return "cut short without an error"


async def keep_asking(client: aiohttp.ClientSession, args: argparse.Namespace, model: str, trial: Trial) -> None:
    """Until cancelled; then waits for what is on its way."""
    asking: set[asyncio.Task[None]] = set()
    ends, weights = ("leave", "stop", ""), (args.leaving, args.stopped, 1 - args.leaving - args.stopped)
    try:
        while True:
            await asyncio.sleep(random.expovariate(args.chats))
            one = Asked(random.choice(QUESTIONS), random.choices(ends, weights)[0])
            trial.asked.append(one)
            task = asyncio.create_task(ask(client, model, one))
            asking.add(task)
            task.add_done_callback(asking.discard)
    finally:
        await asyncio.gather(*asking)


async def many_at_once(client: aiohttp.ClientSession, model: str, trial: Trial, count: int) -> None:
    burst = [Asked(random.choice(QUESTIONS)) for _ in range(count)]
    trial.asked += burst
    await asyncio.gather(*(ask(client, model, one) for one in burst))


async def hostile(client: aiohttp.ClientSession, trial: Trial) -> None:
    for body in HOSTILE:
        one = Asked("hostile", outcome="refused")
        trial.asked.append(one)
        async with client.post(
            "/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
        ) as answer:
            if not 400 <= answer.status < 500:
                one.outcome = f"{answer.status} for {body[:20]!r}"


async def inflict(ours: Service, fault: Fault) -> None:
    """Do it to a process; returns when it is over, not when it is healed."""
    victims = ours.processes().get(fault.victim, [])[:1]
    if fault.victim == "rabbitmq":
        victims = [each for each in ours.processes()["rabbitmq"] if "beam" in each.name()]
    for victim in victims:
        try:
            victim.send_signal(signal.SIGSTOP if fault.frozen_s else signal.SIGKILL)
            if fault.frozen_s:
                await asyncio.sleep(fault.frozen_s)
                victim.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            continue


async def healthy(client: aiohttp.ClientSession) -> bool:
    try:
        async with client.get("/health", timeout=aiohttp.ClientTimeout(5)) as response:
            return bool((await response.json())["status"] == "healthy")
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
        return False


async def within(limit_s: float, check: Callable[[], Awaitable[bool]]) -> float:
    """How long it took until `check` held. Raises TimeoutError."""
    began = time.monotonic()
    async with asyncio.timeout(limit_s):
        while True:
            if await check():
                return time.monotonic() - began
            await asyncio.sleep(0.2)


async def torment(
    ours: Service, client: aiohttp.ClientSession, args: argparse.Namespace, model: str, trial: Trial
) -> None:
    chance = random.Random(args.seed)
    faults = [fault for fault in FAULTS if not args.only or fault.name in args.only]
    began = time.monotonic()
    with tqdm(total=round(60 * args.minutes), unit="s") as bar:
        while (now := time.monotonic() - began) < 60 * args.minutes:
            bar.update(round(now) - bar.n)
            fault = chance.choice(faults)
            bar.set_description(fault.name)
            match fault.name:
                case "many at once":
                    await many_at_once(client, model, trial, args.burst)
                case "hostile bodies":
                    await hostile(client, trial)
                case _:
                    await inflict(ours, fault)
            await asyncio.sleep(STALE_S + 1)  # by now it shows: so long a lost worker counts as there
            trial.healed_s.append((fault.name, await within(HEALTHY_WITHIN_S, lambda: healthy(client))))
            counts = Counter(one.outcome or "open" for one in trial.asked)
            bar.set_postfix(counts)
            await asyncio.sleep(args.pause)


async def records(database_url: str) -> dict[str, dict[str, Any]]:
    """Every chat that is kept, by request id; under "usage" what is billed for them all."""
    pool = make_pool(database_url, max_size=1)
    await pool.open(wait=True)
    try:
        async with pool.connection() as connection:
            chats = await connection.execute(
                "SELECT request_id, messages, finish_reason, completion_tokens, prompt_tokens FROM chats"
            )
            kept = {row.pop("request_id"): row for row in await chats.fetchall()}
            usage = await connection.execute(
                "SELECT coalesce(sum(requests), 0)::int AS requests,"
                " coalesce(sum(completion_tokens), 0)::int AS completion_tokens FROM usage_daily WHERE type = 'chat'"
            )
            (kept["usage"],) = await usage.fetchall()
            return kept
    finally:
        await pool.close()


def explain(trial: Trial, kept: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is lost, doubled or unexplained, and the counts of what is not."""
    usage = kept.pop("usage")
    unexplained = Counter(one.outcome for one in trial.asked if one.outcome not in EXPLAINED)
    lost, garbled, unbilled = [], [], []
    ids = {one.request_id for one in trial.asked}
    strangers = [request_id for request_id in kept if request_id not in ids]
    for one in trial.asked:
        expected = trial.expected.get(one.question, "")
        if one.text != (expected if one.outcome == "answered" else expected[: len(one.text)]):
            garbled.append(one.text)
        if one.outcome in ("left", "stopped") and one.request_id not in kept:
            unbilled.append(one.request_id)
        if one.outcome != "answered":
            continue
        record = kept.get(one.request_id)
        if record is None:
            lost.append(one.request_id)
        elif record["messages"][-1]["content"] != one.text or record["completion_tokens"] != one.completion_tokens:
            garbled.append(f"recorded: {record['messages'][-1]['content']}")
    billed = sum(record["completion_tokens"] for record in kept.values())
    return {
        "outcomes": Counter(one.outcome for one in trial.asked),
        "records": Counter(record["finish_reason"] for record in kept.values()),
        "lost": lost,
        "garbled": garbled,
        "doubled": usage["requests"] - len(kept),
        "tokens_billed_beyond_records": usage["completion_tokens"] - billed,
        "unbilled": unbilled,
        "recorded_and_never_asked": strangers,
        "unexplained": unexplained,
        "healed_s": {
            name: [round(s, 1) for each, s in trial.healed_s if each == name] for name, _ in sorted(set(trial.healed_s))
        },
    }


async def main(args: argparse.Namespace) -> None:
    trial = Trial()
    print("Starting the service (a minute or two) …")
    async with (
        service(args.models) as ours,
        aiohttp.ClientSession(ours.url, headers=ours.headers, connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        chat = ours.registry.default("chat")
        assert chat is not None
        for question in QUESTIONS:
            one = Asked(question)
            trial.asked.append(one)
            await ask(client, chat.id, one)
            trial.expected[question] = one.text
        asking = asyncio.create_task(keep_asking(client, args, chat.id, trial))
        try:
            await torment(ours, client, args, chat.id, trial)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        async def settled() -> bool:
            kept = await records(ours.addresses["database_url"])
            return all(one.request_id in kept for one in trial.asked if one.outcome == "answered")

        try:
            await within(SETTLED_WITHIN_S, settled)
        except TimeoutError:
            print("Not every answer is in history yet.")
        kept = await records(ours.addresses["database_url"])
    result = explain(trial, kept)
    summary = (
        f"{args.minutes:g} min, {len(trial.healed_s)} faults, {len(trial.asked)} chats: {dict(result['outcomes'])}; "
        f"lost {len(result['lost'])}, doubled {result['doubled']}, garbled {len(result['garbled'])}, "
        f"unbilled {len(result['unbilled'])}, "
        f"unexplained {sum(result['unexplained'].values())}; records {dict(result['records'])}; longest to heal "
        f"{max((s for _, s in trial.healed_s), default=0):.0f} s"
    )
    report.save(args, "fault_soak", result, summary)


if __name__ == "__main__":
    uvloop.run(main(arguments()))
