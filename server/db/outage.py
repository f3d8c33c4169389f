"""Whether Postgres answers, as those found who asked it. While it does not, nobody waits for it but one who looks."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from server.core.errors import DatabaseFull, DatabaseUnavailable
from server.db.pool import DOWN, within

T = TypeVar("T")

LOOK_EVERY_S = 1.0


class Outage:
    """A circuit breaker. It opens with the first question that is not answered, and closes when `ping` is."""

    def __init__(self, ping: Callable[[], Awaitable[None]]) -> None:
        self._ping = ping
        self._looking: asyncio.Task[None] | None = None

    async def ask(self, timeout_s: float, question: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The answer. Raises DatabaseUnavailable: after `timeout_s`, or at once where others found out before."""
        if self._looking is not None:
            raise DatabaseUnavailable(DOWN, retry_after_s=5)
        try:
            return await within(timeout_s, question())
        except DatabaseFull:
            raise  # it answers
        except (DatabaseUnavailable, TimeoutError) as exc:
            if self._looking is None:
                self._looking = asyncio.create_task(self._look())
            raise DatabaseUnavailable(DOWN, retry_after_s=5) from exc

    async def _look(self) -> None:
        try:
            while True:
                with contextlib.suppress(DatabaseUnavailable):
                    await self._ping()
                    return
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            self._looking = None
