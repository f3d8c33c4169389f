"""Half an hour of mixed load: do memory, open files, queues or latencies grow?

Streamed chats, embeddings, searches of past chats and history are asked for at fixed rates, whatever the answers take.
Every few seconds each process's own memory and open files, and the broker's queues, are read. In the end the middle of
the run is held against its last third; the first third counts as warm-up.
"""

import argparse
import asyncio
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
from tqdm import tqdm

from benchmarks import report
from benchmarks.stack import Service, service

SAMPLE_EVERY_S = 10.0
QUEUES = re.compile(r"^(qwen3_queue_messages|qwen3_history_queue_messages|qwen3_dead_letters)\S* (\S+)$", re.MULTILINE)
QUESTIONS = ("What is the capital of France?", "What is the capital of Italy?", "Tell me about rivers.")
WORDS = ("sea", "river", "long", "old", "wide", "bridge", "under", "night", "where", "ships", "wait", "for", "rain")


def arguments() -> argparse.Namespace:
    top = report.parser(__doc__)
    top.add_argument("--models", type=Path, metavar="FILE", help="models.yaml")
    top.add_argument("--minutes", type=float, default=30)
    top.add_argument("--chats", type=float, default=5, metavar="RATE", help="streamed chats a second")
    top.add_argument("--embeddings", type=float, default=3, metavar="RATE", help="embedding requests a second")
    top.add_argument(
        "--searches", type=float, default=1, metavar="RATE", help="/chat/similar and /chat/history a second"
    )
    return top.parse_args()


@dataclass(slots=True)
class Sample:
    """At `at_s` from the start: each kind of process's own memory (MiB) and open files, and messages in queues."""

    at_s: float
    memory_mib: dict[str, float]
    files: dict[str, int]
    queued: float


@dataclass(slots=True)
class Soak:
    """`took_s` by kind of request: (at, seconds). `failed` counts what came instead of an answer."""

    took_s: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)


def text(words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


Request = tuple[str, str, dict[str, Any]]
"""Its kind, its path and its body."""


def a_chat(model: str) -> Request:
    question = {"role": "user", "content": random.choice(QUESTIONS)}
    if random.random() < 0.3:
        return "chat", "/v1/messages", {"model": model, "messages": [question], "max_tokens": 64, "stream": True}
    path = random.choice(("/chat", "/v1/chat/completions"))
    return "chat", path, {"messages": [question], "max_tokens": 64, "stream": True}


def an_embedding() -> Request:
    return "embeddings", "/embeddings", {"input": [text(random.randint(3, 120)) for _ in range(random.randint(1, 4))]}


def a_search() -> Request:
    if random.random() < 0.5:
        return "similar", "/chat/similar", {"query": text(5), "limit": 5}
    return "history", "/chat/history?limit=10", {}


async def keep_asking(
    client: aiohttp.ClientSession, make: Callable[[], Request], rate: float, until: float, soak: Soak
) -> None:
    """Ask `rate` times a second, at random moments, without waiting for answers."""
    asking: set[asyncio.Task[None]] = set()
    while rate and time.monotonic() < until:
        await asyncio.sleep(random.expovariate(rate))
        task = asyncio.create_task(ask(client, make(), soak))
        asking.add(task)
        task.add_done_callback(asking.discard)
    await asyncio.gather(*asking)


async def ask(client: aiohttp.ClientSession, request: Request, soak: Soak) -> None:
    kind, path, body = request
    began = time.monotonic()
    try:
        async with client.request("POST" if body else "GET", path, json=body or None) as response:
            answer = await response.read()
    except (aiohttp.ClientError, TimeoutError) as exc:
        soak.failed[f"{kind}: {type(exc).__name__}"] += 1
        return
    whole = not body.get("stream") or b"[DONE]" in answer[-20:] or b"message_stop" in answer[-200:]
    if response.status != 200 or not whole:
        soak.failed[f"{kind}: {response.status}{'' if whole else ' cut short'}"] += 1
        return
    soak.took_s.setdefault(kind, []).append((began, time.monotonic() - began))


async def watch(ours: Service, client: aiohttp.ClientSession, began: float, until: float, soak: Soak) -> None:
    with tqdm(total=round(until - began), unit="s") as bar:
        while (now := time.monotonic()) < until:
            soak.samples.append(await sample(ours, client, now - began))
            bar.set_postfix(answered=sum(map(len, soak.took_s.values())), failed=soak.failed.total())
            await asyncio.sleep(min(SAMPLE_EVERY_S, until - now))
            bar.update(round(time.monotonic() - began) - bar.n)


async def sample(ours: Service, client: aiohttp.ClientSession, at_s: float) -> Sample:
    memory_mib: dict[str, float] = {}
    files: dict[str, int] = {}
    for kind, processes in ours.processes().items():
        for process in processes:
            try:
                # Its own: what processes share would be counted several times.
                memory_mib[kind] = memory_mib.get(kind, 0) + process.memory_full_info().uss / 2**20
                files[kind] = files.get(kind, 0) + process.num_fds()
            except psutil.Error:
                continue
    async with client.get("/metrics") as response:
        queued = sum(float(value) for _, value in QUEUES.findall(await response.text()))
    return Sample(at_s, memory_mib, files, queued)


def summarise(soak: Soak, began: float, length_s: float) -> dict[str, Any]:
    """The middle third against the last."""

    def third(at_s: float) -> int:
        return min(2, int(3 * at_s / length_s))

    thirds: dict[str, dict[str, list[float]]] = {}

    def compare(name: str, values: list[tuple[float, float]], how: Any) -> None:
        parts = [[value for at_s, value in values if third(at_s) == part] for part in (1, 2)]
        if all(parts):
            thirds.setdefault(name.partition(" ")[0], {})[name.partition(" ")[2]] = [round(how(p), 3) for p in parts]

    for kind in soak.samples[0].memory_mib:
        compare(f"memory_mib {kind}", [(s.at_s, s.memory_mib.get(kind, 0)) for s in soak.samples], statistics.median)
        compare(f"files {kind}", [(s.at_s, float(s.files.get(kind, 0))) for s in soak.samples], statistics.median)
    compare("queued messages", [(s.at_s, s.queued) for s in soak.samples], max)
    for kind, took in soak.took_s.items():
        times = [(at - began, 1000 * seconds) for at, seconds in took]
        for p in (50, 99):
            compare(f"p{p}_ms {kind}", times, lambda values, p=p: report.percentile(values, p))
    return {
        "answered": {kind: len(took) for kind, took in soak.took_s.items()},
        "failed": dict(soak.failed),
        "middle_and_last_third": thirds,
        "samples": [{"at_s": round(s.at_s), "memory_mib": s.memory_mib, "queued": s.queued} for s in soak.samples[::6]],
    }


def draw(soak: Soak, began: float, figure: Any) -> None:
    memory, latency = figure.subplots(1, 2)
    for kind in soak.samples[0].memory_mib:
        minutes = [s.at_s / 60 for s in soak.samples]
        memory.plot(minutes, [s.memory_mib.get(kind, 0) for s in soak.samples], label=kind)
    for kind, took in soak.took_s.items():
        by_minute: dict[int, list[float]] = {}
        for at, seconds in took:
            by_minute.setdefault(int((at - began) / 60), []).append(1000 * seconds)
        whole = sorted(by_minute)
        latency.plot(whole, [report.percentile(by_minute[minute], 99) for minute in whole], label=f"{kind} p99")
    for axes, label in ((memory, "own memory, MiB"), (latency, "latency, ms")):
        axes.set_yscale("log")
        axes.set_xlabel("minutes")
        axes.set_ylabel(label)
        axes.legend(fontsize="small")


async def main(args: argparse.Namespace) -> None:
    soak = Soak()
    print("Starting the service (a minute or two) …")
    async with (
        service(args.models) as ours,
        aiohttp.ClientSession(ours.url, headers=ours.headers, connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        chat = ours.registry.default("chat")
        assert chat is not None
        began = time.monotonic()
        until = began + 60 * args.minutes
        await asyncio.gather(
            watch(ours, client, began, until, soak),
            keep_asking(client, partial(a_chat, chat.id), args.chats, until, soak),
            keep_asking(client, an_embedding, args.embeddings, until, soak),
            keep_asking(client, a_search, args.searches, until, soak),
        )
    result = summarise(soak, began, 60 * args.minutes)
    thirds = result["middle_and_last_third"]

    def told(name: str, unit: str) -> str:
        found = (f"{kind} {a:.0f} → {b:.0f}" for kind, (a, b) in thirds.get(name, {}).items())
        return f"{', '.join(found)} {unit}"

    summary = (
        f"{args.minutes:g} min, {sum(result['answered'].values())} answered, {soak.failed.total()} failed; from the "
        f"middle third to the last: own memory {told('memory_mib', 'MiB')}; open files {told('files', '')}; p99 "
        f"{told('p99_ms', 'ms')}; most messages waiting {told('queued', '')}"
    )
    report.save(args, "soak", result, summary, lambda figure: draw(soak, began, figure))


if __name__ == "__main__":
    uvloop.run(main(arguments()))
