"""Frames on their way home: coalesced by reply queue, in order, and not held back without need."""

import asyncio
import time
from dataclasses import replace

import pytest

from server.core.errors import BrokerUnavailable, QueueFull
from server.core.messages import ErrorFrame, Frame, decode, decode_frames
from workers import replies
from workers.replies import Reply, ReplyOutbox

TICK_S = 0.05
"""Long enough that a test can tell a tick from none."""


class FakeLink:
    """Keeps what is sent; refuses it while `lost`."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, list[Frame]]] = []
        self.lost = self.blocked = False

    def send(self, queue: str, body: bytes) -> None:
        if self.lost:
            raise BrokerUnavailable("lost")
        self.sent.append((queue, decode_frames(body)))


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


def outbox_of(link: FakeLink, *, busy: bool) -> ReplyOutbox:
    return ReplyOutbox(link, lambda: busy)  # type: ignore[arg-type]


def frame(request_id: str, text: str) -> Frame:
    return Frame(request_id, "run", 0, "chunk", text.encode())


async def test_one_flush_makes_one_message_a_reply_queue(link: FakeLink) -> None:
    # Given frames of three requests for two servers, mixed
    outbox = outbox_of(link, busy=True)
    outbox.add("replies.a", frame("r1", "1"))
    outbox.add("replies.b", frame("r2", "2"))
    outbox.add("replies.a", frame("r3", "3"))
    outbox.add("replies.a", frame("r1", "4"))
    # When the tick comes
    outbox.flush()
    # Then each server gets one message, with its frames in the order they were added
    assert link.sent == [
        ("replies.a", [frame("r1", "1"), frame("r3", "3"), frame("r1", "4")]),
        ("replies.b", [frame("r2", "2")]),
    ]


async def test_a_flush_sends_nothing_twice(link: FakeLink) -> None:
    outbox = outbox_of(link, busy=True)
    outbox.add("replies.a", frame("r1", "1"))
    outbox.flush()
    outbox.flush()
    outbox.add("replies.a", frame("r1", "2"))
    outbox.flush()
    assert link.sent == [("replies.a", [frame("r1", "1")]), ("replies.a", [frame("r1", "2")])]


async def test_what_comes_after_the_frames_waits_for_them(link: FakeLink) -> None:
    outbox = outbox_of(link, busy=True)
    sent_before: list[int] = []
    # Given that nothing waits, then nothing is waited for
    outbox.after(lambda: sent_before.append(len(link.sent)))
    await asyncio.sleep(0)
    assert sent_before == [0]
    # Given a broker that takes nothing
    link.blocked = True
    outbox.add("replies.a", frame("r1", "1"))
    outbox.after(lambda: sent_before.append(len(link.sent)))
    outbox.flush()
    await asyncio.sleep(0)
    assert sent_before == [0]
    # When it does again, it is done, and once
    link.blocked = False
    outbox.flush()
    assert sent_before == [0]  # what was sent is written at the end of this turn
    await asyncio.sleep(0)
    outbox.add("replies.a", frame("r1", "2"))
    outbox.flush()
    await asyncio.sleep(0)
    assert sent_before == [0, 1]


async def test_alone_a_frame_leaves_at_once(link: FakeLink) -> None:
    # Given a worker with one stream
    outbox = outbox_of(link, busy=False)
    # When it adds what one step of the engine made
    outbox.add("replies.a", frame("r1", "1"))
    outbox.add("replies.a", frame("r1", "2"))
    # Then it leaves in the loop's next round, in one message
    await asyncio.sleep(0)
    assert link.sent == [("replies.a", [frame("r1", "1"), frame("r1", "2")])]
    # And so does the next step's
    outbox.add("replies.a", frame("r1", "3"))
    await asyncio.sleep(0)
    assert link.sent[1:] == [("replies.a", [frame("r1", "3")])]


async def test_several_streams_share_a_message_a_tick(link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a worker with several streams
    monkeypatch.setattr(replies, "TICK_S", TICK_S)
    outbox = outbox_of(link, busy=True)
    # When a step of the engine makes a frame for each
    began = time.monotonic()
    outbox.add("replies.a", frame("r1", "1"))
    outbox.add("replies.a", frame("r2", "2"))
    await asyncio.sleep(0)
    # Then they leave together at once
    assert link.sent == [("replies.a", [frame("r1", "1"), frame("r2", "2")])]
    # And what comes sooner than a tick after them waits for the tick's end, together
    outbox.add("replies.a", frame("r1", "3"))
    await asyncio.sleep(0)
    outbox.add("replies.a", frame("r2", "4"))
    await asyncio.sleep(0)
    assert len(link.sent) == 1
    async with asyncio.timeout(5):
        while len(link.sent) == 1:
            await asyncio.sleep(0.001)
    assert time.monotonic() - began >= TICK_S * 0.9
    assert link.sent[1:] == [("replies.a", [frame("r1", "3"), frame("r2", "4")])]
    # And after a pause nothing waits
    await asyncio.sleep(TICK_S * 2)
    outbox.add("replies.a", frame("r1", "5"))
    await asyncio.sleep(0)
    assert link.sent[2:] == [("replies.a", [frame("r1", "5")])]


def test_the_tick_is_below_what_a_reader_notices() -> None:
    assert 0 < replies.TICK_S <= 0.01


async def test_frames_for_a_lost_broker_wait_until_it_is_back(link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a connection that is down
    monkeypatch.setattr(replies, "RETRY_S", 0.01)
    outbox = outbox_of(link, busy=False)
    link.lost = True
    outbox.add("replies.a", frame("r1", "1"))
    outbox.add("replies.b", frame("r2", "2"))
    # When ticks come and go meanwhile, then nothing is raised and nothing sent
    await asyncio.sleep(0.05)
    assert link.sent == []
    # And when it is back, everything is sent, what was added last behind what waited
    outbox.add("replies.a", frame("r1", "3"))
    link.lost = False
    async with asyncio.timeout(5):
        while not link.sent:
            await asyncio.sleep(0.001)
    assert link.sent == [("replies.a", [frame("r1", "1"), frame("r1", "3")]), ("replies.b", [frame("r2", "2")])]
    # And only once
    await asyncio.sleep(0.05)
    assert len(link.sent) == 2


async def test_a_blocked_broker_is_sent_nothing_and_what_is_held_is_bounded(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given two streams, and a broker that takes nothing
    monkeypatch.setattr(replies, "RETRY_S", 0.01)
    monkeypatch.setattr(replies, "HELD_MAX_BYTES", 1000)
    given_up: list[str] = []
    outbox = ReplyOutbox(link, lambda: True, given_up.append)  # type: ignore[arg-type]
    link.blocked = True
    streams = {"r1": Reply(outbox, "replies.a", "r1"), "r2": Reply(outbox, "replies.b", "r2")}
    for reply in streams.values():
        reply.send("started")
        reply.send("chunk", b"x" * 100)
    await asyncio.sleep(0.05)
    assert link.sent == []
    assert given_up == []
    # When they go on for long
    for _ in range(20):
        for reply in streams.values():
            reply.send("chunk", b"x" * 100)
    await asyncio.sleep(0.05)
    # Then both are given up, and nothing of them is held but that
    assert given_up == ["r1", "r2"]
    link.blocked = False
    async with asyncio.timeout(5):
        while len(link.sent) < 2:
            await asyncio.sleep(0.001)
    for (_, (told,)), request_id in zip(link.sent, streams, strict=True):
        assert (told.request_id, told.seq, told.kind) == (request_id, 0, "error")
        assert decode(ErrorFrame, told.data).status == 503


async def test_frames_go_in_as_many_messages_as_the_broker_takes(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given frames that are larger together than a message may be
    monkeypatch.setattr(replies, "MAX_DATA_BYTES", 100)
    outbox = outbox_of(link, busy=True)
    for number in range(5):
        outbox.add("replies.a", Frame("r1", "run", number, "chunk", b"x" * 40))
    outbox.flush()
    # Then they are several messages, in order
    assert [[frame.seq for frame in frames] for _, frames in link.sent] == [[0, 1], [2, 3], [4]]
    # And an answer that is too large by itself becomes an error, which harms nobody else
    Reply(outbox, "replies.a", "r2").send("result", b"x" * 101)
    outbox.flush()
    (told,) = link.sent[-1][1]
    assert (told.kind, decode(ErrorFrame, told.data).status) == ("error", 400)


async def test_a_reply_addresses_and_counts_its_frames(link: FakeLink) -> None:
    # When two runs of one job answer, as after a redelivery
    outbox = outbox_of(link, busy=True)
    first, second = Reply(outbox, "replies.a", "r1"), Reply(outbox, "replies.a", "r1")
    first.send("started")
    second.send("started")
    first.send("chunk", b"{}")
    first.send("done")
    outbox.flush()
    # Then the frames say which run made them, and count from 0 in each
    ((queue, frames),) = link.sent
    assert queue == "replies.a"
    one, other = frames[0].run, frames[1].run
    assert one != other
    assert [replace(frame, elapsed_s=0) for frame in frames] == [
        Frame("r1", one, 0, "started"),
        Frame("r1", other, 0, "started"),
        Frame("r1", one, 1, "chunk", b"{}"),
        Frame("r1", one, 2, "done"),
    ]
    # And how long each run has had the job
    assert 0 <= frames[0].elapsed_s <= frames[2].elapsed_s <= frames[3].elapsed_s


async def test_a_failure_travels_with_status_message_field_and_code(link: FakeLink) -> None:
    # When a job fails
    outbox = outbox_of(link, busy=True)
    Reply(outbox, "replies.a", "r1").fail(QueueFull("Full.", param="messages.0"))
    outbox.flush()
    # Then the frame says all that the server needs to make the same error of it
    ((_, (sent,)),) = link.sent
    assert (sent.request_id, sent.kind) == ("r1", "error")
    assert decode(ErrorFrame, sent.data) == ErrorFrame(429, "Full.", "messages.0", "queue_full")


async def test_the_word_that_a_job_was_taken_goes_with_the_first_token(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a job that was just taken
    monkeypatch.setattr(replies, "HOLD_S", TICK_S)
    outbox = outbox_of(link, busy=False)
    taken = Frame("r1", "run", 0, "started")
    outbox.add("replies.a", taken)
    await asyncio.sleep(0)
    assert link.sent == []
    # When its first token is there soon, then both are one message
    outbox.add("replies.a", frame("r1", "1"))
    await asyncio.sleep(0)
    assert link.sent == [("replies.a", [taken, frame("r1", "1")])]
    # And when it takes long, the word goes alone
    outbox.add("replies.a", taken)
    async with asyncio.timeout(5):
        while len(link.sent) == 1:
            await asyncio.sleep(0.001)
    assert link.sent[1:] == [("replies.a", [taken])]
