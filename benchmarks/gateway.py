"""What the way through this service costs: requests/s, latency and CPU seconds, with a worker that only echoes.

The server, RabbitMQ and Postgres are real; the worker (benchmarks/echo.py) answers at once, so that all of the time
and CPU measured is the service's own. With --litellm the same load goes to LiteLLM's proxy and its mock backend, which
answers inside the proxy's own process (no queue, no second process, no record, no database). Alternating, in one run:

    python3 -m venv litellm-venv && litellm-venv/bin/pip install 'litellm[proxy]'
    python -m benchmarks.gateway --litellm litellm-venv/bin/litellm

Finished chats stay in the history queue: the archivist's work is measured by benchmarks/similar.py.
"""

import argparse
import asyncio
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
from tqdm import tqdm

from benchmarks import report
from benchmarks.echo import WORD
from benchmarks.stack import KEY, cpu_seconds
from server.db.pool import migrate
from server.private import PrivatePostgres, PrivateRabbitMQ, free_port
from server.process import start

OURS, THEIRS = "this service", "LiteLLM"
MODEL = "echo"
MODELS = f"models: [{{id: {MODEL}, name: Echo, type: chat, source: none, context_length: 8192, default: true}}]\n"
QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of France? " * 4}]}
WARM_UP_S = 2.0
START_TIMEOUT_S = 180.0


@dataclass
class System:
    """What is measured: where it listens, and its processes by what they are."""

    name: str
    url: str
    key: str
    parts: dict[str, psutil.Process]

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far, with those of children and of children that have ended."""
        used = {}
        for name, process in self.parts.items():
            used[name] = cpu_seconds([process, *process.children(recursive=True)]) + process.cpu_times().children_user
        return used


@dataclass
class Sample:
    """One load on one system. Latencies in seconds: to the answer's first byte of content, and to its end."""

    seconds: float
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)


async def _ask(session: aiohttp.ClientSession, system: System, stream: bool) -> tuple[float, float]:
    """Ask once; returns the seconds to the first byte of content and to the end. Raises where the answer is wrong."""
    began, first, tail = time.perf_counter(), 0.0, b""
    url, headers = f"{system.url}/v1/chat/completions", {"Authorization": f"Bearer {system.key}"}
    async with session.post(url, json={**QUESTION, "stream": stream}, headers=headers) as answer:
        async for piece in answer.content.iter_any():
            first = first or time.perf_counter() - began
            tail = piece if not stream else tail[-32:] + piece
        complete = tail.rstrip().endswith(b"data: [DONE]") if stream else WORD.encode() in tail
        if answer.status != 200 or not complete:
            raise RuntimeError(f"{system.name} answered {answer.status}: {tail[:300]!r}")
    return first, time.perf_counter() - began


async def _load(system: System, parallel: int, stream: bool, seconds: float) -> Sample:
    """Ask with `parallel` clients for some seconds, each one question after the other."""
    sample = Sample(seconds)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        before, began, own = system.cpu_s(), time.perf_counter(), time.process_time()

        async def client() -> None:
            while time.perf_counter() - began < seconds:
                first, whole = await _ask(session, system, stream)
                sample.first.append(first)
                sample.whole.append(whole)

        await asyncio.gather(*(client() for _ in range(parallel)))
        sample.seconds = time.perf_counter() - began
        after = system.cpu_s()
    sample.cpu_s = {name: after[name] - before[name] for name in after}
    sample.cpu_s["load generator"] = time.process_time() - own
    return sample


@asynccontextmanager
async def ours(folder: Path, words: int, workers: int) -> AsyncIterator[System]:
    """The API server and the echoing worker over a private broker and database."""
    postgres, rabbitmq = PrivatePostgres(folder / "postgres"), PrivateRabbitMQ(folder / "rabbitmq")
    models, port = folder / "models.yaml", free_port()
    models.write_text(MODELS)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(postgres.stop)
        stack.push_async_callback(rabbitmq.stop)
        database_url, amqp_url = await asyncio.gather(postgres.start(), rabbitmq.start())
        await asyncio.to_thread(migrate, database_url)
        environment = {
            "DATABASE_URL": database_url,
            "AMQP_URL": amqp_url,
            "MODELS_FILE": str(models),
            "API_KEY": KEY,
            "RATE_LIMIT_PER_MINUTE": "0",
        }
        parts = {}
        for name, argv in {
            "server": ["server", "serve", "--port", str(port), "--workers", str(workers)],
            "worker": ["benchmarks.echo", "--words", str(words)],
        }.items():
            child = await start(name, [sys.executable, "-m", *argv], environment, folder / f"{name}.log")
            stack.push_async_callback(child.stop, 10)
            parts[name] = psutil.Process(child.process.pid)
        parts["broker"] = next(c for c in psutil.Process().children() if "rabbitmq" in " ".join(c.cmdline()))
        parts["database"] = psutil.Process(int((folder / "postgres" / "postmaster.pid").read_text().split()[0]))
        system = System(OURS, f"http://127.0.0.1:{port}", KEY, parts)
        await _until_it_answers(system)
        yield system


@asynccontextmanager
async def litellm(command: str, folder: Path, words: int) -> AsyncIterator[System]:
    """LiteLLM's proxy with one model that it answers for by itself."""
    port, key = free_port(), f"sk-{KEY}"
    parameters = {"model": f"openai/{MODEL}", "api_key": "none", "mock_response": WORD * words}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": parameters}],
        "general_settings": {"master_key": key},
    }
    (folder / "litellm.json").write_text(json.dumps(config))  # JSON is YAML
    argv = [*shlex.split(command), "--config", str(folder / "litellm.json"), "--host", "127.0.0.1", "--port", str(port)]
    child = await start(
        "litellm", argv, {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}, folder / "litellm.log"
    )
    try:
        system = System(THEIRS, f"http://127.0.0.1:{port}", key, {"proxy": psutil.Process(child.process.pid)})
        await _until_it_answers(system)
        yield system
    finally:
        await child.stop(10)


async def _until_it_answers(system: System) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                await _ask(session, system, stream=True)
            except (RuntimeError, aiohttp.ClientError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.3)
            else:
                return


def _figures(samples: list[Sample]) -> dict[str, Any]:
    """Of the same load, several times: medians over the rounds."""

    def middle(values: list[float], digits: int) -> float:
        return round(statistics.median(values), digits)

    per_thousand = {
        name: middle([1000 * s.cpu_s[name] / len(s.whole) for s in samples], 3) for name in samples[0].cpu_s
    }
    return {
        "requests": sum(len(s.whole) for s in samples),
        "requests_per_s": middle([len(s.whole) / s.seconds for s in samples], 1),
        "first_byte_ms": {p: middle([1000 * report.percentile(s.first, p) for s in samples], 2) for p in (50, 99)},
        "latency_ms": {p: middle([1000 * report.percentile(s.whole, p) for s in samples], 2) for p in (50, 99)},
        "cpu_s_per_1000_requests": per_thousand,
    }


async def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a load: how it was, and each system's figures."""
    loads = [(stream, parallel) for stream in (False, True) for parallel in args.parallel]
    taken: dict[tuple[bool, int], dict[str, list[Sample]]] = {load: {} for load in loads}
    with tempfile.TemporaryDirectory(prefix="qwen3-") as folder:
        async with AsyncExitStack() as stack:
            systems = [await stack.enter_async_context(ours(Path(folder), args.words, args.workers))]
            if args.litellm:
                systems.append(await stack.enter_async_context(litellm(args.litellm, Path(folder), args.words)))
            for system in systems:
                for stream, parallel in loads:
                    await _load(system, parallel, stream, WARM_UP_S / len(loads))
            with tqdm(total=args.rounds * len(loads) * len(systems), unit="load", disable=None) as bar:
                for _ in range(args.rounds):
                    for stream, parallel in loads:
                        for system in systems:
                            bar.set_postfix_str(f"{system.name}, {parallel} parallel{', streamed' if stream else ''}")
                            sample = await _load(system, parallel, stream, args.seconds)
                            taken[stream, parallel].setdefault(system.name, []).append(sample)
                            bar.update()
    return [
        {"stream": stream, "parallel": parallel, **{name: _figures(samples) for name, samples in of_each.items()}}
        for (stream, parallel), of_each in taken.items()
    ]


def _compare(row: dict[str, Any]) -> None:
    """Add how many times LiteLLM's requests per CPU second ours are: without the worker, whose part an engine has
    anyway, and with it."""
    proxy = row[THEIRS]["cpu_s_per_1000_requests"]["proxy"]
    used = row[OURS]["cpu_s_per_1000_requests"]
    served = used["server"] + used["broker"] + used["database"]
    row["requests_per_core_times_litellm"] = round(proxy / served, 2)
    row["with_the_worker"] = round(proxy / (served + used["worker"]), 2)


def _summary(rows: list[dict[str, Any]]) -> str:
    told = []
    for row in rows:
        here = row[OURS]
        text = f"{row['parallel']} parallel{' streamed' if row['stream'] else ''}: {here['requests_per_s']} requests/s"
        text += f", {here['latency_ms'][50]} ms (p99 {here['latency_ms'][99]})"
        if THEIRS in row:
            times, with_worker = row["requests_per_core_times_litellm"], row["with_the_worker"]
            text += f", per core {times} x LiteLLM ({with_worker} x with the worker)"
        told.append(text)
    return "; ".join(told)


def _draw(rows: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots(1, 2)
    for stream, style in ((False, "-"), (True, "--")):
        of_kind = [row for row in rows if row["stream"] == stream]
        parallel = [row["parallel"] for row in of_kind]
        for name, colour in ((OURS, "tab:blue"), (THEIRS, "tab:orange")):
            if name in rows[0]:
                label = f"{name}{', streamed' if stream else ''}"
                rate = [row[name]["requests_per_s"] for row in of_kind]
                delay = [row[name]["latency_ms"][50] for row in of_kind]
                axes[0].plot(parallel, rate, style, color=colour, marker="o", label=label)
                axes[1].plot(parallel, delay, style, color=colour, marker="o", label=label)
    for axis, title in zip(axes, ("requests/s", "latency p50, ms"), strict=True):
        axis.set(title=title, xlabel="parallel clients", xscale="log", yscale="log")
        axis.legend()


def main() -> int:
    top = report.parser(__doc__)
    top.add_argument("--litellm", default="", metavar="COMMAND", help="LiteLLM's proxy, to compare with (not compared)")
    top.add_argument("--parallel", type=int, nargs="+", default=[1, 16, 64], metavar="N", help="clients (1 16 64)")
    top.add_argument("--seconds", type=float, default=6, help="of each load (6)")
    top.add_argument("--rounds", type=int, default=3, help="of all loads, alternating (3)")
    top.add_argument("--words", type=int, default=32, metavar="N", help="words of an answer, a chunk each (32)")
    top.add_argument("--workers", type=int, default=1, metavar="N", help="processes of the API server (1)")
    args = top.parse_args()
    rows = uvloop.run(_measure(args))
    for row in rows:
        if THEIRS in row:
            _compare(row)
    result = {"litellm": _version(args.litellm), "loads": rows}
    report.save(args, "gateway", result, _summary(rows), lambda figure: _draw(rows, figure))
    return 0


def _version(command: str) -> str | None:
    """What LiteLLM says of itself."""
    if not command:
        return None
    told = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True).stdout
    return told.strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
