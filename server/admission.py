"""Who waits for a model at this server, who may go to its queue, who is refused, and how long it will take.

A key has few jobs at once on their way to a worker; its others wait here, in order. So the queue in the broker stays
short enough for a worker to see all of it and to choose by turns (workers/turns.py), whoever floods; and what waits
here goes to whichever worker has room when its time comes. Knows no broker: it is told what is begun, and what is over.
"""

import math
import time
from dataclasses import dataclass, field

from server.core.errors import QueueFull
from server.core.messages import Job, Status

AT_ONCE = 16
"""Jobs of a key on their way, for each server and model. Each that is begun lets the next go, which takes some
milliseconds: enough for hundreds a second, and few enough for a worker's lookahead with dozens of keys."""

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
        self._since = 0.0
        self._rate = 0.0
        self._job_s = 0.0

    def enter(self, job: Job) -> bool:
        """Let a job wait; whether it may go to the queue at once. Raises QueueFull."""
        key = self._keys.get(job.key_id) or _Key()
        key.weight = max(job.weight, 1)
        waiting = len(self._key_of)
        wait_s = self._wait_s(self._position(job.key_id, key, key.count))
        if key.count >= key.weight * (self._bound - waiting):
            who = "The queue of this model is full" if waiting >= self._bound else "Too many requests of this key wait"
            raise self.refusal(who, wait_s)
        if waiting and wait_s is not None and wait_s + self._job_s > MARGIN * (job.deadline - time.time()):
            raise self.refusal("The requests that wait would take longer than this one may", wait_s)
        if not self._key_of:
            self._since = time.monotonic()
        self._keys[job.key_id] = key
        self._key_of[job.id] = job.key_id
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

    def left(self, request_id: str) -> list[Job]:
        """It waits no longer: a worker runs it, or it is over. Which jobs may go now."""
        key_id = self._key_of.pop(request_id, None)
        if key_id is None:
            return []
        key = self._keys[key_id]
        key.sent.pop(request_id, None)
        key.held.pop(request_id, None)
        if not key.count:
            del self._keys[key_id]
        return self._next(key)

    def send_anew(self) -> list[Job]:
        """A worker is gone, perhaps with all that was on its way: which jobs may go now, not counting those."""
        going = []
        for key in self._keys.values():
            going += self._next(key, at_once=len(key.sent) + AT_ONCE)
        return going

    def hear(self, workers: list[Status], server: str) -> None:
        """How the model's workers fare, and how much of it is this server's, by the name of its reply queue."""
        known = [worker for worker in workers if worker.ready and worker.job_s]
        total = sum(sum(worker.begun.values()) for worker in known)
        mine = sum(worker.begun.get(server, 0.0) for worker in known)
        servers = {server}.union(*(worker.begun for worker in known))
        share = (mine + 1) / (total + len(servers))  # nobody has none, were it only for a lack of requests so far
        self._job_s = sum(worker.job_s for worker in known) / len(known) if known else 0.0
        self._rate = share * sum(worker.slots / worker.job_s for worker in known)

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
        return position / self._rate if self._rate else None
