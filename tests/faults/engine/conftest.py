"""Whoever tests the whole stack keeps off its engine's core, as all of its other parts do."""

from collections.abc import Iterator

import pytest

from tests.processes import kept_to, started
from tests.stack import Stack


@pytest.fixture(autouse=True)
def off_the_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Linux 6.18 was seen to give a process on that core no time at all until the answer was made."""
    if "stack" not in request.fixturenames:
        yield
        return
    stack: Stack = request.getfixturevalue("stack")
    with kept_to(set(started(str(stack.folder), "server", "serve").cpu_affinity())):
        yield
