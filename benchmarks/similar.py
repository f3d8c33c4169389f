"""How fast, and how completely, `/chat/similar` finds; and how fast finished chats get into history.

search  Keys with histories of several sizes, all in one database, their chats scattered among each other's. For each
        size: the latency of a search without the embedding of its query (what the server does in Postgres, its rows
        included), one search after the other, and recall@10 against an exact search in float32.
ingest  Chats a second from the `history` queue to rows in Postgres, through the archivist: of a backlog, and while
        they are published.
lag     From a chat's end until `/chat/history` has it, while chats end at a steady rate.

No model runs: vectors are made up (see benchmarks/corpus.py), chats published as a worker publishes them. A million
chats of 1024 dimensions take 9 GB of disk and, while their index is built, 4 GB of memory; on two cores loading and
indexing them takes 15 minutes. `--data-dir` keeps them for the next time.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks import archiving, report, searching
from server.db.vector_index import EXACT_LIMIT

PARTS = ("search", "ingest", "lag")


def arguments() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument(
        "--histories",
        nargs="+",
        default=["1000", "10000", "100000", "1000000", "1000x100"],
        metavar="CHATS[xKEYS]",
        help="how many chats a key has, and of how many such keys (default: %(default)s)",
    )
    parser.add_argument("--dimensions", type=int, default=1024, help="of a vector (default: %(default)s)")
    parser.add_argument("--uniform", action="store_true", help="vectors without any structure, the worst case")
    parser.add_argument("--queries", type=int, default=200, help="searches a history (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=EXACT_LIMIT, help="vectors searched exactly (default: %(default)s)"
    )
    memory = f"{psutil.virtual_memory().total // 4 // 2**20}MB"
    parser.add_argument("--build-memory", default=memory, help="for building an index (default: %(default)s)")
    parser.add_argument(
        "--build-helpers",
        type=int,
        default=1,
        help="more processes that build it; 0 where /dev/shm has less than --build-memory (default: %(default)s)",
    )
    parser.add_argument("--database", metavar="URL", help="an empty Postgres with pgvector; default: a private one")
    parser.add_argument("--data-dir", type=Path, help="where the private one keeps its data; default: thrown away")
    parser.add_argument("--ingest", type=int, default=20_000, help="chats of `ingest` (default: %(default)s)")
    parser.add_argument("--chats-per-s", type=float, default=50, help="of `lag` (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of `lag` (default: %(default)s)")
    return parser.parse_args()


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="qwen3-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        if "search" in args.parts:
            result["search"] = await searching.searches(args, folder / "s")
        if "ingest" in args.parts:
            async with archiving.archive(folder / "i") as made:
                result["ingest"] = await archiving.ingest(made, args.ingest)
        if "lag" in args.parts:
            async with archiving.archive(folder / "l") as made:
                lags = await archiving.lags(made, args.chats_per_s, args.seconds)
                result["lag"] = {f"p{p}_ms": 1000 * report.percentile(lags, p) for p in (50, 95, 99)}
    return result


def summary(result: dict[str, Any]) -> str:
    told = [
        f"{name} chats: p50 {row['p50_ms']:.1f} ms, p95 {row['p95_ms']:.1f} ms, recall@10 {row['recall_at_10']:.3f};"
        for name, row in result.get("search", {}).items()
    ]
    if "ingest" in result:
        told.append("ingest {backlog_chats_per_s:.0f} chats/s, {live_chats_per_s:.0f} live;".format(**result["ingest"]))
    if "lag" in result:
        told.append("in history after p50 {p50_ms:.0f} ms, p99 {p99_ms:.0f} ms".format(**result["lag"]))
    return " ".join(told)


def plot(figure: Any, rows: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    for name in ("p50_ms", "p95_ms"):
        left.plot(list(rows), [row[name] for row in rows.values()], "o-", label=name.replace("_", " in "))
    left.set(xlabel="chats of the key", ylabel="milliseconds", yscale="log", title="latency of a search")
    left.legend()
    right.plot(list(rows), [row["recall_at_10"] for row in rows.values()], "o-")
    right.set(xlabel="chats of the key", ylabel="recall@10", ylim=(0.9, 1.005), title="found of the nearest ten")


def main() -> None:
    args = arguments()
    result = asyncio.run(measure(args))
    rows = result.get("search")
    report.save(args, "similar", result, summary(result), (lambda figure: plot(figure, rows)) if rows else None)


if __name__ == "__main__":
    main()
