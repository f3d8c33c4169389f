"""What a worker starts of the jobs it has taken, and what becomes of those that wait. Without a broker: deliveries come
from the test, and what would be sent is kept."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.core.amqp import Delivery
from server.core.errors import BrokerUnavailable
from server.core.messages import Cancel, Frame, Job, Lane, Record, WorkerType, decode_frames, encode
from server.core.settings import Settings
from workers import base, intake, replies
from workers.base import Answer, Worker
from workers.replies import Reply
from workers.runs import Run, Slots


class Counting(Worker):
    """Begins a job and waits until the test ends it."""

    type: WorkerType = "chat"

    def __init__(self, slots: int) -> None:
        super().__init__(Settings(amqp_url="amqp://127.0.0.1:1/"), "m")
        self._intake.slots = {"interactive": Slots(slots), "batch": Slots(1)}
        self.begun: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.recorded = False
        self._consumer = self._intake.consumer = self.link = FakeLink()  # type: ignore[assignment]
        self._publisher = self._intake.publisher = self._outbox._link = self.link  # type: ignore[assignment]

    async def start(self) -> int:
        return 1

    async def stop(self) -> None:
        pass

    async def handle(self, job: Job, reply: Reply) -> Answer:
        self.begun.append(job.id)
        await self.ends.setdefault(job.id, asyncio.Event()).wait()
        now = time.time()
        return Answer("result", b"{}", Record(job.id, "chat", job.key_id, "m", "/chat", 1, 9, now, now))

    async def end(self, job_id: str) -> None:
        self.ends.setdefault(job_id, asyncio.Event()).set()
        await settle()

    def take(
        self, id_: str, key: int, lane: Lane | None = "interactive", deadline_s: float = 60.0, again: int = 0
    ) -> None:
        """`again`: so many times before, it was delivered, by connections that are lost."""
        now = time.time()
        job = Job(id_, "m", "/chat", {}, key, "replies.x", now, now + deadline_s, recorded=self.recorded)
        source = self._intake.lanes[lane] if lane else self._intake.suspects
        channel = id_ + "'" * again
        self._intake.take(source, Delivery(encode(job), len(self.link.settled) + 1, 1 + again, channel))  # type: ignore[arg-type]


class FakeLink:
    def __init__(self) -> None:
        self.settled: list[tuple[str, str]] = []
        self.sent: list[Frame] = []
        self.published: list[bytes] = []
        self.consumed: list[tuple[str, int]] = []
        self.cancelled: list[str] = []
        self.down = self.blocked = False
        self.unblocked_at = 0.0

    def ack(self, delivery: Delivery) -> None:
        self.settled.append(("ack", str(delivery.channel)))

    def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        self.settled.append(("back" if requeue else "dead", str(delivery.channel)))

    def send(self, _queue: str, body: bytes) -> None:
        self.sent += decode_frames(body)

    async def publish(self, _queue: str, body: bytes, **_how: Any) -> None:
        if self.down:
            raise BrokerUnavailable("down")
        self.published.append(body)

    def holds(self, _delivery: Delivery) -> bool:
        return True

    async def consume(self, queue: str, _take: Any, prefetch: int, **_how: Any) -> str:
        self.consumed.append((queue, prefetch))
        return f"{queue} {prefetch}"

    async def cancel_consumer(self, tag: str) -> None:
        self.cancelled.append(tag)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def worker(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Counting]:
    """With two slots, both taken by the first key, of which eight more wait."""
    monkeypatch.setattr(base, "HEAR_S", 0)  # no server is there to be heard
    monkeypatch.setattr(replies, "TICK_S", 0)  # jobs are settled once their frames have left
    made = Counting(slots=2)
    for number in range(10):
        made.take(f"a{number}", 1)
    await settle()
    assert made.begun == ["a0", "a1"]
    yield made
    made._intake._clear()
    for run in made._intake.runs.values():
        run.ours.set()
    for name in list(made.ends):
        await made.end(name)
    assert made._intake.runs == {}


async def test_another_key_begins_when_one_of_the_flood_ends(worker: Counting) -> None:
    worker.take("b0", 2)
    worker.take("b1", 2)
    await settle()
    assert (worker.beacon.running, worker.beacon.waiting) == (2, 10)
    await worker.end("a0")
    await worker.end("a1")
    assert worker.begun[2:] in (["b0", "a2"], ["a2", "b0"], ["b0", "b1"])
    # And both have had theirs while the flood still waits
    await worker.end(worker.begun[2])
    await worker.end(worker.begun[3])
    assert {"b0", "b1"} <= set(worker.begun[:6])


async def test_the_lanes_have_slots_of_their_own(worker: Counting) -> None:
    worker.take("later", 3, "batch")
    worker.take("much-later", 3, "batch")
    await settle()
    assert worker.begun == ["a0", "a1", "later"]
    assert (worker.beacon.waiting, worker.beacon.waiting_batch) == (9, 1)
    await worker.end("a0")
    assert "much-later" not in worker.begun
    await worker.end("later")
    assert worker.begun[-1] == "much-later"


@pytest.mark.parametrize("asked", [1, 3])
async def test_what_ends_while_it_is_stopped_is_recorded(
    worker: Counting, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    # Given an engine that does not have a job yet, or no more, when it is to stop it: its end is on its way
    monkeypatch.setattr(base, "HALT_EVERY_S", 0.01)
    halted: list[str] = []

    async def halt(job: Job) -> bool:
        halted.append(job.id)
        if len(halted) == asked:
            worker.ends[job.id].set()
        return True

    monkeypatch.setattr(worker, "halt", halt)
    recorded: list[Record] = []
    monkeypatch.setattr(base, "send_record", lambda _link, record, *_: recorded.append(record))
    worker.recorded = True
    worker.take("b", 2)
    await worker.end("a0")
    assert worker.begun[-1] == "b"
    # When it is cancelled
    worker._on_control(Delivery(encode(Cancel("b")), 0, 1, None))  # type: ignore[arg-type]
    await asyncio.sleep(0.1)
    # Then what it has made is recorded
    assert halted == ["b"] * asked
    assert [(record.request_id, record.finish_reason) for record in recorded] == [("b", "cancelled")]


async def test_what_is_cancelled_while_it_waits_is_done_with_and_never_begun(worker: Counting) -> None:
    worker._on_control(Delivery(encode(Cancel("a5")), 1, 1, None))  # type: ignore[arg-type]
    await settle()
    assert worker.link.settled == [("ack", "a5")]
    assert (worker.beacon.running, worker.beacon.waiting) == (2, 7)
    # And what the server that is gone waited for too
    worker._abandon("replies.x")
    for name in ("a0", "a1"):
        await worker.end(name)
    await settle()
    assert sorted(worker.begun) == ["a0", "a1"]
    assert len(worker.link.settled) == 10
    assert (worker.beacon.running, worker.beacon.waiting) == (0, 0)


async def test_what_has_expired_while_it_waited_is_never_begun(worker: Counting) -> None:
    worker.take("late", 2, deadline_s=0.05)
    await asyncio.sleep(0.06)
    await worker.end("a0")
    await worker.end("a1")
    assert "late" not in worker.begun
    assert ("ack", "late") in worker.link.settled
    worker._outbox.flush()
    assert [frame.kind for frame in worker.link.sent if frame.request_id == "late"] == ["error"]
    # And its slot was taken by another
    assert worker.beacon.running == 2


async def test_a_job_is_settled_once_its_answer_has_left(worker: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given frames that wait for the next tick
    monkeypatch.setattr(replies, "TICK_S", 60)
    worker._outbox.flush()
    await worker.end("a0")
    assert "a0" not in {frame.request_id for frame in worker.link.sent if frame.kind == "result"}
    assert worker.link.settled == []
    # When they leave, then the broker may forget the job
    worker._outbox.flush()
    await settle()
    assert "a0" in {frame.request_id for frame in worker.link.sent if frame.kind == "result"}
    assert worker.link.settled == [("ack", "a0")]


async def test_what_waits_goes_with_the_connection(worker: Counting) -> None:
    # Given a connection that is lost: the broker delivers again, here or elsewhere
    worker._intake.lost()
    assert (worker.beacon.running, worker.beacon.waiting) == (2, 0)
    worker.take("a3", 1)
    await settle()
    assert worker.begun == ["a0", "a1"]
    # And an answer that is ready waits for its job to be delivered again
    await worker.end("a0")
    assert worker.link.settled == []
    worker.take("a0", 1, again=1)
    await settle()
    assert worker.link.settled == [("ack", "a0'")]
    assert worker.begun == ["a0", "a1", "a3"]


async def test_what_another_worker_was_given_is_dropped(worker: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a connection that is lost with two jobs in hand, one of which is done
    monkeypatch.setattr(intake, "BACK_S", 0.05)
    worker._intake.lost()
    await worker.end("a0")
    # When there is another, by which neither is delivered again
    worker._intake.back()
    await asyncio.sleep(0.1)
    # Then nothing is told of them, and their slots are free
    worker._outbox.flush()
    assert [frame.kind for frame in worker.link.sent] == ["started", "started"]
    assert worker.beacon.running == 0


async def test_what_is_delivered_again_while_it_runs_is_told_again(worker: Counting) -> None:
    # Given a connection that is lost with two jobs in hand: what was cancelled meanwhile nobody has heard
    worker._outbox.flush()
    before = list(worker.link.sent)
    worker._intake.lost()
    # When one comes back
    worker.take("a0", 1, again=1)
    worker._outbox.flush()
    # Then its beginning is told again, as it was told before, so that the server can say that nobody waits
    assert worker.link.sent[len(before) :] == [frame for frame in before if frame.request_id == "a0"]
    # But not of one that is done, which is over anyway
    await worker.end("a1")
    worker.take("a1", 1, again=1)
    await settle()
    worker._outbox.flush()
    assert [frame.kind for frame in worker.link.sent if frame.request_id == "a1"] == ["started", "result"]


async def test_what_another_worker_had_meanwhile_is_begun_anew(worker: Counting) -> None:
    # Given a connection that is lost, and a job that was delivered to somebody else before it comes back
    worker._intake.lost()
    worker.take("a0", 1, None, again=1)
    await settle()
    # Then it is begun anew, as whoever waits follows the other worker's answer
    assert worker.begun == ["a0", "a1", "a0"]
    await worker.end("a0")
    assert worker.link.settled[-1] == ("ack", "a0'")
    # And one that was not is not
    worker.take("a1", 1, again=1)
    await worker.end("a1")
    assert worker.link.settled[-1] == ("ack", "a1'")


async def test_few_retries_are_run_at_once_and_more_as_they_end_well(worker: Counting) -> None:
    worker._intake._clear()
    worker._intake.open(16)
    await worker._intake.consume(worker.link)  # type: ignore[arg-type]
    retries = worker._intake.retries.queue
    worker.link.consumed.clear()
    for number in range(1, 17):
        worker._intake.runs[f"r{number}"] = run = Run(
            Job(f"r{number}", "m", "/chat", {}, 1, "replies.x", time.time(), 1e10, recorded=False),
            worker._intake.retries,
            Delivery(b"", number, 1, f"r{number}"),  # type: ignore[arg-type]
        )
        worker._intake.start(run)
        await settle()
        await worker.end(f"r{number}")
    # Four, then eight, then sixteen: never more than there are slots
    assert worker.link.consumed == [(retries, 4), (retries, 8)]
    # And four again once there are no more
    worker._intake.narrow()
    await settle()
    assert worker.link.cancelled == [f"{retries} 4", f"{retries} 8"]


@pytest.mark.parametrize("down", [False, True])
async def test_what_waits_is_passed_on_when_the_worker_stops(worker: Counting, down: bool) -> None:
    worker.link.down = down
    await worker._intake.close()
    # As new messages, which count no try; where that cannot be, it is given back
    how = "back" if down else "ack"
    assert worker.link.settled == [(how, f"a{number}") for number in range(2, 10)]
    assert len(worker.link.published) == (0 if down else 8)
    await worker.end("a0")
    await worker.end("a1")
    assert worker.begun == ["a0", "a1"]


async def test_a_suspect_does_not_wait_for_its_turn(worker: Counting) -> None:
    worker.take("s", 2, None)
    await settle()
    assert worker.begun == ["a0", "a1", "s"]
    # And takes nobody's slot for good
    await worker.end("s")
    assert (worker.beacon.running, worker.begun[3:]) == (2, [])
    await worker.end("a0")
    assert worker.begun[3:] == ["a2"]
