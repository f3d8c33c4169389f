"""The service's processes started one by one over a private broker and database, to be killed, frozen and cut."""

import asyncio
import hashlib
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psycopg
import yaml

from server.core.settings import BadSettings
from server.db.pool import make_pool, migrate
from server.db.store import Store
from server.private import PrivatePostgres, PrivateRabbitMQ, free_port
from server.process import Child, start
from tests.faults.broker import ctl
from tests.processes import MARK

MODEL = "qwen3-test"


@dataclass
class Stores:
    """A broker and a migrated database that run, and what of them is set aside for rigs that share them."""

    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    database_url: str
    amqp_url: str
    hosts: Iterator[str] = field(default_factory=lambda: iter(()))

    async def set_aside(self, count: int) -> None:
        """Virtual hosts for so many rigs: made one by one, each would take the broker's command a second."""
        names = [f"rig{n}" for n in range(count)]
        hosts = ", ".join(f'<<"{name}">>' for name in names)
        all_ = '<<".*">>, <<".*">>, <<".*">>'
        each = f"rabbit_vhost:add(H, U), rabbit_auth_backend_internal:set_permissions(U, H, {all_}, U)"
        await ctl(self.rabbitmq, "eval", f'U = <<"qwen3">>, [begin {each} end || H <- [{hosts}]].')
        self.hosts = iter(names)

    async def one(self) -> tuple[str, str]:
        """Addresses of a database and a virtual host that nobody has used."""
        name = next(self.hosts)
        server, database = self.database_url.split("/postgres?")
        async with await psycopg.AsyncConnection.connect(f"{server}/template1?{database}", autocommit=True) as admin:
            await admin.execute(f"CREATE DATABASE {name} TEMPLATE postgres")
        return f"{server}/{name}?{database}", f"{self.amqp_url.removesuffix('%2F')}{name}"


@contextmanager
def own_folder() -> Iterator[Path]:
    """For stores. Postgres, started by root, is another user's process and has to reach its own: pytest's folder will
    not do, which each session that starts shuts to others. And a socket's path must be short."""
    with TemporaryDirectory(prefix="qwen3-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)
        yield Path(name)


@asynccontextmanager
async def stores(folder: Path) -> AsyncIterator[Stores]:
    postgres, rabbitmq = PrivatePostgres(folder / "postgres"), PrivateRabbitMQ(folder / "rabbitmq")
    try:
        database_url, amqp_url = await asyncio.gather(postgres.start(), rabbitmq.start())
        await asyncio.to_thread(migrate, database_url)
        yield Stores(postgres, rabbitmq, database_url, amqp_url)
    finally:
        await asyncio.gather(postgres.stop(), rabbitmq.stop())


@dataclass
class Rig:
    """`postgres` and `rabbitmq` run; servers and workers are started by name. `key` is an admin's."""

    folder: Path
    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    database_url: str
    amqp_url: str
    key: str
    children: list[Child] = field(default_factory=list)

    @property
    def vhost(self) -> str:
        return self.amqp_url.rpartition("/")[2]

    @property
    def models_file(self) -> Path:
        return self.folder / "models.yaml"

    def serve(self, **entries: dict[str, Any]) -> None:
        """The models of servers and workers started from now on, by id; the echoing one if none is named."""
        usual = {"type": "chat", "source": str(self.folder), "context_length": 2048}
        models = [{"id": id_, "name": id_, **usual, **entry} for id_, entry in (entries or {MODEL: {}}).items()]
        self.models_file.write_text(yaml.safe_dump({"models": models}))

    async def run(self, name: str, *argv: str, cores: set[int] | None = None, **settings: str) -> Child:
        """Start `python -m ARGV` with these settings, on `cores` or where we run; its log is `<name>.log`."""
        environment = {
            "MODELS_FILE": str(self.models_file),
            "DATABASE_URL": self.database_url,
            "AMQP_URL": self.amqp_url,
            "RATE_LIMIT_PER_MINUTE": "0",
            "METRICS_PORT": "0",
            MARK: str(self.folder),
            **settings,
        }
        child = await start(name, [sys.executable, "-m", *argv], environment, self.folder / f"{name}.log", cores)
        self.children.append(child)
        return child

    async def server(self, name: str = "server", **settings: str) -> tuple[str, Child]:
        """An API server that answers; its address and process."""
        port = free_port()
        child = await self.run(name, "server", "serve", "--port", str(port), **settings)
        url = f"http://127.0.0.1:{port}"
        await until(lambda: answers(f"{url}/health"))
        return url, child

    async def echo(self, name: str = "echo", *options: str, **settings: str) -> Child:
        """A chat worker whose engine only echoes."""
        return await self.run(name, "benchmarks.echo", "--model", MODEL, *options, **settings)

    async def archive(self, **settings: str) -> Child:
        return await self.run("archive", "workers", "archive", **settings)

    def client(self, url: str, key: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        # Past its bound of kept connections httpx may close one that it has just given to a request.
        limits = httpx.Limits(max_connections=100, max_keepalive_connections=100)
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=60, limits=limits, trust_env=False)

    async def new_key(self, name: str) -> str:
        async with self.store() as store:
            return await _make_key(store, name, is_admin=False)

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        pool = make_pool(self.database_url, max_size=1)
        await pool.open(wait=True)
        try:
            yield Store(pool)
        finally:
            await pool.close()

    async def stop(self) -> None:
        for child in self.children:
            if not child.exited:
                with suppress(ProcessLookupError):  # it may have ended in this very moment
                    os.kill(child.process.pid, signal.SIGCONT)  # what is frozen hears no other signal
        await asyncio.gather(*(child.stop(timeout_s=10) for child in self.children))


@asynccontextmanager
async def rig(folder: Path, stores_folder: Path | None = None) -> AsyncIterator[Rig]:
    """A rig with stores of its own (in `stores_folder`, where that matters), without servers and workers yet."""
    with ExitStack() as stack:
        where = stores_folder or stack.enter_context(own_folder())
        async with stores(where) as own, _rig(folder, own, own.database_url, own.amqp_url) as made:
            yield made


@asynccontextmanager
async def sharing(folder: Path, shared: Stores) -> AsyncIterator[Rig]:
    """The same over a part of stores that others use too, for who does nothing to these."""
    async with _rig(folder, shared, *await shared.one()) as made:
        yield made


RIGS: list[Path] = []
"""The folders of all that were made."""


@asynccontextmanager
async def _rig(folder: Path, own: Stores, database_url: str, amqp_url: str) -> AsyncIterator[Rig]:
    made = Rig(folder, own.postgres, own.rabbitmq, database_url, amqp_url, key="")
    RIGS.append(folder)
    try:
        async with made.store() as store:
            made.key = await _make_key(store, "admin", is_admin=True)
        made.serve()
        yield made
    finally:
        await made.stop()


@asynccontextmanager
async def kept_alive(private: PrivatePostgres | PrivateRabbitMQ) -> AsyncIterator[list[str]]:
    """It is started again whenever it ends, as `up` does; what `up` would say of that."""
    told: list[str] = []

    async def keep() -> None:
        while True:
            await private.ended()
            while True:
                try:
                    await private.start()
                    break
                except BadSettings as exc:
                    told.append(exc.message)
                    await asyncio.sleep(2)

    keeping = asyncio.create_task(keep())
    try:
        yield told
        assert not keeping.done()
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def _make_key(store: Store, name: str, *, is_admin: bool) -> str:
    key = f"qk-{secrets.token_urlsafe(32)}"
    await store.create_key(name, hashlib.sha256(key.encode()).digest(), is_admin=is_admin)
    return key


async def healthy(client: httpx.AsyncClient) -> bool:
    """Whether all parts are there, the archivist aside."""
    answer = await client.get("/health")
    return answer.status_code == 200


async def history(client: httpx.AsyncClient, count: int) -> list[dict[str, Any]] | None:
    """The key's history once it has so many entries; fails when it has more."""
    entries: list[dict[str, Any]] = (await client.get("/chat/history?limit=1000")).json()
    assert len(entries) <= count, entries
    return entries if len(entries) == count else None


async def answers(url: str) -> bool:
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        try:
            return bool((await client.get(url)).status_code)
        except httpx.TransportError:
            return False


async def until(check: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """What `check` (awaited if it must be) returns once that is true; fails with its last answer otherwise."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        answer = check()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return answer
        assert loop.time() < deadline, f"still {answer!r} after {timeout_s} s"
        await asyncio.sleep(0.05)
