"""OpenAI's `/v1/responses`. The worker's engine speaks it by itself; what is done here is bounds and sources.

Nothing is kept to go on from: `previous_response_id` and `background` are refused, `store` is ignored.
"""

from collections.abc import AsyncGenerator
from typing import Any

import orjson
from fastapi import Request, Response

from server import limits
from server.core.conversation import last_question
from server.core.errors import InvalidRequest, ServiceError
from server.dialects.relay import Question, Turn, ask, ignored_of, json_response, must_answer
from server.errors import count_error
from server.media import check_media
from server.schemas.responses import FunctionCall, InputMessage, ReasoningItem, ResponsesRequest
from server.sse import SseResponse, event
from server.variants import Variant, resolve

REFUSED = {
    "previous_response_id": "no response is stored here; send the whole conversation in input",
    "conversation": "no conversation is stored here; send all of it in input",
    "background": "responses are made while the client waits; leave it out and stream",
    "prompt": "no prompts are stored here; send instructions and input",
}


async def respond(request: Request, body: ResponsesRequest) -> Response:
    """Answer `/v1/responses`. Raises ServiceError; once a stream has begun, errors are events in it."""
    state = request.app.state
    variant = resolve(state.registry, body.model)
    ignored = _check(body)
    fields = _engine_body(body, variant)
    given = fields["input"]
    if isinstance(given, list):
        check_media(given, "input", variant.spec, state.settings.media_domains)
    text = given if isinstance(given, str) else last_question(given)
    turn = await ask(request, Question(variant, "responses", fields, text=text, ignored=ignored))
    if body.stream:
        return SseResponse(turn.from_queue(_stream(turn)), turn.headers, turn.close)
    turn.close()
    result = orjson.loads(turn.first.data)
    return json_response(result | ({"sources": turn.sources} if turn.sources else {}), turn.headers)


def _check(body: ResponsesRequest) -> tuple[str, ...]:
    """The names of ignored fields. Raises InvalidRequest for what is refused."""
    extra = body.model_extra or {}
    for name, why in REFUSED.items():
        if extra.get(name):
            raise InvalidRequest(f"{name}: {why}.", param=name)
    limits.refuse(extra)
    for index, tool in enumerate(body.tools or []):
        if tool.parameters is not None:
            limits.check_schema(tool.parameters, f"tools.{index}.parameters")
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        raise InvalidRequest("tool_choice: there are no tools to choose from.", param="tool_choice")
    if not isinstance(body.tool_choice, str | None):
        chosen = body.tool_choice.name
        if chosen not in [tool.name for tool in body.tools or []]:
            raise InvalidRequest(f"tool_choice.name: {chosen!r} is none of the tools.", param="tool_choice")
    if body.text and body.text.format and body.text.format.type == "json_schema":
        limits.check_schema(body.text.format.json_schema, "text.format.schema")
    return ignored_of(body)


def _engine_body(body: ResponsesRequest, variant: Variant) -> dict[str, Any]:
    names = {
        "instructions", "max_output_tokens", "temperature", "top_p", "parallel_tool_calls", "top_logprobs",
        "metadata", "seed", "reasoning", "text",
    }  # fmt: skip
    fields = body.model_dump(include=names, exclude_none=True, by_alias=True)
    fields |= {"model": variant.spec.id, "stream": bool(body.stream), "input": _input(body)}
    if fields.get("top_p") == 0:
        fields["top_p"] = 1e-6
    if body.tools:
        fields["tools"] = [{"parameters": None, "strict": False, **t.model_dump(exclude_none=True)} for t in body.tools]
        if body.tool_choice not in (None, "none", "auto"):
            # The engine holds arguments to their schema only for strict tools; a forced call must be right too.
            fields["tools"] = [tool | {"strict": True} for tool in fields["tools"]]
        if body.tool_choice is not None:
            choice = body.tool_choice
            fields["tool_choice"] = choice if isinstance(choice, str) else choice.model_dump()
    if "message.output_text.logprobs" in (body.include or []):
        fields["include"] = ["message.output_text.logprobs"]
    effort = body.reasoning.effort if body.reasoning else None
    if variant.thinking and effort is None:
        fields["chat_template_kwargs"] = {"enable_thinking": True}
    formatted = body.text is not None and body.text.format is not None and body.text.format.type != "text"
    if effort != "none" and (formatted or body.tool_choice not in (None, "none", "auto")):
        fields["vllm_xargs"] = must_answer(variant.spec, body.max_output_tokens)
    return fields


def _input(body: ResponsesRequest) -> Any:
    """The conversation in the shapes the engine takes; it wants an id where OpenAI leaves one out."""
    if isinstance(body.input, str):
        return body.input
    items = []
    for index, item in enumerate(body.input):
        if isinstance(item, InputMessage):
            items.append(_message(item, f"input.{index}.content"))
        elif isinstance(item, FunctionCall):
            items.append(item.model_dump(exclude_none=True) | {"arguments": item.arguments.strip() or "{}"})
        elif isinstance(item, ReasoningItem):
            items.append({**item.model_dump(exclude_none=True), "id": item.id or f"rs_{index}"})
        else:
            items.append(item.model_dump(exclude_none=True) | {"output": item.text})
    return items


def _message(item: InputMessage, where: str) -> dict[str, Any]:
    role = "system" if item.role == "developer" else item.role
    if isinstance(item.content, str):
        return {"role": role, "content": item.content}
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(item.content):
        if part.type == "input_image":
            if role != "user":
                at = f"{where}.{index}"
                raise InvalidRequest(f"{at}: only a message of the user may hold an {part.type}.", param=at)
            parts.append(part.model_dump())
        else:
            parts.append({"type": "input_text", "text": part.refusal if part.type == "refusal" else part.text})
    return {"role": role, "content": parts if role == "user" else "".join(part["text"] for part in parts)}


async def _stream(turn: Turn) -> AsyncGenerator[bytes, None]:
    count = 0
    try:
        async for frame in turn.frames():
            name, _, data = frame.data.partition(b"\n")
            if turn.sources and name in (b"response.created", b"response.completed", b"response.incomplete"):
                content = orjson.loads(data)
                content["response"]["sources"] = turn.sources
                data = orjson.dumps(content)
            count += 1
            yield event(data, name)
    except ServiceError as exc:
        count_error(exc)
        told = {"type": "error", "code": exc.code or None, "message": exc.message, "param": exc.param}
        yield event(orjson.dumps(told | {"sequence_number": count}), b"error")
