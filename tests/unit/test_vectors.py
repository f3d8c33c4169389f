"""The task that makes chats searchable ends when it is told to."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

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
