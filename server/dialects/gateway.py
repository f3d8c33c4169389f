"""AI Service V1's dialect: OpenAI's chat, whose stream is `data: {"content": "…"}` and `data: [DONE]`."""

from collections.abc import AsyncGenerator

import orjson
from fastapi import Request, Response

from server.core.errors import InvalidRequest, ServiceError
from server.dialects import openai
from server.dialects.relay import Turn, ask, json_response
from server.errors import error_body
from server.schemas.openai import ChatCompletionsRequest
from server.sse import DONE, SseResponse, event


async def chat(request: Request, body: ChatCompletionsRequest) -> Response:
    """Answer `/ai/v1/chat/completions`. Raises ServiceError; once a stream has begun, errors are events in it."""
    if body.stream and (body.n or 1) > 1:
        raise InvalidRequest("n: a stream of this dialect holds one answer.", param="n")
    turn = await ask(request, openai.question_of(request, body))
    if body.stream:
        return SseResponse(turn.from_queue(_stream(turn)), turn.headers, turn.close)
    turn.close()
    return json_response(openai.completion(turn), turn.headers)


async def _stream(turn: Turn) -> AsyncGenerator[bytes, None]:
    """What is said, and nothing of how: thoughts and counts have no place here. Tool calls come as OpenAI's deltas."""
    try:
        if turn.sources:
            yield event(orjson.dumps({"content": "", "sources": turn.sources}))
        async for frame in turn.frames():
            if frame.kind != "chunk":
                continue
            delta = orjson.loads(frame.data)["choices"][0]["delta"]
            if delta.get("tool_calls"):
                yield event(orjson.dumps({"content": delta.get("content") or "", "tool_calls": delta["tool_calls"]}))
            elif delta.get("content"):
                yield event(orjson.dumps({"content": delta["content"]}))
        yield DONE
    except ServiceError as exc:
        yield event(orjson.dumps(error_body(exc, "openai")))
