"""The batcher: which texts go together, whose turn it is, and who is hurt when a batch fails."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.core.messages import Lane
from workers.batching import Batcher, Budget, Text


def text(length: int, name: int = 0, kind: str = "") -> Text:
    return Text({"input_ids": [name] * length}, length, kind)


def texts(*lengths: int) -> list[Text]:
    """Texts of these lengths, told apart by their places."""
    return [text(length, name) for name, length in enumerate(lengths)]


def vector(of: Text) -> list[float]:
    """What the fake encoder makes of a text."""
    return [float(of.length), float(of.fields["input_ids"][0])]


POISON = text(1, name=666)


class FakeEncoder:
    """Records its batches. While `hold` is set it waits in its thread for `let_go`."""

    def __init__(self) -> None:
        self.batches: list[list[Text]] = []
        self.alone: list[bool] = []
        self.hold = False
        self.entered = threading.Semaphore(0)
        self.let_go = threading.Event()

    @property
    def lengths(self) -> list[list[int]]:
        return [[each.length for each in batch] for batch in self.batches]

    def __call__(self, batch: list[Text], alone: bool) -> NDArray[np.float32]:
        self.batches.append(batch)
        self.alone.append(alone)
        hold = self.hold
        self.entered.release()
        if hold:
            assert self.let_go.wait(10)
        if POISON in batch:
            raise RuntimeError("no vector for poison")
        return np.array([vector(each) for each in batch], dtype=np.float32)


def budget(most: int = 100, least: int = 1000, padding: int = 1000, streams: int = 1) -> Budget:
    """By default no batch is small to be shared, or because of its padding."""
    return Budget(most, min(least, most), padding, streams)


@asynccontextmanager
async def running(encoder: FakeEncoder, of: Budget | None = None) -> AsyncIterator[Batcher]:
    batcher = Batcher(encoder, of or budget(), ThreadPoolExecutor(1))
    task = asyncio.create_task(batcher.run())
    try:
        async with asyncio.timeout(5):
            yield batcher
        assert not task.done()
    finally:
        encoder.let_go.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def waits(batcher: Batcher, count: int) -> None:
    async with asyncio.timeout(5):
        while batcher.waiting != count:
            await asyncio.sleep(0)


@asynccontextmanager
async def occupied(encoder: FakeEncoder, of: Budget | None = None) -> AsyncIterator[Batcher]:
    """A batcher whose encoder is busy with one text of 99 tokens, so that what is submitted now waits."""
    encoder.hold = True
    async with running(encoder, of) as batcher:
        first = asyncio.create_task(batcher.submit([text(99)]))
        assert await asyncio.to_thread(encoder.entered.acquire, timeout=5)
        encoder.hold = False
        try:
            yield batcher
        finally:
            encoder.let_go.set()
            assert (await first).tolist() == [[99, 0]]


async def batches_of(waiting: list[tuple[Text, Lane]], of: Budget) -> list[list[int]]:
    """The lengths in each batch that is made of texts which wait together, each of a request of its own.

    The turn of the oldest has just been, so that the shortest are next.
    """
    encoder = FakeEncoder()
    async with occupied(encoder, of) as batcher:
        tasks = [asyncio.create_task(batcher.submit([one], lane)) for one, lane in waiting]
        await waits(batcher, len(tasks))
        encoder.let_go.set()
        for task, (one, _) in zip(tasks, waiting, strict=True):
            assert (await task).tolist() == [vector(one)]
    return encoder.lengths[1:]


def interactive(*lengths: int) -> list[tuple[Text, Lane]]:
    return [(one, "interactive") for one in texts(*lengths)]


async def test_a_request_gets_its_vectors_in_its_order() -> None:
    async with running(FakeEncoder()) as batcher:
        # When two requests are made at the same time
        one, two = await asyncio.gather(
            batcher.submit([text(5, 1), text(1, 2), text(3, 3)]), batcher.submit([text(3, 4), text(2, 5)])
        )
    # Then each has one row a text, its own, in its order
    assert one.tolist() == [[5, 1], [1, 2], [3, 3]]
    assert two.tolist() == [[3, 4], [2, 5]]
    assert one.dtype == np.float32


async def test_what_waits_during_a_batch_goes_together_into_the_next() -> None:
    assert await batches_of(interactive(3, 1, 4, 1, 5), budget()) == [[1, 1, 3, 4, 5]]


async def test_texts_go_with_those_nearest_in_length() -> None:
    # Given texts of many lengths; the shortest have the first turn
    lengths = await batches_of(interactive(4, 5, 20, 50, 22, 18, 30), budget(most=66, padding=3))
    # Then those nearest to the oldest that is left go with it, shorter and longer
    assert lengths == [[4, 5], [18, 20, 22], [30], [50]]


async def test_padding_counts_against_the_budget() -> None:
    # Given short texts and a long one: padded alike they would take 18 of 12
    assert await batches_of(interactive(2, 2, 6), budget(most=12)) == [[2, 2], [6]]


async def test_little_is_padded() -> None:
    # Given room for all, but a small allowance of padding
    assert await batches_of(interactive(10, 10, 11, 40), budget(most=1000, padding=5)) == [[10, 10, 11], [40]]


async def test_a_text_larger_than_the_budget_goes_alone() -> None:
    assert await batches_of(interactive(1, 50, 1), budget(most=10)) == [[1, 1], [50]]


async def test_a_crowd_of_long_texts_holds_up_a_short_one_for_one_batch() -> None:
    # Given long texts that take a batch each, and a short one that comes last
    lengths = await batches_of(interactive(50, 51, 52, 53, 54, 3), budget(most=60))
    # Then no more than one of the long ones goes first
    assert [3] in lengths[:2]


async def test_a_crowd_of_short_texts_does_not_starve_a_long_one() -> None:
    # Given a long text, and so many short ones before and after it that they fill many batches
    lengths = await batches_of(interactive(*[2] * 20, 50, *[2] * 20), budget(most=8))
    # Then it goes when those before it have gone, at the latest
    assert lengths.index([50]) <= 5 + 1
    # Because every second batch is of the oldest, short ones never wait for each other's later comers
    assert all(batch in ([2] * 4, [50]) for batch in lengths)


async def test_short_texts_that_keep_coming_do_not_starve_a_long_one() -> None:
    encoder = FakeEncoder()
    async with occupied(encoder, budget(most=8)) as batcher:
        # Given a long text that waits, and a short one that comes again as soon as it is answered
        long = asyncio.create_task(batcher.submit([text(50)]))
        await waits(batcher, 1)
        encoder.let_go.set()
        for _ in range(3):
            await batcher.submit([text(2)])
        # Then the long one was not passed by for ever
        assert long.done()


async def test_interactive_work_goes_first_and_batch_work_still_goes_on() -> None:
    # Given more of both lanes than one batch holds, and an encoder that takes one step at a time
    entered = {length: threading.Semaphore(0) for length in (5, 7)}
    go_on = {length: threading.Semaphore(0) for length in (5, 7)}

    def encode(batch: list[Text], _alone: bool) -> NDArray[np.float32]:
        (one,) = batch
        entered[one.length].release()
        assert go_on[one.length].acquire(timeout=5)
        return np.array([vector(one)], dtype=np.float32)

    async def enters(length: int) -> None:
        assert await asyncio.to_thread(entered[length].acquire, timeout=5)

    batcher = Batcher(encode, budget(most=7), ThreadPoolExecutor(1))
    tasks = [asyncio.create_task(batcher.submit([text(5)])) for _ in range(9)]
    tasks += [asyncio.create_task(batcher.submit([text(7)], "batch")) for _ in range(2)]
    await waits(batcher, len(tasks))
    running = asyncio.create_task(batcher.run())
    for _ in range(2):
        # Then the batch lane takes nothing beside the first two of each three of the other, and then one
        for _ in range(2):
            await enters(5)
            assert not entered[7].acquire(blocking=False)
            go_on[5].release()
        await enters(5)
        await enters(7)
        go_on[7].release()
        go_on[5].release()
    go_on[5].release(3)
    await asyncio.gather(*tasks)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_batch_work_in_hand_holds_up_nobody() -> None:
    # Given a batch of the batch lane that takes its time
    encoder = FakeEncoder()
    encoder.hold = True
    async with running(encoder) as batcher:
        slow = asyncio.create_task(batcher.submit([text(50)], "batch"))
        assert await asyncio.to_thread(encoder.entered.acquire, timeout=5)
        encoder.hold = False
        # When somebody waits for an answer, then it comes
        assert (await batcher.submit([text(5)])).tolist() == [[5, 0]]
        assert not slow.done()
        encoder.let_go.set()
        await slow


async def test_batch_work_steps_back_from_the_processor() -> None:
    # Given an encoder that tells the priority of its thread
    def encode(batch: list[Text], _alone: bool) -> NDArray[np.float32]:
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return np.full((len(batch), 1), nice, dtype=np.float32)

    batcher = Batcher(encode, budget(), ThreadPoolExecutor(1))
    task = asyncio.create_task(batcher.run())
    # Then the batch lane's is the lower one, and the other is as the process has it
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert (await batcher.submit([text(1)], "batch")).tolist() == [[max(own, 15)]]
    assert (await batcher.submit([text(1)])).tolist() == [[own]]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_has_the_machine_for_itself_runs_in_one_thread() -> None:
    # Given an encoder that tells its thread
    used: dict[bool, set[str]] = {True: set(), False: set()}

    def encode(batch: list[Text], alone: bool) -> NDArray[np.float32]:
        used[alone].add(threading.current_thread().name)
        return np.zeros((len(batch), 1), dtype=np.float32)

    machine = ThreadPoolExecutor(1, "machine")
    batcher = Batcher(encode, budget(most=8, streams=2), machine)
    task = asyncio.create_task(batcher.run())
    # When texts come one by one, of either lane, and then many at once
    for _ in range(6):
        await batcher.submit([text(5)])
        await batcher.submit([text(5)], "batch")
    await batcher.submit(texts(*[5] * 6))
    # Then those that came alone were all encoded in that one, and no others
    assert used[True] == {"machine_0"}
    assert used[False]
    assert "machine_0" not in used[False]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_kinds_are_not_mixed() -> None:
    waiting: list[tuple[Text, Lane]] = [(text(5, kind=kind), "interactive") for kind in ("a", "a", "b", "a")]
    encoder = FakeEncoder()
    async with running(encoder) as batcher:
        await batcher.submit([one for one, _ in waiting])
    assert all(len({one.kind for one in batch}) == 1 for batch in encoder.batches)
    assert sum(map(len, encoder.batches)) == 4


async def test_streams_share_what_waits() -> None:
    # Given two streams and two texts of a length
    encoder = FakeEncoder()
    encoder.hold = True
    async with running(encoder, budget(most=100, least=1, streams=2)) as batcher:
        request = asyncio.create_task(batcher.submit(texts(10, 10)))
        # Then both run at once, and neither has the machine for itself
        for _ in range(2):
            assert await asyncio.to_thread(encoder.entered.acquire, timeout=5)
        assert encoder.lengths == [[10], [10]]
        assert not encoder.alone[0]
        encoder.let_go.set()
        await request
        # But a text that is alone has
        encoder.hold = False
        await batcher.submit([text(10)])
        assert encoder.alone[-1]


async def test_small_work_is_not_shared_out() -> None:
    encoder = FakeEncoder()
    async with running(encoder, budget(most=100, least=20, streams=2)) as batcher:
        await batcher.submit(texts(10, 10))
    assert encoder.lengths == [[10, 10]]
    assert encoder.alone == [True]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 60), st.integers(0, 10), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
async def test_any_texts_are_encoded_once_within_the_budget(
    lengths: list[int], most: int, padding: int, streams: int
) -> None:
    # Given texts of any lengths
    encoder = FakeEncoder()
    waiting = texts(*lengths)
    async with running(encoder, Budget(most, min(8, most), padding, streams)) as batcher:
        vectors = await batcher.submit(waiting)
    # Then each has its vector, and was encoded once
    assert vectors.tolist() == [vector(each) for each in waiting]
    assert sum(map(len, encoder.batches)) == len(waiting)
    for batch in encoder.lengths:
        padded = max(batch) * len(batch)
        # And no batch of several exceeds the budget, or is padded beyond its allowance
        assert len(batch) == 1 or padded <= most
        assert padded - sum(batch) <= max(padding, padded // 8)


async def test_a_failing_batch_fails_only_its_own_requests() -> None:
    encoder = FakeEncoder()
    async with occupied(encoder, budget(most=3)) as batcher:
        # Given a batch with a poisonous text, a neighbour in the same batch, and one in the next
        poison = asyncio.create_task(batcher.submit([text(1), POISON]))
        neighbour = asyncio.create_task(batcher.submit([text(1, 2)]))
        other = asyncio.create_task(batcher.submit([text(3)]))
        await waits(batcher, 4)
        # When they are encoded
        encoder.let_go.set()
        failed = await asyncio.gather(poison, neighbour, return_exceptions=True)
        # Then the batch's requests fail with the encoder's own error
        assert [str(exc) for exc in failed] == ["no vector for poison"] * 2
        # And the other one, and whoever comes later, is served
        assert (await other).tolist() == [[3, 0]]
        assert (await batcher.submit([text(1)])).tolist() == [[1, 0]]


async def test_a_failed_request_is_not_encoded_to_its_end() -> None:
    # Given a request that takes four batches, of which the first fails
    encoder = FakeEncoder()
    async with running(encoder, budget(most=2)) as batcher:
        with pytest.raises(RuntimeError, match="no vector for poison"):
            await batcher.submit([POISON, *texts(1, 1, 1, 1, 1, 1)])
        # When another request comes, then it is served
        assert (await batcher.submit([text(2)])).tolist() == [[2, 0]]
    # And of the failed one no more was encoded than the batch that had been taken already
    assert sum(map(len, encoder.batches)) <= 4 + 1


async def test_a_cancelled_requests_texts_are_skipped() -> None:
    encoder = FakeEncoder()
    async with occupied(encoder) as batcher:
        # Given a request that is cancelled while it waits between two others
        before = asyncio.create_task(batcher.submit([text(1, 1)]))
        gone = asyncio.create_task(batcher.submit([text(1, 2), text(1, 3)]))
        after = asyncio.create_task(batcher.submit([text(1, 4)]))
        await waits(batcher, 4)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        # When the next batch is taken
        encoder.let_go.set()
        results = await asyncio.gather(before, after)
    # Then nothing is spent on it, and the others have their vectors
    assert encoder.batches[1:] == [[text(1, 1), text(1, 4)]]
    assert [r.tolist() for r in results] == [[[1, 1]], [[1, 4]]]
    assert gone.cancelled()


async def test_a_request_cancelled_while_it_is_encoded_harms_nobody() -> None:
    encoder = FakeEncoder()
    encoder.hold = True
    async with running(encoder) as batcher:
        # Given a request in the batch that runs
        gone = asyncio.create_task(batcher.submit([text(1)]))
        assert await asyncio.to_thread(encoder.entered.acquire, timeout=5)
        # When it is cancelled and the batch then ends
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        encoder.let_go.set()
        # Then the batcher goes on
        assert (await batcher.submit([text(2)])).tolist() == [[2, 0]]
    assert encoder.lengths == [[1], [2]]


async def test_waiting_counts_the_texts_no_batch_has_taken() -> None:
    encoder = FakeEncoder()
    async with occupied(encoder) as batcher:
        assert batcher.waiting == 0
        request = asyncio.create_task(batcher.submit(texts(1, 1)))
        await waits(batcher, 2)
        encoder.let_go.set()
        await request
        assert batcher.waiting == 0
