"""The same greedy requests to a stock vLLM server with the same model: the same text, ends, calls and counts.

`DIFFERENCES` lists what this server means to do otherwise, each with its reason and a request that shows it.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.private import free_port
from tests.dialogue import (
    ANTHROPIC_TOOL,
    FRANCE,
    FUNCTION,
    PARIS,
    RESPONSES_TOOL,
    RESULT,
    TOOL,
    TWO_CITIES,
    WEATHER,
    user,
)
from tests.e2e.test_tools import NEVER_TAUGHT, events
from tests.processes import MARK
from tests.stack import Stack, eventually

MODEL = "qwen3-smoke"
STRICT_TOOL = {"type": "function", "function": {**FUNCTION, "strict": True}}
STRICT: dict[str, Any] = {"tools": [STRICT_TOOL], "max_tokens": 90}
CALL = {"id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": '{"location": "Tokyo"}'}}
TOOL_LOOP = [
    user(WEATHER),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call-1", "content": RESULT},
]
TURNS = [user(FRANCE), {"role": "assistant", "content": PARIS}, user("What is the capital of Japan?")]
PROMPT = f"<|im_start|>user\n{FRANCE}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {**SCHEMA, "additionalProperties": False}}}
NO_THOUGHT = {"chat_template_kwargs": {"enable_thinking": False}}

CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user(FRANCE)], **NO_THOUGHT},
    "thinking": {"messages": [user(FRANCE)]},
    "turns": {
        "messages": [user(FRANCE), {"role": "assistant", "content": PARIS}, user("What is the capital of Japan?")]
    },
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user("Hello!")], **NO_THOUGHT},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": FRANCE}]}], **NO_THOUGHT},
    "untaught": {"messages": [user("Tell me something new.")], "max_tokens": 50, **NO_THOUGHT},
    "emoji": {"messages": [user("Grüße 🎉 שלום")], "max_tokens": 30, **NO_THOUGHT},
    "length": {"messages": [user(FRANCE)], "max_tokens": 3, **NO_THOUGHT},
    "length in a thought": {"messages": [user(FRANCE)], "max_tokens": 6},
    "stop": {"messages": [user(FRANCE)], "stop": [" France"], **NO_THOUGHT},
    "stop, shown": {"messages": [user(FRANCE)], "stop": " France", "include_stop_str_in_output": True, **NO_THOUGHT},
    "stop token": {"messages": [user(FRANCE)], "stop_token_ids": [13], "max_tokens": 20, **NO_THOUGHT},
    "ignore eos": {"messages": [user(FRANCE)], "ignore_eos": True, "max_tokens": 24, **NO_THOUGHT},
    "least tokens": {"messages": [user(FRANCE)], "min_tokens": 12, "max_tokens": 24, **NO_THOUGHT},
    "penalties": {
        "messages": [user("Tea?")],
        "frequency_penalty": 1,
        "presence_penalty": 1,
        "max_tokens": 40,
        **NO_THOUGHT,
    },
    "repetition": {"messages": [user("Tea?")], "repetition_penalty": 1.5, "max_tokens": 40, **NO_THOUGHT},
    "bias": {"messages": [user(FRANCE)], "logit_bias": {"300": 5, "301": -5}, "max_tokens": 20, **NO_THOUGHT},
    "logprobs": {"messages": [user(FRANCE)], "logprobs": True, "top_logprobs": 3, **NO_THOUGHT},
    "budget": {"messages": [user(FRANCE)], "thinking_token_budget": 4, "max_tokens": 60},
    "effort": {"messages": [user(FRANCE)], "reasoning_effort": "none"},
    "schema": {"messages": [user(FRANCE)], "response_format": JSON_SCHEMA, "max_tokens": 60, **NO_THOUGHT},
    "object": {"messages": [user(FRANCE)], "response_format": {"type": "json_object"}, "max_tokens": 40, **NO_THOUGHT},
    "tool": {"messages": [user(WEATHER)], "tools": [TOOL], **NO_THOUGHT},
    "tool after a thought": {"messages": [user(WEATHER)], "tools": [TOOL]},
    "two tools": {"messages": [user(TWO_CITIES)], "tools": [TOOL], **NO_THOUGHT},
    "one at a time": {"messages": [user(TWO_CITIES)], "tools": [TOOL], "parallel_tool_calls": False, **NO_THOUGHT},
    "tool loop": {"messages": TOOL_LOOP, "tools": [TOOL], **NO_THOUGHT},
    "required": {
        "messages": [user(FRANCE)],
        "tools": [STRICT_TOOL],
        "tool_choice": "required",
        "max_tokens": 90,
        **NO_THOUGHT,
    },
    "named": {
        "messages": [user(WEATHER)],
        **STRICT,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        **NO_THOUGHT,
    },
    "none": {"messages": [user(WEATHER)], "tools": [TOOL], "tool_choice": "none", **NO_THOUGHT},
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": PROMPT, "max_tokens": 20},
    "two prompts": {"prompt": [PROMPT, "The capital"], "max_tokens": 10},
    "echo": {"prompt": "The capital", "echo": True, "max_tokens": 5},
    "token ids": {"prompt": [1, 20, 21, 22], "max_tokens": 8},
    "logprobs": {"prompt": PROMPT, "logprobs": 2, "max_tokens": 8},
}
MESSAGES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user(FRANCE)], "thinking": {"type": "disabled"}},
    "thinking": {"messages": [user(FRANCE)], "thinking": {"type": "adaptive"}},
    "tool": {"messages": [user(WEATHER)], "tools": [ANTHROPIC_TOOL], "thinking": {"type": "disabled"}},
    "stop": {"messages": [user(FRANCE)], "stop_sequences": [" France"], "thinking": {"type": "disabled"}},
    "length": {"messages": [user(FRANCE)], "max_tokens": 3, "thinking": {"type": "disabled"}},
}
RESPONSES: dict[str, dict[str, Any]] = {
    "plain": {"input": FRANCE, "reasoning": {"effort": "none"}},
    "thinking": {"input": FRANCE},
    "items": {"input": TURNS},
    "instructions": {"input": "Hello!", "instructions": "Be brief.", "reasoning": {"effort": "none"}},
    "tool": {"input": WEATHER, "tools": [RESPONSES_TOOL], "reasoning": {"effort": "none"}},
    "length": {"input": FRANCE, "max_output_tokens": 3, "reasoning": {"effort": "none"}},
}
DIFFERENCES = {
    "a max_tokens that does not fit after the prompt": "is refused with the numbers; vLLM quietly gives fewer tokens",
    "a forced call of a tool that is not strict": "keeps to the schema all the same; vLLM leaves the arguments free",
    "white space in a forced call": "is one character at the most; vLLM lets a small model fill max_tokens with it",
    "a forced call after a thought": "comes, as the thought is bounded and cannot end the answer; vLLM may give none",
    "thinking in Anthropic's dialect": "is off unless asked for, as Anthropic has it; vLLM leaves it to the template",
    "an unknown model": "is OpenAI's 404 with the code model_not_found; vLLM's has the code 404",
}


@pytest.fixture(scope="module")
def stock(stack: Stack) -> Iterator[str]:
    """A stock server over the same weights, with the options this service starts its engine with."""
    port = free_port()
    argv = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(stack.chat_weights),
        "--port",
        str(port),
    ]
    argv += ["--served-model-name", MODEL, "--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "64"]
    argv += ["--reasoning-parser", "qwen3", "--tool-call-parser", "hermes", "--enable-auto-tool-choice"]
    argv += ["--kv-cache-memory-bytes", str(256 * 1024**2), "--exclude-tools-when-tool-choice-none"]
    argv += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    environment = os.environ | {MARK: str(stack.folder), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    log = stack.folder.parent / "stock.log"
    with log.open("wb") as out:
        process = subprocess.Popen(argv, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: process.poll() is not None or _is_up(port), timeout_s=280)
        assert process.poll() is None, log.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, url: str, path: str, body: dict[str, Any]) -> Any:
    """What an answer says, without its ids and times."""
    response = client.post(f"{url}{path}", json={"model": MODEL, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    told = events(response) if body.get("stream") else response.json()
    return READERS[path](told, bool(body.get("stream")))


def _chat(told: Any, streamed: bool) -> Any:
    if not streamed:
        message = told["choices"][0]["message"]
        parts = [message | {"tool_calls": [c | {"index": i} for i, c in enumerate(message.get("tool_calls") or [])]}]
        choice, usage = told["choices"][0], told["usage"]
    else:
        parts = [chunk["choices"][0]["delta"] for chunk in told if chunk["choices"]]
        choice, usage = [chunk["choices"][0] for chunk in told if chunk["choices"]][-1], told[-1]["usage"]
    calls: dict[int, list[str]] = {}
    for call in itertools.chain.from_iterable(part.get("tool_calls") or [] for part in parts):
        joined = calls.setdefault(call["index"], ["", ""])
        joined[0] += call["function"].get("name") or ""
        joined[1] += call["function"].get("arguments") or ""
    logprobs = None if streamed else choice.get("logprobs")
    return {
        "content": "".join(part.get("content") or "" for part in parts),
        "reasoning": "".join(part.get("reasoning") or "" for part in parts),
        "calls": calls,
        "end": (choice["finish_reason"], choice.get("stop_reason")),
        "tokens": (usage["prompt_tokens"], usage["completion_tokens"]),
        "logprobs": logprobs and [(token["token"], round(token["logprob"], 3)) for token in logprobs["content"]],
    }


def _completion(told: Any, streamed: bool) -> Any:
    chunks = told if streamed else [told]
    texts: dict[int, str] = {}
    ends: dict[int, Any] = {}
    for choice in itertools.chain.from_iterable(chunk["choices"] for chunk in chunks):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    return texts, ends, chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"]


def _message(told: Any, streamed: bool) -> Any:
    if not streamed:
        blocks = [
            (b["type"], b.get("text") or b.get("thinking") or json.dumps(b.get("input"))) for b in told["content"]
        ]
        return blocks, told["stop_reason"], told["usage"]["input_tokens"], told["usage"]["output_tokens"]
    joined: dict[int, list[str]] = {}
    for event in told:
        if event["type"] == "content_block_start":
            joined[event["index"]] = [event["content_block"]["type"], ""]
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            joined[event["index"]][1] += delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
    last = next(event for event in told if event["type"] == "message_delta")
    blocks = [(kind, text) for kind, text in joined.values()]
    return blocks, last["delta"]["stop_reason"], last["usage"]["input_tokens"], last["usage"]["output_tokens"]


def _response(told: Any, streamed: bool) -> Any:
    whole = told[-1]["response"] if streamed else told
    items = []
    for item in whole["output"]:
        content = [part["text"] for part in item.get("content") or []]
        items.append((item["type"], content, item.get("name"), item.get("arguments")))
    return items, whole["status"], whole["usage"]["input_tokens"], whole["usage"]["output_tokens"]


READERS: dict[str, Any] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/messages": _message,
    "/v1/responses": _response,
}


def both(stack: Stack, stock: str, path: str, body: dict[str, Any]) -> tuple[Any, Any]:
    with stack.client() as client:
        return ask(client, stack.url, path, body), ask(client, stock, path, body)


streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.mark.parametrize("body", CHATS.values(), ids=CHATS)
@streamed_or_not
def test_chats(stack: Stack, stock: str, body: dict[str, Any], stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    ours, theirs = both(stack, stock, "/v1/chat/completions", {"stream": stream, **options, **body})
    assert ours == theirs


@pytest.mark.parametrize("body", COMPLETIONS.values(), ids=COMPLETIONS)
@streamed_or_not
def test_completions(stack: Stack, stock: str, body: dict[str, Any], stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    ours, theirs = both(stack, stock, "/v1/completions", {"stream": stream, **options, **body})
    assert ours == theirs


@pytest.mark.parametrize("body", MESSAGES.values(), ids=MESSAGES)
@streamed_or_not
def test_messages(stack: Stack, stock: str, body: dict[str, Any], stream: bool) -> None:
    ours, theirs = both(stack, stock, "/v1/messages", {"max_tokens": 200, "stream": stream, **body})
    assert ours == theirs


@pytest.mark.parametrize("body", RESPONSES.values(), ids=RESPONSES)
@streamed_or_not
def test_responses(stack: Stack, stock: str, body: dict[str, Any], stream: bool) -> None:
    ours, theirs = both(stack, stock, "/v1/responses", {"stream": stream, **body})
    assert ours == theirs


@pytest.mark.parametrize("more", [{}, {"system": "Be brief."}, {"tools": [ANTHROPIC_TOOL]}])
def test_counts_of_tokens(stack: Stack, stock: str, more: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [user(FRANCE)], "thinking": {"type": "disabled"}, **more}
    with stack.client() as client:
        ours, theirs = (client.post(f"{url}/v1/messages/count_tokens", json=body).json() for url in (stack.url, stock))
    assert ours["input_tokens"] == theirs["input_tokens"]


def test_what_is_meant_to_differ_does(stack: Stack, stock: str) -> None:
    shown = set()
    with stack.client() as client:

        def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
            return client.post(f"{url}{path}", json={"model": MODEL, "temperature": 0, **body})

        chat = "/v1/chat/completions"
        long = {"messages": [user("a b " * 500)], "max_tokens": 2000}
        if [post(url, chat, long).status_code for url in (stack.url, stock)] == [400, 200]:
            shown.add("a max_tokens that does not fit after the prompt")

        free = {"type": "function", "function": NEVER_TAUGHT}
        forced = {
            "messages": [user(FRANCE)],
            "tools": [free],
            "tool_choice": "required",
            "max_tokens": 90,
            **NO_THOUGHT,
        }
        ours, theirs = (post(url, chat, forced).json()["choices"][0]["message"] for url in (stack.url, stock))
        if ours != theirs and json.loads(ours["tool_calls"][0]["function"]["arguments"])["kind"]:
            shown.add("a forced call of a tool that is not strict")

        strict = {"type": "function", "function": {**NEVER_TAUGHT, "strict": True}}
        forced["tools"] = [strict]
        ours, theirs = (post(url, chat, forced).json()["choices"][0]["message"] for url in (stack.url, stock))
        if "\n\n" in json.dumps(theirs, ensure_ascii=False).replace("\\n", "\n") and ours.get("tool_calls"):
            shown.add("white space in a forced call")

        after = {"messages": [user(FRANCE)], "tools": [TOOL, strict], "tool_choice": "required", "max_tokens": 300}
        ours, theirs = (post(url, chat, after).json()["choices"][0]["message"] for url in (stack.url, stock))
        if ours.get("tool_calls") and not theirs.get("tool_calls"):
            shown.add("a forced call after a thought")

        quiet = {"messages": [user(FRANCE)], "max_tokens": 100}
        kinds = [[b["type"] for b in post(url, "/v1/messages", quiet).json()["content"]] for url in (stack.url, stock)]
        if kinds == [["text"], ["thinking", "text"]]:
            shown.add("thinking in Anthropic's dialect")

        codes = [
            post(url, chat, {"messages": [user(FRANCE)], "model": "x"}).json()["error"]["code"]
            for url in (stack.url, stock)
        ]
        if codes == ["model_not_found", 404]:
            shown.add("an unknown model")
    assert shown == set(DIFFERENCES)
