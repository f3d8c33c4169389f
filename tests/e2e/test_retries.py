"""What the SDKs do by themselves when they are told to wait."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.dialogue import FRANCE, MODEL, PARIS, QUICK, user
from tests.stack import Stack, second_server


@pytest.fixture
def slow_server(stack: Stack) -> Any:
    with second_server(stack, RATE_LIMIT_PER_MINUTE="1", SIMPLE_MODEL_MAP="true") as (url, _):
        yield url


def near_the_minutes_end() -> None:
    """The rate is counted by calendar minutes: near the end of one, the wait for the next is short."""
    while time.time() % 60 < 54:
        time.sleep(0.2)


def test_both_sdks_wait_and_ask_again_after_a_429(stack: Stack, slow_server: str) -> None:
    # Given two keys that have used up their one request of this minute
    keys = [stack.new_key("patient"), stack.new_key("patient too")]
    near_the_minutes_end()
    for key in keys:
        assert httpx.get(f"{slow_server}/v1/models", headers={"x-api-key": key}).status_code == 200
    refused = httpx.get(f"{slow_server}/v1/models", headers={"x-api-key": keys[0]})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    # When the SDKs ask all the same
    retried: list[int] = []

    def note(response: httpx.Response) -> None:
        retried.append(response.status_code)

    asked: Any = {"model": MODEL, "messages": [user(FRANCE)], "max_tokens": 50, "extra_body": {"temperature": 0}}
    hooks: Any = {"response": [note]}
    other = anthropic.Anthropic(base_url=slow_server, api_key=keys[1])
    with httpx.Client(event_hooks=hooks) as http, ThreadPoolExecutor() as pool:
        client = openai.OpenAI(base_url=f"{slow_server}/v1", api_key=keys[0], http_client=http)
        waiting = pool.submit(other.messages.create, **asked)
        completion = client.chat.completions.create(**asked | {"extra_body": {"temperature": 0, **QUICK}})
        message = waiting.result()
    # Then they wait as long as they are told, and are answered
    assert completion.choices[0].message.content == PARIS
    assert message.content[0].model_dump()["text"] == PARIS
    assert (retried[0], retried[-1]) == (429, 200)
    with pytest.raises(anthropic.RateLimitError):
        other.with_options(max_retries=0).messages.create(**asked)


def test_a_simple_list_has_no_variants_which_work_all_the_same(stack: Stack, slow_server: str) -> None:
    headers = [{"x-api-key": stack.new_key(name)} for name in ("one", "two")]
    listed = httpx.get(f"{slow_server}/v1/models", headers=headers[0]).json()["data"]
    assert [model["id"] for model in listed] == ["qwen3-smoke", "minilm-smoke"]
    body = {"model": f"{MODEL}-thinking", "messages": [user(FRANCE)], "temperature": 0}
    answer = httpx.post(f"{slow_server}/v1/chat/completions", json=body, headers=headers[1], timeout=60).json()
    assert "Paris" in answer["choices"][0]["message"]["reasoning"]
