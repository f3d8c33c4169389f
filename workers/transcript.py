"""What is remembered of a chat, whatever dialect it was held in: the messages, and how the answer ended.

Reads the engine's JSON and no more of it than history needs; knows neither engine nor queue.
"""

from typing import Any

import msgspec

from server.core.conversation import MEDIA, Message
from server.core.messages import Api


class _Usage(msgspec.Struct):
    """Tokens by OpenAI's two sets of names, the chats' and the responses'."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Message(msgspec.Struct):
    """A message, or a delta of one."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = []


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Message | None = None
    delta: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    """As much of a completion, of a chunk of one, or of a response, as history needs."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    output: list[dict[str, Any]] = []
    status: str = ""


_decoder = msgspec.json.Decoder(_Answer)


class Transcript:
    """The assistant's message, put together from an answer or from its chunks. Of several choices, the first."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self.finish_reason = ""
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def add(self, data: bytes) -> bool:
        """Take in the JSON of an answer or of a chunk; whether it carries any choice."""
        answer = _decoder.decode(data)
        if answer.usage is not None:
            self.prompt_tokens = answer.usage.prompt_tokens or answer.usage.input_tokens or 0
            self.completion_tokens = answer.usage.completion_tokens or answer.usage.output_tokens or 0
        for choice in answer.choices:
            if choice.index == 0:
                self._add_choice(choice)
        for item in answer.output:
            self._add_item(item)
        if answer.status:
            self.finish_reason = "length" if answer.status == "incomplete" else "stop"
        return bool(answer.choices)

    def _add_choice(self, choice: _Choice) -> None:
        part = choice.message or choice.delta or _Message(content=choice.text)
        self._content.append(part.content or "")
        self._reasoning.append(part.reasoning or "")
        for call in part.tool_calls:
            self._add_call(call)
        self.finish_reason = choice.finish_reason or self.finish_reason

    def _add_call(self, call: dict[str, Any]) -> None:
        """Whole calls stand alone; a delta continues the call of its `index`."""
        index = call.get("index")
        if index is None or index >= len(self._tool_calls):
            self._tool_calls.append({k: v for k, v in call.items() if k != "index"})
            return
        arguments = (call.get("function") or {}).get("arguments") or ""
        function = self._tool_calls[index]["function"] = self._tool_calls[index].get("function") or {}
        function["arguments"] = (function.get("arguments") or "") + arguments

    def _add_item(self, item: dict[str, Any]) -> None:
        """An output item of a response."""
        text = "".join(part.get("text") or "" for part in item.get("content") or [])
        if item["type"] == "message":
            self._content.append(text)
        elif item["type"] == "reasoning":
            self._reasoning.append(text)
        elif item["type"] == "function_call":
            self._tool_calls.append(_tool_call(item))

    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": "".join(self._content)}
        if reasoning := "".join(self._reasoning):
            message["reasoning"] = reasoning
        if self._tool_calls:
            message["tool_calls"] = self._tool_calls
        return message


def _tool_call(item: dict[str, Any]) -> dict[str, Any]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def asked(api: Api, body: dict[str, Any]) -> list[Message]:
    """What the client said, as messages; media are left out, which history would keep forever."""
    if api == "completions":
        # Of several prompts the first, as of several answers.
        first = body["prompt"][0] if isinstance(body["prompt"], list) else body["prompt"]
        return [{"role": "user", "content": first if isinstance(first, str) else ""}]
    if api == "responses":
        given = body["input"]
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else [_of_item(i) for i in given]
        first = body.get("instructions")
    else:
        messages = [_without_media(message) for message in body["messages"]]
        first = body.get("system")
    return [{"role": "system", "content": first}, *messages] if first else messages


def _of_item(item: dict[str, Any]) -> Message:
    """An input item of a response as a message."""
    if item.get("type") == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_tool_call(item)]}
    if item.get("type") == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if item.get("type") == "reasoning":
        thought = "".join(part.get("text") or "" for part in item.get("content") or item.get("summary") or [])
        return {"role": "assistant", "content": "", "reasoning": thought}
    return _without_media({"role": item["role"], "content": item["content"]})


def _without_media(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_part_without_media(part) for part in content]}


def _part_without_media(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") in MEDIA:
        return {"type": part["type"]}
    return _without_media(part)  # a tool's result has parts of its own


def put_before_question(api: Api, body: dict[str, Any], context: str) -> dict[str, Any]:
    """The body with `context` before the text of the user's last message; unchanged where there is none."""
    field = "input" if api == "responses" else "messages"
    if isinstance(body[field], str):
        return {**body, field: f"{context}\n\n{body[field]}"}
    messages = list(body[field])
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message.get("role") != "user" or not message["content"]:
            continue
        content = message["content"]
        if isinstance(content, str):
            messages[index] = {**message, "content": f"{context}\n\n{content}"}
            return {**body, field: messages}
        for at, part in enumerate(content):
            if part.get("type") in ("text", "input_text") and part["text"]:
                with_context = {**part, "text": f"{context}\n\n{part['text']}"}
                messages[index] = {**message, "content": [*content[:at], with_context, *content[at + 1 :]]}
                return {**body, field: messages}
    return body
