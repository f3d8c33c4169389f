"""A waiter gives one run's frames, whole and in order, or an error: never repeated or missing text."""

import time
from dataclasses import replace

import pytest

from server.core import continuation
from server.core.amqp import Delivery
from server.core.errors import (
    BrokerUnavailable,
    ClientTooSlow,
    DeadlineExceeded,
    EngineFailed,
    ServiceError,
    Unavailable,
)
from server.core.inbox import Inbox, Waiter
from server.core.messages import Cancel, ErrorFrame, Frame, FrameKind, Job, decode, encode, encode_frames


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


@pytest.mark.parametrize("told", [False, True])
async def test_a_second_run_that_ends_before_it_begins_is_heard(told: bool) -> None:
    # Given a request whose worker was lost, before its first word or after
    waiter = Waiter(job())
    for frame in frames("a", "started", "chunk")[: 1 + told]:
        waiter.put(frame)
    # When the next worker says no more than that it is over, as it was cancelled meanwhile
    waiter.put(replace(frames("b", "error")[0], data=encode(ErrorFrame(499, "cancelled"))))
    # Then whoever waits is told
    await read(waiter, int(told))
    with pytest.raises(ServiceError, match="cancelled"):
        await waiter.next()


async def test_a_second_run_whose_start_was_lost_answers() -> None:
    waiter = Waiter(job())
    waiter.put(frames("a", "started")[0])
    for frame in frames("b", "chunk", "done", first=1):
        waiter.put(frame)
    assert await read(waiter, 2) == [b"b1", b"b2"]


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


async def test_what_nobody_reads_is_kept_up_to_a_bound_and_then_given_up() -> None:
    # Given a request whose client does not read, and another one
    inbox = Inbox("amqp://127.0.0.1:1/", "test", [], 1, max_unread_bytes=1000)
    unread = inbox.waiting["id"] = Waiter(job())
    read = inbox.waiting["other"] = Waiter(job())
    texts: list[bytes] = []
    most = 0
    # When ten times the bound arrives for both
    for number, frame in enumerate(frames("a", "started", *["chunk"] * 200)):
        frame = replace(frame, data=b"x" * 50 if number else b"")
        inbox._on_frames(delivery([frame, replace(frame, request_id="other")]))
        most = max(most, unread.unread_bytes)
        if number:
            texts.append((await read.next()).data)
    # Then little more than the bound was kept of the one, and all of the other was there
    assert most <= 1050
    assert texts == [b"x" * 50] * 200
    # And who reads after all is told so, once, whatever else arrives
    inbox._on_frames(delivery(frames("b", "started", "chunk", "done")))
    with pytest.raises(ClientTooSlow, match="was not read"):
        await unread.next()
    assert unread.unread_bytes == 0


async def test_a_large_answer_in_one_piece_is_not_given_up() -> None:
    inbox = Inbox("amqp://127.0.0.1:1/", "test", [], 1, max_unread_bytes=1000)
    waiter = inbox.waiting["id"] = Waiter(job())
    whole = replace(frames("a", "result")[0], data=b"x" * 100_000)
    inbox._on_frames(delivery([whole]))
    assert (await waiter.next()).data == b"x" * 100_000


def delivery(arrived: list[Frame]) -> Delivery:
    return Delivery(encode_frames(arrived), 1, 1, channel=None)


class FakeLink:
    """Keeps what would be told all workers, once `down` is false."""

    def __init__(self) -> None:
        self.down = False
        self.told: list[Cancel] = []

    def broadcast(self, _exchange: str, body: bytes) -> None:
        if self.down:
            raise BrokerUnavailable("down")
        self.told.append(decode(Cancel, body))

    async def publish_soon(self, *_args: object, **_kwargs: object) -> None:
        raise BrokerUnavailable("not confirmed")


@pytest.fixture
async def inbox() -> Inbox:
    made = Inbox("amqp://127.0.0.1:1/", "test", ["m"], 8)
    made.publisher = FakeLink()  # type: ignore[assignment]
    return made


def begun(inbox: Inbox) -> None:
    inbox._on_frames(Delivery(encode_frames(frames("a", "started")), 1, 1, None))  # type: ignore[arg-type]


async def test_what_was_refused_is_not_wanted_whoever_begins_it(inbox: Inbox) -> None:
    waiter = inbox.waiting["id"] = Waiter(job())
    with pytest.raises(BrokerUnavailable):
        await inbox.send(waiter, "interactive")
    inbox.release("id")
    inbox.cancel("id")  # as whoever ends a request does
    begun(inbox)
    assert inbox.publisher.told == [Cancel("id", unwanted=True)] * 3  # type: ignore[attr-defined]


async def test_what_has_begun_is_not_refused_for_want_of_a_confirm(inbox: Inbox) -> None:
    waiter = inbox.waiting["id"] = Waiter(job())
    begun(inbox)
    await inbox.send(waiter, "interactive")
    assert inbox.publisher.told == []  # type: ignore[attr-defined]


async def test_what_was_left_is_recorded_and_what_is_over_is_not_made_again(inbox: Inbox) -> None:
    inbox.cancel("id")
    begun(inbox)
    assert inbox.publisher.told == [Cancel("id"), Cancel("id")]  # type: ignore[attr-defined]
    inbox._cancelled.clear()  # and another one, which was answered
    begun(inbox)
    assert inbox.publisher.told[-1] == Cancel("id", unwanted=True)  # type: ignore[attr-defined]


async def test_a_cancel_is_told_when_the_connection_is_back(inbox: Inbox) -> None:
    inbox.publisher.down = True  # type: ignore[attr-defined]
    inbox.cancel("id", unwanted=True)
    inbox.publisher.down = False  # type: ignore[attr-defined]
    inbox._tell_again()
    assert inbox.publisher.told == [Cancel("id", unwanted=True)]  # type: ignore[attr-defined]
    inbox._tell_again()
    assert len(inbox.publisher.told) == 1  # type: ignore[attr-defined]


async def test_a_second_run_that_is_not_understood_harms_no_other(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a stream that goes on, with something that nobody had thought of
    inbox.waiting["id"] = stream = Waiter(replace(job(), body={"stream": True, "temperature": 0}, api="chat"))
    inbox.waiting["other"] = other = Waiter(replace(job(), id="other"))
    said = Frame("id", "a", 1, "chunk", b'{"choices": []}')
    inbox._on_frames(delivery([*frames("a", "started"), said]))
    monkeypatch.setattr(continuation.Continuation, "follow", lambda self, frame: {}["unheard of"])
    # When it comes in one message with another's answer
    again = replace(said, run="b")
    answer = Frame("other", "c", 0, "result", b"whole")
    inbox._on_frames(delivery([*frames("b", "started"), again, answer]))
    # Then it ends with an error, and the other is answered
    assert (await stream.next()).data == said.data
    with pytest.raises(Unavailable, match="lost in the middle"):
        await stream.next()
    assert await read(other, 1) == [b"whole"]


async def test_who_waits_leaves_a_beginning_that_is_said_again_and_who_left_has_it_stopped(inbox: Inbox) -> None:
    # Given a stream whose worker may have missed something, and says once more that it has begun
    inbox.waiting["id"] = waiter = Waiter(job())
    started, one, two = frames("a", "started", "chunk", "chunk")
    inbox._on_frames(delivery([started, one, started, two, started]))
    # Then nothing is missing and nothing there twice
    assert await read(waiter, 2) == [b"a1", b"a2"]
    assert inbox.publisher.told == []  # type: ignore[attr-defined]
    # But one that nobody waits for any more is stopped, and what was made of it recorded
    inbox.release("id")
    inbox.cancel("id")
    inbox._on_frames(delivery([started]))
    assert inbox.publisher.told == [Cancel("id"), Cancel("id")]  # type: ignore[attr-defined]
