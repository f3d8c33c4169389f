"""What the service refuses, and how: the documented shape, the field's name, and no harm done."""

import json
from datetime import datetime
from typing import Any

import httpx
import pytest

from tests.stack import Stack, say

HELLO = say("Hello!")

BAD_CHATS: list[tuple[Any, str]] = [
    ({}, "messages: Field required"),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": "hi"}, "messages: Input should be a valid list (got 'hi')"),
    ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role: Input should be 'system', 'user' or"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content: Input should be a string or a list"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type: Input should be 'text' (got 'image_url')",
    ),
    ({**HELLO, "model": "gpt-9"}, "Invalid model specified: 'gpt-9' is not served. Known: qwen3-smoke."),
    ({**HELLO, "model": "qwen3-embedding-0.6b"}, "is for embedding, not for chat"),
    ({**HELLO, "model": 3}, "model: Input should be a valid string (got 3)"),
    ({**HELLO, "max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1 (got 0)"),
    ({**HELLO, "max_tokens": "many"}, "max_tokens: Input should be a valid integer (got 'many')"),
    ({**HELLO, "max_tokens": 5000}, "max_tokens=5000 cannot be greater than max_model_len=2048"),
    ({**HELLO, "max_tokens": 2040}, "max_tokens: 2040 tokens do not fit after a prompt of 16 in a context of 2048."),
    ({**HELLO, "max_tokens": 10**30}, "max_tokens: "),
    ({**HELLO, "temperature": 2.1}, "temperature: Input should be less than or equal to 2 (got 2.1)"),
    ({**HELLO, "temperature": None}, "temperature: Input should be a valid number (got None)"),
    ({**HELLO, "top_p": -0.1}, "top_p: Input should be greater than or equal to 0 (got -0.1)"),
    ({**HELLO, "stream": "yes"}, "stream: Input should be a valid boolean (got 'yes')"),
    ({**HELLO, "session_id": "a b"}, "session_id: String should match pattern"),
    ({**HELLO, "session_id": "x" * 129}, "session_id: String should match pattern"),
    ([HELLO], "valid dictionary"),
    ("hi", "valid dictionary"),
    (None, "The body is missing"),
]


def check_error(response: httpx.Response, status: int, text: str) -> None:
    body = response.json()
    assert set(body) == {"error", "status_code", "timestamp"}
    assert response.status_code == body["status_code"] == status
    assert text in body["error"]
    assert "Traceback" not in body["error"]
    datetime.fromisoformat(body["timestamp"])


@pytest.mark.parametrize(("body", "text"), BAD_CHATS, ids=lambda value: json.dumps(value)[:60])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_bad_chat_names_its_field(client: httpx.Client, body: Any, text: str, streamed: bool) -> None:
    if streamed and isinstance(body, dict) and "stream" not in body:
        body = {**body, "stream": True}
    check_error(client.post("/chat", json=body), 400, text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "text: Field required"),
        ({"text": ""}, "text: String should have at least 1 character"),
        ({"text": ["a"]}, "text: Input should be a valid string (got ['a'])"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": ["a", 3]}, "input.1: Input should be a valid string (got 3)"),
        ({"input": ["a"] * 257}, "input: List should have at most 256 items"),
        ({"text": "a", "input": "b"}, "give text or input, not both"),
        ({"text": "a", "model": "qwen3-0.6b"}, "is for chat, not for embedding"),
        ({"text": "word " * 3000}, "has 3002 tokens; minilm-smoke takes 256"),
    ],
)
def test_a_bad_embedding_names_its_field(client: httpx.Client, body: dict[str, Any], text: str) -> None:
    check_error(client.post("/embeddings", json=body), 400, text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "query: Field required"),
        ({"query": ""}, "query: String should have at least 1 character"),
        ({"query": "a", "limit": 0}, "limit: Input should be greater than or equal to 1"),
        ({"query": "a", "threshold": 1.5}, "threshold: Input should be less than or equal to 1"),
    ],
)
def test_a_bad_search_names_its_field(client: httpx.Client, body: dict[str, Any], text: str) -> None:
    check_error(client.post("/chat/similar", json=body), 400, text)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("limit=0", "limit: Input should be greater than or equal to 1"),
        ("limit=x", "limit: Input should be a valid integer"),
        ("offset=-1", "offset: Input should be greater than or equal to 0"),
        ("offset=99999999999999999999", "offset: Input should be less than or equal to"),
        ("model=%00", "model: String should match pattern"),
        ("session_id=%F0%9F%98%80", "session_id: String should match pattern"),
    ],
)
def test_bad_history_queries_name_the_parameter(client: httpx.Client, query: str, text: str) -> None:
    check_error(client.get(f"/chat/history?{query}"), 400, text)


def test_an_overlong_prompt_is_told_with_both_numbers(client: httpx.Client) -> None:
    for streamed in (False, True):
        response = client.post("/chat", json=say("word " * 3000, stream=streamed))
        check_error(response, 400, "maximum context length is 2048 tokens")
        assert "2049" in response.json()["error"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"messages": [', "not valid JSON"),
        (b"", "The body is missing"),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "not valid UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": NaN}]}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_body_that_is_no_json_is_told_so(client: httpx.Client, content: bytes, text: str) -> None:
    check_error(client.post("/chat", content=content), 400, text)


def test_a_large_body_is_refused_before_it_is_read(client: httpx.Client) -> None:
    # Given the limit of 4 MiB, when a length beyond it is declared, or a stream goes beyond it
    check_error(client.post("/chat", content=b"a" * (4 * 1024 * 1024 + 1)), 413, "larger than 4194304 bytes")
    pieces = (b"a" * 65536 for _ in range(100))
    check_error(client.post("/chat", content=pieces), 413, "larger than 4194304 bytes")


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer"}])
def test_no_key_no_answer(stack: Stack, headers: dict[str, str]) -> None:
    for path in ("/models", "/chat/history", "/usage", "/qwen3/models"):
        check_error(httpx.get(stack.url + path, headers=headers), 401, "No API key")
    # Not even what is wrong with the body
    response = httpx.post(stack.url + "/chat", headers=headers, content=b"{")
    check_error(response, 401, "No API key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_unknown_and_revoked_keys_are_told_apart(stack: Stack) -> None:
    check_error(httpx.get(stack.url + "/models", headers={"Authorization": "Bearer qk-nobody"}), 401, "not known")
    # Given a key that works
    key = stack.new_key("short-lived")
    with stack.client(key) as client:
        assert client.get("/models").status_code == 200
        # When it is revoked
        number = next(line.split()[0] for line in stack.command("keys", "list").splitlines() if "short-lived" in line)
        stack.command("keys", "revoke", number)
        # Then it works no longer
        check_error(client.get("/models"), 401, "revoked")


def test_unknown_paths_and_wrong_methods(client: httpx.Client) -> None:
    check_error(client.get("/nope"), 404, "There is no /nope here")
    check_error(client.get("/chat/nope"), 404, "There is no /chat/nope here")
    response = client.get("/chat")
    check_error(response, 405, "GET is not allowed on /chat")
    assert response.headers["allow"] == "POST"


def test_hostile_texts_come_back_byte_for_byte(client: httpx.Client) -> None:
    # Given text that databases, logs and terminals choke on
    text = "a\u0000b \\u0000 '; DROP TABLE chats; -- 😀 \u202eright to left\u202c \x1b[31m <|im_start|>system\n"
    # When it is said
    response = client.post("/chat", json=say(text, session_id="hostile", max_tokens=1))
    assert response.status_code == 200
    # Then history has it as it was
    from tests.stack import eventually

    (entry,) = eventually(lambda: client.get("/chat/history?session_id=hostile").json())
    assert entry["messages"][0]["content"] == text


def test_the_workers_are_still_there(client: httpx.Client) -> None:
    """After all of the above, in this module's order."""
    health = client.get("/health").json()
    assert health["status"] == "healthy"
    assert client.post("/chat", json=say("Hello!")).json()["choices"][0]["message"]["content"].startswith("Hello!")
