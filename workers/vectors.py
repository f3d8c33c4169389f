"""Makes chats searchable: has each embedded at low priority, and gives keys that outgrow exact search an index."""

import asyncio
import contextlib
import logging
import time
import uuid

import numpy as np
from numpy.typing import NDArray

from server.core import metrics, spans
from server.core.conversation import Message, answer, last_question
from server.core.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    PayloadTooLarge,
    RecordRefused,
    ServiceError,
)
from server.core.inbox import Inbox
from server.core.messages import Job, Record, decode_embeddings, vectors_of
from server.core.registry import ModelSpec
from server.db.store import Row, Store
from server.db.vector_index import VectorIndexes

logger = logging.getLogger(__name__)

BATCH = 32
"""Chats in one job, fewer where so many were not done in time. One job at a time, in the lane that the embedding worker
serves when nobody waits."""
RETRY_S = 2.0
LOOK_S = 10.0
"""How often chats without a vector are looked for where none has come."""
OUTGROWN_S = 60.0
"""How often keys that have outgrown exact search are looked for."""
EMBED_TIMEOUT_S = 120.0
MAX_TRACES = 10_000
"""Of chats that wait for a vector; while more do, the oldest get theirs in traces of their own."""


def searchable_text(messages: list[Message]) -> str:
    """What of a chat its vector is made of: the last thing asked, and the answer."""
    return "\n".join(filter(None, (last_question(messages), answer(messages)))) or " "


class Vectors:
    """`come` is set whenever chats may have come that wait for a vector."""

    def __init__(self, model: ModelSpec, store: Store, indexes: VectorIndexes, inbox: Inbox) -> None:
        self._model = model
        self._store = store
        self._indexes = indexes
        self._inbox = inbox
        self._traces: dict[str, str] = {}
        self._batch = BATCH
        self.come = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()  # what came before this process did

    def remember(self, records: list[Record]) -> None:
        """Let the vectors of these chats be part of their traces."""
        self._traces |= {one.request_id: one.traceparent for one in records if one.type == "chat" and one.traceparent}
        for request_id in list(self._traces)[: max(0, len(self._traces) - MAX_TRACES)]:
            del self._traces[request_id]

    async def embed_all(self) -> None:
        """Give each new chat its vector, until cancelled; what fails is tried again after a while."""
        met = False
        while True:
            try:
                if not met:
                    await self._store.requeue_vectors(self._model.vector_space)
                    met = True
                self.come.clear()  # before looking: what comes after is then not missed
                while chats := await self._store.pending_chats(self._batch):
                    await self._embed(chats)
                    self._written.set()
            except ServiceError as exc:
                logger.warning("vectors wait", extra={"action": "vectors", "error": type(exc).__name__})
                await asyncio.sleep(RETRY_S)
                continue
            with contextlib.suppress(TimeoutError):
                # Not wait_for, which before Python 3.12 forgets that it was cancelled where `come` is set as well.
                async with asyncio.timeout(LOOK_S):
                    await self.come.wait()

    async def index_all(self) -> None:
        """Give each key that has outgrown exact search an index, until cancelled."""
        while True:
            await self._written.wait()
            self._written.clear()
            try:
                for key in await self._indexes.outgrown(self._model.vector_space):
                    if not await self._indexes.build(key):
                        self._written.set()  # another archivist is at it: look again
                        break
            except ServiceError as exc:
                logger.warning("index waits", extra={"action": "index", "error": type(exc).__name__})
                self._written.set()
            await asyncio.sleep(OUTGROWN_S)

    async def _embed(self, chats: list[Row]) -> None:
        """Embed a batch; one that the model or Postgres will never take goes without. Raises Unavailable, and
        DeadlineExceeded, after which a batch is half as large: there may be no worker, or one too slow for so many."""
        ids: list[str] = [chat["request_id"] for chat in chats]
        try:
            with spans.Vectors(self._model.id, ids, [self._traces.get(id_, "") for id_ in ids]) as together:
                texts = [searchable_text(chat["messages"]) for chat in chats]
                vectors = await self._vectors(texts, together.traceparent)
                with together.insert():
                    await self._store.write_vectors(chats, self._model.vector_space, vectors)
        except DeadlineExceeded:
            self._batch = max(1, len(chats) // 2)
            raise
        except (InvalidRequest, PayloadTooLarge, EngineFailed, RecordRefused) as exc:
            if len(chats) > 1:
                for chat in chats:
                    await self._embed([chat])
                return
            if isinstance(exc, EngineFailed):
                await self._vectors(["ready"], "")  # raises where the model fails at everything: it is not this chat
            extra = {"action": "vectors", "chat": chats[0]["id"], "error": type(exc).__name__}
            logger.error("chat left without a vector", extra=extra)
            await self._store.drop_pending(chats[0]["id"])
            self._traces.pop(ids[0], None)
            return
        for id_ in ids:
            self._traces.pop(id_, None)
        self._batch = min(BATCH, max(self._batch, len(chats) + 1))
        metrics.vectors_written.labels(self._model.id).inc(len(chats))

    async def _vectors(self, texts: list[str], traceparent: str) -> NDArray[np.float32]:
        """float32 (n_texts, dimensions)."""
        now = time.time()
        job = Job(
            id=f"vectors-{uuid.uuid4().hex}",
            model=self._model.id,
            endpoint="archive",
            body={"input": texts, "truncate": True, "space": self._model.vector_space},
            key_id=0,
            reply_to=self._inbox.queue,
            created_at=now,
            deadline=now + EMBED_TIMEOUT_S,
            recorded=False,
            traceparent=traceparent,
            api="embeddings",
        )
        waiter = await self._inbox.submit(job, "batch")
        try:
            return vectors_of(decode_embeddings((await waiter.next()).data))
        finally:
            self._inbox.release(job.id)
