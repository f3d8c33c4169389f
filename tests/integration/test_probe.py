"""What a worker's probes see of its life: a model that loads, serves, hangs and does not end."""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator

import httpx
import pytest

from server.core.settings import Settings
from tests.integration.test_amqp import until
from tests.integration.test_archive import archivist
from tests.integration.test_worker import EchoWorker
from workers.archive import Archivist
from workers.probe import HUNG_S


class SlowWorker(EchoWorker):
    """Loads until it is told that it has; hangs for as long as it is told, and cannot be ended."""

    def __init__(self, settings: Settings, model: str) -> None:
        super().__init__(settings, model)
        self.loaded = asyncio.Event()
        self.hangs_for_s = 0.0
        self.kills = 0

    async def start(self) -> int:
        await self.loaded.wait()
        return 1

    def hung_s(self) -> float:
        return self.hangs_for_s

    def kill(self) -> None:
        self.kills += 1


@pytest.fixture
async def worker(settings: Settings) -> AsyncIterator[SlowWorker]:
    made = SlowWorker(settings, f"slow-{secrets.token_hex(4)}")
    running = asyncio.create_task(made.run())
    await until(lambda: made.probe.port or running.done())
    yield made
    made.loaded.set()
    await until(lambda: made.probe.ready or running.done() or made.hangs_for_s)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0


async def statuses(worker: SlowWorker | Archivist) -> tuple[int, int, int]:
    """Of startup, live and ready."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{worker.probe.port}", trust_env=False) as client:
        told = [(await client.get(f"/health/{name}")).status_code for name in ("startup", "live", "ready")]
        return told[0], told[1], told[2]


async def reaches(worker: SlowWorker | Archivist, wanted: tuple[int, int, int]) -> None:
    for _ in range(100):
        if await statuses(worker) == wanted:
            return
        await asyncio.sleep(0.1)
    assert await statuses(worker) == wanted


async def test_a_worker_that_loads_is_told_from_one_that_hangs(worker: SlowWorker) -> None:
    # Given a model that loads for longer than the beacon's second
    await asyncio.sleep(1.5)
    assert await statuses(worker) == (503, 200, 503)
    # When it is loaded, then it serves
    worker.loaded.set()
    await reaches(worker, (200, 200, 200))
    # When its model hangs for a little, it is only not ready
    worker.hangs_for_s = 8.0
    await reaches(worker, (200, 200, 503))
    # When it was told to end and is still there, then the probe says that it takes somebody else to do it
    worker.hangs_for_s = HUNG_S
    await reaches(worker, (200, 503, 503))
    assert worker.kills
    # And a model that comes back is served again
    worker.hangs_for_s = 0.0
    await reaches(worker, (200, 200, 200))


async def test_an_archivist_is_probed_in_the_same_way(settings: Settings) -> None:
    async with archivist(settings) as made:
        await reaches(made, (200, 200, 200))
