"""A real broker and a real database, without an engine."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from server.core.settings import Settings
from server.db.pool import Pool, make_pool, migrate
from server.db.store import Store
from server.private import PrivatePostgres, PrivateRabbitMQ
from tests.faults.rig import own_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """For a private store, which pytest's own would not do for."""
    with own_folder() as made:
        yield made


@pytest.fixture(scope="session")
async def amqp_url() -> AsyncIterator[str]:
    with own_folder() as folder:
        broker = PrivateRabbitMQ(folder / "rabbitmq")
        try:
            yield await broker.start()
        finally:
            await broker.stop()


@pytest.fixture(scope="session")
async def database_url() -> AsyncIterator[str]:
    with own_folder() as folder:
        postgres = PrivatePostgres(folder / "postgres")
        try:
            url = await postgres.start()
            migrate(url)
            yield url
        finally:
            await postgres.stop()


@pytest.fixture(scope="session")
async def pool(database_url: str) -> AsyncIterator[Pool]:
    made = make_pool(database_url)
    await made.open(wait=True)
    yield made
    await made.close()


@pytest.fixture
def store(pool: Pool) -> Store:
    return Store(pool)


@pytest.fixture
async def key_id(store: Store) -> int:
    """A key of the test's own."""
    made = await store.create_key("test", hashlib.sha256(secrets.token_bytes()).digest())
    assert made is not None
    return made


@pytest.fixture
def settings(amqp_url: str, database_url: str) -> Settings:
    return Settings(amqp_url=amqp_url, database_url=database_url, drain_timeout_s=2)
