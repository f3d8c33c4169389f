"""AI Service V1's dialect: what of a chat its streams tell."""

from typing import Any

import orjson
import pytest

from server.core.errors import QueueFull
from server.dialects import gateway
from server.schemas.openai import ChatCompletionsRequest
from tests.unit.fake_requests import SOURCES, FakeDispatcher, body_of, collect, frame, refused, request_of, turn_of

CALLS = [{"index": 0, "id": "c1", "function": {"name": "get_time", "arguments": ""}}]


def delta(**content: Any) -> Any:
    return frame("chunk", {"choices": [{"index": 0, "delta": content}]})


async def test_a_stream_is_what_is_said_and_done() -> None:
    # Given a chat's chunks: who speaks, a thought, text, an empty one, a call, the end and the counts
    turn = turn_of(
        delta(role="assistant", content=""),
        delta(reasoning="Hm."),
        delta(content="Hé"),
        delta(content=""),
        delta(tool_calls=CALLS),
        delta(content="llo", tool_calls=CALLS),
        delta(),
        frame("usage", {"choices": [], "usage": {}}),
        frame("done"),
    )
    # Then text and calls are told, and nothing else
    calls = orjson.dumps(CALLS)
    assert await collect(gateway._stream(turn)) == [
        'data: {"content":"Hé"}\n\n'.encode(),
        b'data: {"content":"","tool_calls":' + calls + b"}\n\n",
        b'data: {"content":"llo","tool_calls":' + calls + b"}\n\n",
        b"data: [DONE]\n\n",
    ]


async def test_sources_come_first() -> None:
    first, *_ = await collect(gateway._stream(turn_of(delta(role="assistant"), frame("done"), sources=SOURCES)))
    assert orjson.loads(first[6:]) == {"content": "", "sources": SOURCES}


async def test_a_stream_that_breaks_ends_with_the_error_and_without_done() -> None:
    *_, last = await collect(gateway._stream(turn_of(delta(content="Hé"), QueueFull("Full."))))
    error = {"message": "Full.", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    assert orjson.loads(last[6:]) == {"error": error}


def body(**fields: Any) -> ChatCompletionsRequest:
    return ChatCompletionsRequest.model_validate({"messages": [{"role": "user", "content": "Hello!"}], **fields})


async def test_a_stream_holds_one_answer() -> None:
    with refused("n: a stream of this dialect holds one answer", "n"):
        await gateway.chat(request_of(), body(stream=True, n=2))


@pytest.mark.parametrize("fields", [{"n": 2}, {"n": 1, "stream": False}])
async def test_an_unstreamed_answer_is_openais(fields: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "Hi.", "reasoning": "Hm."}
    result = {"id": "x", "choices": [{"index": 0, "message": message}], "usage": {"completion_tokens": 2}}
    dispatcher = FakeDispatcher(frame("result", result))
    answer = orjson.loads(await body_of(await gateway.chat(request_of(dispatcher), body(**fields))))
    assert answer["choices"][0]["message"] == message | {"reasoning_content": "Hm."}
    assert answer["usage"]["output_tokens"] == 2
    assert dispatcher.calls[0].body["n"] == fields["n"]


async def test_a_streams_work_ends_with_its_reader() -> None:
    # When a streamed answer has been read to its end
    dispatcher = FakeDispatcher(delta(role="assistant"), delta(content="Hi."), frame("done"))
    stream = await body_of(await gateway.chat(request_of(dispatcher), body(stream=True)))
    # Then all of it has come, and nothing is held for it any more
    assert stream == b'data: {"content":"Hi."}\n\ndata: [DONE]\n\n'
    assert dispatcher.calls[0].body["stream"] is True
    assert [ticket.closed for ticket in dispatcher.tickets] == [True]
