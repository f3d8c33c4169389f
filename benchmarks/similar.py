"""How fast, and how completely, `/chat/similar` finds; and how fast finished chats get into history.

search  Keys with histories of several sizes, all in one database, their chats scattered among each other's. For each
        size: the latency of a search without the embedding of its query (what the server does in Postgres, its rows
        included), one search after the other, and recall@10 against an exact search in float32.
ingest  Chats a second from the `history` queue to rows in Postgres, through the archivist: of a backlog, and while
        they are published.
lag     From a chat's end until `/chat/history` has it, while chats end at a steady rate.

No model runs: vectors are made up (see benchmarks/corpus.py), chats published as a worker publishes them. A million
chats of 1024 dimensions take about 8 GB of disk and, for their index, as much again of memory as half of that; on two
cores loading and indexing them takes 15 minutes. `--data-dir` keeps them for the next time.
"""

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import archiving, report
from benchmarks.corpus import History, Vectors, stored
from server.db.pool import make_pool, migrate
from server.db.store import SimilarQuery, Store
from server.db.vector_index import EXACT_LIMIT, Outgrown, VectorIndexes
from server.private import PrivatePostgres

TOP = 10
WARM_UP = 20
SAME = 1e-6
"""Cosines that differ by less are equal."""
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
    parser.add_argument("--build-memory", default="6GB", help="for building an index (default: %(default)s)")
    parser.add_argument("--database", metavar="URL", help="an empty Postgres with pgvector; default: a private one")
    parser.add_argument("--data-dir", type=Path, help="where the private one keeps its data; default: thrown away")
    parser.add_argument("--ingest", type=int, default=20_000, help="chats of `ingest` (default: %(default)s)")
    parser.add_argument("--chats-per-s", type=float, default=50, help="of `lag` (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of `lag` (default: %(default)s)")
    return parser.parse_args()


@contextlib.asynccontextmanager
async def database(args: argparse.Namespace, folder: Path) -> AsyncIterator[str]:
    """The URL of the database to load."""
    if args.database:
        yield args.database
        return
    kept: Path = (args.data_dir or folder).resolve()
    kept.mkdir(parents=True, exist_ok=True)
    postgres = PrivatePostgres(kept / "postgres")
    try:
        yield await postgres.start()
    finally:
        await postgres.stop()


async def load(connection: psycopg.AsyncConnection[Any], args: argparse.Namespace, space: str) -> dict[str, list[int]]:
    """The keys of each of the histories, by its name; those that are not there yet are made and loaded."""
    groups: dict[str, list[int]] = {}
    sizes: dict[int, int] = {}
    for name in args.histories:
        chats, _, count = name.partition("x")
        found = await (
            await connection.execute("SELECT id FROM api_keys WHERE name = %s", [f"{space} {name}"])
        ).fetchall()
        groups[name] = [row[0] for row in found]
        for index in range(len(found), int(count or 1)):
            made = await connection.execute(
                "INSERT INTO api_keys (name, hash) VALUES (%s, sha256(%s::bytea)) RETURNING id",
                [f"{space} {name}", f"{space} {name} {index}".encode()],
            )
            key_id = (await made.fetchall())[0][0]
            groups[name].append(key_id)
            sizes[key_id] = int(chats)
    if sizes:
        vectors = Vectors(args.dimensions, draws=len(groups), uniform=args.uniform)
        await History(sizes, space, vectors).load(connection)
    return groups


async def build(connection: psycopg.AsyncConnection[Any], indexes: VectorIndexes, key: Outgrown) -> float:
    """Give the key an index; returns the seconds it took."""
    began = time.monotonic()
    building = asyncio.create_task(indexes.build(key))
    with tqdm(total=key.vectors, desc="indexing", unit="chats") as bar:
        while not building.done():
            cursor = await connection.execute("SELECT max(tuples_done) FROM pg_stat_progress_create_index")
            done = (await cursor.fetchall())[0][0] or 0
            bar.update(max(0, min(done, key.vectors) - bar.n))
            await asyncio.wait({building}, timeout=1)
    await building
    return time.monotonic() - began


def best(ids: NDArray[np.int64], kept: NDArray[np.float16], queries: NDArray[np.float32]) -> list[dict[int, float]]:
    """For each query the cosine of every chat that may be among its TOP, by the chat's id."""
    cosines = np.empty((len(queries), len(ids)), np.float32)
    for start in range(0, len(ids), 50_000):
        part = kept[start : start + 50_000].astype(np.float32)
        cosines[:, start : start + 50_000] = queries @ (part / np.linalg.norm(part, axis=1, keepdims=True)).T
    nearest = np.argpartition(-cosines, min(TOP, len(ids)) - 1)[:, :TOP]
    rows = []
    for query, near in zip(cosines, nearest, strict=True):
        least = query[near].min() - SAME
        rows.append({int(ids[i]): float(query[i]) for i in np.flatnonzero(query >= least)})
    return rows


async def search(
    connection: psycopg.AsyncConnection[Any], store: Store, keys: list[int], space: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Latency and recall of searches that take turns over the keys."""
    drawn = Vectors(args.dimensions, draws=10**6, uniform=args.uniform).draw(args.queries + WARM_UP)
    drawn = drawn.astype(np.float16).astype(np.float32)  # as they are sent
    found: list[list[int]] = []
    took_ms: list[float] = []
    for index, query in enumerate(tqdm(drawn, "searching", unit="queries")):
        asked = SimilarQuery(space, query, TOP, 0.0)
        began = time.perf_counter()
        rows = await store.similar(keys[index % len(keys)], asked)
        if index >= WARM_UP:
            took_ms.append(1000 * (time.perf_counter() - began))
        found.append([row["id"] for row in rows])
    hits = wanted = 0
    for offset, key_id in enumerate(tqdm(keys, "comparing", unit="keys")):
        mine = range(offset, len(drawn), len(keys))
        ids, kept = await stored(connection, key_id, space, args.dimensions)
        norms = np.linalg.norm(drawn[mine], axis=1, keepdims=True)
        for index, nearest in zip(mine, best(ids, kept, drawn[mine] / norms), strict=True):
            hits += len(nearest.keys() & set(found[index]))
            wanted += min(TOP, len(ids))
    return {
        "p50_ms": report.percentile(took_ms, 50),
        "p95_ms": report.percentile(took_ms, 95),
        "recall_at_10": min(1.0, hits / wanted),
    }


async def searches(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    kind = "uniform" if args.uniform else "clustered"
    space = f"{kind}:{args.dimensions}"
    result: dict[str, Any] = {}
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(database(args, folder))
        migrate(url)
        connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(url, autocommit=True))
        groups = await load(connection, args, space)
        pool = make_pool(url)
        pool.kwargs["options"] = f"-c maintenance_work_mem={args.build_memory} -c max_parallel_maintenance_workers=2"
        await pool.open(wait=True)
        stack.push_async_callback(pool.close)
        indexes = VectorIndexes(pool, args.limit)
        waiting = {key.key_id: key for key in await indexes.outgrown(space)}
        total = (await (await connection.execute("SELECT sum(vectors)::bigint FROM vector_counts")).fetchall())[0][0]
        for name, keys in groups.items():
            took_s = [await build(connection, indexes, waiting[key_id]) for key_id in keys if key_id in waiting]
            print(f"{name} of {total} chats")
            result[name] = {"chats_in_all": total, "build_s": sum(took_s)}
            result[name] |= await search(connection, Store(pool), keys, space, args)
    return result


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="qwen3-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        if "search" in args.parts:
            result["search"] = await searches(args, folder / "s")
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
