"""Every dialect that streams, in short: what a client asks and reads in it, and what a worker says."""

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from server.core.messages import FrameKind, Job
from tests.faults.rig import MODEL

STREAMING = [
    "/chat", "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/ai/v1/chat/completions",
    "/kawai/v1/chat/completions",
]  # fmt: skip
"""The paths that answer in events where they are asked to."""
MOST = {"/v1/responses": "max_output_tokens"}
"""How the bound of an answer is called where it is not `max_tokens`."""
FOREVER = 10_000
"""Tokens that no test waits for."""


def body_of(path: str, content: str, max_tokens: int = FOREVER, *, model: str = MODEL, **fields: Any) -> dict[str, Any]:
    """A request that asks this."""
    name = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    said = [{"role": "user", "content": content}] if name == "messages" else content
    return {"model": model, name: said, MOST.get(path, "max_tokens"): max_tokens, **fields}


def text_in(data: str) -> str:
    """What the data of an event says."""
    if data == "[DONE]":
        return ""
    told = json.loads(data)
    if choices := told.get("choices"):
        told = choices[0]
    delta = told.get("delta", told)
    said = delta if isinstance(delta, str) else delta.get("text") or delta.get("content")
    return said if isinstance(said, str) else ""


def text_of(answer: dict[str, Any]) -> str:
    """What a whole answer says."""
    if choices := answer.get("choices"):
        answer = choices[0].get("message") or choices[0]
    if output := answer.get("output"):
        answer = output[0]
    content = answer.get("text") or answer["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


def asked(job: Job) -> str:
    """The last that was said in a job."""
    body = job.body
    said = body.get("prompt") or body.get("input") or body["messages"][-1]["content"]
    return said if isinstance(said, str) else "".join(part["text"] for part in said)


def most(job: Job) -> int:
    return int(job.body.get("max_tokens") or job.body.get("max_output_tokens") or FOREVER)


@dataclass(frozen=True)
class Speaker:
    """Says an answer as the engine does for this `api`: frames of a stream, or one result."""

    api: str
    head: dict[str, Any]

    def begin(self) -> list[bytes]:
        if self.api == "messages":
            return [_named("message_start", message={**self.head, "type": "message", "content": []})]
        return [_named("response.created", response=self.head)] if self.api == "responses" else []

    def say(self, text: str) -> bytes:
        if self.api == "messages":
            return _named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        if self.api == "responses":
            return _named("response.output_text.delta", delta=text)
        said = {"text": text} if self.api == "completions" else {"delta": {"content": text}}
        return msgspec.json.encode({**self.head, "choices": [{"index": 0, **said, "finish_reason": None}]})

    def end(self, usage: dict[str, int]) -> list[tuple[FrameKind, bytes]]:
        """Frames by their kind."""
        if self.api == "messages":
            return [("chunk", _named("message_delta", delta={}, usage=usage)), ("chunk", _named("message_stop"))]
        if self.api == "responses":
            return [("chunk", _named("response.completed", response={**self.head, "usage": usage}))]
        return [("usage", msgspec.json.encode({**self.head, "choices": [], "usage": usage}))]

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> bytes:
        parts = [{"type": "text", "text": text}]
        said: dict[str, Any] = {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}
        if self.api == "messages":
            said = {"content": parts}
        elif self.api == "responses":
            said = {"output": [{"type": "message", "content": parts}]}
        elif self.api == "chat":
            message = {"role": "assistant", "content": text}
            said = {"choices": [{"index": 0, "message": message, "finish_reason": reason}], "object": "chat.completion"}
        return msgspec.json.encode({**self.head, **said, "usage": usage})


def _named(name: str, **fields: Any) -> bytes:
    return name.encode() + b"\n" + msgspec.json.encode({"type": name, **fields})
