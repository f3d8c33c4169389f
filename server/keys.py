"""Keys, found without asking Postgres each time, and never let in after they were revoked.

A key is cached only while this process listens to the changes of keys (a trigger notifies them): a revoked key is
forgotten at once. While nobody listens, because the connection was lost, each request asks Postgres again, and once
listening again, everything found before is asked for anew. So a notification that was missed lets nobody in. What
bounds the rest: a connection that goes dumb without an end is noticed within 10 s, and no key is trusted for longer
than CONFIRMED_FOR_S without asking, whatever stands between this process and Postgres.
"""

import asyncio
import time
from dataclasses import dataclass

from server.core.errors import DatabaseUnavailable
from server.db.pool import DOWN, within
from server.db.store import KeyRow, Store

CHANNEL = "api_keys"
CONFIRMED_FOR_S = 60.0
GRACE_S = 300.0
"""How long a key that was let in still is while Postgres cannot be asked. It cannot be told of a revocation either."""
LOOKUP_TIMEOUT_S = 2.0
"""Of asking about a key that was let in before."""
FIRST_LOOKUP_TIMEOUT_S = 6.0
"""Of asking about any other: just longer than a connection to Postgres may take."""
DOWN_S = 2.0
"""How often it is looked, once a lookup has failed, whether Postgres is back; nobody with an earlier answer waits."""
MAX_KEYS = 10_000
"""Only keys that exist are cached, so that wrong ones fill nothing."""


@dataclass(frozen=True, slots=True)
class _Kept:
    row: KeyRow
    asked_at: float


class KeyCache:
    """`Store.find_key` with a memory. It is the `Listener` of CHANNEL."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[bytes, _Kept] = {}
        self._listening_since = float("inf")
        self._changes = 0
        self._down = False
        self._look_at = 0.0
        self._looking: asyncio.Task[KeyRow | None] | None = None

    async def find(self, hash_: bytes) -> KeyRow | None:
        """The key with this SHA-256, revoked ones as well. Raises DatabaseUnavailable."""
        kept, now = self._kept.get(hash_), time.monotonic()
        if kept is None:
            try:
                return await within(FIRST_LOOKUP_TIMEOUT_S, self._ask(hash_, now))
            except TimeoutError as exc:
                raise DatabaseUnavailable(DOWN, retry_after_s=5) from exc
        if kept.asked_at >= self._listening_since and now - kept.asked_at < CONFIRMED_FOR_S:
            return kept.row
        lately = now - kept.asked_at < GRACE_S
        if lately and self._down:
            self._look(hash_, now)
            return kept.row
        try:
            return await within(LOOKUP_TIMEOUT_S if lately else FIRST_LOOKUP_TIMEOUT_S, self._ask(hash_, now))
        except (DatabaseUnavailable, TimeoutError) as exc:
            # It may have been forgotten meanwhile; then what was kept is no answer any more.
            if not lately or hash_ not in self._kept:
                raise DatabaseUnavailable(DOWN, retry_after_s=5) from exc
            self._down, self._look_at = True, time.monotonic() + DOWN_S
            return kept.row

    def _look(self, hash_: bytes, now: float) -> None:
        """Ask, now and then, for those who do not wait for it."""
        if now >= self._look_at and (self._looking is None or self._looking.done()):
            self._look_at = now + DOWN_S
            self._looking = asyncio.create_task(self._ask(hash_, now))
            self._looking.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _ask(self, hash_: bytes, now: float) -> KeyRow | None:
        changes = self._changes
        row = await self._store.find_key(hash_)
        self._down = False
        if row is None:
            self._kept.pop(hash_, None)
        elif changes == self._changes:  # else the row may be older than the change that was told meanwhile
            self._kept.pop(hash_, None)
            self._kept[hash_] = _Kept(row, now)
            if len(self._kept) > MAX_KEYS:
                del self._kept[next(iter(self._kept))]  # the one that was asked for longest ago
        return row

    def on_listening(self) -> None:
        self._listening_since = time.monotonic()
        self._down = False

    def on_lost(self) -> None:
        self._listening_since = float("inf")

    def on_notified(self, payload: str) -> None:
        """`payload` is the id of a key that has changed, or empty for all."""
        self._changes += 1
        self._kept = {hash_: kept for hash_, kept in self._kept.items() if payload and str(kept.row.id) != payload}
