"""Any JSON value in any field of any chat dialect: a question for the engine, or a refusal that names the field."""

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import Request, Response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from server.core.errors import InvalidRequest
from server.dialects import anthropic, native, openai, responses
from server.limits import REFUSED
from server.schemas.anthropic import CountTokensRequest, MessagesRequest
from server.schemas.chat import ChatRequest
from server.schemas.openai import ChatCompletionsRequest, CompletionsRequest
from server.schemas.responses import ResponsesRequest
from tests.unit.fake_requests import DATA_URI, JSON, FakeDispatcher, frame, refused, request_of

Answer = Callable[[Request, Any], Awaitable[Response]]

HELLO = [{"role": "user", "content": "Hello!"}]
ENDPOINTS: list[tuple[Answer, type[BaseModel], dict[str, Any]]] = [
    (native.chat, ChatRequest, {"messages": HELLO}),
    (openai.chat, ChatCompletionsRequest, {"messages": HELLO}),
    (openai.completions, CompletionsRequest, {"prompt": "Once"}),
    (responses.respond, ResponsesRequest, {"input": HELLO}),
    (anthropic.messages, MessagesRequest, {"messages": HELLO, "max_tokens": 2000}),
    (anthropic.count_tokens, CountTokensRequest, {"messages": HELLO}),
]
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
RESULT = {"id": "x", "object": "x", "created": 1, "model": "talker", "choices": [], "usage": USAGE}

NEVER = set(REFUSED) - {"vllm_xargs", "return_prompt_text"}
"""What the engine is not asked by any of our own names either."""

URL = st.sampled_from([DATA_URI, "https://media.example/x", "https://evil/", "http://[", ""])
FUNCTION = {"name": "f", "arguments": "{}"}
SEEDS = st.sampled_from(
    [
        {"type": "function", "function": {"name": "f", "parameters": {}}},
        {"type": "function", "function": FUNCTION, "id": "c1"},
        {"type": "function_call", "call_id": "c1", **FUNCTION},
        {"type": "function_call_output", "call_id": "c1", "output": "x"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
        {"type": "tool_use", "id": "t", "name": "f", "input": {}},
        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]},
        {"type": "image", "source": {"type": "url", "url": DATA_URI}},
        {"type": "json_schema", "json_schema": {"schema": {}}, "name": "x", "schema": {}},
        {"type": "enabled", "budget_tokens": 1024},
        {"name": "f", "input_schema": {}},
        {"type": "text", "text": "x"},
    ]
)
"""What means something in one of the dialects; beside it, and in its place, anything."""
PARTS = st.builds(lambda kind, url: {"type": kind, kind: {"url": url}}, st.sampled_from(["image_url", "video"]), URL)
NAMES = st.sampled_from(["type", "function", "content", "input", "source", "summary", "arguments", "schema"])
BROKEN = st.builds(lambda seed, more: {**seed, **more}, SEEDS, st.dictionaries(NAMES, JSON, max_size=2))
THINGS = JSON | SEEDS | BROKEN
VALUES = THINGS | st.lists(THINGS, max_size=3)
ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool"]) | JSON
CONTENT = JSON | st.lists(THINGS | PARTS, max_size=3)
MESSAGES = st.lists(
    VALUES | st.fixed_dictionaries({"role": ROLES, "content": CONTENT}, optional={"tool_calls": VALUES, "name": JSON}),
    max_size=3,
)
LIKELY: list[Any] = [None, True, False, 1, 2000, 0.5, "x", "none", "auto", "low", [], ["x"], {}]
"""What is right in many fields, so that something else is wrong, or nothing."""
MODELS = st.sampled_from(["talker", "seer", "seer-thinking", "vectors"])


@pytest.mark.parametrize(("answer", "schema", "least"), ENDPOINTS, ids=lambda value: getattr(value, "__name__", ""))
@given(data=st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
async def test_any_value_is_taken_or_refused(
    answer: Answer, schema: type[BaseModel], least: dict[str, Any], data: st.DataObject
) -> None:
    # Given a body with anything in some of its fields, and messages of any form
    names = st.sampled_from([*schema.model_fields, "x"])
    fields = st.dictionaries(names, st.sampled_from(LIKELY) | VALUES, max_size=3)
    body = {**least, "model": data.draw(MODELS), **data.draw(fields)}
    if "prompt" not in least and data.draw(st.integers(0, 2)) == 0:
        body["input" if "input" in least else "messages"] = data.draw(MESSAGES)
    dispatcher = FakeDispatcher(frame("result", RESULT))
    # When it is read and asked, then nothing but a refusal keeps it from the engine
    with contextlib.suppress(ValidationError, InvalidRequest):
        await answer(request_of(dispatcher), schema.model_validate(body))
        (call,) = dispatcher.calls
        assert not set(call.body) & NEVER


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize(("answer", "schema", "least"), ENDPOINTS[1:], ids=lambda value: getattr(value, "__name__", ""))
@given(value=VALUES)
@settings(deadline=None, max_examples=3)
async def test_what_no_request_may_set_never_reaches_the_engine(
    answer: Answer, schema: type[BaseModel], least: dict[str, Any], name: str, value: Any
) -> None:
    dispatcher = FakeDispatcher(frame("result", RESULT))
    body = schema.model_validate({**least, name: value})
    if value:
        with refused(f"{name}: not accepted here", name):
            await answer(request_of(dispatcher), body)
    else:
        await answer(request_of(dispatcher), body)
        assert name not in dispatcher.calls[0].body
