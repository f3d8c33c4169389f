"""Child processes: stopped for good, with all they started, and their logs kept."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from server import process as process_module
from server.process import Child, start

PROJECT = Path(__file__).parents[2]
Start = Callable[..., Coroutine[Any, Any, Child]]


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def pids_in(log: Path, count: int) -> list[int]:
    """The numbers that a child has written to its log, once there are so many."""
    await until(lambda: log.exists() and log.read_bytes().count(b"\n") >= count)
    return [int(word) for word in log.read_text().split()]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "child.log"


@pytest.fixture
async def sh(log: Path) -> AsyncIterator[Start]:
    """Starts a shell script as a child; ends what a failing test leaves of it."""
    children: list[Child] = []

    async def run(script: str, **given: Any) -> Child:
        child = await start("child", ["/bin/sh", "-c", script], given.pop("environment", {}), log, **given)
        children.append(child)
        return child

    yield run
    for child in children:
        # Its group may hold what a failing test left; after a passing one there is none.
        try:
            os.killpg(child.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            await child.process.wait()


async def test_a_child_that_heeds_sigterm_ends_at_once(sh: Start) -> None:
    # Given a child that ends on SIGTERM with a status of its own
    child = await sh('trap "exit 7" TERM; echo ready; while :; do sleep 0.05; done')
    await until(lambda: "ready" in child.tail())
    assert not child.exited
    # When it is stopped
    began = time.monotonic()
    await child.stop(timeout_s=10)
    # Then it has ended by itself, long before the timeout
    assert child.process.returncode == 7
    assert child.exited
    assert time.monotonic() - began < 5


async def test_a_child_that_ignores_sigterm_is_killed_after_the_timeout(sh: Start) -> None:
    child = await sh('trap "" TERM; echo ready; while :; do sleep 0.05; done')
    await until(lambda: "ready" in child.tail())
    # When it is stopped
    began = time.monotonic()
    await child.stop(timeout_s=0.3)
    took_s = time.monotonic() - began
    # Then it got its time, and no more
    assert child.process.returncode == -signal.SIGKILL
    assert 0.3 <= took_s < 5
    assert not alive(child.process.pid)


@pytest.mark.parametrize(
    "script",
    [
        "sleep 600 & echo $!; wait",
        'trap "" TERM; sleep 600 & echo $!; while :; do sleep 0.05; done',
        # What has a parent no more
        '(sleep 600 & echo $!); trap "exit 0" TERM; while :; do sleep 0.05; done',
    ],
    ids=["heeds SIGTERM", "ignores SIGTERM", "orphans it"],
)
async def test_what_a_child_started_goes_with_it(sh: Start, log: Path, script: str) -> None:
    # Given a child with a child of its own
    child = await sh(script)
    (grandchild,) = await pids_in(log, 1)
    assert alive(grandchild)
    # When the child is stopped
    await child.stop(timeout_s=0.3)
    # Then neither is left
    await until(lambda: not alive(grandchild))
    assert not alive(child.process.pid)


async def test_what_a_child_left_behind_is_cleared_after_it_ended(sh: Start, log: Path) -> None:
    # Given a child that has ended by itself and left a process
    child = await sh("sleep 600 & echo $!; exit 3")
    (grandchild,) = await pids_in(log, 1)
    await child.process.wait()
    assert child.exited
    assert alive(grandchild)
    # When it is stopped
    await child.stop(timeout_s=1)
    # Then that process is gone, and the child's own status stands
    await until(lambda: not alive(grandchild))
    assert child.process.returncode == 3


async def test_stopping_twice_does_no_harm(sh: Start) -> None:
    child = await sh("exit 0")
    await child.process.wait()
    await child.stop(timeout_s=1)
    await child.stop(timeout_s=1)
    assert child.process.returncode == 0


async def test_a_child_leads_its_own_group(sh: Start) -> None:
    # Given a running child, then the terminal's Ctrl-C, which goes to our group, does not reach it
    child = await sh("sleep 600")
    assert os.getpgid(child.process.pid) == child.process.pid != os.getpgid(0)
    assert os.getsid(child.process.pid) != os.getsid(0)
    await child.stop(timeout_s=1)


async def test_a_child_gets_the_environment_no_input_and_its_cores(sh: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a variable of this process, and one for the child
    monkeypatch.setenv("OURS", "kept")
    core = min(os.sched_getaffinity(0))
    child = await sh(
        'echo "$OURS $ADDED"; cat; grep Cpus_allowed_list /proc/self/status', environment={"ADDED": "x y"}, cores={core}
    )
    await child.process.wait()
    # Then it sees both, reads nothing, and runs where it should
    assert child.tail().splitlines() == ["kept x y", f"Cpus_allowed_list:\t{core}"]
    assert "ADDED" not in os.environ


async def test_output_and_errors_are_appended_to_the_log(sh: Start, log: Path) -> None:
    # Given a log that is there already
    log.parent.mkdir()
    log.write_text("from before\n")
    # When a child writes to both of its outputs
    child = await sh("echo out; echo err >&2")
    await child.process.wait()
    # Then the log has it all
    assert log.read_text() == "from before\nout\nerr\n"
    assert child.tail() == "from before\nout\nerr"


async def test_tail_gives_the_end_of_the_log(sh: Start, log: Path) -> None:
    # Given a log that is much longer than what is read of it
    child = await sh("i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done")
    await child.process.wait()
    # Then its end is told, the last line last
    assert child.tail(3).splitlines() == ["line 4997", "line 4998", "line 4999"]
    assert child.tail().splitlines() == [f"line {n}" for n in range(4985, 5000)]


async def test_tail_of_a_log_that_is_no_text_or_not_there(sh: Start, log: Path) -> None:
    child = await sh("printf 'caf\\351 ok\\n'")
    await child.process.wait()
    assert child.tail() == "caf\N{REPLACEMENT CHARACTER} ok"
    log.unlink()
    assert child.tail() == "(no log)"


async def test_a_program_that_is_not_there_is_told(log: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await start("child", ["/no/such/program"], {}, log)


PARENT = """
import asyncio, sys
from pathlib import Path
from server.process import start

async def main():
    child = await start("child", ["/bin/sleep", "600"], {}, Path(sys.argv[1]))
    print(child.process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_child_does_not_outlive_a_parent_that_was_killed(log: Path) -> None:
    # Given a parent with a child
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(log), stdout=asyncio.subprocess.PIPE, cwd=PROJECT
    )
    assert parent.stdout is not None
    child = int(await asyncio.wait_for(parent.stdout.readline(), 10))
    try:
        assert alive(child)
        # When the parent gets no chance to clean up
        parent.kill()
        await parent.wait()
        # Then the child ends as well
        await until(lambda: not alive(child))
    finally:
        if parent.returncode is None:
            parent.kill()
            await parent.wait()
        if alive(child):
            os.kill(child, signal.SIGKILL)


BEATS = """
import os, signal, sys, time
from server.core import watchdog
for _ in range(int(sys.argv[1])):
    watchdog.beat()
    time.sleep(0.5)
time.sleep(600)
"""


@pytest.mark.parametrize(("beats", "hangs"), [(2, True), (0, False), (60, False)])
async def test_a_watched_child_that_falls_silent_is_ended(
    log: Path, monkeypatch: pytest.MonkeyPatch, beats: int, hangs: bool
) -> None:
    # Given a child that says for a while that it lives; one that never did may still be loading
    monkeypatch.setattr(process_module, "SILENT_S", 3.0)
    argv = [sys.executable, "-c", BEATS, str(beats)]
    child = await start("child", argv, {"PYTHONPATH": str(PROJECT)}, log, watched=True)
    try:
        # When it is watched, then it is ended if it hangs, and only then
        if hangs:
            assert await asyncio.wait_for(child.ended(), 20) == -signal.SIGKILL
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(child.ended(), 7)
            assert not child.exited
    finally:
        await child.stop(timeout_s=0)
