"""The engine's own span in a request's trace, of the real engine, by every API it has."""

import secrets
from typing import Any

import httpx
import pytest

from tests.otlp import Receiver, Span
from tests.stack import eventually, say

QUESTION = "What is the capital of France?"
CHAT = say(QUESTION, model="qwen3-0.6b", max_tokens=40, temperature=0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/messages", CHAT | {"stream": True}),
        ("/v1/completions", {"model": "qwen3-0.6b", "prompt": QUESTION, "max_tokens": 8, "temperature": 0}),
        ("/v1/responses", {"model": "qwen3-0.6b", "input": QUESTION, "max_output_tokens": 40, "temperature": 0}),
    ],
    ids=["streamed", "whole", "messages", "completions", "responses"],
)
def test_the_engine_tells_of_itself_under_the_worker(
    collector: Receiver, client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    # Given a client that wants a trace
    trace_id = secrets.token_hex(16)
    # When it asks
    answer = client.post(path, json=body, headers={"traceparent": f"00-{trace_id}-{'1' * 16}-01"})
    assert answer.status_code == 200
    # Then the engine's span is there, under the worker's of the same answer
    engine, worker = eventually(lambda: told(collector.of(trace_id)))
    assert eventually(lambda: collector.named(trace_id, f"POST {path}", "INSERT chats"))
    assert worker.attributes["gen_ai.provider.name"] == "vllm"
    assert (engine.service, worker.service) == ("qwen3-worker-chat", "qwen3-worker-chat")
    # And it says where the time went, and counts the same tokens
    assert engine.attributes["gen_ai.latency.time_in_queue"] >= 0
    assert 0 < engine.attributes["gen_ai.latency.time_to_first_token"] < 60
    assert worker.attributes["gen_ai.request.model"] == worker.attributes["gen_ai.response.model"]
    assert worker.attributes["gen_ai.usage.input_tokens"] == engine.attributes["gen_ai.usage.prompt_tokens"]
    assert worker.attributes["gen_ai.usage.output_tokens"] == engine.attributes["gen_ai.usage.completion_tokens"]
    # And what was said is nowhere
    sent = b"".join(collector.bodies)
    assert b"capital" not in sent
    assert b"Paris" not in sent


def told(spans: list[Span]) -> tuple[Span, Span] | None:
    """The engine's span and its parent. Each process has two ways to the collector, so that either may come first."""
    by_id = {span.span_id: span for span in spans}
    pairs = [(span, by_id[span.parent_id]) for span in spans if span.name == "llm_request" and span.parent_id in by_id]
    return pairs[0] if len(pairs) == 1 else None


def test_who_does_not_ask_is_not_traced(collector: Receiver, client: httpx.Client) -> None:
    # Given sampling by the client's wish alone
    before = client.post("/v1/chat/completions", json=CHAT).headers["x-request-id"]
    trace_id = secrets.token_hex(16)
    client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": f"00-{trace_id}-{'1' * 16}-01"})
    eventually(lambda: collector.named(trace_id, "INSERT chats"))
    assert before.encode() not in b"".join(collector.bodies)
