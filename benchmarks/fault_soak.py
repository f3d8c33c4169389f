"""Half an hour of requests while one fault follows the other: is any lost, doubled, or without an explanation?

Chats, streamed and whole, and embeddings are asked for at a fixed rate; some clients leave in the middle, some stop
their request, some are cut off and read on by Last-Event-ID, some ask twice with one Idempotency-Key. Meanwhile
processes are killed, stopped and frozen, the broker's connections are closed, its memory runs out, many more chats come
at once, a client stops reading, or bodies come that are none (benchmarks/faults.py). After each fault the service must
become healthy again by itself. In the end every request has to be explained:

answered   the whole text, the same as without faults, and exactly one record of it with the same text and counts; of an
           embedding the same vector, and one record
refused    a clear error before the answer, or as the last event of a stream, while a fault was not healed: then at most
           one record
left       the client's own doing: at most one record
stopped    by DELETE: at most one record

One Idempotency-Key has one answer, unless a fault ended the first.
"""

import argparse
import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from tqdm import tqdm

from benchmarks import report
from benchmarks.asking import STALLED_READER_S, Asked, Clients
from benchmarks.faults import FAULTS, Fault
from benchmarks.stack import Service, service
from server.db.pool import make_pool
from server.fleet import STALE_S

EXPLAINED = ("answered", "refused", "left", "stopped")
HEALTHY_WITHIN_S = 180.0
SETTLED_WITHIN_S = 120.0
CHATS = """
    SELECT request_id, messages -> -1 ->> 'content' AS text, finish_reason, completion_tokens FROM chats
    UNION ALL
    SELECT request_id, '', 'embedding', 0 FROM embedding_requests
"""
USAGE = """
    SELECT coalesce(sum(requests), 0)::int AS requests, coalesce(sum(completion_tokens), 0)::int AS completion_tokens
    FROM usage_daily
"""

Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    top = report.parser(__doc__)
    top.add_argument("--models", type=Path, metavar="FILE", help="models.yaml")
    top.add_argument("--minutes", type=float, default=30)
    top.add_argument("--rate", type=float, default=4, metavar="RATE", help="requests a second")
    top.add_argument("--leaving", type=float, default=0.1, metavar="SHARE", help="of streams left in the middle")
    top.add_argument("--stopped", type=float, default=0.1, metavar="SHARE", help="of streams stopped by DELETE")
    top.add_argument("--pause", type=float, default=10, metavar="SECONDS", help="between recovery and the next fault")
    top.add_argument("--seed", type=int, default=0, help="of the faults' order")
    top.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS], help="these faults")
    return top.parse_args()


@dataclass(frozen=True, slots=True)
class Inflicted:
    """When a fault began, and when the service was healthy again, by the monotonic clock."""

    name: str
    began_at: float
    done_at: float
    healed_at: float

    def met(self, one: Asked) -> bool:
        return one.began_at <= self.healed_at and self.began_at <= one.ended_at


async def healthy(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/health", timeout=aiohttp.ClientTimeout(5)) as response:
            return bool((await response.json())["status"] == "healthy")
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
        return False


async def within(limit_s: float, check: Callable[[], Awaitable[bool]]) -> None:
    """Returns once `check` holds. Raises TimeoutError."""
    async with asyncio.timeout(limit_s):
        while True:
            if await check():
                return
            await asyncio.sleep(0.2)


def in_turn(faults: list[Fault], chance: random.Random) -> Callable[[], Fault]:
    """All in random order, then all again in another one: none is left out for long."""
    left: list[Fault] = []

    def following() -> Fault:
        if not left:
            left.extend(chance.sample(faults, len(faults)))
        return left.pop()

    return following


async def torment(ours: Service, clients: Clients, args: argparse.Namespace) -> list[Inflicted]:
    faults = [fault for fault in FAULTS if not args.only or fault.name in args.only]
    following, done, began = in_turn(faults, random.Random(args.seed)), [], time.monotonic()
    with tqdm(total=round(60 * args.minutes), unit="s") as bar:
        while (now := time.monotonic() - began) < 60 * args.minutes:
            bar.update(round(now) - bar.n)
            fault = following()
            bar.set_description(fault.name)
            at = time.monotonic()
            await fault.inflict(ours, clients)
            over = time.monotonic()
            await asyncio.sleep(STALE_S + 1)  # by now it shows: so long a lost worker counts as there
            await within(HEALTHY_WITHIN_S, lambda: healthy(clients.session))
            done.append(Inflicted(fault.name, at, over, time.monotonic()))
            bar.set_postfix(Counter(one.outcome or "open" for one in clients.asked))
            await asyncio.sleep(args.pause)
    return done


async def records(database_url: str) -> tuple[dict[str, Row], Row]:
    """Everything that is kept, by request id, and what is billed for it all."""
    pool = make_pool(database_url, max_size=1)
    await pool.open(wait=True)
    try:
        async with pool.connection() as connection:
            kept = await (await connection.execute(CHATS)).fetchall()
            (usage,) = await (await connection.execute(USAGE)).fetchall()
            return {row["request_id"]: row for row in kept}, usage
    finally:
        await pool.close()


async def settled(database_url: str, asked: list[Asked]) -> tuple[dict[str, Row], Row]:
    """The same, once every answer has its record, or none of those missing has come for long."""
    answered = {one.request_id for one in asked if one.outcome == "answered"}

    async def all_there() -> bool:
        return answered <= (await records(database_url))[0].keys()

    try:
        await within(SETTLED_WITHIN_S, all_there)
    except TimeoutError:
        print("Not every answer is in history yet.")
    return await records(database_url)


def explain(clients: Clients, faults: list[Inflicted], kept: dict[str, Row], usage: Row) -> Row:
    """What is lost, doubled, garbled or unexplained, and the counts of what is not."""
    asked = clients.asked
    unexplained = Counter(one.outcome for one in asked if one.outcome not in EXPLAINED)
    unexplained += Counter(
        f"refused without a fault: {one.kind}"
        for one in asked
        if one.outcome == "refused" and one.kind != "hostile" and not any(fault.met(one) for fault in faults)
    )
    lost = [one.request_id for one in asked if one.outcome == "answered" and one.request_id not in kept]
    garbled = [text for one in asked if (text := _garbled(one, clients.texts, kept.get(one.request_id)))]
    strangers = kept.keys() - {one.request_id for one in asked}
    nameless = sum(not one.request_id for one in asked)  # whose connection ended before they were told their id
    return {
        "outcomes": Counter(one.outcome for one in asked),
        "kinds": Counter(one.kind for one in asked),
        "records": Counter(record["finish_reason"] for record in kept.values()),
        "lost": lost,
        "garbled": garbled,
        "doubled": usage["requests"] - len(kept) + len(_answered_twice(asked, faults)),
        "tokens_billed_beyond_records": usage["completion_tokens"] - sum(r["completion_tokens"] for r in kept.values()),
        "unbilled": [
            f"{one.request_id}: {one.kind}, {one.outcome}, met {[fault.name for fault in faults if fault.met(one)]}"
            for one in asked
            if one.outcome in ("left", "stopped") and one.text and one.request_id not in kept
        ],
        "recorded_and_never_asked": sorted(strangers) if len(strangers) > nameless else [],
        "unexplained": unexplained,
        "healed_s": {
            fault.name: [round(each.healed_at - each.done_at, 1) for each in faults if each.name == fault.name]
            for fault in sorted(faults, key=lambda fault: fault.name)
        },
    }


def _garbled(one: Asked, texts: dict[str, str], record: Row | None) -> str:
    """What is wrong about a request's text or its record; empty: nothing."""
    if one.kind == "embedding":
        return ""
    right, answered = texts.get(one.question, ""), one.outcome == "answered"
    if one.text != (right if answered else right[: len(one.text)]):
        return one.text
    if record is None or not answered:
        return ""
    recorded = (record["text"], record["completion_tokens"])
    return "" if recorded == (one.text, one.completion_tokens) else f"recorded: {recorded}"


def _answered_twice(asked: list[Asked], faults: list[Inflicted]) -> list[str]:
    """The Idempotency-Keys with two answers that no fault explains."""
    by_key: dict[str, list[Asked]] = defaultdict(list)
    for one in asked:
        if one.key and one.outcome == "answered":
            by_key[one.key].append(one)
    return [
        key
        for key, tries in by_key.items()
        if len({one.request_id for one in tries}) > 1 and not any(fault.met(one) for fault in faults for one in tries)
    ]


async def main(args: argparse.Namespace) -> None:
    print("Starting the service (a minute or two) …")
    async with (
        service(args.models, STALLED_READER_S=str(STALLED_READER_S)) as ours,
        aiohttp.ClientSession(
            ours.url,
            headers=ours.headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),  # requests have a limit of their own
        ) as session,
    ):
        clients = Clients(session, ours)
        await clients.learn()
        asking = asyncio.create_task(clients.keep_asking(args.rate, args.leaving, args.stopped))
        try:
            faults = await torment(ours, clients, args)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        kept, usage = await settled(ours.addresses["database_url"], clients.asked)
    result = explain(clients, faults, kept, usage)
    longest_s = max((fault.healed_at - fault.done_at for fault in faults), default=0)
    summary = (
        f"{args.minutes:g} min, {len(faults)} faults of {len({fault.name for fault in faults})} kinds, "
        f"{len(clients.asked)} requests: {dict(result['outcomes'])}; "
        f"lost {len(result['lost'])}, doubled {result['doubled']}, garbled {len(result['garbled'])}, "
        f"unbilled {len(result['unbilled'])}, unexplained {result['unexplained'].total()}; "
        f"records {dict(result['records'])}; longest to heal {longest_s:.0f} s"
    )
    report.save(args, "fault_soak", result, summary)


if __name__ == "__main__":
    uvloop.run(main(arguments()))
