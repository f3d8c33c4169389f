"""Any JSON value in any field of any dialect: an answer, or a refusal in that dialect's shape, and no harm done."""

import copy
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from server.errors import Dialect
from server.limits import REFUSED
from server.schemas.anthropic import CountTokensRequest, MessagesRequest
from server.schemas.chat import ChatRequest, ChatResponse
from server.schemas.dialects import (
    AnthropicError,
    AnthropicMessage,
    ChatCompletion,
    Completion,
    EmbeddingList,
    OpenAIError,
    Response,
    TokenCount,
)
from server.schemas.embeddings import EmbeddingRequest, EmbeddingResponse
from server.schemas.openai import ChatCompletionsRequest, CompletionsRequest, EmbeddingsRequest
from server.schemas.responses import ResponsesRequest
from server.schemas.service import ErrorBody
from tests.dialogue import ANTHROPIC_TOOL, FRANCE, PARIS, QUICK, RESPONSES_TOOL, RESULT, TOOL, user
from tests.stack import Stack

SHAPES: dict[Dialect, type[BaseModel]] = {"native": ErrorBody, "openai": OpenAIError, "anthropic": AnthropicError}


@dataclass(frozen=True)
class Endpoint:
    """`bodies` are right as they stand, and small. `ends` are the last events a stream may have."""

    path: str
    dialect: Dialect
    asked: type[BaseModel]
    answered: type[BaseModel]
    bodies: tuple[dict[str, Any], ...]
    ends: tuple[str, ...] = ("[DONE]",)


HELLO = user("Hello!")
FEW: Any = {"max_tokens": 3, "temperature": 0}
CALL: Any = {"name": "get_weather", "arguments": '{"location": "Tokyo"}'}
SCHEMA: Any = {
    "type": "object",
    "$defs": {"tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}},
    "properties": {
        "name": {"type": ["string", "null"], "minLength": 1, "maxLength": 9},
        "code": {"type": "string", "pattern": "^[a-z]{2}$", "description": "x"},
        "size": {"anyOf": [{"enum": [1, "x", None]}, {"type": "number", "minimum": 0}]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "prefixItems": [{"type": "null"}], "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}
CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [HELLO], **FEW},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "x"}], "name": "ada"},
            {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": CALL}], "reasoning": "y"},
            {"role": "tool", "tool_call_id": "c1", "content": RESULT},
        ],
        "tools": [TOOL, {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "enable_thinking": True,
        "thinking_budget": 1,
        **FEW,
    },
    {
        "messages": [user("x"), {"role": "assistant", "content": "y"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": True},
        "logit_bias": {"5": 1},
        "logprobs": True,
        "top_logprobs": 1,
        "stop": ["x"],
        "seed": 1,
        **FEW,
    },
    {
        "messages": [HELLO],
        "dry_multiplier": 1,
        "xtc_probability": 1,
        "repeat_penalty": 1.2,
        "repeat_last_n": 5,
        "min_tokens": 2,
        "n": 1,
        **FEW,
        "temperature": 1,
    },
)
CLAUDES: tuple[dict[str, Any], ...] = (
    {"messages": [HELLO], "thinking": {"type": "disabled"}, **FEW},
    {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "x", "signature": "y"},
                    {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"location": "Tokyo"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": RESULT}]},
                    {"type": "text", "text": "y"},
                ],
            },
        ],
        "tools": [ANTHROPIC_TOOL, {"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        **FEW,
    },
    {
        "messages": [user("x")],
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"},
        "stop_sequences": ["x"],
        "thinking": {"type": "adaptive"},
        **FEW,
    },
)
EMBEDDED: tuple[dict[str, Any], ...] = ({"input": "x"}, {"input": ["x", "y"]})
ENDPOINTS = (
    Endpoint("/v1/chat/completions", "openai", ChatCompletionsRequest, ChatCompletion, CHATS),
    Endpoint("/ai/v1/chat/completions", "openai", ChatCompletionsRequest, ChatCompletion, CHATS),
    Endpoint("/kawai/v1/chat/completions", "openai", ChatCompletionsRequest, ChatCompletion, CHATS),
    Endpoint(
        "/v1/completions",
        "openai",
        CompletionsRequest,
        Completion,
        (
            {"prompt": "x", **FEW},
            {"prompt": [[5, 6], [7]], "logit_bias": {"5": 1}, "logprobs": 1, "stop_token_ids": [5], "stop": "x", **FEW},
            {"prompt": ["x", "y"], "response_format": CHATS[2]["response_format"], "echo": True, **FEW},
        ),
    ),
    Endpoint(
        "/v1/responses",
        "openai",
        ResponsesRequest,
        Response,
        (
            {"input": "Hello!", "max_output_tokens": 3, "temperature": 0, "reasoning": {"effort": "none"}},
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "y"}]},
                    {"type": "function_call", "call_id": "c1", **CALL},
                    {"type": "function_call_output", "call_id": "c1", "output": RESULT},
                ],
                "instructions": "Be brief.",
                "tools": [RESPONSES_TOOL, {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
                "tool_choice": {"type": "function", "name": "f"},
                "max_output_tokens": 3,
            },
            {
                "input": "x",
                "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
                "include": ["message.output_text.logprobs"],
                "top_logprobs": 1,
                "metadata": {"x": "y"},
                "max_output_tokens": 3,
            },
        ),
        ("response.completed", "response.incomplete"),
    ),
    Endpoint("/v1/messages", "anthropic", MessagesRequest, AnthropicMessage, CLAUDES, ("message_stop",)),
    Endpoint("/v1/messages/count_tokens", "anthropic", CountTokensRequest, TokenCount, CLAUDES),
    Endpoint("/chat", "native", ChatRequest, ChatResponse, ({"messages": [HELLO], **FEW}, {**CHATS[3], **CHATS[0]})),
    Endpoint("/v1/embeddings", "openai", EmbeddingsRequest, EmbeddingList, (*EMBEDDED, {"input": [[5, 6], [7]]})),
    Endpoint("/embeddings", "native", EmbeddingRequest, EmbeddingResponse, (*EMBEDDED, {"text": "x"})),
)

ODD_TEXTS = (
    "", " ", "\x00", "\n", "\u2028", "\ufeff", "\ufffe\uffff", "e\u0301" * 9, "\u202eab\u202c", "👩‍👩‍👧", "\U0010ffff",
    "x" * 3000, "👩" * 999, "{", "{}", "[]", "null", "5", "-1", "1" * 5000, "<|im_end|>", "<|endoftext|>", "<think>",
    "</think>", "<tool_call>", "</tool_call>", '<tool_call>\n{"name": 5}', "{{ 1 / 0 }}", "{% raw", "%s%n", "../..",
    "#/$defs/tree", "#", "(", "(?=x)", "[^", "\\ud800", "\\u0000", "data:,", "http://[", "file:///etc/passwd",
    "auto", "none", "required", "any", "tool", "user", "assistant", "system", "developer", "text", "object", "string",
    "json_object", "json_schema", "enabled", "disabled", "adaptive", "low", "integer", "array", "null", "base64",
    "float", "query", "qwen3-0.6b-thinking-search", "qwen3-embedding-0.6b", "true", "date-time", "uuid",
)  # fmt: skip
ODD_NUMBERS: tuple[float, ...] = (
    0, 1, -1, 2, 5, 7.5, -0.0, 0.5, 1e-300, 1e308, -1e308, 100, 128, 2047, 2048, 151_643, 151_936, 2**31 - 1, 2**31,
    2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, -(10**30),
)  # fmt: skip
KEYS = (
    "type", "content", "text", "name", "input", "url", "source", "schema", "function", "arguments", "parameters",
    "properties", "items", "required", "anyOf", "allOf", "not", "enum", "const", "$ref", "$defs", "pattern", "format",
    "minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum", "multipleOf", "uniqueItems", "if", "then",
    "patternProperties", "propertyNames", "additionalProperties", "minProperties", "dependentRequired", "5", "é", "",
)  # fmt: skip
FORMS: tuple[Any, ...] = (
    *(body[name] for body in (*CHATS, *CLAUDES) for name in ("messages", "tools", "tool_choice") if name in body),
    *CHATS[1]["messages"], *CHATS[1]["tools"], *CLAUDES[1]["messages"][1]["content"], SCHEMA, CALL,
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "image", "source": {"type": "url", "url": "http://localhost/x"}}, {"type": "json_object"},
    {"type": "object", "additionalProperties": {"type": "string", "format": "date-time"}}, {"enum": ["é", 1e308, {}]},
    {"type": "enabled", "budget_tokens": 1024}, [[]], {"not": {}}, {"oneOf": [True, False]},
)  # fmt: skip
LARGE: tuple[Any, ...] = (
    json.loads("[" * 90 + "]" * 90), [0] * 5000, ["x"] * 300, dict.fromkeys(map(str, range(2000)), 0), "x" * 200_000,
)  # fmt: skip

TEXTS = st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.sampled_from([None, True, False]) | NUMBERS | TEXTS | st.sampled_from(FORMS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | TEXTS, inner, max_size=4),
    max_leaves=8,
)


def like(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, which more often mean something."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return NUMBERS | st.integers(0, 20) | st.floats(0, 1)
    if isinstance(value, str):
        return TEXTS
    if isinstance(value, list):
        return st.lists(st.sampled_from(value) | VALUES if value else VALUES, max_size=4)
    if isinstance(value, dict):
        more = st.dictionaries(st.sampled_from([*value, *KEYS]), VALUES, max_size=2)
        return st.tuples(st.sampled_from([value, {}]), more).map(lambda parts: {**parts[0], **parts[1]})
    return VALUES


def fitting(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a field's own JSON Schema allows, its bounds first of all; anything where it says too little."""
    if "anyOf" in schema:
        return st.one_of(*map(fitting, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low, high = (schema.get("minimum"), schema.get("maximum"))
    ends = st.sampled_from([end for end in (low, high) if end is not None] or [0])
    if schema.get("type") == "integer":
        return ends | st.integers(low, high)
    if schema.get("type") == "number":
        return ends | st.floats(low, high, allow_nan=False, allow_infinity=False)
    if schema.get("type") == "array":
        return st.lists(fitting(schema["items"]), max_size=4)
    return {"boolean": st.booleans(), "string": TEXTS, "null": st.none()}.get(schema.get("type", ""), VALUES)


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path of each value within, but of the whole."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (key,)
        yield from ((key, *path) for path in places(child))


@st.composite
def bodies(draw: st.DrawFn, endpoint: Endpoint) -> dict[str, Any]:
    """A body that is right, but for one place or a few with something else in it."""
    body = copy.deepcopy(draw(st.sampled_from(endpoint.bodies)))
    fields = endpoint.asked.model_json_schema()["properties"]
    names = [*fields, "x", draw(st.sampled_from(sorted(REFUSED)))]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        within = st.sampled_from([*places(body)])
        *way, last = draw(within | st.sampled_from([(name,) for name in names]))
        found: Any = body
        for step in way:
            found = found[step]
        old = found.get(last) if isinstance(found, dict) else found[last]
        right = like(old) if way or last not in fields else fitting(fields[last])
        kinds = [right] * 6 + [like(old), like(old), VALUES, VALUES, NUMBERS, st.sampled_from(LARGE)]
        found[last] = copy.deepcopy(draw(kinds[draw(st.sampled_from(range(len(kinds))))]))
    if "stream" in endpoint.asked.model_fields and draw(st.integers(0, 9)):
        body["stream"] = draw(st.booleans())
    return body


def check(endpoint: Endpoint, response: httpx.Response, *statuses: int) -> None:
    """An answer that is whole, or a refusal in shape."""
    assert response.status_code in (statuses or (200, 400, 404)), response.text
    shape = SHAPES[endpoint.dialect]
    if response.status_code != 200:
        assert response.headers["content-type"] == "application/json"
        shape.model_validate(response.json(), extra="forbid")
    elif response.headers["content-type"] == "application/json":
        endpoint.answered.model_validate(response.json())
    else:
        assert response.headers["content-type"].startswith("text/event-stream")
        *_, last, nothing = response.text.split("\n\n")
        assert nothing == ""
        data = last.split("data: ", 1)[1]
        told = data if data == "[DONE]" else json.loads(data)
        assert (told if isinstance(told, str) else told["type"]) in endpoint.ends, response.text[-500:]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
@given(data=st.data())
@settings(
    derandomize=True,
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
def test_any_json_is_answered_or_refused_in_shape(
    client: httpx.Client, endpoint: Endpoint, data: st.DataObject
) -> None:
    # Given a body with any JSON somewhere in it
    body = data.draw(bodies(endpoint), label="body")
    # When it is sent
    response = client.post(endpoint.path, content=json.dumps(body, ensure_ascii=False).encode())
    # Then there is an answer, whole to its last event, or a refusal as the dialect has it
    check(endpoint, response)


BY_PATH = {endpoint.path: endpoint for endpoint in ENDPOINTS}
UNSUPPORTED = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
FORCED = {"tools": [TOOL], "tool_choice": "required"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        # A schema that the compiler declines, where the engine looks at it after the stream began
        (
            "/v1/responses",
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": UNSUPPORTED}}},
        ),
        # Ids that the model has room for and the tokenizer no token
        ("/v1/completions", {"prompt": [[5], [639]], "echo": True, "max_tokens": 2}),
        # A hidden thought before an answer that must come
        ("/v1/chat/completions", {"messages": [user(FRANCE)], "include_reasoning": False, "max_tokens": 60, **FORCED}),
        (
            "/v1/chat/completions",
            {"messages": [user(FRANCE)], "include_reasoning": False, "max_tokens": 90, "response_format": FORMAT},
        ),
    ],
)
def test_what_broke_once(client: httpx.Client, path: str, body: dict[str, Any], stream: bool) -> None:
    response = client.post(path, json={**body, "stream": stream})
    check(BY_PATH[path], response)
    assert response.headers["content-type"] == "application/json" or "[DONE]" in response.text


@pytest.mark.parametrize("promise", [FORCED, {"response_format": FORMAT}], ids=["call", "format"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_begun_in_a_thought_leaves_the_answer_its_form(
    stack: Stack, client: httpx.Client, promise: dict[str, Any], stream: bool
) -> None:
    # Given a model that is made to begin a tool call at once, which ends its thought
    tokenizer = json.loads(next(stack.folder.glob("smoke/*/tokenizer.json")).read_text())
    (begin,) = [token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<tool_call>"]
    body = {"messages": [user(FRANCE)], "logit_bias": {str(begin): 100}, "temperature": 0, "max_tokens": 60, **promise}
    # When a call, or an answer of some form, is promised
    body |= {"enable_thinking": True, "stream": stream, "parallel_tool_calls": False}
    # Then the grammar and the bounds on thoughts agree about where the thought ended
    check(BY_PATH["/v1/chat/completions"], client.post("/v1/chat/completions", json=body))


BROKEN: list[tuple[bytes, str]] = [
    (b"", "missing"),
    (b"null", "missing"),
    (b"[]", ""),
    (b'"x"', ""),
    (b"5", ""),
    (b"{", "not valid JSON"),
    (b'{"x": 1e999}', ""),
    (b'{"x": NaN}', "not valid JSON"),
    (b'{"x": "\\ud800"}', "not valid JSON"),
    (b"\xff\xfe{\x00}\x00", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_a_body_that_is_no_object_is_refused_in_shape(client: httpx.Client, endpoint: Endpoint) -> None:
    for content, told in BROKEN:
        for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data; boundary=x"}):
            response = client.post(endpoint.path, content=content, headers=headers)
            check(endpoint, response)
            assert response.status_code == 400
            assert told in response.text


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_of_two_values_the_last_counts(client: httpx.Client, endpoint: Endpoint) -> None:
    content = json.dumps(endpoint.bodies[0]).encode()
    first = b'{"model": 5, "temperature": [], ' + content[1:-1] + b', "model": null}'
    if "temperature" in endpoint.bodies[0] or "temperature" not in endpoint.asked.model_fields:
        response = client.post(endpoint.path, content=first)
        check(endpoint, response)
        assert response.status_code == 200


ODD_HEADERS: list[tuple[Any, tuple[int, ...]]] = [
    ({"x-api-key": "qk-nobody"}, (200,)),  # the Bearer token comes first
    ({"anthropic-version": "1999-01-01", "anthropic-beta": "x", "OpenAI-Beta": "y"}, (200,)),
    ({"Accept": "image/png", "Accept-Encoding": "br;q=0.5, x", "Content-Type": ""}, (200,)),
    ({"X-Session-Id": "s-1", "traceparent": "nonsense", "X-Request-Id": "é".encode()}, (200,)),
    # Routes that have no sessions do not read it
    ({"X-Session-Id": "a b"}, (200, 400)),
    ({"X-Session-Id": ""}, (200, 400)),
    ({"X-Session-Id": "é".encode()}, (200, 400)),
    ({"Authorization": "Bearer qk-nobody"}, (401,)),
    ({"Authorization": "Bearer"}, (401,)),
    ({"Authorization": "é".encode()}, (401,)),
    ({"X-Large": "x" * 20_480}, (431,)),
]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_odd_headers_are_read_or_refused_in_shape(client: httpx.Client, endpoint: Endpoint) -> None:
    for headers, statuses in ODD_HEADERS:
        check(endpoint, client.post(endpoint.path, json=endpoint.bodies[0], headers=headers), *statuses)


@pytest.mark.parametrize("line", [b"a" * 4096, b"X-More: y\r\n" * 400], ids=["one line", "many lines"])
def test_headers_without_an_end_are_cut_off(stack: Stack, line: bytes) -> None:
    # Given a client that nobody has let in, whose headers never end
    def send_on() -> None:
        for _ in range(16 * 1024):
            connection.sendall(line)

    with socket.create_connection(("127.0.0.1", stack.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-Endless: ")
        # When more of them come than anybody reads, then the server hangs up
        with pytest.raises(ConnectionError):
            send_on()


def test_the_service_is_as_well_as_before(client: httpx.Client) -> None:
    """After all of the above, in this module's order."""
    assert client.get("/health").json()["status"] == "healthy"
    body = {"messages": [user(FRANCE)], "temperature": 0, **QUICK}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == PARIS
