"""Whether an engine hangs: it owes an answer, and none of its processes does anything."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from workers import heart as heart_module
from workers.heart import Heart, kill_below


@contextmanager
def below(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process below this one."""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield process
        finally:
            process.kill()


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
    with below("import time; time.sleep(600)"):
        assert await hung_s(Heart(never), 5.5) >= 2


async def test_who_computes_is_only_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    with below("while True: pass"):
        assert await hung_s(Heart(never), 3.5) == 0
        # Unless it goes on longer than any step can take
        monkeypatch.setattr(heart_module, "LONGEST_STEP_S", 1.0)
        assert await hung_s(Heart(never), 4.5) >= 2


async def test_one_that_hangs_can_be_ended() -> None:
    with below("while True: pass") as process:
        psutil.Process(process.pid).suspend()
        kill_below()
        assert process.wait(10) < 0
