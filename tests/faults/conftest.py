"""What faults are done to: a rig of processes without an engine (seconds), and a whole stack with one (a minute)."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.faults.guarded import Guarded, guarded_service
from tests.faults.rig import Rig, rig
from tests.stack import Stack, whole_stack


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Rig]:
    """Broker and database of the test's own; it starts what else it needs."""
    async with rig(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    """One for all tests that abuse it: it has to stand that."""
    async with guarded_service(tmp_path_factory.mktemp("guarded")) as made:
        yield made


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One for all tests here; whoever breaks it waits until it is whole again."""
    with whole_stack(tmp_path_factory.mktemp("faults")) as running:
        yield running
