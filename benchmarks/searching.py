"""Loads histories into a database, and searches them through the server's own store. Used by `benchmarks.similar`."""

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import psycopg
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import report
from benchmarks.corpus import History, Vectors, stored
from server.db.pool import make_pool, migrate
from server.db.store import SimilarQuery, Store
from server.db.vector_index import Outgrown, VectorIndexes
from server.private import PrivatePostgres

TOP = 10
STEADY = 0.95
MAX_ROUNDS = 40
SAME = 1e-6
"""Cosines that differ by less are equal."""


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
    """Latency and recall of searches that take turns over the keys, each round with queries of its own.

    The first round finds caches as they are; the last is the first that is hardly faster than the one before.
    """
    vectors = Vectors(args.dimensions, draws=10**6, uniform=args.uniform)
    rounds: list[list[float]] = []
    with tqdm(desc="searching", unit="queries") as bar:
        while len(rounds) < 2 or (_median(rounds[-1]) < STEADY * _median(rounds[-2]) and len(rounds) < MAX_ROUNDS):
            drawn = vectors.draw(args.queries).astype(np.float16).astype(np.float32)  # as they are sent
            found: list[set[int]] = []
            took_ms: list[float] = []
            for index, query in enumerate(drawn):
                asked = SimilarQuery(space, query, TOP, 0.0)
                began = time.perf_counter()
                rows = await store.similar(keys[index % len(keys)], asked)
                took_ms.append(1000 * (time.perf_counter() - began))
                found.append({row["id"] for row in rows})
                bar.update()
            rounds.append(took_ms)
    hits = wanted = 0
    for offset, key_id in enumerate(tqdm(keys[: args.queries], "comparing", unit="keys")):
        mine = range(offset, len(drawn), len(keys))
        ids, kept = await stored(connection, key_id, space, args.dimensions)
        norms = np.linalg.norm(drawn[mine], axis=1, keepdims=True)
        for index, nearest in zip(mine, best(ids, kept, drawn[mine] / norms), strict=True):
            hits += len(nearest.keys() & found[index])
            wanted += min(TOP, len(ids))
    return {
        "p50_ms": _median(rounds[-1]),
        "p95_ms": report.percentile(rounds[-1], 95),
        "first_round_p50_ms": _median(rounds[0]),
        "first_round_p95_ms": report.percentile(rounds[0], 95),
        "rounds": len(rounds),
        "recall_at_10": min(1.0, hits / wanted),
    }


def _median(values: list[float]) -> float:
    return report.percentile(values, 50)


async def searches(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    kind = "uniform" if args.uniform else "bench"
    space = f"{kind}:{args.dimensions}"
    result: dict[str, Any] = {}
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(database(args, folder))
        migrate(url)
        connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(url, autocommit=True))
        groups = await load(connection, args, space)
        pool = make_pool(url)
        cast(dict[str, Any], pool.kwargs)["options"] = f"-c maintenance_work_mem={args.build_memory}"
        await pool.open(wait=True)
        stack.push_async_callback(pool.close)
        indexes = VectorIndexes(pool, args.limit, args.build_helpers)
        waiting = {key.key_id: key for key in await indexes.outgrown(space)}
        total = (await (await connection.execute("SELECT sum(vectors)::bigint FROM vector_counts")).fetchall())[0][0]
        for name, keys in groups.items():
            took_s = [await build(connection, indexes, waiting[key_id]) for key_id in keys if key_id in waiting]
            print(f"{name} of {total} chats")
            result[name] = {"chats_in_all": total, "build_s": sum(took_s)}
            result[name] |= await search(connection, Store(pool), keys, space, args)
    return result
