"""Anthropic's dialect: `/v1/messages` and `/v1/messages/count_tokens`.

The worker converts it to a chat and back with vLLM's own converters; what is done here is bounds, ids, pings,
and that nothing is thought unless it was asked for, as Anthropic documents it.
"""

from collections.abc import AsyncGenerator
from typing import Any

import orjson
from fastapi import Request, Response

from server import limits
from server.core.conversation import last_question
from server.core.errors import InvalidRequest, ServiceError
from server.dialects.relay import Question, Turn, ask, ignored_of, json_response, must_answer
from server.errors import error_body
from server.media import check_media
from server.schemas.anthropic import CountTokensRequest, MessagesRequest
from server.sse import SseResponse, event
from server.variants import Variant, resolve

PING = b'event: ping\ndata: {"type": "ping"}\n\n'


async def messages(request: Request, body: MessagesRequest) -> Response:
    """Answer `/v1/messages`. Raises ServiceError; once a stream has begun, errors are events in it."""
    budget = body.thinking.budget_tokens if body.thinking and body.thinking.type == "enabled" else None
    if budget is not None and budget >= body.max_tokens:
        raise InvalidRequest(
            f"thinking.budget_tokens: {budget} must be less than max_tokens, which is {body.max_tokens}.",
            param="thinking.budget_tokens",
        )
    question = _question(request, body)
    fields = question.body
    for name in ("max_tokens", "stop_sequences", "temperature", "top_p", "top_k"):
        if (value := getattr(body, name)) is not None:
            fields[name] = value
    if fields.get("top_p") == 0:
        fields["top_p"] = 1e-6
    fields["stream"] = bool(body.stream)
    if body.output_config is not None:
        if body.output_config.format is not None:
            limits.check_schema(body.output_config.format.json_schema, "output_config.format.schema")
        fields["output_config"] = body.output_config.model_dump(exclude_none=True, by_alias=True)
    forced = body.tool_choice is not None and body.tool_choice.type in ("any", "tool")
    formatted = body.output_config is not None and body.output_config.format is not None
    if (forced or formatted) and fields["chat_template_kwargs"]["enable_thinking"]:
        fields["vllm_xargs"] = fields.get("vllm_xargs", {}) | must_answer(question.variant.spec, body.max_tokens)
    turn = await ask(request, question)
    if body.stream:
        return SseResponse(turn.from_queue(_stream(turn)), turn.headers, turn.close, keep_alive=PING)
    turn.close()
    result = orjson.loads(turn.first.data)
    return json_response(_named(result, turn) | {"stop_sequence": result.get("stop_sequence")}, turn.headers)


async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """Answer `/v1/messages/count_tokens`: what a request would cost before its answer. Raises ServiceError."""
    question = _question(request, body, api="count_tokens")
    turn = await ask(request, question)
    turn.close()
    return Response(turn.first.data, media_type="application/json", headers=turn.headers)


def _question(request: Request, body: CountTokensRequest, api: Any = "messages") -> Question:
    state = request.app.state
    variant = resolve(state.registry, body.model)
    limits.refuse(body.model_extra or {})
    given = [message.model_dump(exclude_none=True) for message in body.messages]
    check_media(given, "messages", variant.spec, state.settings.media_domains)
    fields: dict[str, Any] = {"model": variant.spec.id, "messages": given, **_thinking(body, variant)}
    if body.system is not None:
        fields["system"] = body.system if isinstance(body.system, str) else [b.model_dump() for b in body.system]
    if body.tools:
        fields |= _tools(body)
    elif body.tool_choice is not None and body.tool_choice.type not in ("auto", "none"):
        raise InvalidRequest("tool_choice: there are no tools to choose from.", param="tool_choice")
    return Question(variant, api, fields, text=last_question(given), ignored=ignored_of(body))


def _tools(body: CountTokensRequest) -> dict[str, Any]:
    tools = body.tools or []
    for index, tool in enumerate(tools):
        limits.check_schema(tool.input_schema, f"tools.{index}.input_schema")
    choice = body.tool_choice
    # The engine holds arguments to their schema only for strict tools; a forced call must be right too.
    strict = {"strict": True} if choice is not None and choice.type in ("any", "tool") else {}
    fields: dict[str, Any] = {
        "tools": [tool.model_dump(exclude_none=True, exclude={"type"}) | strict for tool in tools]
    }
    if choice is not None:
        if choice.type == "tool" and choice.name not in [tool.name for tool in tools]:
            raise InvalidRequest(f"tool_choice.name: {choice.name!r} is none of the tools.", param="tool_choice.name")
        fields["tool_choice"] = choice.model_dump(exclude_none=True)
    return fields


def _thinking(body: CountTokensRequest, variant: Variant) -> dict[str, Any]:
    """Whether to think, said to the template, and for how long, said to the engine."""
    given = body.thinking
    thinks = variant.thinking if given is None else given.type != "disabled"
    fields: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": thinks}}
    if given is not None and given.type == "enabled":
        fields["vllm_xargs"] = {"thinking_budget": given.budget_tokens}
    return fields


def _named(message: dict[str, Any], turn: Turn) -> dict[str, Any]:
    """The message with an id of Anthropic's form, and the sources."""
    sources = {"sources": turn.sources} if turn.sources else {}
    return {**message, "id": f"msg_{turn.ticket.request_id}", **sources}


async def _stream(turn: Turn) -> AsyncGenerator[bytes, None]:
    try:
        async for frame in turn.frames():
            name, _, data = frame.data.partition(b"\n")
            if name == b"message_start":
                content = orjson.loads(data)
                content["message"] = _named(content["message"], turn)
                yield event(orjson.dumps(content), name) + PING
            else:
                yield event(data, name)
    except ServiceError as exc:
        yield event(orjson.dumps(error_body(exc, "anthropic", turn.ticket.request_id)), b"error")
