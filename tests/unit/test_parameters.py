"""Sampling parameters: by which names the engine gets them, and where Kawai's defaults hold."""

from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from server.dialects import kawai, native, openai
from server.limits import MIN_XTC_THRESHOLD
from server.schemas.chat import ChatRequest
from server.schemas.openai import ChatCompletionsRequest
from server.schemas.parameters import SamplingParameters
from tests.unit.fake_requests import FakeDispatcher, body_of, frame, request_of

HELLO = [{"role": "user", "content": "Hello!"}]
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
ANSWER = {
    "id": "x",
    "object": "x",
    "created": 1,
    "model": "x",
    "usage": USAGE,
    "choices": [{"index": 0, "message": {"content": "Hi."}, "finish_reason": "stop"}],
}


def for_engine(**given: Any) -> dict[str, Any]:
    return SamplingParameters.model_validate(given).for_engine()


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({}, {}),
        ({"top_k": 40, "min_p": 0.1}, {"top_k": 40, "min_p": 0.1}),
        ({"top_k": 0, "min_p": 0, "logprobs": False, "top_logprobs": 0}, None),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none"}),
        ({"return_prompt": True}, {"return_prompt_text": True}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 20}),
        # Of streams, and no affair of the engine's
        ({"include_usage": True}, {}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repeat_penalty": 1.1, "repeat_last_n": -1}, {"repetition_penalty": 1.1}),
        (
            {"repeat_penalty": 1.1, "repeat_last_n": 64},
            {"vllm_xargs": {"repeat_penalty": 1.1, "repeat_last_n": 64}},
        ),
        ({"repeat_penalty": 1.1, "repeat_last_n": 0}, {"vllm_xargs": {"repeat_penalty": 1.1, "repeat_last_n": 0}}),
        ({"repeat_last_n": 64}, {}),
        ({"repeat_last_n": -1}, {}),
        # DRY and XTC: nothing of them unless they are switched on
        ({"dry_base": 2.0, "dry_allowed_length": 3, "dry_penalty_last_n": 9}, {}),
        ({"dry_multiplier": 0, "dry_base": 2.0}, {}),
        ({"dry_multiplier": 0.8}, {"vllm_xargs": {"dry_multiplier": 0.8}}),
        (
            {"dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 3, "dry_penalty_last_n": 9},
            {
                "vllm_xargs": {
                    "dry_multiplier": 0.8, "dry_base": 2.0, "dry_allowed_length": 3, "dry_penalty_last_n": 9,
                }
            },
        ),
        (
            {"dry_multiplier": 1, "dry_penalty_last_n": -1},
            {"vllm_xargs": {"dry_multiplier": 1, "dry_penalty_last_n": 0}},
        ),
        (
            {"dry_multiplier": 1, "dry_penalty_last_n": 0},
            {"vllm_xargs": {"dry_multiplier": 1, "dry_penalty_last_n": 0}},
        ),
        ({"xtc_threshold": 0.2, "xtc_min_keep": 2}, {}),
        ({"xtc_probability": 0, "xtc_threshold": 0.2}, {}),
        (
            {"xtc_probability": 0.5, "xtc_threshold": 0.2, "xtc_min_keep": 0},
            {"vllm_xargs": {"xtc_probability": 0.5, "xtc_threshold": 0.2, "xtc_min_keep": 0}},
        ),
        (
            {"xtc_probability": 0.5, "dry_multiplier": 1, "repeat_penalty": 2, "repeat_last_n": 8},
            {"vllm_xargs": {"dry_multiplier": 1, "xtc_probability": 0.5, "repeat_penalty": 2, "repeat_last_n": 8}},
        ),
    ],
)  # fmt: skip
def test_the_engine_gets_them_by_its_own_names(given: dict[str, Any], fields: dict[str, Any] | None) -> None:
    assert for_engine(**given) == (given if fields is None else fields)


@pytest.mark.parametrize("schema", [ChatRequest, ChatCompletionsRequest])
@pytest.mark.parametrize(
    ("value", "switch"),
    [(True, True), (False, False), ("true", True), ("false", False), ("True", True), ("FALSE", False), (None, None)],
)
def test_thinking_is_switched_by_a_word_too(schema: Any, value: Any, switch: bool | None) -> None:
    assert schema.model_validate({"messages": HELLO, "enable_thinking": value}).enable_thinking is switch


@pytest.mark.parametrize("value", ["", "yes", "1", " true", 1, 0, 1.0, [], {}, ["true"]])
def test_no_other_word_switches_thinking(value: Any) -> None:
    with pytest.raises(ValidationError):
        ChatCompletionsRequest.model_validate({"messages": HELLO, "enable_thinking": value})


@pytest.mark.parametrize(
    ("name", "least", "most", "beyond"),
    [
        ("top_k", -1, 2**31 - 1, (-2, 2**31)),
        ("min_p", 0, 1, (-0.1, 1.1)),
        ("repeat_penalty", 0.01, 10, (0, 10.1)),
        ("repeat_last_n", -1, 2**31 - 1, (-2, 2**31)),
        ("dry_multiplier", 0, 100, (-0.1, 100.1)),
        ("dry_base", 1, 10, (0.9, 10.1)),
        ("dry_allowed_length", 1, 16, (0, 17)),
        ("dry_penalty_last_n", -1, 2**31 - 1, (-2, 2**31)),
        ("xtc_probability", 0, 1, (-0.1, 1.1)),
        ("xtc_threshold", MIN_XTC_THRESHOLD, 1, (-0.1, MIN_XTC_THRESHOLD / 2, 1.1)),
        ("xtc_min_keep", 0, 2**31 - 1, (-1, 2**31)),
        ("top_logprobs", 0, 20, (-1, 21)),
        ("reasoning_effort", "none", "max", ("", "more")),
        ("return_prompt", True, False, ("true", 1)),
        ("include_usage", True, False, ("true", 0)),
        ("logprobs", True, False, (5, "true")),
    ],
)
def test_the_bounds(name: str, least: Any, most: Any, beyond: tuple[Any, ...]) -> None:
    for value in (least, most, None):
        assert getattr(SamplingParameters.model_validate({name: value}), name) == value
    for value in (*beyond, [], {}, "x"):
        with pytest.raises(ValidationError):
            SamplingParameters.model_validate({name: value})


async def asked(dialect: Any, **given: Any) -> dict[str, Any]:
    """The body that the engine is asked with, in this dialect."""
    dispatcher = FakeDispatcher(frame("result", ANSWER))
    schema = ChatRequest if dialect is native else ChatCompletionsRequest
    body = schema.model_validate({"messages": HELLO, **given})
    await dialect.chat(request_of(dispatcher), body)
    return dispatcher.calls[0].body


@pytest.mark.parametrize(
    ("given", "thinks"),
    [
        ({}, False),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": "false", "reasoning_effort": "high"}, False),
        ({"reasoning_effort": "minimal"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"model": "talker-thinking"}, True),
        ({"model": "talker-thinking", "enable_thinking": False}, False),
        ({"model": "talker-thinking", "reasoning_effort": "none"}, False),
    ],
)
async def test_thinking_in_the_services_own_dialect(given: dict[str, Any], thinks: bool) -> None:
    assert (await asked(native, **given))["chat_template_kwargs"] == {"enable_thinking": thinks}


async def test_kawais_defaults_hold_in_kawais_dialect_alone() -> None:
    # When nothing is said about sampling
    theirs, others = await asked(kawai), await asked(openai)
    # Then the documented values hold there, and elsewhere the model's own
    assert {name: value for name, value in theirs.items() if name not in others} == {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "vllm_xargs": {"repeat_penalty": 1.1, "repeat_last_n": 64},
        "chat_template_kwargs": {"enable_thinking": True},
    }
    assert set(others) == {"model", "messages", "stream"}


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"temperature": 0}, "temperature", 0),
        ({"top_k": -1}, "top_k", -1),
        ({"top_p": 1}, "top_p", 1),
        ({"repeat_penalty": 1}, "vllm_xargs", {"repeat_penalty": 1, "repeat_last_n": 64}),
        ({"repeat_last_n": -1}, "repetition_penalty", 1.1),
        ({"dry_multiplier": 1}, "vllm_xargs", {"repeat_penalty": 1.1, "repeat_last_n": 64, "dry_multiplier": 1}),
        ({"enable_thinking": "false"}, "chat_template_kwargs", {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", {"enable_thinking": False}),
        ({"reasoning_effort": "none"}, "reasoning_effort", "none"),
        ({"reasoning_effort": "none"}, "chat_template_kwargs", None),
        ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"repetition_penalty": 1.5}, "vllm_xargs", None),
        ({"temperature": None}, "temperature", 0.8),
    ],
)
async def test_what_is_given_wins_over_kawais_defaults(given: dict[str, Any], name: str, value: Any) -> None:
    assert (await asked(kawai, **given)).get(name) == value


@pytest.mark.parametrize(
    ("dialect", "given", "counted"),
    [
        (kawai, {}, True),
        (kawai, {"include_usage": False}, False),
        (kawai, {"stream_options": {"include_usage": False}}, False),
        (openai, {}, False),
        (openai, {"include_usage": True}, True),
        (openai, {"stream_options": {"include_usage": True}}, True),
        (openai, {"stream_options": {"include_usage": False}}, False),
    ],
)
async def test_a_stream_counts_its_tokens_unasked_in_kawais_dialect_alone(
    dialect: Any, given: dict[str, Any], counted: bool
) -> None:
    frames = [frame("chunk", {"choices": []}), frame("usage", {"choices": [], "usage": USAGE}), frame("done")]
    body = ChatCompletionsRequest.model_validate({"messages": HELLO, "stream": True, **given})
    stream = await body_of(await dialect.chat(request_of(FakeDispatcher(*frames)), body))
    told = [orjson.loads(event[6:]) for event in stream.split(b"\n\n")[:-2]]
    assert [chunk["usage"]["output_tokens"] for chunk in told if "usage" in chunk] == ([2] if counted else [])
