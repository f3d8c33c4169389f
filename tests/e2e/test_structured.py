"""Output held to a schema: it validates, thinking or not, streamed or not, in every dialect that has it."""

import json
from typing import Any

import httpx
import jsonschema
import pytest

from tests.dialogue import FRANCE, MODEL, user
from tests.e2e.test_tools import events
from tests.stack import Stack

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "rank": {"type": "integer", "minimum": 1, "maximum": 9},
        "rivers": {"type": "array", "items": {"enum": ["Seine", "Marne"]}, "minItems": 1, "maxItems": 2},
        "seat": {"type": "boolean"},
    },
    "required": ["city", "rank", "rivers", "seat"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "capital", "schema": SCHEMA, "strict": True}}
FLAT = {"type": "json_schema", "name": "capital", "schema": SCHEMA}

QUESTIONS = [FRANCE, "Hello!", "Something that nobody has taught it."]


def openai_chat(client: httpx.Client, question: str, thinks: bool, streamed: bool) -> str:
    body = {
        "model": MODEL,
        "messages": [user(question)],
        "response_format": NAMED,
        "temperature": 0,
        "enable_thinking": thinks,
        "max_tokens": 300,
        "stream": streamed,
    }
    response = client.post("/v1/chat/completions", json=body)
    if streamed:
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in events(response))
    return str(response.json()["choices"][0]["message"]["content"])


def responses(client: httpx.Client, question: str, thinks: bool, streamed: bool) -> str:
    body = {
        "model": MODEL,
        "input": question,
        "text": {"format": FLAT},
        "temperature": 0,
        "reasoning": {"effort": "high" if thinks else "none"},
        "max_output_tokens": 300,
        "stream": streamed,
    }
    response = client.post("/v1/responses", json=body)
    if streamed:
        return "".join(e["delta"] for e in events(response) if e["type"] == "response.output_text.delta")
    return "".join(item["content"][0]["text"] for item in response.json()["output"] if item["type"] == "message")


def anthropic(client: httpx.Client, question: str, thinks: bool, streamed: bool) -> str:
    body = {
        "model": MODEL,
        "messages": [user(question)],
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "temperature": 0,
        "thinking": {"type": "adaptive" if thinks else "disabled"},
        "max_tokens": 300,
        "stream": streamed,
    }
    response = client.post("/v1/messages", json=body)
    if streamed:
        return "".join(e["delta"].get("text", "") for e in events(response) if e["type"] == "content_block_delta")
    return "".join(block.get("text", "") for block in response.json()["content"])


@pytest.mark.parametrize("ask", [openai_chat, responses, anthropic], ids=["openai", "responses", "anthropic"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("thinks", [False, True], ids=["quick", "thinking"])
@pytest.mark.parametrize("question", QUESTIONS, ids=["taught", "short", "untaught"])
def test_the_answer_validates(client: httpx.Client, ask: Any, question: str, thinks: bool, streamed: bool) -> None:
    jsonschema.validate(json.loads(ask(client, question, thinks, streamed)), SCHEMA)


def test_json_object_is_an_object(stack: Stack, client: httpx.Client) -> None:
    # Given the tokens that end a string and an object made likely, or this model would not end by itself
    tokenizer = json.loads((stack.chat_weights / "tokenizer.json").read_text())
    ends = {str(tokenizer["model"]["vocab"][token]): 30 for token in ('"', "}")}
    body = {
        "messages": [user(FRANCE)],
        "response_format": {"type": "json_object"},
        "temperature": 0,
        "logit_bias": ends,
    }
    for thinks in (False, True):
        asked = body | {"enable_thinking": thinks, "max_tokens": 200}
        choice = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert isinstance(json.loads(choice["message"]["content"]), dict)
