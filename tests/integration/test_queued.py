"""What is told of those who wait, over several server processes and a worker that looks ahead: each of them once."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration.test_server_processes import Server, environment_of, eventually, key, served
from tests.stack import PROJECT

__all__ = ["key"]  # a fixture

MODEL = "queued-test"
MODELS = f"models: [{{id: {MODEL}, name: M, type: chat, source: none, context_length: 4096, default: true}}]"
TOKENS = f'qwen3_queue_prompt_tokens{{lane="interactive",model="{MODEL}"}}'
AGE = f'qwen3_queue_oldest_age_seconds{{lane="interactive",model="{MODEL}"}}'
WAITING = f'qwen3_requests_waiting{{model="{MODEL}"}}'
BUSY = f'qwen3_workers_busy{{model="{MODEL}"}}'
SLOTS = 4


@pytest.fixture
def environment(tmp_path: Path, amqp_url: str, database_url: str) -> dict[str, str]:
    return environment_of(tmp_path, MODELS, amqp_url, database_url) | {"START_ON_DEMAND": MODEL}


@asynccontextmanager
async def working(environment: dict[str, str]) -> AsyncIterator[None]:
    """A worker that takes a minute for each of `SLOTS` jobs at once."""
    options = ("--model", MODEL, "--slots", str(SLOTS), "--words", "1", "--pause", "60")
    argv = [sys.executable, "-m", "benchmarks.echo", *options]
    worker = await asyncio.create_subprocess_exec(
        *argv, cwd=PROJECT, env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        worker.kill()
        await worker.wait()


class Clients:
    """Those who wait for an answer, each over a connection of its own."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._asking: list[asyncio.Task[None]] = []

    def ask(self, server: Server, count: int) -> None:
        self._asking += [asyncio.create_task(self._one(server)) for _ in range(count)]

    async def _one(self, server: Server) -> None:
        url, body = f"http://127.0.0.1:{server.port}/chat", {"messages": [{"role": "user", "content": "a" * 4000}]}
        async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
            await client.post(url, json=body, headers={"Authorization": f"Bearer {self._key}"})

    @property
    def waiting(self) -> int:
        return sum(not task.done() for task in self._asking)

    async def leave(self) -> None:
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)


async def test_those_who_wait_are_counted_once_wherever_they_wait(environment: dict[str, str], key: str) -> None:
    clients = Clients(key)
    async with served(environment, SERVER_WORKERS="2") as two, served(environment) as one:
        servers = [two, one]

        async def total(name: str) -> float:
            return sum([(await server.samples())[name] for server in servers])

        async def adds_up(begun: int = 0) -> bool:
            return await total(TOKENS) == (clients.waiting - begun) * each and await total(WAITING) > 0

        try:
            # Given no worker of a model that may be without one: that is no fault, and who asks waits and is told of
            assert (await one.get("/health")).status_code == 200
            clients.ask(one, 1)
            each = 0.0

            async def told() -> bool:
                nonlocal each
                each = await total(TOKENS)
                return each > 0

            await eventually(told)
            assert 1000 <= each <= 1020
            # When more come than a server sends of one key, then all count, at two processes of one server as well
            clients.ask(one, 23)
            clients.ask(two, 40)
            await eventually(adds_up)
            assert await total(WAITING) == 64
            # And each of the two says the same
            assert len({(await two.samples())[TOKENS] for _ in range(8)}) == 1
            age_s = (await one.samples())[AGE]
            await asyncio.sleep(1.2)
            assert age_s + 1 <= (await one.samples())[AGE] < 60
            # When a worker comes, which runs four and takes all the others to choose from
            async with working(environment):

                async def takes() -> bool:
                    return (await one.samples())[BUSY] == 1.0 and await adds_up(SLOTS)

                await eventually(takes)
                # And a process is killed, then those of its clients are gone and nobody else
                before = clients.waiting
                os.kill(two.children()[0].pid, signal.SIGKILL)
                await eventually(takes)
                assert 0 < clients.waiting < before
                # And no server tells of what another had, when that is killed with all it has
                servers.remove(one)
                one.process.kill()

                async def left() -> bool:
                    return (await two.samples())[BUSY] == 1.0 and await adds_up(SLOTS)

                await eventually(left)
            # When the worker is lost, then what it had begun waits again

            async def all_again() -> bool:
                return await adds_up()

            await eventually(all_again)
        finally:
            await clients.leave()
    assert not [child for child in psutil.Process().children() if "benchmarks.echo" in " ".join(child.cmdline())]
