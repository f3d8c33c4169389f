"""A job that a worker has taken, from then on until its end. Knows neither the broker nor models."""

import asyncio
import time
from dataclasses import dataclass, field

from server.core.amqp import Delivery
from server.core.errors import ServiceError
from server.core.messages import Job, Lane
from workers.replies import Reply
from workers.turns import Turns


@dataclass(frozen=True, slots=True)
class Source:
    """A queue of jobs. Those of a `lane` wait at the worker for their turn, others are begun as they come. What was
    delivered more than `tries` times goes on to the queue `then`, where there is one."""

    queue: str
    lane: Lane | None
    tries: int
    then: str = ""


@dataclass(slots=True, eq=False)
class Run:
    """A job in hand, waiting for its turn until it has a task. `delivery` is the latest one: after a reconnection the
    broker delivers it again. `taken_ns` is when the first came, in Unix nanoseconds. `charged` (beforehand) and `used`
    are tokens."""

    job: Job
    source: Source
    delivery: Delivery
    taken_ns: int = field(default_factory=time.time_ns)
    charged: float = 0.0
    used: int = 0
    task: asyncio.Task[None] | None = None
    reply: Reply | None = None
    handling: bool = False
    stopped: ServiceError | None = None
    """Why it is ended early: what it has made is recorded then as cancelled."""
    unwanted: bool = False
    """It was refused, or is over already: nothing of it is recorded."""
    ours: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared while the connection that it came by is lost: the broker may have given it to another worker, whose
    answer is then the one that counts."""
    dropped: bool = False
    """It was not ours for too long."""

    def __post_init__(self) -> None:
        self.ours.set()

    async def counts(self) -> bool:
        """Whether its record does. Waits until that is known."""
        await self.ours.wait()
        return not self.unwanted

    def drop(self) -> None:
        """End it without a word: another worker answers."""
        self.dropped = True
        if self.reply is not None:
            self.reply.muted = True
        if self.task is not None:
            self.task.cancel()


@dataclass(slots=True)
class Slots:
    """What a lane may run at once, and what waits for it."""

    count: int
    busy: int = 0
    turns: Turns[Run] = field(default_factory=Turns)
