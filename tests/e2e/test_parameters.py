"""Kawai's parameters on both chat routes, against the real engine."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.dialogue import FRANCE, MODEL, PARIS, QUICK, user
from tests.e2e.test_tools import events
from tests.stack import Stack

REPETITIVE = "Write the same word again and again, and never stop."


def ask(client: httpx.Client, path: str, **more: Any) -> Any:
    body = {"model": MODEL, "messages": [user(FRANCE)], "temperature": 0, **QUICK, **more}
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def text(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


both_routes = pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions"])


@both_routes
def test_return_prompt_logprobs_and_counts(client: httpx.Client, path: str) -> None:
    answer = ask(client, path, return_prompt=True, logprobs=True, top_logprobs=2)
    assert answer["prompt"].startswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>")
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens[:-1]) == PARIS
    assert len(tokens[0]["top_logprobs"]) == 2
    usage = answer["usage"]
    assert usage["output_tokens"] == usage["completion_tokens"] == 8
    assert usage["reasoning_tokens"] == 0
    assert usage["tokens_per_second"] > 0


@both_routes
@pytest.mark.parametrize("switch", [True, "true"])
def test_enable_thinking_as_a_word_and_as_a_switch(client: httpx.Client, path: str, switch: Any) -> None:
    answer = ask(client, path, enable_thinking=switch)
    assert "It is Paris" in answer["choices"][0]["message"]["reasoning"]
    assert answer["usage"]["reasoning_tokens"] > 5


@both_routes
def test_reasoning_effort_switches_thinking(client: httpx.Client, path: str) -> None:
    def reasoning(effort: str) -> Any:
        body = {"model": MODEL, "messages": [user(FRANCE)], "temperature": 0, "reasoning_effort": effort}
        return client.post(path, json=body).json()["choices"][0]["message"].get("reasoning")

    assert reasoning("none") is None
    assert "Paris" in reasoning("low")


@both_routes
def test_top_k_and_min_p_leave_only_the_best(client: httpx.Client, path: str) -> None:
    # Given a temperature at which anything may be said
    assert text(ask(client, path, temperature=2, top_k=1, top_p=1)) == PARIS
    assert text(ask(client, path, temperature=2, min_p=1, top_p=1)) == PARIS


@both_routes
@pytest.mark.parametrize(
    "penalty",
    [
        {"repeat_penalty": 5.0},
        {"repeat_penalty": 5.0, "repeat_last_n": 64},
        {"dry_multiplier": 5.0, "dry_allowed_length": 1},
        {"xtc_probability": 1.0, "xtc_threshold": 0.001},
    ],
    ids=["repetition", "windowed", "dry", "xtc"],
)
def test_each_sampler_changes_what_is_said(client: httpx.Client, path: str, penalty: dict[str, Any]) -> None:
    plain = text(ask(client, path, messages=[user(REPETITIVE)], max_tokens=60))
    changed = text(ask(client, path, messages=[user(REPETITIVE)], max_tokens=60, seed=1, **penalty))
    assert changed != plain
    # And the next request is as if it had never been
    assert text(ask(client, path, messages=[user(REPETITIVE)], max_tokens=60)) == plain


@both_routes
@pytest.mark.parametrize(
    "off",
    [
        {"repeat_penalty": 5.0, "repeat_last_n": 0},
        {"dry_multiplier": 0.0, "dry_base": 9.0},
        {"xtc_probability": 0.0, "xtc_threshold": 0.001},
    ],
)
def test_what_is_switched_off_changes_nothing(client: httpx.Client, path: str, off: dict[str, Any]) -> None:
    plain = text(ask(client, path, messages=[user(REPETITIVE)], max_tokens=60))
    assert text(ask(client, path, messages=[user(REPETITIVE)], max_tokens=60, **off)) == plain


def test_a_seed_fixes_xtc(client: httpx.Client) -> None:
    fields = {"xtc_probability": 0.5, "xtc_threshold": 0.001, "max_tokens": 60, "messages": [user(REPETITIVE)]}
    path = "/v1/chat/completions"
    seeded = {text(ask(client, path, seed=seed, **fields)) for seed in (3, 3, 3)}
    assert len(seeded) == 1
    assert len({text(ask(client, path, seed=seed, **fields)) for seed in range(4)}) > 1


def test_a_bound_on_one_thought_ends_no_other_answer(stack: Stack, key: str) -> None:
    # Given answers that are being generated while bounded thoughts come, are cut short and go
    counting = {
        "messages": [user("Count to fifteen.")],
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": 100,
        **QUICK,
    }
    thought = {"messages": [user(FRANCE)], "temperature": 0, "enable_thinking": True, "max_tokens": 8}

    def run(index: int) -> str:
        with stack.client(key) as client:
            if index % 2:
                client.post("/v1/chat/completions", json=thought | {"thinking_budget": 12 + index % 3})
                return ""
            return text(client.post("/v1/chat/completions", json=counting).json())

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(run, range(96)))[::2]
    # Then none of the answers has the end of a thought in it
    assert "fifteen" in answers[0]
    assert set(answers) == {answers[0]}


@both_routes
def test_include_usage_ends_a_stream_with_its_counts(client: httpx.Client, path: str) -> None:
    body = {"messages": [user(FRANCE)], "stream": True, "temperature": 0, **QUICK}
    assert all("usage" not in chunk for chunk in events(client.post(path, json=body)))
    last = events(client.post(path, json=body | {"include_usage": True}))[-1]
    assert last["usage"]["output_tokens"] == 8
    assert last["usage"]["tokens_per_second"] > 0


def test_kawai_s_defaults_hold_on_its_own_path_only(client: httpx.Client) -> None:
    # Given a stream that asks for nothing
    body = {"messages": [user(FRANCE)], "stream": True}
    # Then on Kawai's path it is counted, and thinks
    chunks = events(client.post("/kawai/v1/chat/completions", json=body))
    assert chunks[-1]["usage"]["reasoning_tokens"] > 0
    # And on OpenAI's it is not counted
    assert all("usage" not in chunk for chunk in events(client.post("/v1/chat/completions", json=body)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", -2),
        ("min_p", 1.5),
        ("repeat_penalty", 0),
        ("repeat_last_n", -2),
        ("dry_multiplier", -1),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0),
        ("dry_penalty_last_n", -2),
        ("xtc_probability", 2),
        ("xtc_threshold", 0),
        ("xtc_min_keep", -1),
        ("enable_thinking", "perhaps"),
        ("reasoning_effort", "huge"),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
    ],
)
@both_routes
def test_what_is_out_of_range_is_refused_by_name(client: httpx.Client, path: str, field: str, value: Any) -> None:
    response = client.post(path, json={"messages": [user(FRANCE)], field: value})
    assert response.status_code == 400
    told = response.json()["error"]
    assert (told if path == "/chat" else told["message"]).startswith(f"{field}: ")
    if path != "/chat":
        assert told["param"] == field
