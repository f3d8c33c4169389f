"""Batches texts across requests: what waits while a batch runs goes together into the next.

Bounded by tokens, not by count, so that a batch costs about the same whatever the texts' lengths are.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[list[str]], NDArray[np.float32]]
"""texts -> float32 (n_texts, dimensions). Called in a thread, once at a time."""

MAX_BATCH_TOKENS = 8192


@dataclass(slots=True)
class _Item:
    text: str
    tokens: int
    vector: asyncio.Future[NDArray[np.float32]]


class Batcher:
    """Feeds `encode` from many requests, first come first served."""

    def __init__(self, encode: Encode, max_batch_tokens: int = MAX_BATCH_TOKENS) -> None:
        self._encode = encode
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[_Item] = deque()
        self._arrived = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Texts that no batch has taken yet."""
        return len(self._waiting)

    async def submit(self, texts: Sequence[str], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Vectors of the texts, (n_texts, dimensions). `tokens` are the texts' lengths."""
        loop = asyncio.get_running_loop()
        items = [_Item(text, n, loop.create_future()) for text, n in zip(texts, tokens, strict=True)]
        self._waiting.extend(items)
        self._arrived.set()
        try:
            return np.stack(await asyncio.gather(*(item.vector for item in items)))
        finally:
            for item in items:
                item.vector.cancel()

    async def run(self) -> None:
        """Encode for ever; a failed batch fails its own requests."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not batch:
                self._arrived.clear()
                continue
            try:
                vectors = await loop.run_in_executor(None, self._encode, [item.text for item in batch])
                pairs = list(zip(batch, vectors, strict=True))
            except Exception as exc:
                for item in batch:
                    if not item.vector.done():
                        item.vector.set_exception(exc)
                continue
            for item, vector in pairs:
                if not item.vector.done():
                    item.vector.set_result(vector)

    def _take(self) -> list[_Item]:
        """The next batch: at least one text, then as many as the budget holds once all are padded alike."""
        batch: list[_Item] = []
        longest = 0
        while self._waiting:
            item = self._waiting[0]
            if item.vector.done():  # its request was cancelled
                self._waiting.popleft()
                continue
            longest = max(longest, item.tokens)
            if batch and longest * (len(batch) + 1) > self._max_batch_tokens:
                break
            batch.append(self._waiting.popleft())
        return batch
