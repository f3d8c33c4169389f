"""The service's own dialect: `/chat` and `/embeddings`, as the API document has them.

A request in, OpenAI-shaped work out to the dispatcher, and the answer back in the documented shape.
"""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import orjson
from fastapi import Request, Response
from numpy.typing import NDArray

from server.auth import Principal
from server.core import metrics
from server.core.errors import ServiceError
from server.core.messages import Frame, decode_embeddings, vectors_of
from server.core.registry import ModelSpec
from server.dispatch import Call, Dispatcher, Ticket
from server.errors import error_body
from server.schemas.chat import ChatRequest
from server.schemas.embeddings import EmbeddingRequest
from server.sse import DONE, SseResponse, event, unless_disconnected


async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer `/chat`. Raises ServiceError; once a stream has begun, errors are events in it."""
    principal: Principal = request.state.principal
    spec = request.app.state.registry.resolve(body.model, "chat")
    request.state.model = spec.id
    session_id = body.session_id or f"session-{uuid.uuid4().hex}"
    headers = {"X-Session-Id": session_id, **_notes(body.model, spec, body.model_extra)}
    call = Call(
        request_id=request.state.request_id,
        spec=spec,
        endpoint="/chat",
        body=_engine_body(body, spec),
        key_id=principal.key_id,
        session_id=session_id,
        traceparent=request.headers.get("traceparent", ""),
    )
    dispatcher: Dispatcher = request.app.state.dispatcher
    ticket = await dispatcher.submit(call)
    try:
        # Nothing is answered before the worker has taken the request for good: what it refuses becomes
        # a status, not an event.
        first = await unless_disconnected(request, ticket.next())
    except BaseException:
        ticket.close()
        raise
    if body.stream:
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        return SseResponse(_stream(request, ticket, first, session_id, wants_usage), headers, ticket.close)
    ticket.close()
    return _json(_answer(first.data, session_id), headers)


def _engine_body(body: ChatRequest, spec: ModelSpec) -> dict[str, Any]:
    return {
        "model": spec.id,
        "messages": [message.model_dump() for message in body.messages],
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        # Documented from 0; the engine wants more than 0, and this little keeps one token all the same.
        "top_p": max(body.top_p, 1e-6),
        "stream": body.stream,
        "chat_template_kwargs": {"enable_thinking": body.enable_thinking},
    }


def _notes(asked: str | None, spec: ModelSpec, extra: dict[str, Any] | None) -> dict[str, str]:
    """Headers that say what is not as asked: a stand-in that answers, fields that nobody reads."""
    notes = {}
    if asked is not None and asked != spec.id:
        notes["X-Stand-In"] = spec.id
    ignored = [name if name.isascii() and name.isprintable() else "?" for name in list(extra or {})[:20]]
    if ignored:
        notes["X-Ignored-Fields"] = ", ".join(name[:64] for name in ignored)
    return notes


def _json(content: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(
        orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json", headers=headers
    )


def _answer(data: bytes, session_id: str) -> dict[str, Any]:
    """The documented fields of a completion, and the session's id."""
    result = orjson.loads(data)
    choices = []
    for choice in result["choices"]:
        message = {"role": "assistant", "content": choice["message"].get("content")}
        if choice["message"].get("reasoning"):
            message["reasoning"] = choice["message"]["reasoning"]
        choices.append({"index": choice["index"], "message": message, "finish_reason": choice["finish_reason"]})
    usage = result["usage"]
    return {
        "id": result["id"],
        "object": result["object"],
        "created": result["created"],
        "model": result["model"],
        "choices": choices,
        "usage": {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
        "session_id": session_id,
    }


async def _stream(
    request: Request, ticket: Ticket, first: Frame, session_id: str, wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The chunks as the engine made them; the first one carries the session's id."""
    model: str = request.state.model
    try:
        opening = orjson.loads(first.data)
        for internal in ("prompt_token_ids", "prompt_text"):
            opening.pop(internal, None)
        yield event(orjson.dumps({**opening, "session_id": session_id}))
        last = 0.0
        while (frame := await ticket.next()).kind != "done":
            if frame.kind == "usage" and not wants_usage:
                continue
            now = time.monotonic()
            if last:
                metrics.inter_token_latency.labels(model).observe(now - last)
            else:
                metrics.ttft.labels(model).observe(now - request.state.started)
            last = now
            yield event(frame.data)
        yield DONE
    except ServiceError as exc:
        # Too late for a status: the event says it, and the missing [DONE] that the answer is not whole.
        yield event(orjson.dumps(error_body(exc.status, exc.message)))


async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Answer `/embeddings`. Raises ServiceError."""
    principal: Principal = request.state.principal
    spec = request.app.state.registry.resolve(body.model, "embedding")
    request.state.model = spec.id
    call = Call(
        request_id=request.state.request_id,
        spec=spec,
        endpoint="/embeddings",
        body={"input": body.texts},
        key_id=principal.key_id,
        traceparent=request.headers.get("traceparent", ""),
    )
    vectors, prompt_tokens = await embed(request, call)
    data = [{"object": "embedding", "embedding": vector, "index": i} for i, vector in enumerate(vectors)]
    content = {
        "object": "embedding",
        "data": data,
        "model": spec.id,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }
    return _json(content, _notes(body.model, spec, body.model_extra))


async def embed(request: Request, call: Call) -> tuple[NDArray[np.float32], int]:
    """Vectors, float32 (n_texts, dimensions), L2-normalised, and the tokens they cost."""
    ticket = await request.app.state.dispatcher.submit(call)
    try:
        frame = await unless_disconnected(request, ticket.next())
    finally:
        ticket.close()
    result = decode_embeddings(frame.data)
    return vectors_of(result), result.prompt_tokens
