"""Frames on their way to the servers, coalesced: one AMQP message a tick and server, for all its streams.

The broker's cost then grows with time, not with tokens. While one stream runs nothing waits.
"""

import asyncio
from collections.abc import Callable

from server.core.amqp import AmqpLink
from server.core.errors import BrokerUnavailable, ServiceError
from server.core.messages import ErrorFrame, Frame, FrameKind, encode, encode_frames

TICK_S = 0.004
"""How long a frame may wait for others: below what a reader notices between two tokens."""


class ReplyOutbox:
    """Collects frames by reply queue. `busy` says whether several streams share the tick."""

    def __init__(self, link: AmqpLink, busy: Callable[[], bool]) -> None:
        self._link = link
        self._busy = busy
        self._waiting: dict[str, list[Frame]] = {}
        self._scheduled = False

    def add(self, reply_to: str, frame: Frame) -> None:
        self._waiting.setdefault(reply_to, []).append(frame)
        if not self._scheduled:
            self._scheduled = True
            loop = asyncio.get_running_loop()
            if self._busy():
                loop.call_later(TICK_S, self.flush)
            else:
                loop.call_soon(self.flush)

    def flush(self) -> None:
        self._scheduled = False
        waiting, self._waiting = self._waiting, {}
        for reply_to, frames in waiting.items():
            try:
                self._link.send(reply_to, encode_frames(frames))
            except BrokerUnavailable:
                # The server's reply queue went with the connection, and its requests have ended with
                # an error there; there is nobody to send these to.
                return


class Reply:
    """The way back to the one who waits for a job."""

    def __init__(self, outbox: ReplyOutbox, reply_to: str, request_id: str) -> None:
        self._outbox = outbox
        self._reply_to = reply_to
        self._request_id = request_id

    def send(self, kind: FrameKind, data: bytes = b"") -> None:
        self._outbox.add(self._reply_to, Frame(self._request_id, kind, data))

    def fail(self, error: ServiceError) -> None:
        self.send("error", encode(ErrorFrame(error.status, error.message, error.param)))
