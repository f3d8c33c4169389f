"""Anthropic's dialect: what the engine is asked, what is refused, and the events of a stream."""

from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from server.core.errors import AnswerLost, EngineFailed, ServiceError
from server.dialects import anthropic
from server.dispatch import Call
from server.errors import describe
from server.schemas.anthropic import CountTokensRequest, MessagesRequest
from server.schemas.messages import MAX_DEPTH
from tests.unit.fake_requests import (
    SOURCES,
    FakeDispatcher,
    body_of,
    collect,
    data_of,
    frame,
    refused,
    request_of,
    turn_of,
)

HELLO = {"role": "user", "content": "Hello!"}
TOOL = {"name": "get_time", "input_schema": {"type": "object"}}
STRICT = {**TOOL, "strict": True}
SCHEMA = {"type": "json_schema", "schema": {"const": None}}
BASE64 = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


def use(given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": "t", "name": "f", "input": given}


OFF = {"enable_thinking": False}
ON = {"enable_thinking": True}


async def asked(**fields: Any) -> Call:
    """The call for a message."""
    dispatcher = FakeDispatcher(frame("result", {"id": "x"}))
    body = MessagesRequest.model_validate({"max_tokens": 2000, "messages": [HELLO], **fields})
    await anthropic.messages(request_of(dispatcher), body)
    return dispatcher.calls[0]


async def test_a_message_thinks_only_if_it_is_told_to() -> None:
    call = await asked()
    assert (call.api, call.recorded) == ("messages", True)
    assert call.body == {
        "model": "talker",
        "messages": [HELLO],
        "max_tokens": 2000,
        "stream": False,
        "chat_template_kwargs": OFF,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 0.5, "top_k": 1, "stop_sequences": ["a", "b", "c", "d"]},
        {"system": "Be kind."},
        {"system": [{"type": "text", "text": "Be kind."}]},
        {"tools": [TOOL, {**TOOL, "name": "x", "description": "y", "strict": False}], "tool_choice": {"type": "auto"}},
        {"tools": [STRICT], "tool_choice": {"type": "tool", "name": "get_time", "disable_parallel_tool_use": True}},
        {"tools": [{"name": "f", "input_schema": {"default": None}}], "tool_choice": {"type": "none"}},
        {"output_config": {"format": SCHEMA, "effort": "low"}},
        {"messages": [{"role": "assistant", "content": [use({"a": None})]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "12:00"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]}]},
        {"model": "seer", "messages": [{"role": "user", "content": [BASE64, {"type": "text", "text": "What?"}]}]},
    ],
)  # fmt: skip
async def test_what_the_engine_knows_is_passed_on(fields: dict[str, Any]) -> None:
    expected = {
        "model": "talker",
        "messages": [HELLO],
        "max_tokens": 2000,
        "stream": False,
        "chat_template_kwargs": OFF,
    }
    body = (await asked(**fields)).body
    body.pop("thinking_token_budget", None)
    assert body == {**expected, **fields}


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"top_p": 0}, "top_p", 1e-6),
        ({"tools": []}, "tools", None),
        ({"tools": [{**TOOL, "type": "custom", "cache_control": {}}]}, "tools", [TOOL]),
        # A call that is forced is held to its schema
        ({"tools": [TOOL, {**TOOL, "strict": False}], "tool_choice": {"type": "any"}}, "tools", [STRICT, STRICT]),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "get_time"}}, "tools", [STRICT]),
        ({"tool_choice": {"type": "auto"}}, "tool_choice", None),
        ({"tool_choice": {"type": "none"}}, "tool_choice", None),
        ({"system": ""}, "system", ""),
        ({"metadata": {"user_id": "ada"}}, "metadata", None),
    ],
)
async def test_what_it_knows_otherwise_is_put_so(fields: dict[str, Any], name: str, value: Any) -> None:
    assert (await asked(**fields)).body.get(name) == value


@pytest.mark.parametrize(
    ("fields", "switch", "thinking"),
    [
        ({"model": "talker-thinking"}, ON, None),
        ({"thinking": {"type": "adaptive"}}, ON, None),
        ({"thinking": {"type": "disabled"}}, OFF, None),
        ({"model": "talker-thinking", "thinking": {"type": "disabled"}}, OFF, None),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1999}},
            ON,
            {"thinking_budget": 1999},
        ),
        # A budget for nothing is no matter
        ({"thinking": {"type": "disabled", "budget_tokens": 5000}}, OFF, None),
        ({"output_config": {"effort": "high"}}, OFF, None),
    ],
)
async def test_thinking(fields: dict[str, Any], switch: dict[str, bool], thinking: Any) -> None:
    body = (await asked(**fields)).body
    assert (body["chat_template_kwargs"], body.get("vllm_xargs")) == (switch, thinking)


@pytest.mark.parametrize(
    "promise",
    [
        {"tools": [TOOL], "tool_choice": {"type": "any"}},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "get_time"}},
        {"output_config": {"format": SCHEMA}},
    ],
)
async def test_thoughts_leave_room_for_an_answer_that_must_come(promise: dict[str, Any]) -> None:
    body = (await asked(model="talker-thinking", **promise)).body
    assert body["vllm_xargs"] == {"must_answer": 1000}
    # And where nothing is promised, or nothing thought, they may take all of it
    assert "vllm_xargs" not in (await asked(**promise)).body
    assert "vllm_xargs" not in (await asked(model="talker-thinking")).body
    # And who says how long has the nearer bound
    body = (await asked(thinking={"type": "enabled", "budget_tokens": 1024}, **promise)).body
    assert body["vllm_xargs"] == {"thinking_budget": 1024, "must_answer": 1000}


@pytest.mark.parametrize("budget", [2000, 2001, 2**31 - 1])
async def test_thoughts_leave_room_for_an_answer(budget: int) -> None:
    told = f"thinking.budget_tokens: {budget} must be less than max_tokens, which is 2000."
    with refused(told, "thinking.budget_tokens"):
        await asked(thinking={"type": "enabled", "budget_tokens": budget})


@pytest.mark.parametrize(
    ("fields", "told", "param"),
    [
        ({"chat_template": "x"}, "chat_template: not accepted", "chat_template"),
        ({"vllm_xargs": {"xtc_probability": 1}}, "vllm_xargs: not accepted", "vllm_xargs"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools", "tool_choice"),
        ({"tools": [], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice: there are no", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name: 'x'", "tool_choice.name"),
        ({"tools": [TOOL, {"name": "f", "input_schema": {"type": 5}}]}, "tools.1.input_schema", "tools.1.input_schema"),
        ({"output_config": {"format": {**SCHEMA, "schema": {"type": 5}}}}, "output_", "output_config.format.schema"),
        ({"messages": [{"role": "user", "content": [BASE64]}]}, "messages.0.content.0: talker", "messages.0.content.0"),
    ],
)  # fmt: skip
async def test_what_is_refused_is_named(fields: dict[str, Any], told: str, param: str) -> None:
    with refused(told, param):
        await asked(**fields)


def deep(levels: int) -> dict[str, Any]:
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": None}, "max_tokens: Input should be a valid integer"),
        ({"thinking": {"type": "enabled"}}, "thinking: budget_tokens: Field required"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}}, "thinking.budget_tokens: Input should be greater"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice: name: Field required"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: Input should be 'custom'"),
        ({"stop_sequences": ["x"] * 5}, "stop_sequences: List should have at most 4"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content.0: Input should be"),
        ({"system": [BASE64]}, "system.0.type: Input should be 'text'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
            "messages.0.content.0.source: Input should be an object whose type is one of base64, url",
        ),
        (
            {"messages": [{"role": "assistant", "content": [use(deep(100))]}]},
            f"messages.0.content.0.input: Objects and arrays may nest {MAX_DEPTH} deep, not more",
        ),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as wrong:
        MessagesRequest.model_validate({"max_tokens": 2000, "messages": [HELLO], **fields})
    assert describe([{**e, "loc": ("body", *e["loc"])} for e in wrong.value.errors()]).startswith(told)


async def test_counting_asks_for_no_answer_and_leaves_no_history() -> None:
    dispatcher = FakeDispatcher(frame("result", {"input_tokens": 5}))
    body = CountTokensRequest.model_validate({"messages": [HELLO], "system": "Be kind.", "max_tokens": 5})
    response = await anthropic.count_tokens(request_of(dispatcher), body)
    (call,) = dispatcher.calls
    assert (call.api, call.recorded) == ("count_tokens", False)
    fields = {"model": "talker", "messages": [HELLO], "system": "Be kind.", "chat_template_kwargs": OFF}
    assert call.body == fields
    assert await body_of(response) == b'{"input_tokens":5}'
    assert response.headers["x-ignored-fields"] == "max_tokens"


async def test_a_whole_message_has_an_id_of_anthropics_form() -> None:
    dispatcher = FakeDispatcher(frame("result", {"id": "chatcmpl-1", "content": [], "stop_reason": "end_turn"}))
    body = MessagesRequest.model_validate({"max_tokens": 5, "messages": [HELLO]})
    response = await anthropic.messages(request_of(dispatcher, {"X-Session-Id": "mine"}), body)
    answer = orjson.loads(await body_of(response))
    assert answer == {"id": "msg_r1", "content": [], "stop_reason": "end_turn", "stop_sequence": None}
    assert response.headers["x-session-id"] == "mine"
    assert [ticket.closed for ticket in dispatcher.tickets] == [True]


START = frame("chunk", b'message_start\n{"type":"message_start","message":{"id":"x","content":[]}}')
STOP = frame("chunk", b'message_stop\n{"type":"message_stop"}')


@pytest.mark.parametrize("sources", [[], SOURCES])
async def test_a_stream_starts_with_its_message_and_a_ping(sources: list[dict[str, Any]]) -> None:
    delta = frame("chunk", 'content_block_delta\n{"text":"a\\nb ü"}'.encode())
    first, *rest = await collect(anthropic._stream(turn_of(START, delta, STOP, frame("done"), sources=sources)))
    # Then the message has its id, and what was shown of past chats
    start, ping, end = first.split(b"\n\n")
    assert start.startswith(b"event: message_start\ndata: ")
    message = {"id": "msg_r1", "content": [], **({"sources": sources} if sources else {})}
    assert data_of(start) == {"type": "message_start", "message": message}
    assert (ping, end) == (b'event: ping\ndata: {"type": "ping"}', b"")
    # And the other events are the engine's, byte for byte
    assert rest == [
        'event: content_block_delta\ndata: {"text":"a\\nb ü"}\n\n'.encode(),
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ]


@pytest.mark.parametrize(
    ("error", "kind"), [(AnswerLost("Lost."), "overloaded_error"), (EngineFailed("Broke."), "api_error")]
)
async def test_a_stream_that_breaks_ends_with_an_error_event(error: ServiceError, kind: str) -> None:
    *_, last = await collect(anthropic._stream(turn_of(START, error)))
    assert last.startswith(b"event: error\ndata: ")
    told = {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": "r1"}
    assert data_of(last) == told
