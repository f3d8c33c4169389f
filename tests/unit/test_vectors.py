"""The task that makes chats searchable: it ends when it is told to, and asks for no more than can be done in time."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

import workers.vectors
from server.core.errors import DeadlineExceeded, EngineFailed
from workers.vectors import Vectors


class NothingPending:
    """A store without a chat that waits; `looked` is set each time it is asked."""

    def __init__(self) -> None:
        self.looked = asyncio.Event()

    async def requeue_vectors(self, space: str) -> None:
        """All are there."""

    async def pending_chats(self, limit: int) -> list[dict[str, Any]]:
        self.looked.set()
        return []


async def test_it_ends_although_a_chat_comes_at_that_moment() -> None:
    # Given a task that has nothing to do
    store = NothingPending()
    model, none = SimpleNamespace(id="m", vector_space="m"), cast(Any, None)
    vectors = Vectors(cast(Any, model), cast(Any, store), none, none)
    for turns in range(5):
        store.looked.clear()
        embedding = asyncio.create_task(vectors.embed_all())
        await store.looked.wait()
        await asyncio.sleep(0.01)
        # When a chat comes, and the loop turns a few times before the task is cancelled
        vectors.come.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        embedding.cancel()
        # Then it ends
        await asyncio.wait({embedding}, timeout=1)
        assert embedding.done(), turns


class SlowWorker(Vectors):
    """Embeds no more than five texts in time."""

    def __init__(self, store: Any) -> None:
        model, none = SimpleNamespace(id="m", vector_space="m"), cast(Any, None)
        super().__init__(cast(Any, model), store, none, none)
        self.asked: list[int] = []

    async def _vectors(self, texts: list[str], traceparent: str) -> NDArray[np.float32]:
        self.asked.append(len(texts))
        if len(texts) > 5:
            raise DeadlineExceeded("late")
        return np.zeros((len(texts), 1), np.float32)


class Pending(NothingPending):
    """A store with so many chats that wait."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.chats = [{"id": number, "request_id": str(number), "messages": []} for number in range(count)]
        self.written: list[int] = []
        self.dropped: list[int] = []

    async def drop_pending(self, chat_id: int) -> None:
        self.dropped.append(chat_id)
        self.chats = [chat for chat in self.chats if chat["id"] != chat_id]

    async def pending_chats(self, limit: int) -> list[dict[str, Any]]:
        await super().pending_chats(limit)
        return self.chats[:limit]

    async def write_vectors(self, chats: list[dict[str, Any]], space: str, vectors: NDArray[np.float32]) -> None:
        assert len(chats) == len(vectors)
        self.written += [chat["id"] for chat in chats]
        self.chats = [chat for chat in self.chats if chat not in chats]


async def test_what_is_too_much_at_once_is_done_in_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given more chats than a slow worker can embed together
    monkeypatch.setattr(workers.vectors, "RETRY_S", 0)
    store = Pending(40)
    slow = SlowWorker(store)
    embedding = asyncio.create_task(slow.embed_all())
    # When it is asked for them; then all get their vectors, and what was too much is seldom tried again
    async with asyncio.timeout(5):
        while store.chats:
            await asyncio.sleep(0)
    embedding.cancel()
    await asyncio.gather(embedding, return_exceptions=True)
    assert sorted(store.written) == list(range(40))
    assert slow.asked[:4] == [32, 16, 8, 4]
    assert sum(count > 5 for count in slow.asked[3:]) <= len(slow.asked) / 3


class FailingWorker(SlowWorker):
    """Fails at whatever has the word for it; with `broken`, at everything."""

    broken = False

    async def _vectors(self, texts: list[str], traceparent: str) -> NDArray[np.float32]:
        self.asked.append(len(texts))
        if self.broken or any("poison" in text for text in texts):
            raise EngineFailed("CUDA error")
        return np.zeros((len(texts), 1), np.float32)


async def test_a_chat_that_the_model_fails_at_goes_without_but_none_for_a_model_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers.vectors, "RETRY_S", 0)
    # Given chats that wait, one of which the model cannot take, and a model that fails at everything for a while
    store = Pending(5)
    store.chats[2]["messages"] = [{"role": "user", "content": "poison"}]
    failing = FailingWorker(store)
    failing.broken = True
    embedding = asyncio.create_task(failing.embed_all())
    async with asyncio.timeout(5):
        while len(failing.asked) < 20:
            await asyncio.sleep(0)
        # Then all wait, until it is well again
        assert len(store.chats) == 5
        failing.broken = False
        while store.chats:
            await asyncio.sleep(0)
    embedding.cancel()
    await asyncio.gather(embedding, return_exceptions=True)
    # And then the one goes without
    assert (sorted(store.written), store.dropped) == ([0, 1, 3, 4], [2])
