"""Keys, found without asking Postgres each time, and never let in after they were revoked.

A key is cached only while this process listens to the changes of keys (a trigger notifies them): a revoked key is
forgotten at once. While nobody listens, because the connection was lost, each request asks Postgres again, and once
listening again, everything found before is asked for anew. So a notification that was missed lets nobody in. What
bounds the rest: a connection that goes dumb without an end is noticed within 10 s, and no key is trusted for longer
than CONFIRMED_FOR_S without asking, whatever stands between this process and Postgres.
"""

import time
from dataclasses import dataclass

from server.core.errors import DatabaseUnavailable
from server.db.outage import Outage
from server.db.store import KeyRow, Store

CHANNEL = "api_keys"
CONFIRMED_FOR_S = 60.0
GRACE_S = 300.0
"""How long a key that was let in still is while Postgres cannot be asked. It cannot be told of a revocation either."""
LOOKUP_TIMEOUT_S = 2.0
"""Of asking about a key that was let in before."""
FIRST_LOOKUP_TIMEOUT_S = 6.0
"""Of asking about any other: just longer than a connection to Postgres may take."""
MAX_KEYS = 10_000
"""Only keys that exist are cached, so that wrong ones fill nothing."""


@dataclass(frozen=True, slots=True)
class _Kept:
    row: KeyRow
    asked_at: float


class KeyCache:
    """`Store.find_key` with a memory. It is the `Listener` of CHANNEL."""

    def __init__(self, store: Store, outage: Outage) -> None:
        self._store = store
        self._outage = outage
        self._kept: dict[bytes, _Kept] = {}
        self._listening_since = float("inf")
        self._changes = 0

    async def find(self, hash_: bytes) -> KeyRow | None:
        """The key with this SHA-256, revoked ones as well. Raises DatabaseUnavailable."""
        kept, now = self._kept.get(hash_), time.monotonic()
        asked_at = kept.asked_at if kept is not None else float("-inf")
        if kept is not None and asked_at >= self._listening_since and now - asked_at < CONFIRMED_FOR_S:
            return kept.row
        lately = now - asked_at < GRACE_S
        try:
            timeout_s = LOOKUP_TIMEOUT_S if lately else FIRST_LOOKUP_TIMEOUT_S
            return await self._outage.ask(timeout_s, lambda: self._ask(hash_, now))
        except DatabaseUnavailable:
            # It may have been forgotten meanwhile; then what was kept is no answer any more.
            if kept is None or not lately or hash_ not in self._kept:
                raise
            return kept.row

    async def _ask(self, hash_: bytes, now: float) -> KeyRow | None:
        changes = self._changes
        row = await self._store.find_key(hash_)
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

    def on_lost(self) -> None:
        self._listening_since = float("inf")

    def on_notified(self, payload: str) -> None:
        """`payload` is the id of a key that has changed, or empty for all."""
        self._changes += 1
        self._kept = {hash_: kept for hash_, kept in self._kept.items() if payload and str(kept.row.id) != payload}
