"""Wire types: what a body means when it says little, and what is refused rather than guessed."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from server.errors import describe
from server.schemas.chat import ChatRequest
from server.schemas.embeddings import MAX_TEXTS, EmbeddingRequest
from server.schemas.history import SimilarRequest

HELLO = {"role": "user", "content": "Hello!"}


def refusal(schema: type[BaseModel], body: Any) -> str:
    """What the caller is told about a body that is refused."""
    with pytest.raises(ValidationError) as refused:
        schema.model_validate(body)
    return describe([{**error, "loc": ("body", *error["loc"])} for error in refused.value.errors()])


def test_a_chat_needs_nothing_but_messages() -> None:
    request = ChatRequest.model_validate({"messages": [HELLO]})
    assert request.max_tokens == 100
    assert request.temperature == 0.7
    assert request.top_p == 0.9
    assert request.stream is False
    assert request.stream_options is None
    assert request.enable_thinking is None
    assert request.model_extra == {}
    assert request.for_engine() == {}
    assert request.model is None
    assert request.session_id is None
    assert [message.model_dump() for message in request.messages] == [HELLO]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", 2**31 - 1),
        ("temperature", 0),
        ("temperature", 2),
        ("top_p", 0),
        ("top_p", 1.0),
        ("stream", True),
        ("enable_thinking", True),
        ("enable_thinking", None),
        ("model", "qwen3-0.6b"),
        ("model", None),
        ("session_id", "session-123"),
        ("session_id", "!" * 128),
        ("session_id", None),
    ],
)
def test_a_chat_takes_what_is_in_bounds(field: str, value: Any) -> None:
    request = ChatRequest.model_validate({"messages": [HELLO], field: value})
    assert getattr(request, field) == value


BAD_CHATS: list[tuple[str, Any, str]] = [
    ("max_tokens", "5", "Input should be a valid integer (got '5')"),
    ("max_tokens", True, "Input should be a valid integer (got True)"),
    ("max_tokens", 5.0, "Input should be a valid integer (got 5.0)"),
    ("max_tokens", None, "Input should be a valid integer (got None)"),
    ("max_tokens", 0, "Input should be greater than or equal to 1 (got 0)"),
    ("max_tokens", 2**31, "Input should be less than or equal to 2147483647 (got 2147483648)"),
    ("temperature", "0.7", "Input should be a valid number (got '0.7')"),
    ("temperature", True, "Input should be a valid number (got True)"),
    ("temperature", -0.1, "Input should be greater than or equal to 0 (got -0.1)"),
    ("temperature", 2.1, "Input should be less than or equal to 2 (got 2.1)"),
    ("temperature", float("nan"), "(got nan)"),
    ("top_p", "1", "Input should be a valid number (got '1')"),
    ("top_p", False, "Input should be a valid number (got False)"),
    ("top_p", -0.1, "Input should be greater than or equal to 0 (got -0.1)"),
    ("top_p", 1.1, "Input should be less than or equal to 1 (got 1.1)"),
    ("stream", "true", "Input should be a valid boolean (got 'true')"),
    ("stream", 1, "Input should be a valid boolean (got 1)"),
    ("stream", None, "Input should be a valid boolean (got None)"),
    ("enable_thinking", 0, "Input should be a valid boolean (got 0)"),
    ("model", 3, "Input should be a valid string (got 3)"),
    ("session_id", "", "String should match pattern"),
    ("session_id", "a b", "String should match pattern"),
    ("session_id", "line\n", "String should match pattern"),
    ("session_id", "ü", "String should match pattern"),
    ("session_id", "x" * 129, "String should match pattern"),
    ("session_id", 5, "Input should be a valid string (got 5)"),
    ("messages", [], "List should have at least 1 item"),
    ("messages", None, "Input should be a valid list (got None)"),
    ("messages", "Hello!", "Input should be a valid list (got 'Hello!')"),
]


@pytest.mark.parametrize(("field", "value", "told"), BAD_CHATS)
def test_a_chat_refuses_what_it_would_have_to_guess(field: str, value: Any, told: str) -> None:
    message = refusal(ChatRequest, {"messages": [HELLO], field: value})
    assert message.startswith(f"{field}: ")
    assert told in message
    assert "; " not in message


@pytest.mark.parametrize(
    ("content", "plain"),
    [
        ("Hello!", "Hello!"),
        ("", ""),
        (
            [{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}],
            [{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}],
        ),
    ],
)
def test_content_is_a_string_or_text_parts(content: Any, plain: Any) -> None:
    request = ChatRequest.model_validate({"messages": [{"role": "system", "content": content}]})
    assert request.messages[0].model_dump() == {"role": "system", "content": plain}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user"}, "messages.0.content: Field required"),
        ({"content": "x"}, "messages.0.role: Field required"),
        ({"role": "king", "content": "x"}, "messages.0.role: Input should be 'system', 'user' or 'assistant'"),
        (
            {"role": "user", "content": 7},
            "messages.0.content: Input should be a string or a list of text parts (got 7)",
        ),
        ({"role": "user", "content": None}, "messages.0.content: Input should be a string or a list of text parts"),
        ({"role": "user", "content": {}}, "messages.0.content: Input should be a string or a list of text parts"),
        ({"role": "user", "content": ["x"]}, "messages.0.content.0: "),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text: Field required"),
        (
            {"role": "user", "content": [{"type": "text", "text": 1}]},
            "messages.0.content.0.text: Input should be a valid",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}, "text": ""}]},
            "messages.0.content.0.type: Input should be 'text' (got 'image_url')",
        ),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(message: Any, told: str) -> None:
    assert refusal(ChatRequest, {"messages": [message]}).startswith(told)


def test_a_wrong_message_among_good_ones_is_found() -> None:
    assert refusal(ChatRequest, {"messages": [HELLO, HELLO, {"role": "user"}]}) == "messages.2.content: Field required"


def test_unknown_fields_are_kept_for_the_note_about_them() -> None:
    request = ChatRequest.model_validate({"messages": [HELLO], "presence_penalty": 1, "user": "ada"})
    assert request.model_extra == {"presence_penalty": 1, "user": "ada"}


def test_stream_options_are_strict_as_well() -> None:
    request = ChatRequest.model_validate({"messages": [HELLO], "stream_options": {"include_usage": True}})
    assert request.stream_options is not None
    assert request.stream_options.include_usage is True
    told = refusal(ChatRequest, {"messages": [HELLO], "stream_options": {"include_usage": 1}})
    assert told == "stream_options.include_usage: Input should be a valid boolean (got 1)"


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        ({"text": "one"}, ["one"]),
        ({"input": "one"}, ["one"]),
        ({"input": ["one", "two"]}, ["one", "two"]),
        ({"text": "one", "input": None}, ["one"]),
        ({"text": None, "input": ["one"]}, ["one"]),
        ({"input": ["x"] * MAX_TEXTS}, ["x"] * MAX_TEXTS),
    ],
)
def test_an_embedding_takes_text_or_input(body: dict[str, Any], texts: list[str]) -> None:
    assert EmbeddingRequest.model_validate(body).texts == texts


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "text: Field required (or OpenAI's name for it, input)"),
        ({"text": None, "input": None}, "text: Field required (or OpenAI's name for it, input)"),
        ({"text": "one", "input": "two"}, "text: give text or input, not both"),
        ({"text": ""}, "text: String should have at least 1 character (got '')"),
        ({"text": ["one"]}, "text: Input should be a valid string (got ['one'])"),
        ({"text": 1}, "text: Input should be a valid string (got 1)"),
        ({"input": ""}, "input: String should have at least 1 character (got '')"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": ["x"] * (MAX_TEXTS + 1)}, "input: List should have at most 256 items after validation, not 257"),
        ({"input": ["one", ""]}, "input.1: String should have at least 1 character (got '')"),
        ({"input": ["one", 2]}, "input.1: Input should be a valid string (got 2)"),
        ({"input": 5}, "input: Input should be a string or a list of strings (got 5)"),
        ({"input": {"text": "x"}}, "input: Input should be a string or a list of strings"),
        ({"text": "one", "model": 5}, "model: Input should be a valid string (got 5)"),
    ],
)
def test_an_embedding_refuses_the_rest(body: dict[str, Any], told: str) -> None:
    assert refusal(EmbeddingRequest, body).startswith(told)


def test_a_search_has_the_documented_defaults() -> None:
    request = SimilarRequest.model_validate({"query": "capitals"})
    assert (request.query, request.limit, request.threshold) == ("capitals", 5, 0.7)


@pytest.mark.parametrize(
    ("field", "value"), [("limit", 1), ("limit", 100), ("threshold", 0), ("threshold", 1), ("threshold", 0.25)]
)
def test_a_search_takes_what_is_in_bounds(field: str, value: Any) -> None:
    assert getattr(SimilarRequest.model_validate({"query": "q", field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("query", ""),
        ("query", None),
        ("query", ["q"]),
        ("limit", 0),
        ("limit", 101),
        ("limit", "5"),
        ("limit", True),
        ("limit", 2.0),
        ("threshold", -0.01),
        ("threshold", 1.01),
        ("threshold", "0.7"),
        ("threshold", True),
    ],
)
def test_a_search_refuses_the_rest(field: str, value: Any) -> None:
    assert refusal(SimilarRequest, {"query": "q", field: value}).startswith(f"{field}: ")
