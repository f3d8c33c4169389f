"""A stream says the same wherever the network cuts it: inside a letter, a field, or between an event's two ends."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import pairwise
from typing import Any

import anthropic as anthropic_sdk
import httpx
import httpx2
import openai as openai_sdk
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.core.errors import AnswerLost, ServiceError
from server.core.messages import Frame
from server.dialects import anthropic, gateway, native, openai, responses
from server.sse import KEEP_ALIVE
from tests.unit.fake_requests import SOURCES, collect, frame, turn_of

TEXTS = ["", "Grüße, ", "👩‍👩‍👧", " \u202eשלום\u202c", "\u2028\x85\r\n data: [DONE]\n\nevent: x", "e\u0301\ufeff"]
"""Letters of one to four bytes, and all that some reader of lines takes for the end of one."""
ARGUMENTS = ['{"loca', 'tion": "', "東京 🗼", '"}']
LOST = AnswerLost("The connection was lost. 🗼")
USAGE = {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> Frame:
    """A chunk of a chat."""
    choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return frame("chunk", {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "choices": choices})


def call(function: dict[str, str], **more: str) -> Frame:
    return chunk({"tool_calls": [{"index": 0, **more, "function": function}]})


CHAT = [
    chunk({"role": "assistant", "content": ""}),
    *(chunk({"reasoning": text}) for text in TEXTS),
    *(chunk({"content": text}) for text in TEXTS),
    call({"name": "get_weather", "arguments": ""}, id="call_1", type="function"),
    *(call({"arguments": piece}) for piece in ARGUMENTS),
    chunk({}, "tool_calls"),
    frame(
        "usage", {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "choices": [], "usage": USAGE}
    ),
]


def named(name: str, **content: Any) -> Frame:
    """An event of a message or of a response, as a worker sends it."""
    return frame("chunk", name.encode() + b"\n" + orjson.dumps({"type": name, **content}))


def block(index: int, content: dict[str, Any], deltas: list[dict[str, Any]]) -> list[Frame]:
    """A block of an Anthropic message, from its start to its end."""
    return [
        named("content_block_start", index=index, content_block=content),
        *(named("content_block_delta", index=index, delta=delta) for delta in deltas),
        named("content_block_stop", index=index),
    ]


HEAD = {"type": "message", "role": "assistant", "content": [], "model": "talker", "stop_reason": None}
MESSAGE = [
    named("message_start", message=HEAD | {"id": "x", "usage": {"input_tokens": 1, "output_tokens": 0}}),
    *block(0, {"type": "thinking", "thinking": ""}, [{"type": "thinking_delta", "thinking": text} for text in TEXTS]),
    *block(1, {"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in TEXTS]),
    *block(
        2,
        {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}},
        [{"type": "input_json_delta", "partial_json": piece} for piece in ARGUMENTS],
    ),
    named("message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 9}),
    named("message_stop"),
]
WHOLE: dict[str, Any] = {"id": "resp_1", "object": "response", "model": "talker", "output": []}
RESPONSE = [
    named("response.created", sequence_number=0, response=WHOLE | {"status": "in_progress"}),
    *(named("response.reasoning_text.delta", item_id="rs_1", output_index=0, delta=text) for text in TEXTS),
    *(named("response.output_text.delta", item_id="msg_1", output_index=1, delta=text) for text in TEXTS),
    *(named("response.function_call_arguments.delta", output_index=2, delta=piece) for piece in ARGUMENTS),
    named("response.function_call_arguments.done", output_index=2, arguments="".join(ARGUMENTS)),
    named("response.completed", sequence_number=99, response=WHOLE | {"status": "completed"}),
]


class Network:
    """Answers every request with a stream in the pieces that were put here."""

    pieces: list[bytes]

    def client(self, kit: Any) -> Any:
        """A client of httpx's, or of the other package of its kind that Anthropic's SDK has."""

        class Stream(kit.SyncByteStream):
            def __iter__(_) -> Iterator[bytes]:
                return iter(self.pieces)

        def answer(_request: Any) -> Any:
            return kit.Response(200, headers={"Content-Type": "text/event-stream; charset=utf-8"}, stream=Stream())

        return kit.Client(transport=kit.MockTransport(answer))


NETWORK = Network()
ASKED: Any = {"model": "talker", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], "stream": True}


Clients = tuple[openai_sdk.OpenAI, anthropic_sdk.Anthropic]
Events = AsyncGenerator[bytes, None]
STREAMS: dict[str, tuple[Callable[[list[Frame | ServiceError]], Events], list[Frame]]] = {
    "/v1/chat/completions": (lambda frames: openai._stream(turn_of(*frames, sources=SOURCES), True), CHAT),
    "/ai/v1/chat/completions": (lambda frames: gateway._stream(turn_of(*frames, sources=SOURCES)), CHAT),
    "/chat": (lambda frames: native._stream(turn_of(*frames), True), CHAT),
    "/v1/messages": (lambda frames: anthropic._stream(turn_of(*frames, sources=SOURCES)), MESSAGE),
    "/v1/responses": (lambda frames: responses._stream(turn_of(*frames, sources=SOURCES)), RESPONSE),
}
"""How each dialect makes its stream, and of which frames."""


@functools.cache
def sent(path: str, broken: bool) -> bytes:
    """A dialect's whole stream, with keep-alives; `broken` in the middle, or not."""
    made, frames = STREAMS[path]
    end = [*frames[: len(frames) // 2], LOST] if broken else [*frames, frame("done")]
    events = asyncio.run(collect(made(end)))
    alive = anthropic.PING if path == "/v1/messages" else KEEP_ALIVE
    return b"".join([*events[:2], alive, *events[2:5], alive, *events[5:]])


def heard(path: str, pieces: list[bytes], clients: Clients) -> list[Any]:
    """All that the dialect's own SDK makes of a stream: its events, and the error it ends with."""
    openai_client, anthropic_client = clients
    NETWORK.pieces = pieces
    events: list[Any] = []
    stream: Any
    if path == "/v1/messages":
        stream = anthropic_client.messages.create(**ASKED)
    elif path == "/v1/responses":
        stream = openai_client.responses.create(model="talker", input="x", stream=True)
    else:
        stream = openai_client.chat.completions.create(**ASKED)
    try:
        events += [each.model_dump(exclude_unset=True, warnings=False) for each in stream]
    except (openai_sdk.APIError, anthropic_sdk.APIError) as exc:
        events.append({"raised": str(exc), "body": exc.body})
    return events


def told(path: str, broken: bool, clients: Clients) -> tuple[bytes, list[Any]]:
    """A stream, and what is heard of it in one piece."""
    stream = sent(path, broken)
    return stream, heard(path, [stream], clients)


def tender(stream: bytes) -> list[int]:
    """Where a cut is most likely to hurt: inside a letter, and around the end of a line."""
    inside = [at for at, byte in enumerate(stream) if byte & 0xC0 == 0x80]
    return inside + [at + step for at, byte in enumerate(stream) if byte == 10 for step in (0, 1)]


def split(stream: bytes, cuts: set[int]) -> list[bytes]:
    ends = sorted(cuts | {0, len(stream)})
    return [stream[start:end] for start, end in pairwise(ends)]


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    key: Any = {"api_key": "x", "max_retries": 0}
    with (
        openai_sdk.OpenAI(base_url="http://test/v1", http_client=NETWORK.client(httpx), **key) as ours,
        anthropic_sdk.Anthropic(base_url="http://test", http_client=NETWORK.client(httpx2), **key) as theirs,
    ):
        yield ours, theirs


every_stream = pytest.mark.parametrize("path", STREAMS)
broken_or_not = pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])


@every_stream
@broken_or_not
@given(data=st.data())
@settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_cut_leaves_the_events_as_they_are(path: str, broken: bool, clients: Clients, data: st.DataObject) -> None:
    # Given a stream, and what is heard of it in one piece
    stream, whole = told(path, broken, clients)
    # When it comes in pieces, cut anywhere
    places = st.sampled_from(tender(stream)) | st.integers(0, len(stream))
    pieces = split(stream, data.draw(st.sets(places, max_size=30), label="cuts"))
    # Then the same is heard
    assert heard(path, pieces, clients) == whole


@every_stream
@broken_or_not
def test_a_stream_may_come_byte_by_byte(path: str, broken: bool, clients: Clients) -> None:
    stream, whole = told(path, broken, clients)
    assert heard(path, split(stream, set(range(len(stream)))), clients) == whole


@every_stream
def test_all_that_was_said_is_heard(path: str, clients: Clients) -> None:
    # When a stream is heard to its end
    _, whole = told(path, False, clients)
    # Then what was said and called is as the model had it, and thoughts where the dialect shows them
    calls = "".join(ARGUMENTS)
    thoughts = [] if path == "/ai/v1/chat/completions" else ["".join(TEXTS)]
    if path == "/v1/messages":
        deltas = [event["delta"] for event in whole if event["type"] == "content_block_delta"]
        names = ("thinking", "text", "partial_json")
    elif path == "/v1/responses":
        deltas = [{event["type"]: event["delta"]} for event in whole if "delta" in event]
        names = (
            "response.reasoning_text.delta",
            "response.output_text.delta",
            "response.function_call_arguments.delta",
        )
    else:
        deltas = [delta_of(chunk) for chunk in whole if chunk.get("choices") != []]
        names = ("reasoning", "content", "arguments")
        if path == "/v1/chat/completions":
            assert [d.get("reasoning") for d in deltas] == [d.get("reasoning_content") for d in deltas]
    said = ["".join(delta.get(name) or "" for delta in deltas) for name in names]
    assert said == [*(thoughts or [""]), "".join(TEXTS), calls]


@every_stream
def test_a_broken_stream_says_so(path: str, clients: Clients) -> None:
    _, whole = told(path, True, clients)
    assert LOST.message in str(whole[-1])


def delta_of(chunk: dict[str, Any]) -> dict[str, Any]:
    """A chunk's delta, its call's arguments beside the rest; AI Service V1's chunks are deltas themselves."""
    delta = chunk["choices"][0]["delta"] if "choices" in chunk else chunk
    return {**delta, "arguments": "".join(call["function"]["arguments"] for call in delta.get("tool_calls") or [])}
