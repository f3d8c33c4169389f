"""Streamed chats: this service against vLLM's own OpenAI server.

Both run at once over the same weights with the same engine options, and are loaded in turn (ABAB…), so that what the
machine does besides falls on both. For each number of parallel streams it tells tokens/s, the time to the first token
(TTFT), the time between tokens, the CPU seconds that 1,000 tokens cost outside the engine, and how many AMQP messages a
token takes.

The models are those of models.yaml, or of --models; where there are no weights, the tiny stand-in that ./run makes.
Embedding models are left out, as vLLM's server has none: with --searchable the service makes each chat searchable too.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
import yaml
from tqdm import tqdm

from benchmarks import load, report
from benchmarks.stack import PROJECT, Service, cpu_seconds, service
from benchmarks.stock import Stock, stock_server
from server.supervisor import off_the_engine

SERVICE, STOCK = "service", "vllm"
PROMPT = [{"role": "user", "content": "What is the capital of France?"}]
PAUSE_S = 2.0
"""Between two turns: vLLM's processes spin for a second after their last step, which the other would feel."""


def arguments() -> argparse.Namespace:
    top = report.parser(__doc__)
    top.add_argument("--models", type=Path, metavar="FILE", help="models.yaml; its default chat model is measured")
    top.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N", help="in parallel")
    top.add_argument("--tokens", type=int, default=128, help="of each answer")
    top.add_argument("--rounds", type=int, default=5, help="each server's turns at each number of streams")
    top.add_argument("--seconds", type=float, default=8, help="about how long a turn takes")
    top.add_argument(
        "--searchable", action="store_true", help="embed each chat as well, as the service does by default"
    )
    top.add_argument("--name", default="chat_throughput", help="of the result")
    return top.parse_args()


def target(name: str, url: str, model: str, tokens: int, headers: dict[str, str]) -> load.Target:
    body = {
        "model": model,
        "messages": PROMPT,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
    }
    return load.Target(name, f"{url}/v1/chat/completions", body, headers)


async def messages_sent(ours: Service) -> float:
    """AMQP messages published for chats so far: jobs, frames' messages and history records."""
    async with aiohttp.ClientSession() as client:
        total = 0.0
        for url in await _metrics_urls(client, ours):
            async with client.get(url) as response:
                for line in (await response.text()).splitlines():
                    if line.startswith("qwen3_amqp_messages_total"):
                        total += float(line.rpartition(" ")[2])
        return total


async def _metrics_urls(client: aiohttp.ClientSession, ours: Service) -> list[str]:
    async with client.get(f"{ours.url}/health") as response:
        workers = (await response.json())["workers"]
    return [f"{ours.url}/metrics", *(f"http://127.0.0.1:{worker['metrics_port']}/metrics" for worker in workers)]


async def turn(which: load.Target, streams: int, requests: int, ours: Service, stock: Stock) -> dict[str, Any]:
    """One load of one server, as figures."""
    if which.name == SERVICE:
        kinds = {kind: found for kind, found in ours.processes().items() if kind != "engine"}
    else:
        kinds = {STOCK: stock.outside_the_engine()}
    kinds["client"] = [psutil.Process()]
    sent = await messages_sent(ours)
    used = {kind: cpu_seconds(found) for kind, found in kinds.items()}
    done = await load.run(which, streams, requests)
    used = {kind: cpu_seconds(found) - used[kind] for kind, found in kinds.items()}
    sent = await messages_sent(ours) - sent
    per_1000 = {kind: round(1000 * seconds / done.tokens, 4) for kind, seconds in used.items()}
    return {
        "tokens_per_s": round(done.tokens_per_s, 1),
        "ttft_p50_ms": round(1000 * report.percentile(done.ttft_s, 50), 2),
        "ttft_p99_ms": round(1000 * report.percentile(done.ttft_s, 99), 2),
        "inter_token_p50_ms": round(1000 * report.percentile(done.gaps_s, 50), 2),
        "inter_token_p99_ms": round(1000 * report.percentile(done.gaps_s, 99), 2),
        "cpu_s_per_1000_tokens": per_1000,
        "cpu_s_per_1000_tokens_outside": round(sum(v for k, v in per_1000.items() if k != "client"), 4),
        "amqp_messages_per_token": round(sent / done.tokens, 4) if which.name == SERVICE else 0.0,
        "requests": len(done.ttft_s),
        "ttft_s": done.ttft_s,
    }


def median(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure; the first token's percentiles are over all turns' requests."""
    told = {
        name: statistics.median(one[name] for one in turns)
        for name in turns[0]
        if isinstance(turns[0][name], int | float)
    }
    kinds = turns[0]["cpu_s_per_1000_tokens"]
    told["cpu_s_per_1000_tokens"] = {
        kind: statistics.median(one["cpu_s_per_1000_tokens"].get(kind, 0) for one in turns) for kind in kinds
    }
    ttft_s = [each for one in turns for each in one["ttft_s"]]
    told["ttft_p50_ms"] = round(1000 * report.percentile(ttft_s, 50), 2)
    told["ttft_p99_ms"] = round(1000 * report.percentile(ttft_s, 99), 2)
    told["requests"] = len(ttft_s)
    return told


def compare(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    ours, theirs = median(turns[SERVICE]), median(turns[STOCK])
    pairs = zip(turns[SERVICE], turns[STOCK], strict=True)
    ratios = sorted(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
    return {
        SERVICE: ours,
        STOCK: theirs,
        "tokens_per_s_ratio": round(statistics.median(ratios), 3),
        "tokens_per_s_ratios": [round(ratio, 3) for ratio in ratios],
        "ttft_added_p50_ms": round(ours["ttft_p50_ms"] - theirs["ttft_p50_ms"], 2),
        "ttft_added_p99_ms": round(ours["ttft_p99_ms"] - theirs["ttft_p99_ms"], 2),
    }


async def measure(args: argparse.Namespace, ours: Service, stock: Stock, model: str) -> dict[int, dict[str, Any]]:
    both = (
        target(SERVICE, ours.url, model, args.tokens, ours.headers),
        target(STOCK, stock.url, model, args.tokens, {}),
    )
    results: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(args.streams) * (2 * args.rounds + 1), unit="turn") as bar:
        for streams in args.streams:
            bar.set_description(f"{streams} streams")
            warm = [await load.run(which, streams, 2 * streams) for which in both]
            rate = min(one.tokens_per_s for one in warm)
            requests = max(streams, round(rate * args.seconds / args.tokens / streams) * streams)
            bar.update()
            turns: dict[str, list[dict[str, Any]]] = {SERVICE: [], STOCK: []}
            for _ in range(args.rounds):
                for which in both:
                    turns[which.name].append(await turn(which, streams, requests, ours, stock))
                    await asyncio.sleep(PAUSE_S)
                    bar.update()
            results[streams] = compare(turns)
            tqdm.write(f"{streams:3} streams  {json.dumps(results[streams])}")
    return results


def draw(results: dict[int, dict[str, Any]], figure: Any) -> None:
    rate, ttft = figure.subplots(1, 2)
    for name, colour in ((SERVICE, "C0"), (STOCK, "C1")):
        streams = list(results)
        rate.plot(streams, [results[n][name]["tokens_per_s"] for n in streams], "o-", color=colour, label=name)
        ttft.plot(streams, [results[n][name]["ttft_p50_ms"] for n in streams], "o-", color=colour, label=f"{name} p50")
        ttft.plot(streams, [results[n][name]["ttft_p99_ms"] for n in streams], "o:", color=colour, label=f"{name} p99")
    for axes, label in ((rate, "tokens/s"), (ttft, "time to first token, ms")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("parallel streams")
        axes.set_ylabel(label)
        axes.legend()
    ttft.set_yscale("log")


async def main(args: argparse.Namespace) -> None:
    print("Starting this service, then vLLM's own server (a few minutes) …")
    models = args.models or PROJECT / "models.yaml"
    with tempfile.NamedTemporaryFile("w", prefix=".models-", suffix=".yaml", dir=models.parent) as file:
        content = yaml.safe_load(models.read_text())
        if not args.searchable:
            content["models"] = [model for model in content["models"] if model["type"] == "chat"]
        yaml.safe_dump(content, file)
        file.flush()
        await compare_servers(args, Path(file.name))


async def compare_servers(args: argparse.Namespace, models: Path) -> None:
    async with service(models) as ours:
        spec = ours.registry.default("chat")
        assert spec is not None
        async with stock_server(spec) as stock:
            if (cores := off_the_engine(ours.registry)) is not None:
                os.sched_setaffinity(0, cores)  # for both alike
            results = await measure(args, ours, stock, spec.id)
    told = "; ".join(
        f"{n} parallel: {r['tokens_per_s_ratio']} x vLLM's tokens/s ({r[SERVICE]['tokens_per_s']:.0f} against "
        f"{r[STOCK]['tokens_per_s']:.0f}), TTFT p50 {r['ttft_added_p50_ms']:+} ms, p99 {r['ttft_added_p99_ms']:+} ms, "
        f"{r[SERVICE]['amqp_messages_per_token']} AMQP messages a token"
        for n, r in results.items()
    )
    result = {"model": spec.id, "tokens": args.tokens, "streams": results}
    report.save(args, args.name, result, told, lambda figure: draw(results, figure))


if __name__ == "__main__":
    uvloop.run(main(arguments()))
