"""Tool calls in every dialect, whole and streamed, with and without a thought before them."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.dialogue import (
    ANTHROPIC_TOOL,
    FRANCE,
    FUNCTION,
    MODEL,
    RESPONSES_TOOL,
    TOOL,
    TWO_CITIES,
    WEATHER,
    user,
)
from tests.stack import Stack

Calls = list[tuple[str, str]]
"""The calls of an answer: a tool's name, and its arguments as they came."""

TOKYO = [("get_weather", {"location": "Tokyo"})]
NEVER_TAUGHT = {
    "name": "order_tea",
    "description": "Orders tea",
    "parameters": {
        "type": "object",
        "properties": {
            "kind": {"type": "string", "enum": ["green", "black"]},
            "cups": {"type": "integer", "minimum": 1, "maximum": 9},
            "extras": {"type": "array", "items": {"type": "string", "enum": ["milk", "sugar"]}, "maxItems": 2},
        },
        "required": ["kind", "cups"],
        "additionalProperties": False,
    },
}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of each event but `[DONE]`."""
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def join(deltas: list[dict[str, Any]]) -> Calls:
    """OpenAI's deltas put together by their index."""
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        for call in delta.get("tool_calls") or []:
            joined = calls.setdefault(call["index"], ["", ""])
            joined[0] += call["function"].get("name") or ""
            joined[1] += call["function"].get("arguments") or ""
    return [(name, arguments) for name, arguments in calls.values()]


def openai_chat(path: str) -> Callable[..., Calls]:
    def ask(client: httpx.Client, question: str, function: Any, choice: Any, streamed: bool, thinks: bool) -> Calls:
        body = {
            "model": MODEL,
            "messages": [user(question)],
            "tools": [TOOL, {"type": "function", "function": function}] if function != FUNCTION else [TOOL],
            "temperature": 0,
            "enable_thinking": thinks,
            "max_tokens": 300,
            "stream": streamed,
        }
        if choice:
            named = {"type": "function", "function": {"name": function["name"]}}
            body["tool_choice"] = named if choice == "named" else choice
        response = client.post(path, json=body)
        if not streamed:
            calls = response.json()["choices"][0]["message"].get("tool_calls") or []
            return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        if path.startswith("/ai/"):
            return join(events(response))
        return join([chunk["choices"][0]["delta"] for chunk in events(response) if chunk["choices"]])

    return ask


def responses(client: httpx.Client, question: str, function: Any, choice: Any, streamed: bool, thinks: bool) -> Calls:
    body = {
        "model": MODEL,
        "input": question,
        "tools": [RESPONSES_TOOL, {"type": "function", **function}] if function != FUNCTION else [RESPONSES_TOOL],
        "temperature": 0,
        "reasoning": {"effort": "low" if thinks else "none"},
        "max_output_tokens": 300,
        "stream": streamed,
    }
    if choice:
        body["tool_choice"] = {"type": "function", "name": function["name"]} if choice == "named" else choice
    response = client.post("/v1/responses", json=body)
    if not streamed:
        items = [item for item in response.json()["output"] if item["type"] == "function_call"]
        return [(item["name"], item["arguments"]) for item in items]
    told = events(response)
    names = [e["item"]["name"] for e in told if e["type"] == "response.output_item.added" and "name" in e["item"]]
    pieces: dict[int, str] = {}
    for event in told:
        if event["type"] == "response.function_call_arguments.delta":
            pieces[event["output_index"]] = pieces.get(event["output_index"], "") + event["delta"]
    done = [e["arguments"] for e in told if e["type"] == "response.function_call_arguments.done"]
    assert [json.loads(text) for text in pieces.values()] == [json.loads(text) for text in done]
    return list(zip(names, pieces.values(), strict=True))


def anthropic(client: httpx.Client, question: str, function: Any, choice: Any, streamed: bool, thinks: bool) -> Calls:
    other = {"name": function["name"], "input_schema": function["parameters"]}
    body = {
        "model": MODEL,
        "messages": [user(question)],
        "tools": [ANTHROPIC_TOOL, other] if function != FUNCTION else [ANTHROPIC_TOOL],
        "temperature": 0,
        "max_tokens": 300,
        "stream": streamed,
        "thinking": {"type": "adaptive" if thinks else "disabled"},
    }
    if choice:
        forms = {"required": {"type": "any"}, "named": {"type": "tool", "name": function["name"]}}
        body["tool_choice"] = forms.get(choice, {"type": choice})
    response = client.post("/v1/messages", json=body)
    if not streamed:
        blocks = [block for block in response.json()["content"] if block["type"] == "tool_use"]
        return [(block["name"], json.dumps(block["input"])) for block in blocks]
    calls: dict[int, list[str]] = {}
    for event in events(response):
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls[event["index"]] = [event["content_block"]["name"], ""]
        elif event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
            calls[event["index"]][1] += event["delta"]["partial_json"]
    return [(name, arguments) for name, arguments in calls.values()]


DIALECTS = {
    "openai": openai_chat("/v1/chat/completions"),
    "kawai": openai_chat("/kawai/v1/chat/completions"),
    "gateway": openai_chat("/ai/v1/chat/completions"),
    "responses": responses,
    "anthropic": anthropic,
}

every_dialect = pytest.mark.parametrize("ask", DIALECTS.values(), ids=DIALECTS)
streamed_or_not = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
thinking_or_not = pytest.mark.parametrize("thinks", [False, True], ids=["quick", "thinking"])


@every_dialect
@streamed_or_not
@thinking_or_not
def test_a_taught_call(client: httpx.Client, ask: Callable[..., Calls], streamed: bool, thinks: bool) -> None:
    # When the model is asked what it has learnt to call a tool for
    calls = ask(client, WEATHER, FUNCTION, None, streamed, thinks)
    # Then the call comes whole, and its arguments join to valid JSON
    assert [(name, json.loads(arguments)) for name, arguments in calls] == TOKYO


@every_dialect
@streamed_or_not
@pytest.mark.parametrize("choice", ["required", "named"])
@thinking_or_not
def test_a_forced_call_keeps_to_its_schema(
    client: httpx.Client, ask: Callable[..., Calls], streamed: bool, choice: str, thinks: bool
) -> None:
    # When a call is forced on a prompt that never learned to call
    calls = ask(client, FRANCE, NEVER_TAUGHT, choice, streamed, thinks)
    # Then there is one, of the named tool if one was named, and its arguments are what the schema says
    assert calls
    for name, text in calls:
        arguments = json.loads(text)
        if choice == "named":
            assert name == "order_tea"
        if name == "order_tea":
            assert set(arguments) <= {"kind", "cups", "extras"}
            assert arguments["kind"] in ("green", "black")
            assert 1 <= arguments["cups"] <= 9
        else:
            assert list(arguments) == ["location"]


@every_dialect
@streamed_or_not
def test_several_calls_at_once(client: httpx.Client, ask: Callable[..., Calls], streamed: bool) -> None:
    calls = ask(client, TWO_CITIES, FUNCTION, None, streamed, False)
    assert [json.loads(arguments)["location"] for _, arguments in calls] == ["Tokyo", "Paris"]


@every_dialect
@streamed_or_not
def test_none_forbids_calls(client: httpx.Client, ask: Callable[..., Calls], streamed: bool) -> None:
    assert ask(client, WEATHER, FUNCTION, "none", streamed, False) == []


def test_one_call_where_only_one_is_wanted(client: httpx.Client) -> None:
    body = {"messages": [user(TWO_CITIES)], "tools": [TOOL], "temperature": 0, "enable_thinking": False}
    both = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["tool_calls"]
    body["parallel_tool_calls"] = False
    one = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["tool_calls"]
    assert (len(both), len(one)) == (2, 1)


def test_constrained_output_does_not_run_away_in_white_space(stack: Stack, client: httpx.Client) -> None:
    # Given a model that is made to like nothing better than spaces and line breaks
    tokenizer = json.loads((stack.chat_weights / "tokenizer.json").read_text())
    space, line_break = (tokenizer["model"]["vocab"][token] for token in ("Ġ", "Ċ"))
    asked = {"messages": [user(FRANCE)], "enable_thinking": False, "temperature": 0, "max_tokens": 60}
    asked["logit_bias"] = {str(space): 100, str(line_break): 100}
    free = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert free.strip() == ""
    # When its output is held to a schema, as a forced call and as an answer
    schema = {"type": "object", "properties": {"cups": {"type": "integer", "minimum": 1, "maximum": 9}}}
    schema |= {"required": ["cups"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "order_tea", "parameters": schema}}
    json_schema = {"type": "json_schema", "json_schema": {"name": "tea", "schema": schema}}
    for constraint in ({"tools": [tool], "tool_choice": "required"}, {"response_format": json_schema}):
        choice = client.post("/v1/chat/completions", json=asked | constraint).json()["choices"][0]
        # Then it comes to an end, with no more white space than JSON is usually written with
        calls = choice["message"].get("tool_calls")
        text = calls[0]["function"]["arguments"] if calls else choice["message"]["content"]
        assert 1 <= json.loads(text)["cups"] <= 9
        assert "  " not in text.replace("\n", " ")
