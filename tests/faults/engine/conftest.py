"""Whoever tests the whole stack keeps off its engine's core, as all of its other parts do."""

import os
from collections.abc import Iterator

import psutil
import pytest

from tests.processes import marked
from tests.stack import Stack


@pytest.fixture(autouse=True)
def off_the_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Linux 6.18 was seen to give a process on that core no time at all until the answer was made."""
    before = os.sched_getaffinity(0)
    if "stack" in request.fixturenames:
        stack: Stack = request.getfixturevalue("stack")
        os.sched_setaffinity(0, server(stack).cpu_affinity())
    yield
    os.sched_setaffinity(0, before)


def server(stack: Stack) -> psutil.Process:
    """The API server's process, or one of its processes."""
    return next(process for process in marked(str(stack.folder)) if process.cmdline()[1:4] == ["-m", "server", "serve"])
