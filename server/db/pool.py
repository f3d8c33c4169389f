"""The connection pool, and the boundary where the driver's errors become the service's."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool
import yoyo
from pgvector.psycopg import register_vector_async
from psycopg.rows import DictRow, dict_row

from server.core.errors import DatabaseUnavailable

logger = logging.getLogger(__name__)

Pool = psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[DictRow]]

DOWN = "The database is not reachable. Try again shortly."


async def _configure(connection: psycopg.AsyncConnection[Any]) -> None:
    await register_vector_async(connection)


def make_pool(url: str, max_size: int = 8) -> Pool:
    """A pool that is not open yet. The database must have been migrated before it is opened."""
    return psycopg_pool.AsyncConnectionPool(
        url,
        min_size=1,
        max_size=max_size,
        timeout=5,
        open=False,
        configure=_configure,
        check=psycopg_pool.AsyncConnectionPool.check_connection,
        kwargs={"row_factory": dict_row, "autocommit": True, "connect_timeout": 5},
    )


@asynccontextmanager
async def connection(pool: Pool) -> AsyncIterator[psycopg.AsyncConnection[DictRow]]:
    """A connection from the pool. Raises DatabaseUnavailable when Postgres is down, full or shutting down."""
    try:
        async with pool.connection() as conn:
            yield conn
    except (psycopg.OperationalError, psycopg_pool.PoolTimeout) as exc:
        logger.warning("database not reachable", extra={"action": "database", "error": type(exc).__name__})
        raise DatabaseUnavailable(DOWN, retry_after_s=5) from exc


def migrate(url: str) -> list[str]:
    """Bring the schema up to date; returns the migrations applied. Raises DatabaseUnavailable."""
    driver_url = url.replace("postgresql://", "postgresql+psycopg://", 1).replace(
        "postgres://", "postgresql+psycopg://", 1
    )
    try:
        backend = yoyo.get_backend(driver_url)
    except psycopg.OperationalError as exc:
        raise DatabaseUnavailable(DOWN, retry_after_s=5) from exc
    migrations = yoyo.read_migrations(str(Path(__file__).parent / "migrations"))
    with backend.lock():
        missing = backend.to_apply(migrations)
        names = [migration.id for migration in missing]
        backend.apply_migrations(missing)
    backend.connection.close()
    return names
