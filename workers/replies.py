"""Frames on their way to the servers, coalesced: one AMQP message a tick and server, for all its streams.

The broker's cost then grows with time, not with tokens. An engine's step makes a token for each of its streams at once,
so that what it made goes together without waiting; only where steps are shorter than a tick, several share a message.
While one stream runs nothing waits at all.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable

from server.core.amqp import AmqpLink
from server.core.errors import BrokerUnavailable, ServiceError
from server.core.messages import ErrorFrame, Frame, FrameKind, encode, encode_frames

TICK_S = 0.004
"""The least time between two messages of several streams: below what a reader notices between two tokens."""

HOLD_S = 0.02
"""How long the word that a job was taken waits for the first token, which most often is there by then."""

RETRY_S = 0.2
"""How soon frames are tried again that found the connection down."""


class ReplyOutbox:
    """Collects frames by reply queue. `busy` says whether several streams share the tick."""

    def __init__(self, link: AmqpLink, busy: Callable[[], bool]) -> None:
        self._link = link
        self._busy = busy
        self._waiting: dict[str, list[Frame]] = {}
        self._scheduled = False
        self._flushed_at = 0.0

    def add(self, reply_to: str, frame: Frame) -> None:
        self._waiting.setdefault(reply_to, []).append(frame)
        loop = asyncio.get_running_loop()
        if frame.kind == "started":
            loop.call_later(HOLD_S, self.flush)
        elif not self._scheduled:
            self._scheduled = True
            left_s = self._flushed_at + TICK_S - loop.time() if self._busy() else 0.0
            if left_s > 0:
                loop.call_later(left_s, self.flush)
            else:
                loop.call_soon(self.flush)  # after all tasks that this step of the engine has woken

    def flush(self) -> None:
        if not self._waiting:
            return
        self._scheduled = False
        self._flushed_at = asyncio.get_running_loop().time()
        waiting, self._waiting = self._waiting, {}
        for reply_to, frames in waiting.items():
            try:
                self._link.send(reply_to, encode_frames(frames))
            except BrokerUnavailable:
                # Only this connection is down; whoever waits may still be there when it is back.
                self._waiting[reply_to] = frames
        if self._waiting and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(RETRY_S, self.flush)


class Reply:
    """The way back to the one who waits for a job, for one run of it. Once `muted` it tells no more than an error."""

    muted = False

    def __init__(self, outbox: ReplyOutbox, reply_to: str, request_id: str) -> None:
        self._outbox = outbox
        self._reply_to = reply_to
        self._request_id = request_id
        self._run = uuid.uuid4().hex[:8]
        self._seq = itertools.count()
        self._taken_at = time.monotonic()

    def send(self, kind: FrameKind, data: bytes = b"") -> None:
        if self.muted and kind != "error":
            return
        elapsed_s = time.monotonic() - self._taken_at
        self._outbox.add(self._reply_to, Frame(self._request_id, self._run, next(self._seq), kind, data, elapsed_s))

    def fail(self, error: ServiceError) -> None:
        self.send("error", encode(ErrorFrame(error.status, error.message, error.param, error.code)))
