"""Who waits for a model at this server, who may go to its queue, who is refused, and how long it will take.

A key has few jobs at once on their way to a worker; its others wait here, in order. So the queue in the broker stays
short enough for a worker to see all of it and to choose by turns (workers/turns.py), whoever floods; and what waits
here goes to whichever worker has room when its time comes. Knows no broker: it is told what is begun, and what is over.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, field

from server.core.errors import QueueFull
from server.core.messages import Job, Status

AT_ONCE = 16
"""Jobs of a key on their way, for each server and model. Each that is begun lets the next go, which takes some
milliseconds: enough for hundreds a second, and few enough for a worker's lookahead with dozens of keys."""

WAITED_S = 0.1
"""A job that was begun sooner found a free slot: it says nothing of how fast the others leave."""
RECENT_S = 20.0
"""What the rate is counted over."""
LEAST_S = 2.0
"""Before so much of it has passed, the workers' own word is better."""
MARGIN = 0.8
"""Of its time, what a request may be expected to take: what is begun and not finished is wasted on everybody."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands: 1 is next. `wait_s` is an estimate, None where nothing is known yet."""

    position: int
    wait_s: float | None


@dataclass(slots=True)
class _Key:
    """What of a key waits: sent to the queue, and held here."""

    weight: int = 1
    sent: dict[str, Job] = field(default_factory=dict)
    held: dict[str, Job] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.sent) + len(self.held)


class Line:
    """Those who wait for one model. At the most `bound`, of which one key has no more than is left for others, by
    weight: whoever floods leaves room."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._keys: dict[int, _Key] = {}
        self._key_of: dict[str, int] = {}
        self._entered: dict[str, float] = {}
        self._begun: deque[float] = deque()
        self._since = 0.0
        self._slots = 0
        self._job_s = 0.0
        self._servers = 1

    def enter(self, job: Job) -> bool:
        """Let a job wait; whether it may go to the queue at once. Raises QueueFull."""
        now = time.monotonic()
        key = self._keys.get(job.key_id) or _Key()
        key.weight = max(job.weight, 1)
        waiting = len(self._key_of)
        wait_s = self._wait_s(self._position(job.key_id, key, key.count))
        if key.count >= key.weight * (self._bound - waiting):
            who = "The queue of this model is full" if waiting >= self._bound else "Too many requests of this key wait"
            raise self.refusal(who, wait_s)
        if wait_s is not None and wait_s + self._job_s > MARGIN * (job.deadline - time.time()):
            raise self.refusal("The requests that wait would take longer than this one may", wait_s)
        if not self._key_of:
            self._since = now
            self._begun.clear()
        self._keys[job.key_id] = key
        self._key_of[job.id] = job.key_id
        self._entered[job.id] = now
        goes = len(key.sent) < AT_ONCE
        (key.sent if goes else key.held)[job.id] = job
        return goes

    def refusal(self, why: str, wait_s: float | None = None) -> QueueFull:
        """The error, with the time in which those who wait now will have been begun."""
        if wait_s is None:
            wait_s = self._wait_s(len(self._key_of))
        # Nothing known: nobody has left yet, so that it takes at least as long as they have waited.
        seconds = max(1, math.ceil(time.monotonic() - self._since if wait_s is None else wait_s))
        return QueueFull(f"{why}. Try again in {seconds} s.", retry_after_s=seconds)

    def begun(self, request_id: str) -> list[Job]:
        """A worker runs it: which jobs may go now."""
        now = time.monotonic()
        if now - self._entered.get(request_id, now) >= WAITED_S:
            self._begun.append(now)
        return self.left(request_id)

    def left(self, request_id: str) -> list[Job]:
        """It waits no longer, for whatever reason: which jobs may go now."""
        key_id = self._key_of.pop(request_id, None)
        if key_id is None:
            return []
        del self._entered[request_id]
        key = self._keys[key_id]
        key.sent.pop(request_id, None)
        key.held.pop(request_id, None)
        if not key.count:
            del self._keys[key_id]
        return self._next(key)

    def held(self, request_id: str) -> bool:
        """Whether no worker can have heard of it."""
        key = self._keys.get(self._key_of.get(request_id, -1))
        return key is not None and request_id in key.held

    def send_anew(self) -> list[Job]:
        """A worker is gone, perhaps with all that was on its way: which jobs may go now, not counting those."""
        going = []
        for key in self._keys.values():
            going += self._next(key, at_once=len(key.sent) + AT_ONCE)
        return going

    def hear(self, workers: list[Status]) -> None:
        """How the model's workers fare."""
        ready = [worker for worker in workers if worker.ready]
        self._slots = sum(worker.slots for worker in ready)
        self._servers = max((worker.servers for worker in ready), default=1)
        known = [worker.job_s for worker in ready if worker.job_s]
        self._job_s = sum(known) / len(known) if known else 0.0

    def place(self, request_id: str) -> Place | None:
        """Where it stands; None where it does not wait."""
        key_id = self._key_of.get(request_id)
        if key_id is None:
            return None
        key = self._keys[key_id]
        before = 0
        for waiting in (*key.sent, *key.held):
            if waiting == request_id:
                break
            before += 1
        position = self._position(key_id, key, before)
        return Place(position, self._wait_s(position))

    def _next(self, key: _Key, at_once: int = AT_ONCE) -> list[Job]:
        going = []
        while key.held and len(key.sent) < at_once:
            id_ = next(iter(key.held))
            key.sent[id_] = key.held.pop(id_)
            going.append(key.sent[id_])
        return going

    def _position(self, key_id: int, key: _Key, before: int) -> int:
        """Of a job with so many of its own key before it, as keys take turns by weight and jobs are alike."""
        turns = (before + 1) / key.weight
        others = sum(min(o.count, math.ceil(turns * o.weight)) for id_, o in self._keys.items() if id_ != key_id)
        return before + others + 1

    def _wait_s(self, position: int) -> float | None:
        rate = self._rate()
        return None if rate is None else position / rate

    def _rate(self) -> float | None:
        """Jobs a second that are begun while others wait: seen here, as servers share the workers; or else said by the
        workers."""
        now = time.monotonic()
        since = max(self._since, now - RECENT_S)
        while self._begun and self._begun[0] < since:
            self._begun.popleft()
        if self._key_of and now - since >= LEAST_S:
            return max(len(self._begun), 1) / (now - since)
        return self._slots / self._job_s / self._servers if self._slots and self._job_s else None
