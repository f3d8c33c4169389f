"""The transcript: the same message from a whole answer and from any cut of it into chunks."""

import json
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.transcript import Transcript

CALL = {
    "id": "call-1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"location": "Tokyo"}'},
}


def data(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def answer(message: dict[str, Any], finish_reason: str = "stop") -> bytes:
    """A whole completion as vLLM tells it, with fields that no transcript needs."""
    return data(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1700000000,
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
            "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
        }
    )


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    return data(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1700000000,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
        }
    )


USAGE = data({"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}})


def transcript_of(*parts: bytes) -> Transcript:
    transcript = Transcript()
    for part in parts:
        transcript.add(part)
    return transcript


def tokens_of(transcript: Transcript) -> tuple[int, int]:
    return transcript.prompt_tokens, transcript.completion_tokens


def test_a_whole_answer() -> None:
    # When an answer comes in one piece
    transcript = transcript_of(answer({"role": "assistant", "content": "Paris."}, "length"))
    # Then it is the message, with how it ended and what it cost
    assert transcript.message() == {"role": "assistant", "content": "Paris."}
    assert transcript.finish_reason == "length"
    assert tokens_of(transcript) == (11, 7)


def test_chunks_make_the_same_as_the_whole() -> None:
    # Given the chunks of an answer, as vLLM sends them
    transcript = transcript_of(
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Par"}),
        chunk({"content": "is."}),
        chunk({}, "stop"),
        USAGE,
    )
    # Then message, reason and usage are those of the whole
    whole = transcript_of(answer({"role": "assistant", "content": "Paris."}))
    assert transcript.message() == whole.message() == {"role": "assistant", "content": "Paris."}
    assert transcript.finish_reason == whole.finish_reason == "stop"
    assert tokens_of(transcript) == tokens_of(whole) == (11, 7)


def test_add_tells_chunks_from_the_usage() -> None:
    # When a chunk, an empty one and the closing usage are added
    transcript = Transcript()
    told = [transcript.add(piece) for piece in (chunk({"content": "a"}), chunk({}), USAGE)]
    # Then the caller is told which of them carried a choice
    assert told == [True, True, False]


def test_thoughts_are_kept_apart() -> None:
    whole = transcript_of(answer({"role": "assistant", "content": "Paris.", "reasoning": "Of France."}))
    pieces = transcript_of(
        chunk({"role": "assistant", "reasoning": "Of "}),
        chunk({"reasoning": "France.", "content": None}),
        chunk({"content": "Paris."}, "stop"),
    )
    expected = {"role": "assistant", "content": "Paris.", "reasoning": "Of France."}
    assert whole.message() == pieces.message() == expected


def test_no_thoughts_leave_no_trace() -> None:
    transcript = transcript_of(answer({"role": "assistant", "content": "Paris.", "reasoning": None}))
    assert "reasoning" not in transcript.message()


def test_a_whole_tool_call() -> None:
    # When a call comes in one piece, without text
    transcript = transcript_of(answer({"role": "assistant", "content": None, "tool_calls": [CALL]}, "tool_calls"))
    # Then the message carries it as it is
    assert transcript.message() == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert transcript.finish_reason == "tool_calls"


def test_two_whole_tool_calls_stay_two() -> None:
    calls = [CALL, {**CALL, "id": "call-2"}]
    assert transcript_of(answer({"content": None, "tool_calls": calls})).message()["tool_calls"] == calls


def test_tool_call_deltas_join_to_the_whole_calls() -> None:
    # Given two calls in deltas: id and name first, then the arguments bit by bit
    second = {"id": "call-2", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}

    def delta(index: int, **call: Any) -> bytes:
        return chunk({"tool_calls": [{"index": index, **call}]})

    transcript = transcript_of(
        chunk({"role": "assistant", "content": ""}),
        delta(0, id="call-1", type="function", function={"name": "get_weather"}),
        delta(0, function={"arguments": '{"location": '}),
        delta(0, function={"arguments": '"Tokyo"}'}),
        delta(1, id="call-2", type="function", function={"name": "get_time", "arguments": "{"}),
        delta(1, function={"arguments": "}"}),
        chunk({}, "tool_calls"),
    )
    # Then each call is whole, and the stream's index is not part of it
    assert transcript.message()["tool_calls"] == [CALL, second]
    assert transcript.finish_reason == "tool_calls"


def test_deltas_of_two_calls_in_one_chunk() -> None:
    both = [{"index": 0, **CALL}, {"index": 1, **CALL, "id": "call-2"}]
    transcript = transcript_of(chunk({"tool_calls": both}))
    assert transcript.message()["tool_calls"] == [CALL, {**CALL, "id": "call-2"}]


@pytest.mark.parametrize("function", [{}, {"function": None}, {"function": {"name": "get_weather", "arguments": None}}])
def test_a_call_that_starts_empty_takes_its_arguments_later(function: dict[str, Any]) -> None:
    # Given a first delta that names no arguments yet, or no function
    transcript = transcript_of(
        chunk({"tool_calls": [{"index": 0, "id": "call-1", **function}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]}),
    )
    # Then the later ones fill it
    (call,) = transcript.message()["tool_calls"]
    assert call["function"]["arguments"] == '{"a": 1}'
    assert call["id"] == "call-1"


def test_what_comes_later_takes_nothing_back() -> None:
    # Given chunks behind the one that ended the answer, and behind the usage
    transcript = transcript_of(chunk({"content": "a"}, "length"), chunk({"content": ""}), USAGE, chunk({}))
    # Then how it ended and what it cost still stand
    assert transcript.finish_reason == "length"
    assert transcript.completion_tokens == 7


def test_an_answer_cut_short_keeps_what_came() -> None:
    # Given a stream that broke off: no reason, no usage
    transcript = transcript_of(chunk({"content": "The cap"}))
    assert transcript.message()["content"] == "The cap"
    assert transcript.finish_reason == ""
    assert tokens_of(transcript) == (0, 0)


def test_only_the_first_choice_of_a_whole_answer_is_remembered() -> None:
    whole = json.loads(answer({"content": "one"}))
    whole["choices"].append({"index": 1, "message": {"content": "two"}, "finish_reason": "length"})
    transcript = transcript_of(data(whole))
    assert transcript.message()["content"] == "one"
    assert transcript.finish_reason == "stop"


def test_only_the_first_choice_of_a_stream_is_remembered() -> None:
    # Given the chunks of two answers to one prompt, in turns
    def of(index: int, content: str, finish_reason: str | None = None) -> bytes:
        return data({"choices": [{"index": index, "delta": {"content": content}, "finish_reason": finish_reason}]})

    transcript = Transcript()
    pieces = [of(1, "Ro"), of(0, "Pa"), of(1, "me", "length"), of(0, "ris", "stop"), of(1, "!")]
    # Then each of them counts as a chunk, and the first answer's make the message
    assert all(transcript.add(piece) for piece in pieces)
    assert transcript.message()["content"] == "Paris"
    assert transcript.finish_reason == "stop"


def test_a_plain_completion() -> None:
    # Given a completion in one piece, and the same in chunks
    choice = {"index": 0, "text": " Paris.", "finish_reason": "length"}
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    whole = transcript_of(data({"object": "text_completion", "choices": [choice], "usage": usage}))
    chunks = [{**choice, "text": " Par", "finish_reason": None}, {**choice, "text": "is."}]
    pieces = transcript_of(*(data({"choices": [c]}) for c in chunks), data({"choices": [], "usage": usage}))
    # Then both are the assistant's message
    assert whole.message() == pieces.message() == {"role": "assistant", "content": " Paris."}
    assert whole.finish_reason == pieces.finish_reason == "length"
    assert tokens_of(whole) == tokens_of(pieces) == (5, 2)


@pytest.mark.parametrize(("status", "reason"), [("completed", "stop"), ("incomplete", "length")])
def test_a_response(status: str, reason: str) -> None:
    # Given a response that thinks, calls and says something, in items
    output = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Of it."}]},
        {"type": "function_call", "id": "fc_1", "call_id": "call-1", **CALL["function"]},  # type: ignore[dict-item]
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Paris."}]},
        {"type": "reasoning", "id": "rs_2", "summary": [], "content": None},
    ]
    usage = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
    transcript = Transcript()
    carried = transcript.add(data({"object": "response", "status": status, "output": output, "usage": usage}))
    # Then it is a message like any other
    assert transcript.message() == {
        "role": "assistant",
        "content": "Paris.",
        "reasoning": "Of it.",
        "tool_calls": [CALL],
    }
    assert transcript.finish_reason == reason
    assert tokens_of(transcript) == (11, 7)
    assert not carried


def test_what_is_no_answer_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        Transcript().add(b"[DONE]")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(TEXT, TEXT, st.lists(st.integers(0, 100), max_size=8), st.lists(st.integers(0, 100), max_size=8))
@settings(deadline=None)
def test_any_cut_gives_the_same_message(reasoning: str, content: str, thoughts: list[int], words: list[int]) -> None:
    # Given a message in one piece
    whole = transcript_of(answer({"role": "assistant", "content": content, "reasoning": reasoning or None}))
    # When it is cut anywhere, thoughts first
    deltas = [{"reasoning": part} for part in cut(reasoning, thoughts)]
    deltas += [{"content": part} for part in cut(content, words)]
    # Then its pieces join to the same
    pieces = transcript_of(*map(chunk, deltas), chunk({}, "stop"), USAGE)
    assert pieces.message() == whole.message()
    assert pieces.message()["content"] == content
    assert pieces.finish_reason == whole.finish_reason
    assert tokens_of(pieces) == tokens_of(whole)


@given(st.lists(st.integers(0, 100), max_size=6))
@settings(deadline=None)
def test_any_cut_of_arguments_gives_the_same_call(places: list[int]) -> None:
    first, *rest = cut(CALL["function"]["arguments"], places)  # type: ignore[index]
    opening = {"index": 0, **CALL, "function": {"name": "get_weather", "arguments": first}}
    deltas = [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in rest]
    transcript = transcript_of(chunk({"tool_calls": [opening]}), *map(chunk, deltas))
    assert transcript.message()["tool_calls"] == [CALL]
