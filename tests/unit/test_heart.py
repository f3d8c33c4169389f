"""Whether an engine hangs: it owes an answer, and none of its processes does anything."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

from workers import heart as heart_module
from workers.heart import Heart, kill_below

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@contextmanager
def below(code: str) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A worker's process, and the engine's below it. Not below this one: what else runs there is left alone."""
    with subprocess.Popen([sys.executable, "-c", PARENT, code]) as process:
        worker = psutil.Process(process.pid)
        while not worker.children():
            time.sleep(0.01)
        (engine,) = worker.children()
        try:
            yield worker, engine
        finally:
            for one in engine, worker:
                with suppress(psutil.NoSuchProcess):
                    one.kill()


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def hung_s(heart: Heart, for_s: float) -> float:
    beating = asyncio.create_task(heart.run())
    try:
        await asyncio.sleep(for_s)
        return heart.hung_s
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


async def test_who_answers_does_not_hang() -> None:
    async def answer() -> None:
        await asyncio.sleep(0.1)

    assert await hung_s(Heart(answer), 2.5) == 0


async def test_who_neither_answers_nor_computes_hangs() -> None:
    with below("import time; time.sleep(600)") as (worker, _):
        assert await hung_s(Heart(never, worker), 5.5) >= 2


async def test_who_computes_is_only_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    with below("while True: pass") as (worker, _):
        assert await hung_s(Heart(never, worker), 3.5) == 0
        # Unless it goes on longer than any step can take
        monkeypatch.setattr(heart_module, "LONGEST_STEP_S", 1.0)
        assert await hung_s(Heart(never, worker), 4.5) >= 2


async def test_one_that_hangs_can_be_ended() -> None:
    with below("while True: pass") as (worker, engine):
        engine.suspend()
        kill_below(worker)
        engine.wait(10)
        worker.wait(10)  # nothing holds it up any more
