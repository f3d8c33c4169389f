"""The API server as real processes over a real broker and database: several on one port, and the keys they let in."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.auth import hash_key, new_key
from server.db.pool import Pool
from server.db.store import Store
from server.private import free_port
from tests.integration.test_keys import beginning_of_a_minute, end_listeners
from tests.stack import PROJECT

MODELS = "models: [{id: none, name: None, type: chat, source: none, context_length: 64, default: true}]"


@dataclass
class Server:
    process: asyncio.subprocess.Process
    port: int

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    async def get(self, path: str, key: str = "") -> httpx.Response:
        """Over a connection of its own, so that any of the processes may take it."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=20) as client:
            return await client.get(path, headers={"Authorization": f"Bearer {key}"} if key else {})

    async def samples(self) -> dict[str, float]:
        """What `/metrics` says, by name and labels."""
        text = (await self.get("/metrics")).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
        assert len({name for name, _ in lines}) == len(lines), "a sample is told twice"
        return {name: float(value) for name, value in lines}

    async def answers(self) -> bool:
        try:
            return (await self.get("/health/live")).status_code == 200
        except httpx.TransportError:
            return False


async def eventually(check: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def environment_of(folder: Path, models: str, amqp_url: str, database_url: str) -> dict[str, str]:
    """Of a server with these models, whose models.yaml is put into the folder."""
    (folder / "models.yaml").write_text(models)
    return {
        **os.environ,
        "MODELS_FILE": str(folder / "models.yaml"),
        "AMQP_URL": amqp_url,
        "DATABASE_URL": database_url,
        "RATE_LIMIT_PER_MINUTE": "0",
    }


@pytest.fixture
def environment(tmp_path: Path, amqp_url: str, database_url: str) -> dict[str, str]:
    return environment_of(tmp_path, MODELS, amqp_url, database_url)


@asynccontextmanager
async def served(environment: dict[str, str], **settings: str) -> AsyncIterator[Server]:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "serve", "--port", str(port)),
        cwd=PROJECT,
        env={**environment, **settings},
        stderr=asyncio.subprocess.DEVNULL,
    )
    server = Server(process, port)
    try:
        await eventually(server.answers)
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 30)


@pytest.fixture
async def key(store: Store) -> str:
    made = new_key()
    assert await store.create_key("test", hash_key(made)) is not None
    return made


async def id_of(store: Store, key: str) -> int:
    row = await store.find_key(hash_key(key))
    assert row is not None
    return row.id


def by_command(environment: dict[str, str], *arguments: str) -> str:
    """What `python -m server keys …` prints."""
    argv = [sys.executable, "-m", "server", "keys", *arguments]
    return subprocess.run(argv, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True).stdout


async def test_a_key_that_the_command_revokes_is_refused_at_once_by_every_server(
    environment: dict[str, str], store: Store
) -> None:
    async with served(environment) as one, served(environment) as two:
        # Given a key that was made while both run, and that both have let in
        key = (await asyncio.to_thread(by_command, environment, "create", "ada")).split()[0]
        for server in (one, two, one, two):
            assert (await server.get("/models", key)).status_code == 200
        # When the command revokes it
        id_ = await id_of(store, key)
        await asyncio.to_thread(by_command, environment, "revoke", str(id_))
        # Then both refuse it from then on
        for server in (one, two):
            refused = await server.get("/models", key)
            assert (refused.status_code, refused.json()["error"]) == (401, "This API key has been revoked.")


async def test_a_revocation_is_not_missed_while_nobody_listens(
    environment: dict[str, str], store: Store, pool: Pool, key: str
) -> None:
    async with served(environment) as server:
        assert (await server.get("/models", key)).status_code == 200
        # When the server's listening connection is ended, and the key revoked right after
        await end_listeners(pool)
        await store.revoke_key(await id_of(store, key))
        # Then it is refused, by then and after the server listens again
        assert (await server.get("/models", key)).status_code == 401
        await asyncio.sleep(1.5)
        assert (await server.get("/models", key)).status_code == 401


async def test_several_processes_are_one_server(environment: dict[str, str], key: str) -> None:
    await beginning_of_a_minute()
    async with served(environment, SERVER_WORKERS="3", RATE_LIMIT_PER_MINUTE="20") as server:
        assert len(server.children()) == 3
        # When many ask at once, each over a connection of its own
        answers = await asyncio.gather(*(server.get("/models", key) for _ in range(24)))
        # Then the key's limit is kept by all together
        assert sorted(answer.status_code for answer in answers) == [200] * 20 + [429] * 4
        # And each process tells of all of them, whichever is asked
        for _ in range(8):
            samples = await server.samples()
            assert samples['qwen3_requests_total{endpoint="/models",model="",status="200"}'] == 20
            assert samples['qwen3_requests_total{endpoint="/models",model="",status="429"}'] == 4
            assert samples['qwen3_queue_messages{lane="interactive",model="none"}'] == 0
            assert samples['qwen3_queue_oldest_age_seconds{lane="interactive",model="none"}'] == 0
            assert not any("pid=" in name for name in samples)
        # And of the same health
        healths = [(await server.get("/health")).json() for _ in range(6)]
        assert {(health["rabbitmq_connected"], health["database_connected"]) for health in healths} == {(True, True)}


async def test_a_process_that_dies_is_started_again_and_nobody_is_turned_away(
    environment: dict[str, str], key: str
) -> None:
    async with served(environment, SERVER_WORKERS="2") as server:
        for _ in range(10):
            assert (await server.get("/models", key)).status_code == 200
        before = {child.pid for child in server.children()}
        # When one of two is killed
        os.kill(min(before), signal.SIGKILL)
        # Then who comes next is answered all the same
        for _ in range(10):
            assert (await server.get("/models", key)).status_code == 200

        # And there are two again, and what the dead one had counted is still told
        async def two_again() -> bool:
            now = {child.pid for child in server.children()}
            return len(now) == 2 and min(before) not in now

        await eventually(two_again)
        samples = await server.samples()
        assert samples['qwen3_requests_total{endpoint="/models",model="",status="200"}'] == 20


def taken(process: psutil.Process, port: int) -> int:
    """Connections to this port that a process has accepted; others wait in the socket that the processes share."""
    found = process.net_connections(kind="tcp")
    return sum(one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED for one in found)


async def test_sigterm_drains_every_process(environment: dict[str, str], key: str) -> None:
    async with served(environment, SERVER_WORKERS="2", DRAIN_TIMEOUT_S="10") as server:
        children = server.children()
        # Given a request on its way to each of many connections: its body has not come yet
        body = b'{"messages": []}'
        head = f"POST /chat HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
        open_ = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(12)]
        for _, writer in open_:
            writer.write(head.encode())
            await writer.drain()
        async with asyncio.timeout(10):
            while sum(taken(child, server.port) for child in children) < len(open_):
                await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
        # When the service is asked to stop, and then the bodies come
        server.process.terminate()
        await asyncio.sleep(0.5)
        for _, writer in open_:
            writer.write(body)
        # Then each is answered
        for reader, writer in open_:
            assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
            writer.close()
        # And all end well
        assert await asyncio.wait_for(server.process.wait(), 20) == 0
        assert not any(child.is_running() for child in children)


async def test_a_server_that_cannot_start_says_so_and_ends(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("models: [{id: none, nmae: None}]")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "serve", "--port", str(free_port())),
        cwd=PROJECT,
        env={**environment, "SERVER_WORKERS": "2"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, told = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b"models.0.nmae: unknown key" in told


async def test_the_parents_death_ends_the_processes(environment: dict[str, str]) -> None:
    async with served(environment, SERVER_WORKERS="2") as server:
        children = server.children()
        server.process.kill()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, children, 20)
        assert (len(gone), alive) == (2, [])
