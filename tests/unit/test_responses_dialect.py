"""OpenAI's responses: what the engine is asked, what is refused, and where the sources are told."""

from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from server.core import metrics
from server.core.errors import ContextExceeded
from server.dialects import responses
from server.dispatch import Call
from server.errors import describe
from server.schemas.responses import ResponsesRequest
from tests.unit.fake_requests import (
    DATA_URI,
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

TOOL = {"type": "function", "name": "get_time", "parameters": {"type": "object"}}
SCHEMA = {"format": {"type": "json_schema", "name": "answer", "schema": {"const": None}}}
IMAGE = {"type": "input_image", "image_url": DATA_URI}


async def asked(**fields: Any) -> Call:
    """The call for a response."""
    dispatcher = FakeDispatcher(frame("result", {"id": "resp_1"}))
    body = ResponsesRequest.model_validate({"input": "Hello!", **fields})
    await responses.respond(request_of(dispatcher), body)
    return dispatcher.calls[0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"instructions": "Be kind.", "max_output_tokens": 5, "temperature": 0, "top_p": 1, "seed": 7},
        {"metadata": {"a": "b"}, "parallel_tool_calls": False, "top_logprobs": 2},
        {"include": ["message.output_text.logprobs"]},
        {"reasoning": {"effort": "none"}, "text": SCHEMA},
        {"tools": [{**TOOL, "strict": True, "description": "x"}], "tool_choice": "required"},
        {"tools": [{**TOOL, "strict": True}], "tool_choice": {"type": "function", "name": "get_time"}},
        {"tools": [{**TOOL, "strict": False}], "tool_choice": "none"},
        {"tools": [{**TOOL, "strict": False}], "tool_choice": "auto"},
    ],
)
async def test_what_the_engine_knows_is_passed_on(fields: dict[str, Any]) -> None:
    call = await asked(**fields)
    assert (call.api, call.recorded) == ("responses", True)
    call.body.pop("vllm_xargs", None)
    assert call.body == {"model": "talker", "input": "Hello!", "stream": False, **fields}


@pytest.mark.parametrize("promise", [{"tools": [TOOL], "tool_choice": "required"}, {"text": SCHEMA}])
async def test_thoughts_leave_room_for_an_answer_that_must_come(promise: dict[str, Any]) -> None:
    body = (await asked(**promise, max_output_tokens=9)).body
    assert body["vllm_xargs"] == {"must_answer": 4}
    assert "vllm_xargs" not in (await asked(**promise, reasoning={"effort": "none"})).body
    assert "vllm_xargs" not in (await asked(tools=[TOOL], tool_choice="auto")).body


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"top_p": 0}, "top_p", 1e-6),
        ({"tools": []}, "tools", None),
        ({"tool_choice": "auto"}, "tool_choice", None),
        # The engine wants every field of a tool
        (
            {"tools": [{"type": "function", "name": "f"}]},
            "tools",
            [{"type": "function", "name": "f", "parameters": None, "strict": False}],
        ),
        # A call that is forced is held to its schema
        ({"tools": [TOOL], "tool_choice": "required"}, "tools", [{**TOOL, "strict": True}]),
        (
            {"tools": [{**TOOL, "strict": False}], "tool_choice": {"type": "function", "name": "get_time"}},
            "tools",
            [{**TOOL, "strict": True}],
        ),
        ({"include": ["reasoning.encrypted_content"]}, "include", None),
        ({"model": "talker-thinking"}, "chat_template_kwargs", {"enable_thinking": True}),
        ({"model": "talker-thinking", "reasoning": {}}, "chat_template_kwargs", {"enable_thinking": True}),
        ({"model": "talker-thinking", "reasoning": {"effort": "none"}}, "chat_template_kwargs", None),
        ({"store": True, "truncation": "auto"}, "store", None),
    ],
)  # fmt: skip
async def test_what_it_knows_otherwise_is_put_so(fields: dict[str, Any], name: str, value: Any) -> None:
    assert (await asked(**fields)).body.get(name) == value


@pytest.mark.parametrize(
    ("item", "engines"),
    [
        ({"role": "user", "content": "x"}, {"role": "user", "content": "x"}),
        ({"type": "message", "role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_text", "text": "y"}]},
            {"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_text", "text": "y"}]},
        ),
        (
            {"role": "user", "content": [IMAGE, {"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": [{**IMAGE, "detail": "auto"}, {"type": "input_text", "text": "No."}]},
        ),
        # An earlier answer as it was given
        (
            {
                "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                "content": [{"type": "output_text", "text": "x", "logprobs": []}, {"type": "refusal", "refusal": "y"}],
            },
            {"role": "assistant", "content": "xy"},
        ),
        (
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": " ", "status": "completed"},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        ),
        (
            {"type": "function_call_output", "call_id": "c1", "output": "12:00", "id": None},
            {"type": "function_call_output", "call_id": "c1", "output": "12:00"},
        ),
        (
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "reasoning", "id": "rs_1", "summary": []},
        ),
        # The engine wants the id that OpenAI leaves out
        (
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        ),
    ],
)  # fmt: skip
async def test_items_as_the_engine_takes_them(item: dict[str, Any], engines: dict[str, Any]) -> None:
    first = {"role": "system", "content": "Be kind."}
    assert (await asked(model="seer", input=[first, item])).body["input"] == [first, engines]


@pytest.mark.parametrize(
    ("fields", "told", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: no response is stored", "previous_response_id"),
        ({"conversation": {"id": "x"}}, "conversation: no conversation is stored", "conversation"),
        ({"background": True}, "background: responses are made while", "background"),
        ({"prompt": {"id": "x"}}, "prompt: no prompts are stored", "prompt"),
        ({"chat_template": "x"}, "chat_template: not accepted", "chat_template"),
        ({"tool_choice": "required"}, "tool_choice: there are no tools", "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice: there are no tools", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name: 'x'", "tool_choice"),
        ({"tools": [TOOL, {**TOOL, "parameters": {"type": 5}}]}, "tools.1.parameters.type", "tools.1.parameters"),
        ({"text": {"format": {**SCHEMA["format"], "schema": {"type": 5}}}}, "text.format.schema", "text.format.schema"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0: talker takes", "input.0.content.0"),
        # Pictures in other messages than the user's have no way to the model
        (
            {"model": "seer", "input": [{"role": "developer", "content": [{"type": "text", "text": "x"}, IMAGE]}]},
            "input.0.content.1: only a message of the user",
            "input.0.content.1",
        ),
    ],
)  # fmt: skip
async def test_what_is_refused_is_named(fields: dict[str, Any], told: str, param: str) -> None:
    with refused(told, param):
        await asked(**fields)


@pytest.mark.parametrize("name", responses.REFUSED)
@pytest.mark.parametrize("nothing", [None, False, ""])
async def test_what_is_refused_may_be_left_empty(name: str, nothing: Any) -> None:
    assert name not in (await asked(**{name: nothing})).body


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"input": 5}, "input: Input should be a string or a list of items (got 5)"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": [{"type": "computer_call"}]}, "input.0: Input should be an object whose type is one of message, "),
        ({"input": [{"content": "x"}]}, "input.0.role: Field required"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0: Input should be"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: Input should be 'function'"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]},
            "input.0.arguments: Input should be a JSON object in a string",
        ),
    ],
)
def test_what_is_malformed_is_named(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as wrong:
        ResponsesRequest.model_validate({"input": "Hello!", **fields})
    assert describe([{**e, "loc": ("body", *e["loc"])} for e in wrong.value.errors()]).startswith(told)


async def test_what_nobody_reads_is_named() -> None:
    dispatcher = FakeDispatcher(frame("result", {"id": "resp_1"}))
    body = ResponsesRequest.model_validate({"input": "Hello!", "store": False, "user": None, "truncation": "auto"})
    response = await responses.respond(request_of(dispatcher), body)
    assert response.headers["x-ignored-fields"] == "store, truncation"
    assert await body_of(response) == b'{"id":"resp_1"}'


def event(name: str, **content: Any) -> Any:
    return frame("chunk", name.encode() + b"\n" + orjson.dumps({"type": name, **content}))


@pytest.mark.parametrize("end", ["response.completed", "response.incomplete"])
@pytest.mark.parametrize("sources", [[], SOURCES])
async def test_sources_stand_in_the_first_and_the_last_event(end: str, sources: list[dict[str, Any]]) -> None:
    # Given the events of a response, in each of which its text may name others
    frames = [
        event("response.created", response={"id": "resp_1"}),
        event("response.output_text.delta", delta="a\nresponse.created"),
        event(end, response={"id": "resp_1"}),
    ]
    told = await collect(responses._stream(turn_of(*frames, frame("done"), sources=sources)))
    # Then those that carry the response have the sources with it, and the rest are the engine's own
    whole = {"id": "resp_1", **({"sources": sources} if sources else {})}
    assert [data_of(each) for each in told] == [
        {"type": "response.created", "response": whole},
        {"type": "response.output_text.delta", "delta": "a\nresponse.created"},
        {"type": end, "response": whole},
    ]
    assert [each.split(b"\n")[0][7:].decode() for each in told] == [data_of(each)["type"] for each in told]


async def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    error = ContextExceeded("Too long.", param="input")
    counted = metrics.errors.labels("ContextExceeded", "400")._value
    before = counted.get()
    *_, last = await collect(responses._stream(turn_of(event("response.created", response={}), error)))
    assert last.startswith(b"event: error\n")
    expected = {"type": "error", "code": "context_length_exceeded", "message": "Too long.", "param": "input"}
    assert data_of(last) == {**expected, "sequence_number": 1}
    assert counted.get() == before + 1
