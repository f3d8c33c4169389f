"""Anthropic's own SDK, pointed here."""

import json
from typing import Any

import anthropic
import httpx
import pytest

from tests.dialogue import ANTHROPIC_TOOL, FRANCE, MODEL, PARIS, RESULT, SUNNY, WEATHER, user
from tests.stack import Stack

GREEDY: Any = {"model": MODEL, "max_tokens": 200, "extra_body": {"temperature": 0}}


def test_a_message(anthropic_client: anthropic.Anthropic) -> None:
    message = anthropic_client.messages.create(messages=[user(FRANCE)], system="Answer briefly.", **GREEDY)
    assert [block.model_dump(include={"type", "text"}) for block in message.content] == [
        {"type": "text", "text": PARIS}
    ]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 8
    assert message.id.startswith("msg_")


async def test_an_asynchronous_message(stack: Stack, key: str) -> None:
    async with anthropic.AsyncAnthropic(base_url=stack.url, api_key=key) as client:
        message = await client.messages.create(messages=[user(FRANCE)], **GREEDY)
        async with client.messages.stream(messages=[user(FRANCE)], **GREEDY) as stream:
            text = "".join([piece async for piece in stream.text_stream])
    assert message.content[0].model_dump()["text"] == text == PARIS


def test_blocks_and_a_list_of_system_texts(anthropic_client: anthropic.Anthropic) -> None:
    blocks: Any = [{"type": "text", "text": FRANCE, "cache_control": {"type": "ephemeral"}}]
    earlier: Any = [
        {"role": "user", "content": blocks},
        {"role": "assistant", "content": [{"type": "text", "text": PARIS}]},
        user("What is the capital of Japan?"),
    ]
    system: Any = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be right."}]
    message = anthropic_client.messages.create(messages=earlier, system=system, **GREEDY)
    assert message.content[0].model_dump()["text"] == "The capital of Japan is Tokyo."


def test_the_whole_sequence_of_events(anthropic_client: anthropic.Anthropic, client: httpx.Client) -> None:
    # When a message is streamed, thoughts included
    body = {
        "model": MODEL,
        "max_tokens": 1500,
        "messages": [user(FRANCE)],
        "temperature": 0,
        "stream": True,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    events = client.post("/v1/messages", json=body).text.strip().split("\n\n")
    names = [event.split("\n")[0].removeprefix("event: ") for event in events]
    data = [json.loads(event.split("\n")[1].removeprefix("data: ")) for event in events]
    # Then the events come in the documented order, each named as its data says
    assert names == [content["type"] for content in data]
    assert names[:2] == ["message_start", "ping"]
    assert names[-2:] == ["message_delta", "message_stop"]
    kinds = [content["content_block"]["type"] for content in data if content["type"] == "content_block_start"]
    assert kinds == ["thinking", "text"]
    order = [name for name in names if name in ("content_block_start", "content_block_stop")]
    assert order == ["content_block_start", "content_block_stop"] * 2
    deltas = [content["delta"]["type"] for content in data if content["type"] == "content_block_delta"]
    assert {"thinking_delta", "signature_delta", "text_delta"} == set(deltas)
    assert data[-2]["delta"]["stop_reason"] == "end_turn"
    assert data[-2]["usage"]["output_tokens"] > 8


def test_thinking_is_off_unless_asked_for(anthropic_client: anthropic.Anthropic) -> None:
    plain = anthropic_client.messages.create(messages=[user(FRANCE)], **GREEDY)
    assert [block.type for block in plain.content] == ["text"]
    asked = GREEDY | {"max_tokens": 1500}
    thought = anthropic_client.messages.create(
        messages=[user(FRANCE)], thinking={"type": "enabled", "budget_tokens": 1024}, **asked
    )
    assert [block.type for block in thought.content] == ["thinking", "text"]
    by_name = anthropic_client.messages.create(messages=[user(FRANCE)], **GREEDY | {"model": f"{MODEL}-thinking"})
    assert [block.type for block in by_name.content] == ["thinking", "text"]
    # And an answer with its thoughts can be sent back
    messages: Any = [user(FRANCE), {"role": "assistant", "content": thought.content}]
    messages.append(user("What is the capital of Japan?"))
    again = anthropic_client.messages.create(messages=messages, **GREEDY)
    assert again.content[0].model_dump()["text"] == "The capital of Japan is Tokyo."


def test_a_budget_ends_the_thought(client: httpx.Client) -> None:
    # Given a thought longer than its budget (OpenAI's route has no least one)
    body = {"model": MODEL, "messages": [user(FRANCE)], "temperature": 0, "enable_thinking": True}
    free = client.post("/v1/chat/completions", json=body).json()["usage"]["reasoning_tokens"]
    bound = client.post("/v1/chat/completions", json=body | {"thinking_budget": 4, "max_tokens": 60}).json()
    assert free > 8
    assert bound["usage"]["reasoning_tokens"] <= 5


def test_a_tool_loop_until_it_is_done(anthropic_client: anthropic.Anthropic) -> None:
    messages: list[Any] = [user(WEATHER)]
    for _ in range(4):
        message = anthropic_client.messages.create(messages=messages, tools=[ANTHROPIC_TOOL], **GREEDY)
        messages.append({"role": "assistant", "content": message.content})
        if message.stop_reason != "tool_use":
            break
        calls = [block for block in message.content if block.type == "tool_use"]
        assert [call.input for call in calls] == [{"location": "Tokyo"}]
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": RESULT} for call in calls]
        messages.append({"role": "user", "content": results})
    assert message.content[0].model_dump()["text"] == SUNNY
    assert len(messages) == 4


def test_stop_sequences_and_max_tokens(anthropic_client: anthropic.Anthropic) -> None:
    stopped = anthropic_client.messages.create(messages=[user(FRANCE)], stop_sequences=["zzz", " France"], **GREEDY)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " France")
    assert stopped.content[0].model_dump()["text"] == "The capital of"
    short = anthropic_client.messages.create(messages=[user(FRANCE)], **GREEDY | {"max_tokens": 3})
    assert short.stop_reason == "max_tokens"


def test_count_tokens_counts_what_a_message_costs(anthropic_client: anthropic.Anthropic) -> None:
    for more in ({}, {"system": "Be brief."}, {"tools": [ANTHROPIC_TOOL]}):
        asked: Any = {"messages": [user(FRANCE)], **more}
        counted = anthropic_client.messages.count_tokens(model=MODEL, **asked).input_tokens
        assert counted == anthropic_client.messages.create(**asked, **GREEDY).usage.input_tokens > 10


def test_a_tool_call_that_was_cut_short_is_told_as_such(client: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [user(WEATHER)], "tools": [ANTHROPIC_TOOL], "temperature": 0, "max_tokens": 12}
    message = client.post("/v1/messages", json=body | {"tool_choice": {"type": "any"}})
    assert message.status_code == 200
    assert message.json()["stop_reason"] == "max_tokens"


def test_models_are_listed_for_it_too(anthropic_client: anthropic.Anthropic) -> None:
    assert "qwen3-smoke-thinking" in [model.id for model in anthropic_client.models.list()]


def test_errors_are_the_sdk_s_own(stack: Stack, anthropic_client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        anthropic_client.messages.create(messages=[user(FRANCE)], **GREEDY | {"model": "claude-9"})
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError) as wrong:
        anthropic_client.messages.create(messages=[user(FRANCE)], stop_sequences=["a"] * 5, **GREEDY)
    assert "stop_sequences" in str(wrong.value.body)
    budget: Any = {"type": "enabled", "budget_tokens": 1024}
    with pytest.raises(anthropic.BadRequestError, match="must be less than max_tokens"):
        anthropic_client.messages.create(messages=[user(FRANCE)], thinking=budget, **GREEDY)
    stranger = anthropic.Anthropic(base_url=stack.url, api_key="qk-nobody", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as nobody:
        stranger.messages.create(messages=[user(FRANCE)], **GREEDY)
    assert nobody.value.request_id


def test_an_error_in_a_stream_that_has_not_begun_is_a_status(client: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [user("a b " * 3000)], "max_tokens": 5, "stream": True}
    refused = client.post("/v1/messages", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"
