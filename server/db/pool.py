"""The connection pool, and the boundary where the driver's errors become the service's."""

import asyncio
import contextlib
import logging
import os
import select
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import psycopg_pool
import yoyo
from pgvector.psycopg import register_vector_async
from psycopg.rows import DictRow, dict_row
from yoyo.exceptions import LockTimeout

from server.core.errors import DatabaseFull, DatabaseUnavailable, RecordRefused

logger = logging.getLogger(__name__)

T = TypeVar("T")

Connection = psycopg.AsyncConnection[DictRow]
Pool = psycopg_pool.AsyncConnectionPool[Connection]

OPEN_TIMEOUT_S = 15.0
QUERY_TIMEOUT_S = 10.0
"""Of whatever somebody waits for; far more than any of these questions takes."""
RECONNECT_S = 2.0
"""How long the pool tries by itself. Then it tries when it is asked; left to itself it would wait ever longer, at last
as long as the database was away."""
NOTICE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
"""So that a Postgres whose machine went away without a word is noticed, where it is reached over TCP."""
DOWN = "The database is not reachable. Try again shortly."
FULL = "The database has no disk space left. Try again later."
DISK_FULL = "the disk of Postgres is full: free some space; chats wait until then, and it goes on by itself"
"""For whoever runs the service."""


async def _configure(connection: psycopg.AsyncConnection[Any]) -> None:
    await register_vector_async(connection)
    await connection.execute(load_queries()["session_settings"])


async def _check(connection: psycopg.AsyncConnection[Any]) -> None:
    """Raises psycopg.OperationalError for a connection that has ended.

    Postgres says so, and a connection at rest has nothing else to say: only where there is something to read is a
    round trip spent on asking.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        await psycopg_pool.AsyncConnectionPool.check_connection(connection)


def make_pool(url: str, max_size: int = 8) -> Pool:
    """A pool that is not open yet. The database must have been migrated before it is opened."""
    return psycopg_pool.AsyncConnectionPool(
        url,
        min_size=1,
        max_size=max_size,
        timeout=5,
        reconnect_timeout=RECONNECT_S,
        open=False,
        configure=_configure,
        check=_check,
        kwargs={"row_factory": dict_row, "autocommit": True, "connect_timeout": 5, **NOTICE},
    )


@asynccontextmanager
async def connection(pool: Pool, timeout_s: float | None = None) -> AsyncIterator[Connection]:
    """A connection from the pool, which is cut after `timeout_s`: a Postgres that is frozen answers nobody.

    Raises RecordRefused for data that Postgres will never take, DatabaseFull where its disk is full, and
    DatabaseUnavailable for everything else that goes wrong (down, read-only, not migrated yet). The driver's text is
    not logged: it quotes rows.
    """
    try:
        async with pool.connection() as conn:
            cutting = timeout_s and asyncio.get_running_loop().call_later(timeout_s, cut, conn)
            try:
                yield conn
            finally:
                if cutting:
                    cutting.cancel()
    except (psycopg.DataError, psycopg.IntegrityError) as exc:
        raise RecordRefused(f"The database refused the data ({type(exc).__name__}, {exc.sqlstate}).") from None
    except psycopg.errors.DiskFull as exc:
        logger.error(DISK_FULL, extra={"action": "database", "sqlstate": exc.sqlstate})
        raise DatabaseFull(FULL, retry_after_s=30) from None
    except psycopg.Error as exc:
        extra = {"action": "database", "error": type(exc).__name__, "sqlstate": exc.sqlstate}
        logger.warning("database failed", extra=extra)
        raise DatabaseUnavailable(DOWN, retry_after_s=5) from None


def cut(conn: psycopg.AsyncConnection[Any]) -> None:
    """End a connection that gets no answer. To cancel what it waits for would be to wait for Postgres as well; to close
    its socket, to leave it waiting."""
    logger.warning("database silent", extra={"action": "database"})
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(conn.fileno())) as own:
        own.shutdown(socket.SHUT_RDWR)


async def within(timeout_s: float, asking: Coroutine[Any, Any, T]) -> T:
    """What is asked, or TimeoutError, at once: it is left to its own end, as cancelling it may take long as well."""
    task = asyncio.create_task(asking)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # somebody has looked
    await asyncio.wait({task}, timeout=timeout_s)
    if not task.done():
        raise TimeoutError
    return task.result()


def load_queries() -> dict[str, bytes]:
    """The statements of `queries/`, by the names of their files."""
    return {path.stem: path.read_bytes() for path in (Path(__file__).parent / "queries").glob("*.sql")}


async def open_pool(pool: Pool) -> None:
    """Raises DatabaseUnavailable when no connection can be made in time."""
    try:
        await pool.open(wait=True, timeout=OPEN_TIMEOUT_S)
    except psycopg.Error as exc:
        raise DatabaseUnavailable(DOWN, retry_after_s=5) from exc


def migrate(url: str, *, alone: bool = False) -> list[str]:
    """Bring the schema up to date; returns the migrations applied. Raises DatabaseUnavailable.

    `alone` says that nobody else can be migrating, so that a lock found is one left by a killed process.
    """
    driver_url = url.replace("postgresql://", "postgresql+psycopg://", 1).replace(
        "postgres://", "postgresql+psycopg://", 1
    )
    try:
        backend = yoyo.get_backend(driver_url)
    except psycopg.OperationalError as exc:
        raise DatabaseUnavailable(DOWN, retry_after_s=5) from exc
    if alone:
        backend.break_lock()
    migrations = yoyo.read_migrations(str(Path(__file__).parent / "migrations"))
    try:
        with backend.lock():
            missing = backend.to_apply(migrations)
            names = [migration.id for migration in missing]
            backend.apply_migrations(missing)
    except LockTimeout as exc:
        raise DatabaseUnavailable("Another process is migrating the database. Try again when it is done.") from exc
    backend.connection.close()
    return names
