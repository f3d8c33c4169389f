"""A waiter gives one run's frames, whole and in order, or an error: never repeated or missing text."""

import time

import pytest

from server.core.errors import DeadlineExceeded, EngineFailed, Unavailable
from server.core.inbox import Waiter
from server.core.messages import ErrorFrame, Frame, FrameKind, Job, encode


def job(deadline_in_s: float = 10) -> Job:
    now = time.time()
    return Job("id", "m", "/chat", {}, 1, "replies.x", now, now + deadline_in_s)


def frames(run: str, *kinds: FrameKind, first: int = 0) -> list[Frame]:
    return [Frame("id", run, seq, kind, f"{run}{seq}".encode()) for seq, kind in enumerate(kinds, first)]


async def read(waiter: Waiter, count: int) -> list[bytes]:
    return [(await waiter.next()).data for _ in range(count)]


async def test_frames_come_in_order_and_the_start_says_nothing() -> None:
    waiter = Waiter(job())
    for frame in frames("a", "started", "chunk", "chunk", "done"):
        waiter.put(frame)
    assert waiter.started
    assert await read(waiter, 3) == [b"a1", b"a2", b"a3"]


async def test_a_lost_frame_ends_the_request_with_an_error() -> None:
    waiter = Waiter(job())
    started, one, _lost, three = frames("a", "started", "chunk", "chunk", "chunk")
    for frame in (started, one, three):
        waiter.put(frame)
    assert await read(waiter, 1) == [b"a1"]
    with pytest.raises(Unavailable, match="lost in the middle"):
        await waiter.next()


async def test_a_lost_start_does_no_harm() -> None:
    waiter = Waiter(job())
    for frame in frames("a", "chunk", "done", first=1):
        waiter.put(frame)
    assert await read(waiter, 2) == [b"a1", b"a2"]
    # Nor does an answer that had none
    waiter = Waiter(job())
    waiter.put(frames("a", "result")[0])
    assert await read(waiter, 1) == [b"a0"]


async def test_a_second_run_answers_if_the_first_said_nothing() -> None:
    # Given a worker that took the job and died, and another that took it then
    waiter = Waiter(job())
    waiter.put(frames("a", "started")[0])
    for frame in frames("b", "started", "chunk"):
        waiter.put(frame)
    # When the first is heard of after all
    for frame in frames("a", "chunk", "chunk", first=1):
        waiter.put(frame)
    waiter.put(frames("b", "done", first=2)[0])
    # Then only the second's answer counts
    assert await read(waiter, 2) == [b"b1", b"b2"]


async def test_a_second_run_never_repeats_what_was_said() -> None:
    # Given a worker that died in the middle of its answer
    waiter = Waiter(job())
    for frame in frames("a", "started", "chunk"):
        waiter.put(frame)
    # When another begins anew
    for frame in frames("b", "started", "chunk", "done"):
        waiter.put(frame)
    # Then the request ends with an error, and nothing of the second follows what was said
    assert await read(waiter, 1) == [b"a1"]
    with pytest.raises(Unavailable, match="lost in the middle"):
        await waiter.next()


async def test_an_error_frame_is_raised_as_the_error_it_is() -> None:
    waiter = Waiter(job())
    waiter.put(Frame("id", "a", 0, "error", encode(ErrorFrame(500, "broken"))))
    with pytest.raises(EngineFailed, match="broken"):
        await waiter.next()


async def test_what_has_arrived_counts_after_the_deadline_too() -> None:
    # Given an answer that arrived in time, for a reader that comes late
    waiter = Waiter(job(deadline_in_s=-60))
    waiter.put(frames("a", "result")[0])
    assert await read(waiter, 1) == [b"a0"]
    # But nothing is waited for any more
    with pytest.raises(DeadlineExceeded):
        await waiter.next()
