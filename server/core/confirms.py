"""Which messages the broker has: it confirms each by its number on the channel, in any order and several at once.

Knows nothing of the connection they are sent on.
"""

import asyncio
import itertools
import logging

from server.core.errors import BrokerUnavailable, QueueFull

logger = logging.getLogger(__name__)

CONFIRM_TIMEOUT_S = 10.0
"""A broker whose disk or quorum fails may live on and confirm nothing."""
UNCONFIRMED = "The message broker did not take the message in time. Try again shortly."


class Confirms:
    def __init__(self) -> None:
        self._tags = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}

    def __len__(self) -> int:
        """Messages that nothing was told of yet."""
        return len(self._waiting)

    def begin(self) -> None:
        """Count from 1 again: there is a new channel."""
        self._tags = itertools.count(1)

    def sent(self) -> int:
        """The number of a message that was just sent, whether or not anybody waits for it."""
        return next(self._tags)

    def expect(self, tag: int) -> asyncio.Future[None]:
        """Ends when the broker has the message, and fails when it refuses it or does not say so in time."""
        loop = asyncio.get_running_loop()
        confirmed: asyncio.Future[None] = loop.create_future()
        self._waiting[tag] = confirmed
        timer = loop.call_later(CONFIRM_TIMEOUT_S, self._give_up, confirmed)

        def settled(future: asyncio.Future[None]) -> None:
            timer.cancel()
            # Who waits may have gone by the time it fails; asyncio would complain that nobody looked.
            _ = future.cancelled() or future.exception()

        confirmed.add_done_callback(settled)
        return confirmed

    def told(self, tag: int, *, multiple: bool, taken: bool) -> None:
        """The broker has, or has refused, this message, and with `multiple` all before it that it told nothing of."""
        for each in [one for one in self._waiting if one <= tag] if multiple else [tag]:
            confirmed = self._waiting.pop(each, None)
            if confirmed is None or confirmed.done():
                continue
            if taken:
                confirmed.set_result(None)
            else:
                confirmed.set_exception(
                    QueueFull("The queue of this model is full. Try again shortly.", retry_after_s=1)
                )

    def fail(self, why: str) -> None:
        """Whether the broker has them nobody knows; the receivers tell a second copy by its id."""
        waiting, self._waiting = self._waiting, {}
        for confirmed in waiting.values():
            if not confirmed.done():
                confirmed.set_exception(BrokerUnavailable(why))

    def _give_up(self, confirmed: asyncio.Future[None]) -> None:
        """Its place among those that wait is kept: the broker may still tell of it."""
        if not confirmed.done():
            extra = {"action": "amqp_unconfirmed", "unconfirmed": len(self._waiting)}
            logger.warning("message not confirmed", extra=extra)
            confirmed.set_exception(BrokerUnavailable(UNCONFIRMED))
