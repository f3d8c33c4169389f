"""Which cores the processes keep to, on real processes and threads."""

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from workers.placement import keep_apart

SLEEPERS = """
import os, sys, threading, time
bound = threading.Thread(target=lambda: (os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}), time.sleep(60)))
bound.start()
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a thread that bound itself to the first core."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def cores() -> Iterator[set[int]]:
    """What this process may use, as it was before once the test is over."""
    before = os.sched_getaffinity(0)
    yield before
    for thread in psutil.Process().threads():
        os.sched_setaffinity(thread.id, before)


def _cores_of(pid: int) -> list[set[int]]:
    return [os.sched_getaffinity(thread.id) for thread in psutil.Process(pid).threads()]


def test_children_leave_the_front_its_cores(child: subprocess.Popen[bytes], cores: set[int]) -> None:
    # Given a process with a child, on a machine of several cores
    assert len(cores) > 1, "this machine has one core only"
    front = {max(cores)}
    # When the front's cores are set apart
    keep_apart(front)
    # Then every thread of the child keeps off them, and every one of this process keeps to them
    assert all(affinity == cores - front or affinity == {min(cores)} for affinity in _cores_of(child.pid))
    assert _cores_of(os.getpid()) == [front] * len(_cores_of(os.getpid()))
    # And a thread that was bound to one of the others is bound to it still
    assert {min(cores)} in _cores_of(child.pid)
