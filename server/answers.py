"""An answer as it is made, apart from any connection, and who reads it. Knows no dialect and no other process."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from server.core.errors import AnswerLost
from server.core.messages import Head

LOST = "The answer was given up before it was whole. Ask again."


def beyond(head: Head, after: int) -> int:
    """How many events a reader has who knows `after`: what is not streamed has none to go on from."""
    return after if head.keep_alive else 0


class Log:
    """An answer as it is made: its head, then its events (of one that is not streamed its body, as the only one)."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.events: list[bytes] = []
        self.over = False
        self.lost = False
        """Whether its end is not the answer's."""
        self._news = asyncio.Event()

    def begin(self, head: Head) -> None:
        self.head = head
        self._tell()

    def add(self, event: bytes) -> None:
        self.events.append(event)
        self._tell()

    def end(self, *, lost: bool = False) -> None:
        self.over, self.lost = True, lost
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def news(self) -> None:
        await self._news.wait()

    async def begun(self) -> Head:
        """Raises AnswerLost."""
        while self.head is None:
            if self.over:
                raise AnswerLost(LOST, retry_after_s=1)
            await self.news()
        return self.head

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """The events beyond the first `after`, as they come, to the end. Raises AnswerLost."""
        while True:
            for made in self.events[after:]:
                after += 1
                yield made
            if len(self.events) <= after:
                if self.lost:
                    raise AnswerLost(LOST)
                if self.over:
                    return
                await self.news()


class Kept:
    """A request in the making, and how many read its answer. Without a reader it ends after `grace_s`."""

    def __init__(self, request_id: str, key_id: int, grace_s: float) -> None:
        self.request_id = request_id
        self.key_id = key_id
        self.log = Log()
        self.task: asyncio.Task[None] | None = None
        self.settled = False
        """Whether Postgres has the answer, or knows that there is none."""
        self._grace_s = grace_s
        self._readers = 0
        self._giving_up: asyncio.TimerHandle | None = None

    def join(self) -> None:
        self._readers += 1
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def leave(self) -> None:
        self._readers -= 1
        if not self._readers and not self.log.over and self.task is not None:
            self._giving_up = asyncio.get_running_loop().call_later(self._grace_s, self._give_up)

    def _give_up(self) -> None:
        """Nobody came back in time. What has ended meanwhile is kept all the same, or let go of."""
        if not self.log.over and self.task is not None:
            self.task.cancel()


@dataclass(frozen=True, slots=True)
class Source:
    """Where an answer is read from: its head, its events from some point on, and what to do when the reader leaves."""

    head: Head
    events: AsyncGenerator[bytes, None]
    leave: Callable[[], None]
