"""Messages of OpenAI's dialect: as clients write them, and as the chat template knows them."""

from typing import Any

import pytest
from pydantic import ValidationError

from server.errors import describe
from server.schemas.messages import MAX_DEPTH, ChatMessage
from tests.unit.fake_requests import DATA_URI

CALL = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
URL = {"url": DATA_URI}


def for_engine(**message: Any) -> dict[str, Any]:
    return ChatMessage.model_validate(message).for_engine()


def called(arguments: str) -> dict[str, Any]:
    return {**CALL, "function": {"name": "get_time", "arguments": arguments}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello!", "name": "ada"},
        {"role": "user", "content": [{"type": "text", "text": "Hello!"}]},
        {"role": "user", "content": ""},
        {"role": "user", "content": []},
        {"role": "assistant", "content": "Hi.", "reasoning": "Hm."},
        {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
        {"role": "assistant", "content": None, "reasoning": "Hm."},
        {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
    ],
)
def test_a_message_goes_to_the_engine_as_it_is(message: dict[str, Any]) -> None:
    assert for_engine(**message) == message


@pytest.mark.parametrize(
    ("message", "engines"),
    [
        ({"role": "developer", "content": "Be kind."}, {"role": "system", "content": "Be kind."}),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        (
            {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."},
            {"role": "assistant", "content": "Hi.", "reasoning": "Hm."},
        ),
        (
            {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm.", "reasoning": ""},
            {"role": "assistant", "content": "Hi.", "reasoning": ""},
        ),
        # What belongs to another role, or to nobody, is left out
        (
            {"role": "user", "content": "x", "tool_calls": [CALL], "tool_call_id": "c1", "reasoning": "Hm.", "x": 1},
            {"role": "user", "content": "x"},
        ),
        ({"role": "assistant", "content": "x", "tool_calls": [], "audio": None}, {"role": "assistant", "content": "x"}),
        # Clients leave these out
        (
            {"role": "assistant", "tool_calls": [{"id": "c1", "function": CALL["function"]}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "tool_calls": [called(" ")]},
            {"role": "assistant", "content": None, "tool_calls": [called("{}")]},
        ),
    ],
)  # fmt: skip
def test_what_the_template_does_not_know_is_put_otherwise(message: dict[str, Any], engines: dict[str, Any]) -> None:
    assert for_engine(**message) == engines


@pytest.mark.parametrize(
    ("part", "engines"),
    [
        ({"type": "text", "text": "x", "cache_control": {}}, {"type": "text", "text": "x"}),
        ({"type": "image_url", "image_url": {**URL, "detail": "low"}}, {"type": "image_url", "image_url": URL}),
        ({"type": "video_url", "video_url": URL}, {"type": "video_url", "video_url": URL}),
        ({"type": "input_video", "input_video": URL}, {"type": "video_url", "video_url": URL}),
        ({"type": "video", "video": URL}, {"type": "video_url", "video_url": URL}),
        ({"type": "video", "video": DATA_URI}, {"type": "video_url", "video_url": URL}),
        ({"type": "video", "video_url": URL}, {"type": "video_url", "video_url": URL}),
        ({"type": "audio_url", "audio_url": URL}, {"type": "audio_url", "audio_url": URL}),
        (
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        ),
        ({"type": "refusal", "refusal": "No."}, {"type": "text", "text": "No."}),
    ],
)
def test_parts_have_one_name_each(part: dict[str, Any], engines: dict[str, Any]) -> None:
    assert for_engine(role="user", content=[part])["content"] == [engines]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "king", "content": "x"}, "role: Input should be"),
        ({"role": "user"}, "content: Field required"),
        ({"role": "tool", "content": "x"}, "tool_call_id: Field required for the role tool"),
        ({"role": "tool", "content": "x", "tool_call_id": ""}, "tool_call_id: Field required for the role tool"),
        ({"role": "assistant", "tool_calls": []}, "content: Field required, as there are no tool_calls"),
        ({"role": "user", "content": 5}, "content: Input should be a string or a list of parts (got 5)"),
        ({"role": "user", "content": [{"type": "smell"}]}, "content.0: Input should be an object whose type is one of"),
        (
            {"role": "user", "content": [{"type": ["text"]}]},
            "content.0: Input should be an object whose type is one of",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "content.0.text: Field required"),
        ({"role": "user", "content": [{"type": "video", "video": 5}]}, "content.0.video_url.url: Input should be"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}, "content.0.image_url.url: "),
    ],
)
def test_a_message_that_lacks_something_says_what(message: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ChatMessage.model_validate(message)
    assert describe([{**e, "loc": ("body", *e["loc"])} for e in refused.value.errors()]).startswith(told)


@pytest.mark.parametrize("arguments", ["[]", "5", "null", "{", "{'a': 1}", '{"a": NaN}', '"{}"', '{"a": 1} x'])
def test_a_calls_arguments_are_an_object(arguments: str) -> None:
    with pytest.raises(ValidationError, match="Input should be a JSON object in a string"):
        for_engine(role="assistant", tool_calls=[called(arguments)])


@pytest.mark.parametrize("opening", ['{"a":', '{"a":[5,'])
def test_a_calls_arguments_do_not_nest_without_end(opening: str) -> None:
    # Given arguments that nest as deep as they may, and one deeper
    closing = "}" if "[" not in opening else "]}"
    most = MAX_DEPTH // len(closing)
    deepest = opening * most + "1" + closing * most
    # Then the one is a call, and the other is refused where the engine would break
    for_engine(role="assistant", tool_calls=[called(deepest)])
    for arguments in (f'{{"a":{deepest}}}', opening * 500 + "1" + closing * 500, opening * 5000 + "1" + closing * 5000):
        with pytest.raises(ValidationError):
            for_engine(role="assistant", tool_calls=[called(arguments)])
