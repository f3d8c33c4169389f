"""What every dialect does alike: have a job done, hear its frames, and answer in JSON or in events.

Knows no dialect's shapes.
"""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi import Request, Response
from pydantic import BaseModel

from server.core import metrics
from server.core.errors import ContextExceeded, InvalidRequest
from server.core.messages import Api, Frame
from server.core.registry import ModelSpec
from server.dialects import memory
from server.dispatch import Call, Dispatcher, Ticket, again
from server.errors import PREFIX
from server.limits import traceparent
from server.schemas.chat import SESSION_ID
from server.sse import unless_disconnected
from server.variants import Variant

QUEUED_S = 3.0
"""How long a stream waits in the queue before it begins with comments on where it stands, and between two of them."""

NOT_YET = Frame("", "", 0, "started")


@dataclass(slots=True)
class Turn:
    """A chat that a worker has taken: its first frame is here, and nothing is refused any more. Or a stream that has
    waited long: its first frame is `coming`, and what is refused then is an event.

    `sources` are the past chats that `-search` showed to the model. Close it when its client has it all.
    """

    request: Request
    ticket: Ticket
    first: Frame
    model: str
    session_id: str
    headers: dict[str, str]
    sources: list[dict[str, Any]]
    coming: asyncio.Task[Frame] | None = None

    def close(self) -> None:
        self.ticket.close()
        if self.coming is not None:
            self.coming.cancel()

    def from_queue(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The events; before them, while the request waits in the queue, comments on where it stands."""
        return events if self.coming is None else self._with_places(events)

    async def _with_places(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        while self.coming is not None and not self.coming.done():
            if (place := self.ticket.place) is not None:
                yield (
                    b": position %d\n\n" % place.position
                    if place.wait_s is None
                    else (b": position %d, about %d s\n\n" % (place.position, math.ceil(place.wait_s)))
                )
            await asyncio.wait({self.coming}, timeout=QUEUED_S)
        async with aclosing(events):
            async for event in events:
                yield event

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """Every frame but the last, `done`. Raises the ServiceError that the answer ended with."""
        started: float = self.request.state.started
        to_next = metrics.inter_token_latency.labels(self.model).observe
        if self.coming is not None:
            self.first = await self.coming
        frame, last = self.first, 0.0
        if self.ticket.api == "completions":  # a chat's first frame opens the answer and carries no text
            last = time.monotonic()
            metrics.ttft.labels(self.model).observe(last - started)
        while frame.kind != "done":
            yield frame
            frame = await self.ticket.next()
            now = time.monotonic()
            if frame.kind == "chunk":
                if last:
                    to_next(now - last)
                else:
                    metrics.ttft.labels(self.model).observe(now - started)
                last = now

    def opening(self) -> dict[str, Any]:
        """The first chunk of a streamed chat, with what is told once: the rendered prompt, and the sources."""
        chunk: dict[str, Any] = orjson.loads(self.first.data)
        chunk.pop("prompt_token_ids", None)
        if (prompt := chunk.pop("prompt_text", None)) is not None:
            chunk["prompt"] = prompt
        if self.sources:
            chunk["sources"] = self.sources
        return chunk

    def counted(self, frame: Frame) -> bytes:
        """The JSON of the chunk that counts the tokens, with what the engine does not count."""
        chunk = orjson.loads(frame.data)
        _add_to_usage(chunk["usage"], frame)
        return orjson.dumps(chunk)

    def whole(self) -> dict[str, Any]:
        """The answer of an unstreamed chat or completion, with what the engine does not count."""
        result: dict[str, Any] = orjson.loads(self.first.data)
        _add_to_usage(result["usage"], self.first)
        return result


def _add_to_usage(usage: dict[str, Any], frame: Frame) -> None:
    details = usage.get("completion_tokens_details") or {}
    usage["reasoning_tokens"] = details.get("reasoning_tokens", 0)
    usage["output_tokens"] = usage["completion_tokens"]
    usage["tokens_per_second"] = round(usage["completion_tokens"] / frame.elapsed_s, 2) if frame.elapsed_s else 0.0


@dataclass(frozen=True, slots=True)
class Question:
    """A chat on its way to a worker. `text` is the user's last message, which `-search` looks for."""

    variant: Variant
    api: Api
    body: dict[str, Any]
    text: str = ""
    session_id: str | None = None
    ignored: tuple[str, ...] = ()


async def ask(request: Request, question: Question) -> Turn:
    """Have a question answered. Raises ServiceError; what the worker refuses is raised here too."""
    spec = question.variant.spec
    request.state.model = spec.id
    _check_samplers(spec, question.body)
    session_id = question.session_id or _session_of(request)
    headers = {"X-Session-Id": session_id, **notes(question.variant.asked, spec, question.ignored)}
    found = await memory.recall(request, spec, question.text) if question.variant.search else memory.NOTHING
    try:
        ticket, first, coming = await _submit(request, _call(request, question, session_id, found))
    except ContextExceeded:
        if not found.context:
            raise
        # The client is not to blame for what was put before its question.
        found = memory.NOTHING
        call = _call(request, question, session_id, found)
        # A job of its own: a worker may still have the first in hand.
        ticket, first, coming = await _submit(request, replace(call, request_id=again(call.request_id)))
    return Turn(request, ticket, first, spec.id, session_id, headers, found.sources, coming)


def _call(request: Request, question: Question, session_id: str, found: memory.Recalled) -> Call:
    return Call(
        request_id=request.state.request_id,
        spec=question.variant.spec,
        endpoint=request.scope["route"].path.removeprefix(PREFIX),
        api=question.api,
        body=question.body,
        key_id=request.state.principal.key_id,
        session_id=session_id,
        recorded=question.api != "count_tokens",
        traceparent=traceparent(request.headers),
        context=found.context,
        weight=request.state.principal.weight,
    )


async def _submit(request: Request, call: Call) -> tuple[Ticket, Frame, asyncio.Task[Frame] | None]:
    """The call's ticket and its first frame, which is still coming if it is to be streamed and waits long in the queue.

    Raises ServiceError.
    """
    dispatcher: Dispatcher = request.app.state.dispatcher
    ticket = await dispatcher.submit(call)
    try:
        # Nothing is answered before the worker has taken the request for good: what it refuses becomes
        # a status, not an event.
        # What was put before the question may have to be taken away again, which no stream can.
        if call.body.get("stream") and not call.context:
            coming = asyncio.create_task(ticket.next())
            coming.add_done_callback(_seen)  # its client may leave before anybody looks at it
            try:
                await unless_disconnected(request, _come_or_long_queued(ticket, coming))
            except BaseException:
                coming.cancel()
                raise
            return (ticket, coming.result(), None) if coming.done() else (ticket, NOT_YET, coming)
        return ticket, await unless_disconnected(request, ticket.next()), None
    except BaseException:
        ticket.close()
        raise


def _seen(coming: asyncio.Task[Frame]) -> None:
    if not coming.cancelled():
        coming.exception()


async def _come_or_long_queued(ticket: Ticket, coming: asyncio.Task[Frame]) -> None:
    while True:
        await asyncio.wait({coming}, timeout=QUEUED_S)
        if coming.done() or ticket.place is not None:
            return


def must_answer(spec: ModelSpec, max_tokens: int | None) -> dict[str, int]:
    """Tells the engine that an answer is promised: how many tokens may pass before it, half of what there is.

    Grammars hold the answer and not the thought before it, which some models never end, or end the answer with.
    """
    return {"must_answer": (max_tokens or spec.context_length // 2) // 2}


def _check_samplers(spec: ModelSpec, fields: dict[str, Any]) -> None:
    """Raise InvalidRequest where the model's engine runs without the samplers that the request switches on."""
    wanted = fields.get("vllm_xargs")
    if not wanted or spec.extra_samplers:
        return
    if name := next((name for name in wanted if name != "must_answer"), None):
        raise InvalidRequest(f"{name}: {spec.id} is served without this sampler.", param=name)
    del fields["vllm_xargs"]


def _session_of(request: Request) -> str:
    """The session named in the header, for dialects that have no field for it; or a new one."""
    given = request.headers.get("x-session-id")
    if given is None:
        return f"session-{uuid.uuid4().hex}"
    if not SESSION_ID.fullmatch(given):
        raise InvalidRequest("X-Session-Id: 1 to 128 printable ASCII characters without spaces.", param="X-Session-Id")
    return given


def ignored_of(body: BaseModel) -> tuple[str, ...]:
    """The names of fields that nobody reads; null is as good as left out."""
    return tuple(name for name, value in (body.model_extra or {}).items() if value is not None)


def notes(asked: str | None, spec: ModelSpec, ignored: tuple[str, ...]) -> dict[str, str]:
    """Headers that say what is not as asked: a stand-in that answers, fields that nobody reads."""
    told = {}
    if asked is not None and asked != spec.id:
        told["X-Stand-In"] = spec.id
    shown = [name[:64] if name.isascii() and name.isprintable() else "?" for name in ignored[:20]]
    if shown:
        told["X-Ignored-Fields"] = ", ".join(shown)
    return told


def json_response(content: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(
        orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json", headers=headers
    )
