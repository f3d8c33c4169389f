"""Answers in the making on their way between server processes: from the one that makes them to those who read them.

An answer is asked for at its owner, whose reply queue stands next to its claim. An owner that says nothing may be
frozen for a moment, and its generation goes on: only one whose queue is gone has lost that too, since the workers stop
what nobody can hear of. What its owner does not have is not being made: its claim is left from a failure.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import replace

from server.answers import LOST, Kept, Source, beyond
from server.core.errors import AnswerLost, Unavailable
from server.core.messages import Ask, ErrorFrame, FrameKind, Head, decode, encode
from server.dispatch import Dispatcher
from server.peers import ANSWER_S, MAX_PASSED_BYTES

BEAT_S = 2.0
"""How often a process that passes an answer on says that it lives, while there is nothing to pass on."""
LOST_S = 10.0
"""Without a word from it, what it passes on is taken for lost."""
SILENT_S = 10.0
"""How long an owner that says nothing is asked; the broker takes about as long to cut off one that is frozen."""
MAX_RELAYED = 1000
"""Events in one message."""


class Relays:
    """`making` are the answers of this process, by their requests' ids."""

    def __init__(self, making: dict[str, Kept], dispatcher: Dispatcher) -> None:
        self._making = making
        self._peers = dispatcher.peers
        self._timeout_s = dispatcher.timeout_s
        self._relays: dict[str, tuple[Ask, asyncio.Task[None]]] = {}
        self._peers.on_events = self._on_ask
        dispatcher.inbox.on_return = self._on_return

    def tasks(self) -> list[asyncio.Task[None]]:
        """What is being passed on."""
        return [task for _, task in self._relays.values()]

    async def fetch(self, ask: Ask) -> Source | None:
        """The answer that its owner makes; None if it makes none, or is gone. Raises Unavailable while it is silent."""
        loop = asyncio.get_running_loop()
        giving_up = loop.time() + SILENT_S
        while True:
            try:
                return await self._fetch(replace(ask, id=uuid.uuid4().hex, reply_to=self._peers.inbox.queue))
            except TimeoutError as exc:
                if not await self._peers.is_there(ask.owner):
                    return None
                if loop.time() > giving_up:
                    raise Unavailable(
                        "The first request with this key is still in progress. Try again shortly.", retry_after_s=5
                    ) from exc

    async def _fetch(self, ask: Ask) -> Source | None:
        """Raises TimeoutError."""
        with ExitStack() as stack:
            waiter = stack.enter_context(self._peers.asking(ask, timeout_s=self._timeout_s))
            stack.callback(self._peers.tell, replace(ask, what="leave"))
            async with asyncio.timeout(ANSWER_S):
                frame = await waiter.next()
            while not frame.data and frame.kind != "done":  # it is there, and waits for its head as well
                async with asyncio.timeout(LOST_S):
                    frame = await waiter.next()
            if frame.kind == "done":
                return None
            keeping = stack.pop_all()

        async def events() -> AsyncGenerator[bytes, None]:
            while True:
                try:
                    async with asyncio.timeout(LOST_S):
                        piece = await waiter.next()
                except TimeoutError as exc:
                    raise AnswerLost("The process that made the answer was lost. Ask again.") from exc
                if piece.kind == "done":
                    return
                if piece.data:
                    yield piece.data

        return Source(decode(Head, frame.data), events(), keeping.close)

    def _on_ask(self, ask: Ask) -> None:
        if ask.what == "leave":
            if ask.id in self._relays:
                self._relays[ask.id][1].cancel()
            return
        kept = self._making.get(ask.request_id)
        if kept is not None and kept.key_id == ask.key_id:
            self._begin(kept, ask)
        elif ask.owner == self._peers.inbox.queue:
            self._peers.answer(ask, 0, [("done", b"")])

    def _on_return(self, queue: str) -> None:
        """The process that asked is gone."""
        for ask, task in self._relays.values():
            if ask.reply_to == queue:
                task.cancel()

    def _begin(self, kept: Kept, ask: Ask) -> None:
        kept.join()
        task = asyncio.create_task(self._relay(kept, ask))
        self._relays[ask.id] = (ask, task)

        def end(_: object) -> None:
            # Not in the task: one that is cancelled before it began would never come to it.
            del self._relays[ask.id]
            kept.leave()

        task.add_done_callback(end)

    async def _relay(self, kept: Kept, ask: Ask) -> None:
        """Pass an answer on to the process that asked for it."""
        log, sent, seq, begun = kept.log, 0, 0, False
        while True:
            pieces: list[tuple[FrameKind, bytes]] = []
            if log.head is not None:
                if not begun:
                    begun, sent = True, beyond(log.head, ask.after)
                    pieces.append(("chunk", encode(log.head)))
                pieces += [_passed(made) for made in log.events[sent : sent + MAX_RELAYED]]
                sent += len(log.events[sent : sent + MAX_RELAYED])
            more = sent < len(log.events)
            over = log.over and not more
            if over:
                pieces.append(("error", encode(ErrorFrame(503, LOST))) if log.lost else ("done", b""))
            pieces = pieces or [("chunk", b"")]  # says that it lives
            self._peers.answer(ask, seq, pieces)
            seq += len(pieces)
            if over:
                return
            if not more:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_S):
                        await log.news()


def _passed(made: bytes) -> tuple[FrameKind, bytes]:
    if len(made) <= MAX_PASSED_BYTES:
        return ("chunk", made)
    return ("error", encode(ErrorFrame(503, "The answer is too large to be had by way of another process.")))
