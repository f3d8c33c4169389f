"""A broker, a database, the archivist and the API server, without an engine: what becomes of finished chats.

Used by `benchmarks.similar`; chats are published as a chat worker publishes them.
"""

import asyncio
import hashlib
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
from tqdm import tqdm

from benchmarks.stack import cpu_seconds
from server.core import topology
from server.core.amqp import AmqpLink
from server.core.messages import Record, encode
from server.db.pool import migrate
from server.private import PrivatePostgres, PrivateRabbitMQ, free_port
from server.process import Child, start

KEYS = 10
TEXT = "What would you say about this, and why? " * 6
POLL_S = 0.005
IN_FLIGHT = 1000
"""Records that wait for the broker's confirm."""


@dataclass(slots=True)
class Archive:
    """`keys` are the ids of made keys, the first of which is `secret`."""

    folder: Path
    database_url: str
    amqp_url: str
    link: AmqpLink
    keys: list[int]
    secret: str

    @asynccontextmanager
    async def process(self, *arguments: str, **environment: str) -> AsyncIterator[Child]:
        """A process of the service, by its `python -m` arguments."""
        given = {"DATABASE_URL": self.database_url, "AMQP_URL": self.amqp_url, "METRICS_PORT": "0", "API_KEY": ""}
        argv = [sys.executable, "-m", *arguments]
        child = await start(arguments[0], argv, given | environment, self.folder / f"{arguments[0]}.log")
        try:
            yield child
        finally:
            await child.stop(10)

    def record(self, index: int) -> Record:
        """A chat of about 700 bytes, ended just now; ten of a key make a session."""
        now = time.time()
        messages = [{"role": "user", "content": f"{index} {TEXT}"}, {"role": "assistant", "content": TEXT}]
        key_id = self.keys[index % KEYS]
        session = f"s{index // (10 * KEYS)}"
        return Record(
            secrets.token_hex(16), "chat", key_id, "qwen3", "/chat", 60, 60, now, now, session, messages, "stop"
        )

    async def publish(self, count: int) -> None:
        waiting: set[asyncio.Future[None]] = set()
        for index in tqdm(range(count), "publishing", unit="chats"):
            waiting.add(self.link.publish_soon(topology.HISTORY, encode(self.record(index))))
            if len(waiting) >= IN_FLIGHT:
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*waiting)

    async def until_written(self, connection: psycopg.AsyncConnection[Any], count: int) -> None:
        """Watch the rows come. The highest id is asked for: it costs nothing, and no id is skipped here."""
        with tqdm(total=count, desc="archiving", unit="chats") as bar:
            while bar.n < count:
                bar.update(await _rows(connection) - bar.n)
                await asyncio.sleep(0.02)


async def _rows(connection: psycopg.AsyncConnection[Any]) -> int:
    cursor = await connection.execute("SELECT coalesce(max(id), 0) FROM chats")
    return int((await cursor.fetchall())[0][0])


@asynccontextmanager
async def archive(folder: Path) -> AsyncIterator[Archive]:
    """A private broker and database in `folder`, with keys."""
    async with AsyncExitStack() as stack:
        postgres, broker = PrivatePostgres(folder / "postgres"), PrivateRabbitMQ(folder / "rabbitmq")
        stack.push_async_callback(postgres.stop)
        stack.push_async_callback(broker.stop)
        database_url, amqp_url = await asyncio.gather(postgres.start(), broker.start())
        migrate(database_url)

        async def setup(link: AmqpLink) -> None:
            await link.declare_queue(topology.HISTORY)

        link = AmqpLink(amqp_url, "benchmark", setup)
        await link.start()
        stack.push_async_callback(link.close)
        made, keys = [secrets.token_hex(16) for _ in range(KEYS)], []
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            for secret in made:
                hash_ = hashlib.sha256(secret.encode()).digest()
                cursor = await connection.execute(
                    "INSERT INTO api_keys (name, hash) VALUES ('benchmark', %s) RETURNING id", [hash_]
                )
                keys.append(int((await cursor.fetchall())[0][0]))
        yield Archive(folder, database_url, amqp_url, link, keys, made[0])


async def ingest(made: Archive, count: int) -> dict[str, float]:
    """Chats/s from the queue to rows: of a backlog of `count`, and of as many while they are published."""
    result = {}
    async with await psycopg.AsyncConnection.connect(made.database_url, autocommit=True) as connection:
        await made.publish(count)
        async with made.process("workers", "archive") as child:
            while not await _rows(connection):  # noqa: ASYNC110 - another process writes them
                await asyncio.sleep(0.005)
            began, first = time.monotonic(), await _rows(connection)
            await made.until_written(connection, count)
            result["backlog_chats_per_s"] = (count - first) / (time.monotonic() - began)
            used, began = cpu_seconds([psutil.Process(child.process.pid)]), time.monotonic()
            await asyncio.gather(made.publish(count), made.until_written(connection, 2 * count))
            result["live_chats_per_s"] = count / (time.monotonic() - began)
            used = cpu_seconds([psutil.Process(child.process.pid)]) - used
            result["archivist_cpu_s_per_1000_chats"] = 1000 * used / count
    return result


async def lags(made: Archive, chats_per_s: float, seconds: float) -> list[float]:
    """Seconds from each chat's end until `/chat/history` has it, polled by its key every 5 ms."""
    port = free_port()
    ended: dict[int, float] = {}
    found: list[float] = []
    headers = {"Authorization": f"Bearer {made.secret}"}
    async with (
        made.process("workers", "archive"),
        made.process("server", "serve", "--port", str(port), RATE_LIMIT_PER_MINUTE="0"),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client,
    ):
        await _until_answering(client)

        async def chat() -> None:
            began = time.monotonic()
            for index in tqdm(range(int(chats_per_s * seconds)), "chatting", unit="chats"):
                await asyncio.sleep(began + index / chats_per_s - time.monotonic())
                record = made.record(index * KEYS)  # the first key's
                ended[index * KEYS] = record.finished_at
                made.link.publish_soon(topology.HISTORY, encode(record))

        chatting = asyncio.create_task(chat())
        while not chatting.done() or ended:
            answer = await client.get("/chat/history", params={"limit": 50})
            now = time.time()
            for row in answer.json():
                at = ended.pop(int(row["messages"][0]["content"].split()[0]), None)
                if at is not None:
                    found.append(now - at)
            await asyncio.sleep(POLL_S)
        await chatting
    return found


async def _until_answering(client: httpx.AsyncClient) -> None:
    while True:
        try:
            if (await client.get("/chat/history")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.2)
