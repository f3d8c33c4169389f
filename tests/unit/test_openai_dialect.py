"""OpenAI's dialect: what the engine is asked, what is refused, and what of its answers is changed."""

from typing import Any

import pytest

from server.core.errors import AnswerLost, UnknownModel
from server.dialects import openai
from server.dialects.relay import Question
from server.schemas.openai import ChatCompletionsRequest
from tests.unit.fake_requests import DATA_URI, SOURCES, collect, data_of, frame, refused, request_of, turn_of

HELLO = {"role": "user", "content": "Hello!"}
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
STRICT = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}, "strict": True}}
LAX = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}, "strict": False}}
NAMED = {"type": "function", "function": {"name": "get_time"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"const": None}}}


def question(**fields: Any) -> Question:
    body = ChatCompletionsRequest.model_validate({"messages": [HELLO], **fields})
    return openai.question_of(request_of(), body)


def test_a_chat_of_messages_alone_adds_nothing() -> None:
    asked = question()
    assert asked.body == {"model": "talker", "messages": [HELLO], "stream": False}
    assert (asked.api, asked.text, asked.ignored, asked.variant.asked) == ("chat", "Hello!", (), None)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5, "top_p": 0.5, "n": 4, "seed": -(2**63), "stop": "x"},
        {"stop": ["a", "b", "c", "d"], "stop_token_ids": [0, 5], "min_tokens": 1, "ignore_eos": True},
        {"frequency_penalty": -2, "presence_penalty": 2, "logit_bias": {"5": -100.0}},
        {"max_tokens": 5, "max_completion_tokens": 6, "include_reasoning": False},
        {"skip_special_tokens": False, "include_stop_str_in_output": True, "stream": True},
        {"response_format": {"type": "json_object"}},
        {"response_format": SCHEMA},
        {"tools": [STRICT], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"tools": [STRICT], "tool_choice": NAMED},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"default": None}, "strict": True}}]},
        {"repetition_penalty": 1.1},
    ],
)
def test_what_the_engine_knows_is_passed_on(fields: dict[str, Any]) -> None:
    body = question(**fields).body
    body.pop("vllm_xargs", None)
    assert body == {"model": "talker", "messages": [HELLO], "stream": False, **fields}


MUST_ANSWER: list[dict[str, Any]] = [
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "tool_choice": NAMED},
    {"response_format": {"type": "json_object"}},
    {"response_format": SCHEMA},
]
MAY_ANSWER: list[dict[str, Any]] = [
    {},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "auto"},
    {"tools": [TOOL], "tool_choice": "none"},
    {"response_format": {"type": "text"}},
]


@pytest.mark.parametrize("promise", MUST_ANSWER)
@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({"max_tokens": 9}, 4),
        ({"max_tokens": 90, "max_completion_tokens": 7}, 3),
        # Of a context of 100, where nothing is said
        ({}, 25),
        ({"max_tokens": 9, "thinking_budget": 8}, 4),
        ({"max_tokens": 9, "enable_thinking": False}, None),
    ],
)
def test_thoughts_leave_room_for_an_answer_that_must_come(
    promise: dict[str, Any], fields: dict[str, Any], budget: int | None
) -> None:
    bounds = question(**promise, **fields).body.get("vllm_xargs", {})
    assert bounds.get("must_answer") == budget
    assert bounds.get("thinking_budget") == fields.get("thinking_budget")


def test_a_promised_answer_keeps_the_samplers_parameters() -> None:
    body = question(**MUST_ANSWER[0], xtc_probability=0.5).body
    assert body["vllm_xargs"] == {"xtc_probability": 0.5, "must_answer": 25}


@pytest.mark.parametrize("fields", MAY_ANSWER)
def test_thoughts_may_take_all_the_room_otherwise(fields: dict[str, Any]) -> None:
    assert "vllm_xargs" not in question(**fields, max_tokens=9).body


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"top_p": 0}, "top_p", 1e-6),
        ({"temperature": None}, "temperature", None),
        ({"tools": []}, "tools", None),
        # A call that is forced is held to its schema
        ({"tools": [TOOL, LAX], "tool_choice": "required"}, "tools", [STRICT, STRICT]),
        ({"tools": [TOOL], "tool_choice": NAMED}, "tools", [STRICT]),
        ({"tool_choice": "auto"}, "tool_choice", None),
        ({"tools": [], "tool_choice": "none"}, "tool_choice", None),
        ({"stream": None}, "stream", False),
        ({"repeat_penalty": 1.2, "repetition_penalty": 1.1}, "repetition_penalty", 1.1),
        ({"thinking_budget": 0, "thinking_token_budget": 9}, "vllm_xargs", {"thinking_budget": 0}),
        ({"thinking_token_budget": 9}, "vllm_xargs", {"thinking_budget": 9}),
        ({"user": "ada", "store": True}, "user", None),
    ],
)
def test_what_it_knows_otherwise_is_put_so(fields: dict[str, Any], name: str, value: Any) -> None:
    assert question(**fields).body.get(name) == value


@pytest.mark.parametrize(
    ("fields", "switch"),
    [
        ({}, None),
        ({"model": "talker-thinking"}, True),
        ({"model": "talker-search"}, None),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"enable_thinking": "false", "chat_template_kwargs": {"enable_thinking": True}}, False),
        ({"model": "talker-thinking", "enable_thinking": False}, False),
        ({"model": "talker-thinking", "chat_template_kwargs": {"enable_thinking": False}}, False),
        # The engine switches by the effort where nothing else is said
        ({"model": "talker-thinking", "reasoning_effort": "none"}, None),
        ({"enable_thinking": True, "reasoning_effort": "none"}, True),
    ],
)
def test_a_field_wins_over_the_models_name_for_thinking(fields: dict[str, Any], switch: bool | None) -> None:
    body = question(**fields).body
    assert body.get("chat_template_kwargs") == (None if switch is None else {"enable_thinking": switch})
    assert body["model"] == "talker"


def test_what_nobody_reads_is_named_and_null_is_as_good_as_left_out() -> None:
    asked = question(user="ada", store=False, metadata=None, chat_template=None, service_tier="auto")
    assert asked.ignored == ("user", "store", "service_tier")


@pytest.mark.parametrize(
    ("fields", "told", "param"),
    [
        ({"chat_template": "x"}, "chat_template: not accepted", "chat_template"),
        ({"user": "ada", "bad_words": ["x"]}, "bad_words: not accepted", "bad_words"),
        ({"vllm_xargs": {"xtc_probability": 1}}, "vllm_xargs: not accepted", "vllm_xargs"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools: not", "chat_template_kwargs.tools"),
        ({"tool_choice": "required"}, "tool_choice: there are no tools", "tool_choice"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice: there are no tools", "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name: 'x' is none of the tools",
            "tool_choice",
        ),
        (
            {"tools": [TOOL, {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]},
            "tools.1.function.parameters.type: must be one of",
            "tools.1.function.parameters",
        ),
        ({"top_logprobs": 1}, "top_logprobs: needs logprobs", "top_logprobs"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs: needs logprobs", "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x: a token id is", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: must be a number", "logit_bias"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema: a JSON Schema is an object",
            "response_format.json_schema.schema",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": DATA_URI}}]}]},
            "messages.0.content.0: talker takes text",
            "messages.0.content.0",
        ),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], told: str, param: str) -> None:
    with refused(told, param):
        question(**fields)


@pytest.mark.parametrize("model", ["nobody", "vectors", "talker-fast"])
def test_a_model_that_does_not_chat_is_unknown(model: str) -> None:
    with pytest.raises(UnknownModel):
        question(model=model)


async def told(dialect_stream: Any) -> list[Any]:
    *events, last = await collect(dialect_stream)
    return [data_of(event) for event in events] + (["DONE"] if last == b"data: [DONE]\n\n" else [data_of(last)])


def delta(**content: Any) -> Any:
    return {"choices": [{"index": 0, "delta": content}]}


@pytest.mark.parametrize("wants_usage", [True, False])
async def test_a_stream(wants_usage: bool) -> None:
    # Given an answer with a prompt to show, thoughts, text, and counts
    usage = {"completion_tokens": 6, "completion_tokens_details": {"reasoning_tokens": 4}}
    turn = turn_of(
        frame("chunk", {**delta(role="assistant"), "prompt_text": "<user>", "prompt_token_ids": [1]}),
        frame("chunk", delta(reasoning="Hm.")),
        frame("chunk", delta(content='"reasoning":')),
        frame("usage", {"choices": [], "usage": usage}, elapsed_s=2.0),
        frame("done"),
        sources=SOURCES,
    )
    # Then what belongs to the whole comes first, thoughts have two names, and counts come if they are wanted
    counts = usage | {"reasoning_tokens": 4, "output_tokens": 6, "tokens_per_second": 3.0}
    assert await told(openai._stream(turn, wants_usage)) == [
        {**delta(role="assistant"), "prompt": "<user>", "sources": SOURCES},
        delta(reasoning="Hm.", reasoning_content="Hm."),
        delta(content='"reasoning":'),
        *([{"choices": [], "usage": counts}] if wants_usage else []),
        "DONE",
    ]


async def test_a_stream_that_breaks_ends_with_the_error_and_without_done() -> None:
    turn = turn_of(frame("chunk", delta(role="assistant")), AnswerLost("Lost."))
    *_, last = await told(openai._stream(turn, True))
    assert last == {"error": {"message": "Lost.", "type": "server_error", "param": None, "code": None}}


def test_a_whole_answer() -> None:
    choices = [
        {"index": 0, "message": {"role": "assistant", "reasoning": "Hm.", "content": "Hi."}},
        {"index": 1, "message": {"role": "assistant", "tool_calls": [CALL]}},
    ]
    result = {"id": "x", "choices": choices, "usage": {"completion_tokens": 6}, "prompt_text": "<user>"}
    answer = openai.completion(turn_of(frame("result", result), sources=SOURCES))
    messages = [choice["message"] for choice in answer["choices"]]
    assert messages[0]["reasoning_content"] == messages[0]["reasoning"] == "Hm."
    assert (messages[1]["content"], "reasoning_content" in messages[1]) == (None, False)
    assert (answer["prompt"], answer["sources"], "prompt_text" in answer) == ("<user>", SOURCES, False)
    assert answer["usage"]["tokens_per_second"] == 0
