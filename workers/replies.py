"""Frames on their way to the servers, coalesced: one AMQP message a tick and server, for all its streams.

The broker's cost then grows with time, not with tokens. An engine's step makes a token for each of its streams at once,
so that what it made goes together without waiting; only where steps are shorter than a tick, several share a message.
While one stream runs nothing waits at all.

While the broker cannot be sent to, frames are held, up to a bound: a short fault is then only a pause in the stream.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

from server.core import spans, topology
from server.core.amqp import BLOCKED, AmqpLink
from server.core.errors import AnswerLost, BrokerUnavailable, InvalidRequest, ServiceError
from server.core.messages import ErrorFrame, Frame, FrameKind, encode, encode_frames

TICK_S = 0.004
"""The least time between two messages of several streams: below what a reader notices between two tokens."""

HOLD_S = 0.02
"""How long the word that a job was taken waits for the first token, which most often is there by then."""

RETRY_S = 0.2
"""How soon frames are tried again that found the connection down or blocked."""

HELD_MAX_BYTES = 64 * 2**20
"""What is held at the most; past it every stream that waits is given up."""


MAX_DATA_BYTES = topology.MAX_MESSAGE_BYTES - 2**20
"""Of the frames in one message, beside what names them."""


class ReplyOutbox:
    """Collects frames by reply queue. `busy` says whether several streams share the tick; `on_given_up` hears of each
    request whose frames were thrown away, by its id."""

    def __init__(
        self, link: AmqpLink, busy: Callable[[], bool], on_given_up: Callable[[str], None] = lambda request_id: None
    ) -> None:
        self._link = link
        self._busy = busy
        self._on_given_up = on_given_up
        self._waiting: dict[str, list[Frame]] = {}
        self._after: list[Callable[[], None]] = []
        self._bytes = 0
        self._scheduled = False
        self._flushed_at = 0.0

    def add(self, reply_to: str, frame: Frame) -> None:
        self._waiting.setdefault(reply_to, []).append(frame)
        self._bytes += len(frame.data)
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

    def after(self, do: Callable[[], None]) -> None:
        """Have it done once all that waits now was written to the connection; at once where nothing waits. A job is
        settled so: if this process ends before its last frames have left, another worker is given it."""
        self._after.append(do)
        if not self._waiting:
            self._do_after()

    def flush(self) -> None:
        if not self._waiting:
            return
        self._scheduled = False
        self._flushed_at = asyncio.get_running_loop().time()
        if not self._link.blocked:
            waiting, self._waiting, self._bytes = self._waiting, {}, 0
            for reply_to, frames in waiting.items():
                for some in _messages(frames):
                    self._send(reply_to, some)
        if not self._waiting:
            self._do_after()
        else:
            if self._bytes > HELD_MAX_BYTES:
                self._give_up()
            self._scheduled = True
            asyncio.get_running_loop().call_later(RETRY_S, self.flush)

    def _do_after(self) -> None:
        after, self._after = self._after, []
        for do in after:
            asyncio.get_running_loop().call_soon(do)  # a connection writes what it is sent at the end of this turn

    def _send(self, reply_to: str, frames: list[Frame]) -> None:
        try:
            self._link.send(reply_to, encode_frames(frames))
        except BrokerUnavailable:
            # Only this connection is down; whoever waits may still be there when it is back.
            self._waiting.setdefault(reply_to, []).extend(frames)
            self._bytes += _size(frames)

    def _give_up(self) -> None:
        """Of each request that waits, an error is left in place of its frames."""
        error = AnswerLost(BLOCKED)
        data = encode(ErrorFrame(error.status, error.message))
        given_up: list[str] = []
        for reply_to, frames in self._waiting.items():
            errors: dict[str, Frame] = {}
            for frame in frames:
                errors.setdefault(frame.request_id, replace(frame, kind="error", data=data))
            self._waiting[reply_to] = list(errors.values())
            given_up += errors
        self._bytes = sum(_size(frames) for frames in self._waiting.values())
        for request_id in given_up:
            self._on_given_up(request_id)


def _size(frames: list[Frame]) -> int:
    return sum(len(frame.data) for frame in frames)


def _messages(frames: list[Frame]) -> Iterator[list[Frame]]:
    """The frames in order, in as few messages as the broker takes."""
    some: list[Frame] = []
    size = 0
    for frame in frames:
        size += len(frame.data)
        if some and size > MAX_DATA_BYTES:
            yield some
            some, size = [], len(frame.data)
        some.append(frame)
    yield some


class Reply:
    """The way back to the one who waits for a job, for one run of it. Once `muted` it tells no more than an error."""

    muted = False

    def __init__(self, outbox: ReplyOutbox, reply_to: str, request_id: str) -> None:
        self._outbox = outbox
        self._reply_to = reply_to
        self._request_id = request_id
        self._run = uuid.uuid4().hex[:8]
        self._seq = itertools.count()
        self._first: Frame | None = None
        self._last: Frame | None = None
        self._taken_at = time.monotonic()

    def send(self, kind: FrameKind, data: bytes = b"") -> None:
        if self.muted and kind != "error":
            return
        if len(data) > MAX_DATA_BYTES and kind != "error":
            self.fail(
                InvalidRequest(
                    f"The answer is larger than {MAX_DATA_BYTES} bytes. Stream it, or ask for fewer logprobs."
                )
            )
            return
        elapsed_s = time.monotonic() - self._taken_at
        seq = next(self._seq)
        if seq == 1 and kind == "chunk":  # after the word that the job was taken
            spans.first_token(elapsed_s)
        self._last = Frame(self._request_id, self._run, seq, kind, data, elapsed_s)
        self._first = self._first or self._last
        self._outbox.add(self._reply_to, self._last)

    @property
    def told(self) -> bool:
        """Whether something of the answer was."""
        return self._last is not None and self._last.kind != "started"

    def say_again_that_it_began(self) -> None:
        """Whoever waits leaves that; where nobody does any more, the server answers it with a cancel."""
        if self._first is not None and self._first.kind == "started":
            self._outbox.add(self._reply_to, self._first)

    def repeat(self) -> None:
        """The last frame again. Whoever has it leaves it; who lacks it, or one before it, learns how the run ended."""
        if self._last is not None:
            self._outbox.add(self._reply_to, self._last)

    def fail(self, error: ServiceError) -> None:
        self.send("error", encode(ErrorFrame(error.status, error.message, error.param, error.code)))
