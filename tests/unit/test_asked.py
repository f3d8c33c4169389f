"""What was asked, as history keeps it, and past chats put before it: in the shape of each API."""

import copy
from typing import Any

import pytest

from server.core.conversation import last_question
from server.core.messages import Api
from workers.transcript import asked, put_before_question

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
HELLO = {"role": "user", "content": "Hello!"}


@pytest.mark.parametrize(
    ("api", "body", "messages"),
    [
        ("chat", {"messages": [HELLO], "max_tokens": 5}, [HELLO]),
        ("messages", {"messages": [HELLO], "system": "Be kind."}, [{"role": "system", "content": "Be kind."}, HELLO]),
        ("messages", {"messages": [HELLO], "system": ""}, [HELLO]),
        (
            "messages",
            {"messages": [HELLO], "system": [{"type": "text", "text": "Be kind."}]},
            [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, HELLO],
        ),
        ("completions", {"prompt": "Once"}, [{"role": "user", "content": "Once"}]),
        ("completions", {"prompt": ["Once", "Twice"]}, [{"role": "user", "content": "Once"}]),
        # Tokens say nothing to a reader
        ("completions", {"prompt": [1, 2]}, [{"role": "user", "content": ""}]),
        ("completions", {"prompt": [[1, 2], [3]]}, [{"role": "user", "content": ""}]),
        ("responses", {"input": "Hello!"}, [HELLO]),
        (
            "responses",
            {"input": "Hello!", "instructions": "Be kind."},
            [{"role": "system", "content": "Be kind."}, HELLO],
        ),
        ("responses", {"input": [HELLO]}, [HELLO]),
    ],
)
def test_what_was_asked_becomes_messages(api: Api, body: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert asked(api, body) == messages


def test_the_items_of_a_response_become_messages() -> None:
    # Given a tool loop as a response's input
    items = [
        HELLO,
        {"type": "reasoning", "id": "rs_0", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "In short."}]},
        {"type": "function_call", "call_id": "c1", "name": "get_time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "12:00"},
    ]
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    # Then each is kept as the message that a chat would have
    assert asked("responses", {"input": items}) == [
        HELLO,
        {"role": "assistant", "content": "", "reasoning": "Hm."},
        {"role": "assistant", "content": "", "reasoning": "In short."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
    ]


@pytest.mark.parametrize(
    ("api", "part"),
    [
        ("chat", IMAGE),
        ("chat", {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}),
        ("chat", {"type": "audio_url", "audio_url": {"url": "data:AAAA"}}),
        ("chat", {"type": "video_url", "video_url": {"url": "data:AAAA"}}),
        ("responses", {"type": "input_image", "image_url": "data:AAAA", "detail": "auto"}),
        ("messages", BLOCK),
    ],
)
def test_media_are_left_out(api: Api, part: dict[str, Any]) -> None:
    # Given a question with a picture or the like in it
    text = {"type": "text", "text": "What is this?"}
    body = {"input" if api == "responses" else "messages": [{"role": "user", "content": [text, part]}]}
    before = copy.deepcopy(body)
    # Then history keeps that it was there, and not what it was
    (message,) = asked(api, body)
    assert message == {"role": "user", "content": [text, {"type": part["type"]}]}
    # And the engine's body is as it was
    assert body == before


def test_media_in_a_tools_result_are_left_out_too() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Seen."}, BLOCK]}
    (message,) = asked("messages", {"messages": [{"role": "user", "content": [result]}]})
    assert message["content"] == [{**result, "content": [{"type": "text", "text": "Seen."}, {"type": "image"}]}]


def field_of(api: Api) -> str:
    return "input" if api == "responses" else "messages"


APIS: list[Api] = ["chat", "messages", "responses", "count_tokens"]


@pytest.mark.parametrize("api", APIS)
def test_past_chats_stand_before_the_last_question(api: Api) -> None:
    # Given a conversation whose last message is not the user's
    said = [
        {"role": "user", "content": "One?"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    body = {field_of(api): said, "temperature": 0.5}
    # When past chats are put before the question
    changed = put_before_question(api, body, "PAST")
    # Then the user's last message begins with them, and nothing else has changed
    expected = [said[0], {"role": "user", "content": "PAST\n\nTwo?"}, said[2]]
    assert changed == {field_of(api): expected, "temperature": 0.5}
    assert said[1]["content"] == "Two?"


@pytest.mark.parametrize("nothing", ["", [], [{"type": "text", "text": ""}], [IMAGE]])
def test_a_message_without_text_is_no_question(nothing: Any) -> None:
    # Given a last message of the user's in which nothing is asked
    body = {"messages": [HELLO, {"role": "user", "content": nothing}]}
    # Then the past chats stand where the search took its question from
    changed = put_before_question("chat", body, "PAST")["messages"]
    assert changed == [{"role": "user", "content": "PAST\n\nHello!"}, body["messages"][1]]
    assert last_question(body["messages"]) == "Hello!"


def test_past_chats_stand_before_a_response_in_one_string() -> None:
    assert put_before_question("responses", {"input": "Two?"}, "PAST") == {"input": "PAST\n\nTwo?"}


@pytest.mark.parametrize(
    ("api", "media", "type_"),
    [
        ("chat", IMAGE, "text"),
        ("messages", BLOCK, "text"),
        ("responses", {"type": "input_image", "image_url": "data:AAAA"}, "input_text"),
    ],
)
def test_past_chats_stand_before_the_first_text_of_parts(api: Api, media: dict[str, Any], type_: str) -> None:
    parts = [media, {"type": type_, "text": "What"}, {"type": type_, "text": "is this?"}]
    changed = put_before_question(api, {field_of(api): [{"role": "user", "content": parts}]}, "PAST")
    assert changed[field_of(api)][0]["content"] == [media, {"type": type_, "text": "PAST\n\nWhat"}, parts[2]]


@pytest.mark.parametrize(
    ("api", "results"),
    [
        ("chat", [{"role": "tool", "tool_call_id": "t1", "content": "12:00"}]),
        ("messages", [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "12:00"}]}]),
        ("responses", [{"type": "function_call_output", "call_id": "t1", "output": "12:00"}]),
    ],
)
def test_past_chats_stay_with_the_question_through_a_tool_loop(api: Api, results: list[dict[str, Any]]) -> None:
    # Given results of a tool after the question
    body = {field_of(api): [HELLO, {"role": "assistant", "content": ""}, *results]}
    # Then the question is the one before them
    changed = put_before_question(api, body, "PAST")[field_of(api)]
    assert changed[0]["content"] == "PAST\n\nHello!"
    assert changed[2:] == results


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "messages", [[], [{"role": "system", "content": "Be kind."}], [{"role": "user", "content": []}]]
)
def test_without_a_question_nothing_changes(api: Api, messages: list[dict[str, Any]]) -> None:
    body = {field_of(api): messages}
    assert put_before_question(api, body, "PAST") == {field_of(api): messages}
