"""What the server processes ask each other: where a request stands, to stop it, and for the events of a kept answer.

Any process may be asked about any request, and only the one that took it knows. So an ask goes to all of them, by the
broker that they share anyway, and the one that knows answers to the asker's own reply queue; who does not know is
silent, as it is about other keys' requests. A table of who has what would cost every request two writes, for a question
that few are asked.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import msgspec

from server.core import topology
from server.core.amqp import BLOCKED, AmqpLink, Delivery
from server.core.errors import BrokerUnavailable
from server.core.inbox import Inbox, Waiter
from server.core.messages import Ask, Frame, FrameKind, Job, RequestState, decode, encode, encode_frames

logger = logging.getLogger(__name__)

ANSWER_S = 1.0
"""In which a server answers that knows. Of a request's state, one that is too busy for it counts as not knowing."""

MAX_PASSED_BYTES = 8 * 1024 * 1024
"""Of an answer that one process passes on to another."""

Find = Callable[[str, int], RequestState | None]


class Peers:
    """`state` and `cancel` find a request of this process by its id and key. `inbox` is set before it is used."""

    inbox: Inbox
    on_events: Callable[[Ask], None] = staticmethod(lambda ask: None)
    """Told when events are asked for, and when who asked is gone."""

    def __init__(self, state: Find, cancel: Find) -> None:
        self._find: dict[str, Find] = {"state": state, "cancel": cancel}

    async def consume(self, link: AmqpLink) -> None:
        await link.listen(topology.ASKS, self._on_ask)

    def _on_ask(self, delivery: Delivery) -> None:
        try:
            ask = decode(Ask, delivery.body)
        except msgspec.DecodeError:
            logger.warning("not an ask", extra={"action": "decode"})  # a newer server's, perhaps
            return
        find = self._find.get(ask.what)
        if find is None:
            self.on_events(ask)
        elif (state := find(ask.request_id, ask.key_id)) is not None:
            self.answer(ask, 0, [("result", encode(state))])

    def answer(self, ask: Ask, first_seq: int, pieces: list[tuple[FrameKind, bytes]]) -> None:
        """Send the answer's next pieces, after the `first_seq` that have gone before."""
        frames = [Frame(ask.id, ask.id, seq, kind, data) for seq, (kind, data) in enumerate(pieces, first_seq)]
        try:
            self.inbox.publisher.send(ask.reply_to, encode_frames(frames))
        except BrokerUnavailable:
            logger.warning("ask not answered", extra={"action": "ask", "request_id": ask.request_id})

    async def is_there(self, queue: str) -> bool:
        """Whether another process still has this reply queue: it goes with its connection. Raises BrokerUnavailable."""
        return await self.inbox.publisher.settle(queue, encode_frames([]))

    def tell(self, ask: Ask) -> None:
        """Ask for no answer."""
        with suppress(BrokerUnavailable):
            self.inbox.publisher.broadcast(topology.ASKS, encode(ask))

    async def ask(self, what: Literal["state", "cancel"], request_id: str, key_id: int) -> RequestState | None:
        """What the process says that has the request; None if none does. Raises BrokerUnavailable."""
        if (mine := self._find[what](request_id, key_id)) is not None:
            return mine
        self._raise_if_blocked()  # what is asked now would be heard much later
        with self.asking(Ask(uuid.uuid4().hex, request_id, key_id, self.inbox.queue, what)) as waiter:
            try:
                frame = await asyncio.wait_for(waiter.next(), ANSWER_S)
            except TimeoutError:
                self._raise_if_blocked()  # the broker says so when it is sent something
                return None
            return decode(RequestState, frame.data)

    def _raise_if_blocked(self) -> None:
        if self.inbox.publisher.blocked:
            raise BrokerUnavailable(BLOCKED)

    @contextmanager
    def asking(self, ask: Ask, timeout_s: float = 60.0) -> Iterator[Waiter]:
        """Who waits for the frames of the answer, for as long as the context lasts. Raises BrokerUnavailable."""
        now = time.time()
        waiter = Waiter(Job(ask.id, "", "", {}, ask.key_id, ask.reply_to, now, now + timeout_s))
        waiter.started = True  # it is in no worker's queue
        waiter.unread_bytes = -MAX_PASSED_BYTES  # what is finished already comes faster than anybody reads
        self.inbox.waiting[ask.id] = waiter
        try:
            self.inbox.publisher.broadcast(topology.ASKS, encode(ask))
            yield waiter
        finally:
            self.inbox.release(ask.id)
