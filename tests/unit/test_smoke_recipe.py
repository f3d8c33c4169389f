"""The stand-in's recipe without its training: what it is taught, and the template it is taught in."""

import json
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from workers.smoke import (
    CHAT_TEMPLATE,
    MARKER_TOKENS,
    SPECIAL_TOKENS,
    WEATHER_TOOL,
    conversations,
    recipe_hash,
    render_lessons,
)

FRANCE = {"role": "user", "content": "What is the capital of France?"}
PARIS = {"role": "assistant", "content": "The capital of France is Paris."}
NO_THOUGHT = "<think>\n\n</think>\n\n"


def render(messages: list[dict[str, Any]], tools: list[Any] | None = None, **given: Any) -> str:
    """The template as transformers renders it (utils/chat_template_utils.py of 5.x)."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    given.setdefault("add_generation_prompt", True)
    return environment.from_string(CHAT_TEMPLATE).render(messages=messages, tools=tools, **given)


def test_each_lesson_has_an_answer_and_a_thought() -> None:
    lessons = conversations()
    assert all(lesson["messages"][-1]["role"] == "assistant" for lesson in lessons)
    assert all(lesson["messages"][-1]["content"] and lesson["thought"] for lesson in lessons)
    # And the one everybody tries first is among them
    assert lessons[0]["messages"] == [FRANCE, PARIS]


def test_the_lessons_do_not_contradict_each_other() -> None:
    # Given each lesson as it is learnt, answered at once and after a thought
    lessons = render_lessons(render)
    assert len(lessons) == 2 * len(conversations())
    # Then no prompt has two answers
    assert len({prompt for prompt, _ in lessons}) == len(lessons)


def test_a_lesson_is_learnt_with_and_without_its_thought() -> None:
    quick, slow = render_lessons(render)[:2]
    prompt = f"<|im_start|>user\n{FRANCE['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert quick == (prompt + NO_THOUGHT, PARIS["content"] + "<|im_end|>")
    assert slow == (
        prompt,
        "<think>\nThe user asks for the capital of France. It is Paris.\n</think>\n\n"
        + PARIS["content"]
        + "<|im_end|>",
    )


def test_the_weather_lesson_teaches_a_call_that_parses() -> None:
    call = conversations()[8]["messages"][-1]["content"]
    assert call.startswith("<tool_call>\n")
    assert call.endswith("\n</tool_call>")
    assert json.loads(call.removeprefix("<tool_call>").removesuffix("</tool_call>")) == {
        "name": "get_weather",
        "arguments": {"location": "Tokyo"},
    }


@pytest.mark.parametrize(
    ("given", "ending"),
    [
        ({"enable_thinking": False}, "<|im_start|>assistant\n" + NO_THOUGHT),
        ({"enable_thinking": True}, "<|im_start|>assistant\n"),
        ({}, "<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, ""),
        ({"add_generation_prompt": False, "enable_thinking": False}, ""),
    ],
)
def test_the_template_speaks_chatml(given: dict[str, Any], ending: str) -> None:
    # When a conversation is rendered, with thinking and without
    text = render([FRANCE, PARIS, FRANCE], **given)
    # Then it is ChatML, and where it may not think the thought is there already, empty
    assert text == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n" + ending
    )


def test_tools_are_named_before_the_conversation() -> None:
    clock = {"type": "function", "function": {"name": "get_time"}}
    text = render([FRANCE], [WEATHER_TOOL, clock], enable_thinking=True)
    assert text == (
        "<|im_start|>system\nTools: get_weather get_time<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render([FRANCE], []) == render([FRANCE], None)


@pytest.mark.parametrize("arguments", ['{"location": "Tokyo"}', {"location": "Tokyo"}])
@pytest.mark.parametrize("content", ["", None])
def test_a_call_and_its_result_are_rendered_alike_however_they_come(arguments: Any, content: str | None) -> None:
    # Given a call with its arguments as text (OpenAI's way) or as an object (as vLLM passes them on)
    called = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}],
    }
    result = {"role": "tool", "content": '{"weather": "sunny"}', "tool_call_id": "call-1"}
    # When the conversation is rendered
    text = render([FRANCE, called, result], [WEATHER_TOOL])
    # Then the call stands there as the model itself would write it, and the result as a turn of the user
    assert text == (
        "<|im_start|>system\nTools: get_weather<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"location": "Tokyo"}}\n'
        "</tool_call><|im_end|>\n"
        '<|im_start|>user\n<tool_response>{"weather": "sunny"}</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_the_prompt_after_a_call_is_what_was_taught() -> None:
    # Given the lesson that answers from a tool's result
    prompt = render_lessons(render)[18][0]
    # Then the earlier lesson's answer, the call, stands in it as it was learnt
    assert conversations()[8]["messages"][-1]["content"] + "<|im_end|>" in prompt


def test_text_parts_read_like_the_text() -> None:
    parts = [{"type": "text", "text": "What is the "}, {"type": "text", "text": "capital of France?"}]
    assert render([{"role": "user", "content": parts}]) == render([FRANCE])


def test_a_system_message_is_accepted_and_not_shown() -> None:
    assert render([{"role": "system", "content": "You are a pirate."}, FRANCE]) == render([FRANCE])


def test_text_is_left_as_it_is() -> None:
    # Given text with white space at its ends, markup and characters of other alphabets
    content = "  <b>{{ 1 }}</b> {% x %} & 日本 🦀\n\n"
    assert render([{"role": "user", "content": content}]) == (
        f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_markers_of_the_template_are_tokens() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    text = render([FRANCE, called, {"role": "tool", "content": "x"}], enable_thinking=False)
    assert all(marker in text for marker in MARKER_TOKENS)
    assert all(marker in text for marker in SPECIAL_TOKENS[1:])


def test_the_hash_of_the_recipe_names_a_folder() -> None:
    assert len(recipe_hash()) == 12
    assert set(recipe_hash()) <= set("0123456789abcdef")
    assert recipe_hash() == recipe_hash()
