"""The batcher: which texts go together, in which order, and who is hurt when a batch fails."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.batching import Batcher


def vector(text: str) -> list[float]:
    """What the fake encoder makes of a text: no two texts here share it."""
    return [float(sum(text.encode())), float(len(text))]


class FakeEncoder:
    """Records its batches. While `hold` is set it waits in its thread for `let_go`."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.hold = False
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        self.batches.append(texts)
        self.entered.set()
        if self.hold:
            assert self.let_go.wait(10)
        if any("poison" in text for text in texts):
            raise RuntimeError("no vector for poison")
        return np.array([vector(text) for text in texts], dtype=np.float32)


@asynccontextmanager
async def running(encoder: FakeEncoder, max_batch_tokens: int = 100) -> AsyncIterator[Batcher]:
    batcher = Batcher(encoder, max_batch_tokens)
    task = asyncio.create_task(batcher.run())
    try:
        async with asyncio.timeout(5):
            yield batcher
        assert not task.done()
    finally:
        encoder.let_go.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def waits(batcher: Batcher, texts: int) -> None:
    async with asyncio.timeout(5):
        while batcher.waiting != texts:
            await asyncio.sleep(0)


@asynccontextmanager
async def occupied(encoder: FakeEncoder, max_batch_tokens: int = 100) -> AsyncIterator[Batcher]:
    """A batcher whose encoder is busy with one text, so that what is submitted now waits."""
    encoder.hold = True
    async with running(encoder, max_batch_tokens) as batcher:
        first = asyncio.create_task(batcher.submit(["first"], [1]))
        assert await asyncio.to_thread(encoder.entered.wait, 5)
        encoder.hold = False
        try:
            yield batcher
        finally:
            encoder.let_go.set()
            assert (await first).tolist() == [vector("first")]


async def test_a_request_gets_its_vectors_in_its_order() -> None:
    async with running(FakeEncoder()) as batcher:
        # When two requests are made at the same time
        one, two = await asyncio.gather(
            batcher.submit(["zebra", "ant", "mule"], [2, 1, 1]), batcher.submit(["mule", "ox"], [1, 1])
        )
    # Then each has one row a text, its own, in its order
    assert one.tolist() == [vector("zebra"), vector("ant"), vector("mule")]
    assert two.tolist() == [vector("mule"), vector("ox")]
    assert one.dtype == np.float32


async def test_what_waits_during_a_batch_goes_together_into_the_next() -> None:
    encoder = FakeEncoder()
    async with occupied(encoder) as batcher:
        # Given three requests that arrive while a batch runs
        later = [asyncio.create_task(batcher.submit(texts, [1] * len(texts))) for texts in (["a"], ["b", "c"], ["d"])]
        await waits(batcher, 4)
        # When that batch is over
        encoder.let_go.set()
        results = await asyncio.gather(*later)
    # Then one batch takes all of them, first come first
    assert encoder.batches == [["first"], ["a", "b", "c", "d"]]
    assert [r.tolist() for r in results] == [[vector("a")], [vector("b"), vector("c")], [vector("d")]]


async def test_padding_counts_against_the_budget() -> None:
    # Given short texts, a long one, and a budget of 12 tokens
    encoder = FakeEncoder()
    texts, tokens = ["a", "b", "long", "c", "d"], [2, 2, 6, 6, 1]
    async with running(encoder, max_batch_tokens=12) as batcher:
        await batcher.submit(texts, tokens)
    # Then the long one does not join the two short ones: padded alike they would take 18
    assert encoder.batches == [["a", "b"], ["long", "c"], ["d"]]


async def test_a_text_larger_than_the_budget_goes_alone() -> None:
    encoder = FakeEncoder()
    async with running(encoder, max_batch_tokens=10) as batcher:
        result = await batcher.submit(["a", "huge", "b"], [1, 50, 1])
    assert encoder.batches == [["a"], ["huge"], ["b"]]
    assert result.tolist() == [vector("a"), vector("huge"), vector("b")]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 60))
@settings(deadline=None, max_examples=60)
async def test_any_batches_keep_order_and_budget(tokens: list[int], budget: int) -> None:
    # Given texts of any lengths
    encoder = FakeEncoder()
    texts = [f"{index}" for index in range(len(tokens))]
    async with running(encoder, budget) as batcher:
        await batcher.submit(texts, tokens)
    # Then every text was encoded once, in order
    assert [text for batch in encoder.batches for text in batch] == texts
    sizes = [[tokens[int(text)] for text in batch] for batch in encoder.batches]
    # And no batch of several exceeds the budget
    assert all(len(batch) == 1 or max(batch) * len(batch) <= budget for batch in sizes)
    # And no batch ended while the next text would have fitted
    for batch, following in pairwise(sizes):
        assert max(*batch, following[0]) * (len(batch) + 1) > budget


async def test_a_failing_batch_fails_only_its_own_requests() -> None:
    encoder = FakeEncoder()
    async with occupied(encoder, max_batch_tokens=3) as batcher:
        # Given a batch with a poisonous text, a neighbour in the same batch, and one in the next
        poison = asyncio.create_task(batcher.submit(["fine", "poison"], [1, 1]))
        neighbour = asyncio.create_task(batcher.submit(["neighbour"], [1]))
        other = asyncio.create_task(batcher.submit(["other"], [3]))
        await waits(batcher, 4)
        # When they are encoded
        encoder.let_go.set()
        failed = await asyncio.gather(poison, neighbour, return_exceptions=True)
        # Then the batch's requests fail with the encoder's own error
        assert [str(exc) for exc in failed] == ["no vector for poison"] * 2
        # And the other one, and whoever comes later, is served
        assert (await other).tolist() == [vector("other")]
        assert (await batcher.submit(["later"], [1])).tolist() == [vector("later")]


async def test_a_failed_request_is_not_encoded_to_its_end() -> None:
    # Given a request that takes four batches, of which the first fails
    encoder = FakeEncoder()
    async with running(encoder, max_batch_tokens=2) as batcher:
        with pytest.raises(RuntimeError, match="no vector for poison"):
            await batcher.submit(["poison", "a", "b", "c", "d", "e", "f"], [1] * 7)
        # When another request comes, then it is served
        assert (await batcher.submit(["later"], [1])).tolist() == [vector("later")]
    # And of the failed one no more was encoded than the batch that had been taken already
    assert [batch for batch in encoder.batches if batch != ["b", "c"]] == [["poison", "a"], ["later"]]


async def test_a_cancelled_requests_texts_are_skipped() -> None:
    encoder = FakeEncoder()
    async with occupied(encoder) as batcher:
        # Given a request that is cancelled while it waits between two others
        before = asyncio.create_task(batcher.submit(["before"], [1]))
        gone = asyncio.create_task(batcher.submit(["gone", "gone too"], [1, 1]))
        after = asyncio.create_task(batcher.submit(["after"], [1]))
        await waits(batcher, 4)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        # When the next batch is taken
        encoder.let_go.set()
        results = await asyncio.gather(before, after)
    # Then nothing is spent on it, and the others have their vectors
    assert encoder.batches == [["first"], ["before", "after"]]
    assert [r.tolist() for r in results] == [[vector("before")], [vector("after")]]
    assert gone.cancelled()


async def test_a_request_cancelled_while_it_is_encoded_harms_nobody() -> None:
    encoder = FakeEncoder()
    encoder.hold = True
    async with running(encoder) as batcher:
        # Given a request in the batch that runs
        gone = asyncio.create_task(batcher.submit(["gone"], [1]))
        assert await asyncio.to_thread(encoder.entered.wait, 5)
        # When it is cancelled and the batch then ends
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        encoder.let_go.set()
        # Then the batcher goes on
        assert (await batcher.submit(["later"], [1])).tolist() == [vector("later")]
    assert encoder.batches == [["gone"], ["later"]]


async def test_waiting_counts_the_texts_no_batch_has_taken() -> None:
    encoder = FakeEncoder()
    async with occupied(encoder) as batcher:
        assert batcher.waiting == 0
        request = asyncio.create_task(batcher.submit(["a", "b"], [1, 1]))
        await waits(batcher, 2)
        encoder.let_go.set()
        await request
        assert batcher.waiting == 0
