"""What faults are done to: a rig of processes without an engine (seconds), and a whole stack with one (a minute)."""

import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from xdist.scheduler import LoadScopeScheduling

from server.errors import PREFIX
from tests.faults.guarded import Guarded, guarded_service
from tests.faults.rig import RIGS, Rig, Stores, own_folder, sharing, stores
from tests.stack import Stack, whole_stack
from workers.smoke import recipe_hash

MOST_RIGS = 100
"""Tests that share the stores."""
MOST_FRAGILE = 10
"""Few, as a broker that comes back looks after every virtual host."""

CONTEXT_LENGTH = 32_768
"""Of the stand-in. Its own is over in a second on a fast machine, and an answer in whose middle something is to happen
must outlast whoever looks from a busy core."""

LOGGED = 20
"""Lines of a process's log that are told of a test that failed."""


@asynccontextmanager
async def stores_for(rigs: int) -> AsyncIterator[Stores]:
    with own_folder() as folder:
        async with stores(folder) as made:
            await made.set_aside(rigs)
            yield made


class _ByFile(LoadScopeScheduling):
    """Where several processes run the tests, each takes whole files, and one all that need an engine."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "engine" if "/engine/" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A request that is cancelled as it ends leaves open what its HTTP client was about to close: idle connections.
    They are found whenever the garbage is, in whichever test that is, and nothing of the service is in this process."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed (<socket|transport):ResourceWarning"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[Any]:
    """With a failure come the last lines of what its processes have logged meanwhile."""
    report = yield
    if report.failed:
        for log in sorted(log for folder in RIGS for log in folder.glob("*.log")):
            if log.stat().st_mtime >= call.start:
                lines = log.read_text(errors="replace").splitlines()[-LOGGED:]
                report.sections.append((log.name, "\n".join(line[:400] for line in lines)))
    return report


@pytest.fixture(scope="session")
async def shared() -> AsyncIterator[Stores]:
    """Broker and database of all tests that do nothing to these."""
    async with stores_for(MOST_RIGS) as made:
        yield made


@pytest.fixture(scope="session")
async def breakable() -> AsyncIterator[Stores]:
    """Broker and database of the tests that break these; each leaves them whole."""
    async with stores_for(MOST_FRAGILE) as made:
        yield made


@pytest.fixture
async def parts(tmp_path: Path, shared: Stores) -> AsyncIterator[Rig]:
    """A database and a virtual host of the test's own; it starts what else it needs."""
    async with sharing(tmp_path, shared) as made:
        yield made


@pytest.fixture
async def fragile(tmp_path: Path, breakable: Stores) -> AsyncIterator[Rig]:
    """The same, of a broker and a Postgres that may be broken for a while."""
    async with sharing(tmp_path, breakable) as made:
        yield made


@pytest.fixture(scope="session")
async def guarded(tmp_path_factory: pytest.TempPathFactory, shared: Stores) -> AsyncIterator[Guarded]:
    """One for all tests that abuse it: it has to stand that."""
    folder = tmp_path_factory.mktemp("guarded")
    async with sharing(folder, shared) as parts, guarded_service(parts) as made:
        yield made


@pytest.fixture
async def nobody_else_was_harmed(guarded: Guarded) -> AsyncIterator[None]:
    """Looks after the test whether it is."""
    yield
    await guarded.is_well()


@pytest.fixture(scope="session")
def paths(guarded: Guarded) -> list[str]:
    """Every path that takes a POST, and one under the prefix."""
    document = httpx.get(f"{guarded.url}/openapi.json", trust_env=False).json()["paths"]
    found = [path for path, methods in document.items() if "post" in methods]
    assert {"/chat", "/chat/similar", "/v1/chat/completions", "/v1/messages/count_tokens"} <= set(found)
    return [*found, f"{PREFIX}/v1/messages"]


@pytest.fixture(scope="session")
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for the chat model with a longer context, taught once for as long as its recipe stays."""
    taught: Path = request.config.cache.mkdir("smoke") / recipe_hash()
    if not (taught / "config.json").exists():
        subprocess.run([sys.executable, "-m", "workers", "smoke", "--out", str(taught)], check=True)
    folder = tmp_path_factory.mktemp("weights") / taught.name
    shutil.copytree(taught, folder)
    for name, field in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        config = json.loads((folder / name).read_text())
        assert field in config
        (folder / name).write_text(json.dumps(config | {field: CONTEXT_LENGTH}))
    return folder


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Stack]:
    """One for all tests here; whoever breaks it waits until it is whole again."""
    with own_folder() as folder, whole_stack(folder, weights) as running:
        yield running
        shutil.copytree(running.folder / "logs", tmp_path_factory.mktemp("stack") / "logs")
