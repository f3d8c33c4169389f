"""The service's own dialect: `/chat` and `/embeddings`, as the API document has them.

A request in, OpenAI-shaped work out to the dispatcher, and the answer back in the documented shape.
"""

from collections.abc import AsyncGenerator
from typing import Any

import orjson
from fastapi import Request, Response

from server.core.conversation import last_question
from server.core.errors import ServiceError
from server.dialects.relay import Question, Turn, ask, ignored_of, json_response, notes
from server.dialects.vectors import embed
from server.errors import error_body
from server.schemas.chat import ChatRequest, ChatUsage
from server.schemas.embeddings import EmbeddingRequest
from server.sse import DONE, SseResponse, event
from server.variants import Variant, resolve


async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer `/chat`. Raises ServiceError; once a stream has begun, errors are events in it."""
    variant = resolve(request.app.state.registry, body.model)
    engine_body = _engine_body(body, variant)
    question = Question(
        variant,
        "chat",
        engine_body,
        text=last_question(engine_body["messages"]),
        session_id=body.session_id,
        ignored=ignored_of(body),
    )
    turn = await ask(request, question)
    if body.stream:
        options = body.stream_options
        wants_usage = bool(body.include_usage or (options is not None and options.include_usage))
        return SseResponse(turn.from_queue(_stream(turn, wants_usage)), turn.headers, turn.close)
    turn.close()
    return json_response(_answer(turn), turn.headers)


def _engine_body(body: ChatRequest, variant: Variant) -> dict[str, Any]:
    thinking = body.enable_thinking
    if thinking is None:
        thinking = variant.thinking if body.reasoning_effort is None else body.reasoning_effort != "none"
    return {
        "model": variant.spec.id,
        "messages": [message.model_dump() for message in body.messages],
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        # Documented from 0; the engine wants more than 0, and this little keeps one token all the same.
        "top_p": max(body.top_p, 1e-6),
        "stream": body.stream,
        "chat_template_kwargs": {"enable_thinking": thinking},
        **body.for_engine(),
    }


def _answer(turn: Turn) -> dict[str, Any]:
    """The documented fields of a completion, and the session's id."""
    result = turn.whole()
    choices = []
    for choice in result["choices"]:
        message = {"role": "assistant", "content": choice["message"].get("content")}
        if choice["message"].get("reasoning"):
            message["reasoning"] = choice["message"]["reasoning"]
        told = {"index": choice["index"], "message": message, "finish_reason": choice["finish_reason"]}
        if choice.get("logprobs"):
            told["logprobs"] = choice["logprobs"]
        choices.append(told)
    answer = {
        "id": result["id"],
        "object": result["object"],
        "created": result["created"],
        "model": result["model"],
        "choices": choices,
        "usage": {name: result["usage"][name] for name in ChatUsage.model_fields},
        "session_id": turn.session_id,
    }
    if "prompt_text" in result:
        answer["prompt"] = result["prompt_text"]
    if turn.sources:
        answer["sources"] = turn.sources
    return answer


async def _stream(turn: Turn, wants_usage: bool) -> AsyncGenerator[bytes, None]:
    """The chunks as the engine made them; the first one carries what belongs to the answer as a whole."""
    try:
        async for frame in turn.frames():
            if frame is turn.first:
                yield event(orjson.dumps(turn.opening() | {"session_id": turn.session_id}))
            elif frame.kind != "usage":
                yield event(frame.data)
            elif wants_usage:
                yield event(turn.counted(frame))
        yield DONE
    except ServiceError as exc:
        # Too late for a status: the event says it, and the missing [DONE] that the answer is not whole.
        yield event(orjson.dumps(error_body(exc, "native")))


async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Answer `/embeddings`. Raises ServiceError."""
    spec = request.app.state.registry.resolve(body.model, "embedding")
    vectors, prompt_tokens = await embed(request, spec, body.texts)
    data = [{"object": "embedding", "embedding": vector, "index": i} for i, vector in enumerate(vectors)]
    content = {
        "object": "embedding",
        "data": data,
        "model": spec.id,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }
    return json_response(content, notes(body.model, spec, ignored_of(body)))
