"""Admission: who waits where, who is refused and for how long, where a request stands. The clock is the test's."""

from types import SimpleNamespace

import pytest

from server import admission
from server.admission import AT_ONCE, Line, Place
from server.core.errors import QueueFull
from server.core.messages import Job, Status


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(admission, "time", SimpleNamespace(time=made.time, monotonic=made.monotonic))
    return made


def job(id_: str, key: int = 1, *, weight: int = 1, left_s: float = 10_000.0) -> Job:
    return Job(id_, "m", "/chat", {}, key, "replies", 1000.0, 1000.0 + left_s, weight=weight)


def worker(slots: int = 2, job_s: float = 4.0, *, ready: bool = True, **begun: float) -> Status:
    return Status("w", "chat", "m", ready, slots=slots, job_s=job_s, begun=begun)


def fill(line: Line, count: int, key: int = 1) -> list[str]:
    ids = [f"{key}-{n}" for n in range(count)]
    for id_ in ids:
        line.enter(job(id_, key))
    return ids


def test_of_one_key_few_go_at_once_and_the_others_in_order(clock: Clock) -> None:
    line = Line(100)
    went = [line.enter(job(str(n))) for n in range(AT_ONCE + 3)]
    assert went == [True] * AT_ONCE + [False] * 3
    # And another key's goes all the same
    assert line.enter(job("other", 2))
    # When one is begun, one is over and one that waits here leaves, then the next go in order
    assert [job.id for job in line.left("3")] == [str(AT_ONCE)]
    assert line.left(str(AT_ONCE + 1)) == []
    assert [job.id for job in line.left("0")] == [str(AT_ONCE + 2)]
    # And what is told twice changes nothing
    assert line.left("0") == line.left("3") == line.left("unknown") == []


def test_one_key_leaves_room_for_others(clock: Clock) -> None:
    line = Line(64)
    # Given a key that has as many as are left for others
    fill(line, 32)
    with pytest.raises(QueueFull, match="Too many requests of this key wait"):
        line.enter(job("more"))
    # Then another key has room, and leaves some
    fill(line, 16, key=2)
    with pytest.raises(QueueFull, match="of this key"):
        line.enter(job("more", 2))
    # And when all is taken, nobody has
    for key in range(3, 8):
        fill(line, 64 // 2**key, key)


def test_a_line_of_one_place(clock: Clock) -> None:
    line = Line(1)
    assert line.enter(job("a"))
    with pytest.raises(QueueFull, match="is full"):
        line.enter(job("b"))
    line.left("a")
    assert line.enter(job("b"))


def test_a_heavier_key_may_have_more_waiting(clock: Clock) -> None:
    line = Line(64)
    for n in range(48):
        line.enter(job(str(n), weight=3))
    with pytest.raises(QueueFull):
        line.enter(job("more", weight=3))


def test_who_is_refused_is_told_how_long_those_before_it_take(clock: Clock) -> None:
    # Given workers that begin a job each 2 s
    line = Line(20)
    line.hear([worker(), worker(ready=False)], "me")
    fill(line, 10)
    # Then the eleventh would wait for 11 of them
    with pytest.raises(QueueFull, match=r"Try again in 22 s\.") as refused:
        line.enter(job("more"))
    assert refused.value.retry_after_s == 22
    # When another worker comes, and another server whose jobs are three in four, then it is told that
    line.hear([worker(me=30.0, other=90.0), worker(me=9.0, other=29.0)], "me")
    with pytest.raises(QueueFull) as refused:
        line.enter(job("more"))
    assert refused.value.retry_after_s == 44
    # And a server that has had nothing yet expects a little
    line.hear([worker(other=9.0)], "me")
    with pytest.raises(QueueFull) as refused:
        line.enter(job("more"))
    assert refused.value.retry_after_s == 242


def test_with_nothing_known_yet_it_is_as_long_as_it_has_taken(clock: Clock) -> None:
    line = Line(4)
    fill(line, 2)
    clock.now += 1.5
    with pytest.raises(QueueFull) as refused:
        line.enter(job("more"))
    assert refused.value.retry_after_s == 2


def test_who_would_not_be_done_in_time_is_not_taken(clock: Clock) -> None:
    # Given a queue of 20 s, and jobs of 4 s
    line = Line(100)
    line.hear([worker()], "me")
    fill(line, 9)
    # Then who has less time than that, with a margin, is refused
    with pytest.raises(QueueFull, match="longer than this one may") as refused:
        line.enter(job("late", left_s=24 / 0.8 - 0.1))
    assert refused.value.retry_after_s == 20
    assert line.enter(job("patient", left_s=24 / 0.8 + 0.1))
    # And another key's, which comes next but one, has time enough
    assert line.enter(job("mine", 2, left_s=11))


def test_where_nobody_waits_the_time_of_others_refuses_nobody(clock: Clock) -> None:
    # Given workers that are idle, and whose last jobs were long
    line = Line(100)
    line.hear([worker(job_s=60.0)], "me")
    # Then a job with less time than that is let in: it may be a short one
    assert line.enter(job("short", left_s=10))


def test_where_a_request_stands(clock: Clock) -> None:
    line = Line(100)
    ids = fill(line, 30)
    assert line.place(ids[0]) == Place(1, None)
    line.hear([worker()], "me")
    assert line.place(ids[20]) == Place(21, 42.0)
    # When another key comes, then they take turns: it stands before nearly all of the first
    line.enter(job("mine", 2))
    assert line.place("mine") == Place(2, 4.0)
    assert line.place(ids[20]) == Place(22, 44.0)
    # And one of double weight has two turns for each
    for n in range(4):
        line.enter(job(f"heavy-{n}", 3, weight=2))
    assert [line.place(f"heavy-{n}").position for n in range(4)] == [3, 4, 6, 7]  # type: ignore[union-attr]
    line.left("mine")
    assert line.place("mine") is None


def test_a_lost_worker_blocks_nobody(clock: Clock) -> None:
    # Given a key whose jobs on their way are with a worker that is gone
    line = Line(100)
    fill(line, AT_ONCE + 5)
    # Then its others go, to whoever is there
    assert len(line.send_anew()) == 5
    assert line.send_anew() == []
