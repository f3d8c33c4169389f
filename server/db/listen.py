"""A connection that hears what Postgres notifies. Owns keeping it, and knowing for certain whether it hears."""

import asyncio
import contextlib
import logging
from typing import Protocol

import psycopg
from psycopg import sql

from server.db.pool import cut, within

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
"""How often a silent connection is asked whether it is still one."""
ANSWER_TIMEOUT_S = 5.0
RECONNECT_S = 1.0


class Listener(Protocol):
    """Who is told. What was notified while not listening is lost, so nothing heard before is certain any more."""

    def on_listening(self) -> None: ...
    def on_notified(self, payload: str) -> None: ...
    def on_lost(self) -> None: ...


async def listen(url: str, channel: str, listener: Listener) -> None:
    """Hear a channel until cancelled, over a connection of its own that comes back by itself.

    A connection that ended is noticed at once, one that went dumb within HEARTBEAT_S + ANSWER_TIMEOUT_S.
    """
    while True:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                connection = await psycopg.AsyncConnection.connect(
                    url, autocommit=True, application_name=f"listen {channel}"
                )
            async with connection:
                await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
                listener.on_listening()
                await _hear(connection, listener)
        except (psycopg.Error, OSError, TimeoutError) as exc:
            logger.warning("not listening", extra={"action": "listen", "error": type(exc).__name__})
        finally:
            listener.on_lost()
        await asyncio.sleep(RECONNECT_S)


async def _hear(connection: psycopg.AsyncConnection[tuple[object, ...]], listener: Listener) -> None:
    """Raises psycopg.Error or TimeoutError when the connection is lost."""
    while True:
        await _until_readable(connection.fileno(), HEARTBEAT_S)
        try:
            await within(
                ANSWER_TIMEOUT_S, connection.execute("SELECT 1")
            )  # raises where what could be read was the end
        except TimeoutError:
            cut(connection)  # to leave it in peace takes an answer as well
            raise
        async for notification in connection.notifies(timeout=0):
            listener.on_notified(notification.payload)


async def _until_readable(fd: int, timeout_s: float) -> None:
    """Returns when there is something to read, or after `timeout_s`. The driver's own wait would wake ten times a
    second."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(readable.wait(), timeout_s)
    finally:
        loop.remove_reader(fd)
