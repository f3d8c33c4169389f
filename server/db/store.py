"""What is asked of Postgres, one method a question. The SQL stands in `queries/`, a file each.

Reads are the server's, writes of chats and vectors the archivist's. Every method raises
DatabaseUnavailable when Postgres is not there, and a write RecordRefused for data it will never take.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from pgvector import HalfVector

from server.core.errors import DatabaseUnavailable
from server.core.messages import Record
from server.db.pool import QUERY_TIMEOUT_S, Pool, connection, load_queries

Row = dict[str, Any]

PING_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 3.0
"""A connection that is being made takes no notice of the other."""


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key as authentication finds it. `weight`: its share of the turns where several keys wait."""

    id: int
    name: str
    hash: bytes
    is_admin: bool
    revoked_at: datetime | None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class HistoryFilter:
    limit: int
    offset: int
    model: str | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True)
class SimilarQuery:
    """`vector`: float32 (dimensions,), L2-normalised, in the space `space` (`ModelSpec.vector_space`)."""

    space: str
    vector: NDArray[np.float32]
    limit: int
    threshold: float


class Store:
    """`timeout_s` bounds each question; None: whoever asks has time."""

    def __init__(self, pool: Pool, timeout_s: float | None = QUERY_TIMEOUT_S) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._queries = load_queries()

    async def _rows(self, query: str, parameters: dict[str, Any] | None = None) -> list[Row]:
        async with connection(self._pool, self._timeout_s) as conn:
            cursor = await conn.execute(self._queries[query], parameters)
            return await cursor.fetchall()

    async def _execute(self, query: str, parameters: dict[str, Any]) -> int:
        """Rows affected."""
        async with connection(self._pool, self._timeout_s) as conn:
            return (await conn.execute(self._queries[query], parameters)).rowcount

    async def ping(self, timeout_s: float = PING_TIMEOUT_S) -> None:
        async with connection(self._pool, timeout_s) as conn:
            await conn.execute("SELECT 1")

    async def answers(self) -> bool:
        """Whether it does, within ANSWER_TIMEOUT_S."""
        try:
            await asyncio.wait_for(self.ping(), ANSWER_TIMEOUT_S)
        except (DatabaseUnavailable, TimeoutError):
            return False
        return True

    async def find_key(self, hash_: bytes) -> KeyRow | None:
        """The key with this SHA-256, whether revoked or not."""
        rows = await self._rows("find_key", {"hash": hash_})
        return KeyRow(**rows[0]) if rows else None

    async def count_requests(self, requests: dict[int, int]) -> list[Row]:
        """Count so many more requests, by key, in the running minute: rows of `key_id, requests, reset_at` (Unix
        seconds), none for a key that is revoked or gone."""
        return await self._rows("count_requests", {"key_ids": list(requests), "requests": list(requests.values())})

    async def create_key(self, name: str, hash_: bytes, *, is_admin: bool = False, weight: int = 1) -> int | None:
        """The new key's id; None if there is a key with this hash already."""
        parameters = {"name": name, "hash": hash_, "is_admin": is_admin, "weight": weight}
        rows = await self._rows("create_key", parameters)
        return int(rows[0]["id"]) if rows else None

    async def list_keys(self) -> list[Row]:
        return await self._rows("list_keys")

    async def revoke_key(self, key_id: int) -> bool:
        """Whether there is such a key."""
        return bool(await self._rows("revoke_key", {"id": key_id}))

    async def weigh_key(self, key_id: int, weight: int) -> bool:
        """Whether there is such a key."""
        return bool(await self._rows("weigh_key", {"id": key_id, "weight": weight}))

    async def write(self, records: list[Record]) -> int:
        """Keep finished requests, each request id once; returns how many were new. One transaction a type."""
        chats = [record for record in records if record.type == "chat"]
        embeddings = [record for record in records if record.type == "embedding"]
        written = 0
        if chats:
            columns = _columns(chats, "request_id key_id session_id model endpoint prompt_tokens")
            columns |= _columns(chats, "completion_tokens finish_reason created_at")
            columns["messages"] = [msgspec.json.encode(chat.messages).decode() for chat in chats]
            written += (await self._rows("write_chats", columns))[0]["count"]
        if embeddings:
            columns = _columns(embeddings, "request_id key_id model texts prompt_tokens created_at")
            written += (await self._rows("write_embeddings", columns))[0]["count"]
        return written

    async def pending_chats(self, limit: int) -> list[Row]:
        """Chats without a vector: rows of `id, key_id, request_id, messages`."""
        return await self._rows("pending_chats", {"limit": limit})

    async def requeue_vectors(self, space: str) -> int:
        """Let every chat without a vector in `space` wait for one; returns how many did not wait yet."""
        return await self._execute("requeue_vectors", {"space": space})

    async def drop_pending(self, chat_id: int) -> None:
        """Leave a chat without a vector."""
        await self._execute("drop_pending", {"chat_id": chat_id})

    async def write_vectors(self, chats: list[Row], space: str, vectors: NDArray[np.float32]) -> None:
        """`vectors`: float32 (n_chats, dimensions), in the order of `chats`."""
        await self._execute(
            "write_vectors",
            {
                "chat_id": [chat["id"] for chat in chats],
                "key_id": [chat["key_id"] for chat in chats],
                "embedding": [HalfVector(vector) for vector in vectors],
                "space": space,
                "dimensions": vectors.shape[1],
            },
        )

    async def similar(self, key_id: int, query: SimilarQuery) -> list[Row]:
        """The key's most similar chats, best first: rows of `id, session_id, messages, created_at, similarity`.

        Exact, unless the key has outgrown that and has an index.
        """
        parameters = {
            "key_id": key_id,
            "space": query.space,
            "query": HalfVector(query.vector),
            "limit": query.limit,
            "threshold": query.threshold,
        }
        async with connection(self._pool, self._timeout_s) as conn:
            way = await (await conn.execute(self._queries["search_way"], parameters)).fetchone()
            if way is not None and way["indexed"]:
                search = self._queries["similar_indexed"].replace(b"{dimensions}", b"%d" % way["dimensions"])
            else:
                search = self._queries["similar"]
            # Planned anew each time: only with the key in sight are its part of the table and its own index found.
            return await (await conn.execute(search, parameters, prepare=False)).fetchall()

    async def history(self, key_id: int, filter_: HistoryFilter) -> list[Row]:
        """The key's chats, newest first."""
        # A statement a filter, each with an index in its order. One for all, with `OR … IS NULL`, is planned without
        # regard to what is filtered, and then reads on through the key's chats until it has found enough.
        by_session = "_by_session" if filter_.session_id is not None else ""
        by_model = "_by_model" if filter_.model is not None else ""
        return await self._rows(
            f"history{by_session}{by_model}",
            {
                "key_id": key_id,
                "limit": filter_.limit,
                "offset": filter_.offset,
                "model": filter_.model,
                "session_id": filter_.session_id,
            },
        )

    async def find_request(self, key_id: int, request_ids: Sequence[str]) -> Row | None:
        """The finished request of this key that has one of these ids: `messages` are a chat's."""
        rows = await self._rows("find_request", {"key_id": key_id, "request_ids": list(request_ids)})
        return rows[0] if rows else None

    async def claim_answer(self, key_id: int, name: str, fingerprint: bytes, claim: tuple[str, str, float]) -> Row:
        """Claim an Idempotency-Key, by a request's id, for the server with this reply queue and for so many seconds,
        unless it is claimed already: a row of the `request_id` and `fingerprint` that it stands for now."""
        parameters = {"key_id": key_id, "name": name, "fingerprint": fingerprint}
        parameters |= dict(zip(("request_id", "owner", "ttl_s"), claim, strict=True))
        while True:
            if rows := await self._rows("claim_answer", parameters):
                return rows[0]  # none, where another request claimed it at the same moment

    async def take_over_answer(self, request_id: str, by: str, owner: str) -> bool:
        """Let another request make an answer that was never whole, at the server with this reply queue; whether that
        was still to be had."""
        return bool(await self._execute("take_over_answer", {"request_id": request_id, "by": by, "owner": owner}))

    async def save_answer(self, request_id: str, head: bytes, events: list[bytes]) -> None:
        """`head` is JSON."""
        await self._execute("save_answer", {"request_id": request_id, "head": head.decode(), "events": events})

    async def release_answer(self, request_id: str) -> None:
        """Give up the claim of an answer that is not whole."""
        await self._execute("release_answer", {"request_id": request_id})

    async def find_answer(self, key_id: int, request_id: str) -> Row | None:
        """An answer of this key: `owner`, `head` and `events`, the latter two None until it is whole."""
        rows = await self._rows("find_answer", {"key_id": key_id, "request_id": request_id})
        return rows[0] if rows else None

    async def forget_answers(self) -> None:
        await self._execute("forget_answers", {})

    async def sessions(self, key_id: int, limit: int, offset: int) -> list[Row]:
        """The key's sessions, the last used first."""
        return await self._rows("sessions", {"key_id": key_id, "limit": limit, "offset": offset})

    async def count_sessions(self, key_id: int) -> int:
        rows = await self._rows("count_sessions", {"key_id": key_id})
        return int(rows[0]["sessions"]) if rows else 0

    async def usage(self, key_id: int) -> list[Row]:
        """The key's roll-ups: a row a model and type, with totals, today's and this month's requests (UTC)."""
        today: date = datetime.now(UTC).date()
        return await self._rows("usage", {"key_id": key_id, "today": today})


def _columns(records: list[Record], names: str) -> dict[str, Any]:
    return {name: [getattr(record, name) for record in records] for name in names.split()}
