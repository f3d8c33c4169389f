"""The rate limit: each key's requests of the running minute, counted in Postgres, so exactly for all servers together.

Requests that come while a count is on its way are counted together by the next statement: the busier the server is, the
less a request costs, and the row of a busy key is never waited for by its own requests.
"""

import asyncio
import time
from dataclasses import dataclass

from server.core.errors import DatabaseUnavailable, ServiceError
from server.db.outage import Outage
from server.db.store import Store

COUNT_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class RateState:
    """Of the key's running minute. `requests` counts this one too; `reset_at` in Unix seconds."""

    limit: int
    requests: int
    reset_at: int

    @property
    def remaining(self) -> int:
        return max(self.limit - self.requests, 0)


class RateLimiter:
    """`limit` 0: nothing is counted."""

    def __init__(self, store: Store, limit: int, outage: Outage) -> None:
        self.limit = limit
        self._store = store
        self._outage = outage
        self._waiting: dict[int, list[asyncio.Future[RateState | None]]] = {}
        self._counting: asyncio.Task[None] | None = None
        self._own_minute = 0
        self._own: dict[int, int] = {}

    async def count(self, key_id: int) -> RateState | None:
        """The key's rate with this request; None if the key is revoked or gone.

        While Postgres does not answer, each process holds the limit for itself: a key in use is then bounded by the
        limit times the number of processes, and nobody who was let in before is turned away.
        """
        counted: asyncio.Future[RateState | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key_id, []).append(counted)
        if self._counting is None:
            self._counting = asyncio.create_task(self._count_all())
        return await counted

    async def _count_all(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, {}
                found: dict[int, RateState] | ServiceError
                try:
                    found = await self._ask({key_id: len(futures) for key_id, futures in waiting.items()})
                except ServiceError as exc:
                    found = exc
                for key_id, futures in waiting.items():
                    _tell(futures, found if isinstance(found, ServiceError) else found.get(key_id))
        finally:
            self._counting = None

    async def _ask(self, requests: dict[int, int]) -> dict[int, RateState]:
        """Each key's state after these requests."""
        try:
            rows = await self._outage.ask(COUNT_TIMEOUT_S, lambda: self._store.count_requests(requests))
        except DatabaseUnavailable:
            return self._count_here(requests)
        return {row["key_id"]: RateState(self.limit, row["requests"], row["reset_at"]) for row in rows}

    def _count_here(self, requests: dict[int, int]) -> dict[int, RateState]:
        minute = int(time.time()) // 60
        if minute != self._own_minute:
            self._own_minute, self._own = minute, {}
        for key_id, more in requests.items():
            self._own[key_id] = self._own.get(key_id, 0) + more
        return {key_id: RateState(self.limit, self._own[key_id], 60 * minute + 60) for key_id in requests}


def _tell(futures: list[asyncio.Future[RateState | None]], found: RateState | ServiceError | None) -> None:
    """Each of a key's requests its own place in the count, in the order they came."""
    for place, future in enumerate(futures, start=1 - len(futures)):
        if future.done():  # whoever asked has gone
            continue
        if isinstance(found, ServiceError):
            future.set_exception(found)
        else:
            future.set_result(found and RateState(found.limit, found.requests + place, found.reset_at))
