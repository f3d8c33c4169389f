"""Batches texts across requests: which of those that wait go together into the next batch, and when.

Bounded by tokens, not by count, so that a batch costs about the same whatever the texts' lengths are. Knows
no model: texts come tokenised, and `encode` makes their vectors.
"""

import asyncio
import contextlib
import os
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.core.messages import Lane

BATCH_LANE_EVERY = 4
"""Where both lanes wait, one batch of so many is of the batch lane."""
BATCH_LANE_NICE = 15
"""How far the batch lane steps back where others want the processor: its threads get a thirtieth beside a busy one."""


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenised text: the model's inputs by name, each `length` tokens long. A batch holds texts of one `kind`."""

    fields: Mapping[str, Sequence[int]]
    length: int
    kind: str = ""


Encode = Callable[[list[Text], bool], NDArray[np.float32]]
"""Texts of one batch, and whether it has the machine for itself -> float32 (n_texts, dimensions).

Called in threads, as many at once as there are streams; with the machine for itself, always in the same one.
"""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much goes into a batch. `most` and `least` in tokens, padding included; `streams` run at once.

    What waits is shared out evenly among the streams, but no batch is split below `least`, and a single text may be
    larger than `most`. `padding` tokens are always worth a batch less; beyond them a batch may pad an eighth.
    """

    most: int
    least: int
    padding: int
    streams: int = 1


@dataclass(slots=True, eq=False)
class _Item:
    text: Text
    vector: asyncio.Future[NDArray[np.float32]]
    taken: bool = False

    @property
    def over(self) -> bool:
        """Whether nobody needs it from here on: a batch has it, or its request was cancelled."""
        return self.taken or self.vector.done()


class _Line:
    """The texts of one lane that no batch has taken yet, by length and by age."""

    def __init__(self) -> None:
        self._by_length: list[_Item] = []  # those of one length in the order of their arrival
        self._by_age: deque[_Item] = deque()
        self._shortest_next = False

    def __len__(self) -> int:
        return len(self._by_length)

    @property
    def tokens(self) -> int:
        return sum(item.text.length for item in self._by_length)

    def add(self, item: _Item) -> None:
        insort(self._by_length, item, key=_length)
        self._by_age.append(item)

    def drop_cancelled(self) -> None:
        self._by_length = [item for item in self._by_length if not item.over]
        while self._by_age and self._by_age[0].over:
            self._by_age.popleft()

    def take(self, most: int, padding: int) -> list[_Item]:
        """The next batch: around the text that waits longest, and by turns around the shortest.

        So nothing waits for ever, and a short text waits for one batch of long ones at the most. Some text must wait.
        """
        start = 0 if self._shortest_next else bisect_left(self._by_length, _length(self._by_age[0]), key=_length)
        self._shortest_next = not self._shortest_next
        low, high = self._neighbours(start, most, padding)
        batch = self._by_length[low:high]
        del self._by_length[low:high]
        for item in batch:
            item.taken = True
        while self._by_age and self._by_age[0].over:
            self._by_age.popleft()
        return batch

    def _neighbours(self, start: int, most: int, padding: int) -> tuple[int, int]:
        """The range of `_by_length` that goes with the one at `start`: the nearest in length, until it is full."""
        items = self._by_length
        kind, tokens = items[start].text.kind, items[start].text.length
        low, high = start, start + 1
        while True:
            shorter = items[start].text.length - items[low - 1].text.length if low else None
            longer = items[high].text.length - items[start].text.length if high < len(items) else None
            if shorter is None and longer is None:
                return low, high
            up = shorter is None or (longer is not None and longer < shorter)
            added = items[high if up else low - 1].text
            longest = added.length if up else items[high - 1].text.length
            padded = longest * (high - low + 1)
            waste = padded - tokens - added.length
            if added.kind != kind or padded > most or waste > max(padding, padded // 8):
                return low, high
            tokens += added.length
            low, high = (low, high + 1) if up else (low - 1, high)


def _length(item: _Item) -> int:
    return item.text.length


class Batcher:
    """Feeds `encode` from many requests. What has the machine for itself runs in `machine`, of one thread."""

    def __init__(self, encode: Encode, budget: Budget, machine: ThreadPoolExecutor) -> None:
        self._encode = encode
        self._budget = budget
        self._machine = machine
        self._lines: dict[Lane, _Line] = {"interactive": _Line(), "batch": _Line()}
        self._changed = asyncio.Event()
        self._running = 0
        self._since_batch_lane = 0

    @property
    def waiting(self) -> int:
        """Texts that no batch has taken yet."""
        return sum(len(line) for line in self._lines.values())

    async def submit(self, texts: Sequence[Text], lane: Lane = "interactive") -> NDArray[np.float32]:
        """Vectors of the texts, float32 (n_texts, dimensions). Raises what `encode` raised on a batch of theirs."""
        loop = asyncio.get_running_loop()
        items = [_Item(text, loop.create_future()) for text in texts]
        for item in items:
            self._lines[lane].add(item)
        self._changed.set()
        try:
            return np.stack(await asyncio.gather(*(item.vector for item in items)))
        finally:
            for item in items:
                item.vector.cancel()

    async def run(self) -> None:
        """Encode for ever; a failed batch fails its own requests.

        The lanes have streams of their own: one that was started for the batch lane may take long beside a busy
        engine, and whoever waits for an answer must not wait for it.
        """
        threads: dict[Lane, ThreadPoolExecutor] = {
            "interactive": ThreadPoolExecutor(self._budget.streams, "encode"),
            "batch": ThreadPoolExecutor(1, "encode-later", initializer=_step_back),
        }
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._stream("batch", threads["batch"]))
                for _ in range(self._budget.streams):
                    group.create_task(self._stream("interactive", threads["interactive"]))
        finally:
            for each in threads.values():
                each.shutdown(wait=False)

    async def _stream(self, lane: Lane, threads: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not (batch := self._take(lane)):
                self._changed.clear()
                await self._changed.wait()
                continue
            self._running += 1
            alone = lane == "interactive" and self._running == 1 and not self.waiting
            try:
                texts = [item.text for item in batch]
                vectors = await loop.run_in_executor(self._machine if alone else threads, self._encode, texts, alone)
                pairs = list(zip(batch, vectors, strict=True))
            except Exception as exc:
                for item in batch:
                    if not item.vector.done():
                        item.vector.set_exception(exc)
                continue
            finally:
                self._running -= 1
                self._changed.set()
            for item, vector in pairs:
                if not item.vector.done():
                    item.vector.set_result(vector)

    def _take(self, lane: Lane) -> list[_Item]:
        """The next batch of a lane; nothing if nothing of it waits, or the other lane goes first."""
        for each in self._lines.values():
            each.drop_cancelled()
        line = self._lines[lane]
        if not line:
            return []
        if lane == "interactive":
            self._since_batch_lane += 1
        elif self._lines["interactive"] and self._since_batch_lane < BATCH_LANE_EVERY - 1:
            return []
        else:
            self._since_batch_lane = 0
        budget = self._budget
        share = -(-line.tokens // budget.streams)
        return line.take(min(max(share, budget.least), budget.most), budget.padding)


def _step_back() -> None:
    """Of the calling thread, and of those it starts."""
    with contextlib.suppress(OSError):  # not everywhere has a thread a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BATCH_LANE_NICE)
