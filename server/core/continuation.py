"""Going on with a stream whose worker was lost: another run of its job repeats what was told, and only the rest is
handed on.

The second run generates the answer again from its start. Greedy or seeded sampling makes the same text again; that it
did is checked, not believed: joined field by field, what the new run says must begin with what was told, and at the
first difference the stream ends with an error. Runs cut their text into chunks differently, so a chunk may be cut in
its middle. Knows the shapes of the engine's stream events, one reader an API, and nothing of queues.

What two runs of one job may differ in is kept as it was told first: `created`, the ids of tool calls and of
`responses`' items, and the numbers of its events.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from server.core.messages import Frame, Job

Content = dict[str, Any]
Lane = tuple[Any, ...]


class Differs(Exception):
    """The new run said something else than was told."""


@dataclass(slots=True)
class _Part:
    """A piece of what a frame says. `scope` is what is told in one order: a choice, or the whole of a message. A lane
    of a scope is one text, told bit by bit where the part has a `holder` (which has it under `field`), else at once.

    A part without a holder stands for itself: `text` is what two runs must agree on.
    """

    scope: int
    lane: Lane
    text: str
    holder: Content | None = None
    field: str = ""


Reader = Callable[[bytes, Content], Iterable[_Part]]
"""The parts of an event, by its name (empty where events have none) and its content."""


def may_continue(job: Job) -> bool:
    """Whether a second run of this job can be expected to say the same again.

    Temperature and seed must be the request's own: left out, the model's generation config decides, and most sample.
    Log probabilities belong to tokens, and where chunks are cut nobody here knows the tokens.
    """
    body = job.body
    if not body.get("stream") or job.api not in _READERS:
        return False
    logprobs = body.get("logprobs")  # of plain completions a number, 0 too asks for them
    if not (logprobs is None or logprobs is False) or body.get("include"):
        return False
    return body.get("temperature") == 0 or body.get("seed") is not None


class Continuation:
    """Follows a new run of a job of which `told` has been handed out already."""

    def __init__(self, job: Job, told: list[Frame]) -> None:
        self._read = _READERS[job.api]
        self._told: dict[int, dict[Lane, str]] = defaultdict(dict)
        self._repeated: dict[int, dict[Lane, int]] = defaultdict(dict)
        self._ids: dict[Lane, str] = {}
        self._renamed: dict[bytes, bytes] = {}
        self._created: Any = None
        self._counted = any(frame.kind == "usage" for frame in told)
        self._events = len(told)
        for frame in told:
            if frame.kind == "chunk":
                self._remember(frame)

    def follow(self, frame: Frame) -> Frame | None:
        """What of the new run's frame was not told yet, as a frame; None: nothing. Raises Differs."""
        if frame.kind in ("usage", "done"):
            for scope in self._told:
                self._check_repeated(scope)
        if frame.kind == "usage" and self._counted:
            return None
        if frame.kind not in ("chunk", "usage"):
            return frame
        name, content = _split(frame.data)
        self._rename(content)
        if frame.kind == "chunk":
            left = {(part.scope, part.lane) for part in self._read(name, content) if self._is_new(part)}
            if not left:
                return None
            if "choices" in content:
                _keep(content, left)
        self._events += 1
        return replace(frame, data=self._with_told_ids(_join(name, content)))

    def _remember(self, frame: Frame) -> None:
        name, content = _split(frame.data)
        for place, id_ in _ids(content):
            self._ids.setdefault(place, id_)
        for holder, field in _times(content):
            self._created = self._created or holder[field]
        for part in self._read(name, content):
            lanes = self._told[part.scope]
            lanes[part.lane] = lanes.get(part.lane, "") + part.text

    def _rename(self, content: Content) -> None:
        for place, id_ in _ids(content):
            if (told := self._ids.get(place, id_)) != id_:
                self._renamed[id_.encode()] = told.encode()
        for holder, field in _times(content):
            holder[field] = self._created or holder[field]
        if "sequence_number" in content:
            content["sequence_number"] = self._events

    def _is_new(self, part: _Part) -> bool:
        """Whether something of this part was not told; what was is taken off it. Raises Differs."""
        told = self._told[part.scope].get(part.lane, "")
        at = self._repeated[part.scope].get(part.lane, 0)
        if part.holder is None and told:
            if part.text != told:
                raise Differs
            self._repeated[part.scope][part.lane] = len(told)
            return False
        again = told[at : at + len(part.text)]
        if not part.text.startswith(again):
            raise Differs
        self._repeated[part.scope][part.lane] = at + len(again)
        part.text = part.text[len(again) :]
        if part.holder is not None:
            part.holder[part.field] = part.text
        if not part.text:
            return False
        self._check_repeated(part.scope)  # or it would come before something that was told
        return True

    def _check_repeated(self, scope: int) -> None:
        """Raise Differs where the new run has not said all that was told."""
        for lane, text in self._told[scope].items():
            if self._repeated[scope].get(lane, 0) < len(text):
                raise Differs

    def _with_told_ids(self, data: bytes) -> bytes:
        for new, told in self._renamed.items():
            data = data.replace(new, told)
        return data


def _split(data: bytes) -> tuple[bytes, Content]:
    """The name and the content of an event; a chat's has no name."""
    name, _, body = data.partition(b"\n") if not data.startswith(b"{") else (b"", b"", data)
    return name, msgspec.json.decode(body)


def _join(name: bytes, content: Content) -> bytes:
    body = msgspec.json.encode(content)
    return name + b"\n" + body if name else body


def _read_choices(_name: bytes, content: Content) -> Iterator[_Part]:
    for choice in content["choices"]:
        at = choice["index"]
        delta = choice.get("delta") or {}
        if delta.get("role"):
            yield _Part(at, ("role",), delta["role"])
        for field in ("reasoning", "content"):
            if delta.get(field):
                yield _Part(at, (field,), delta[field], delta, field)
        for call in delta.get("tool_calls") or []:
            function = call.get("function") or {}
            if function.get("name"):
                yield _Part(at, ("call", call["index"]), function["name"])
            if function.get("arguments"):
                yield _Part(at, ("arguments", call["index"]), function["arguments"], function, "arguments")
        if choice.get("text"):
            yield _Part(at, ("text",), choice["text"], choice, "text")
        if choice.get("finish_reason"):
            yield _Part(at, ("finish_reason",), choice["finish_reason"])


_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


def _read_message(name: bytes, content: Content) -> Iterator[_Part]:
    place = (name, content.get("index"))
    delta = content.get("delta") or {}
    kind = delta.get("type")
    if kind in _DELTAS:
        yield _Part(0, (*place, kind), delta[_DELTAS[kind]], delta, _DELTAS[kind])
    else:
        block = content.get("content_block") or {}
        yield _Part(0, (*place, kind), f"{kind} {block.get('type')} {block.get('name')} {delta.get('stop_reason')}")


def _read_response(name: bytes, content: Content) -> Iterator[_Part]:
    place = (name, content.get("output_index"), content.get("content_index"), content.get("summary_index"))
    if name.endswith(b".delta") and isinstance(content.get("delta"), str):
        yield _Part(0, place, content["delta"], content, "delta")
    else:
        item = content.get("item") or {}
        yield _Part(0, place, f"event {item.get('type')} {item.get('name')}")


_READERS: dict[str, Reader] = {
    "chat": _read_choices,
    "completions": _read_choices,
    "messages": _read_message,
    "responses": _read_response,
}


def _ids(content: Content) -> Iterator[tuple[Lane, str]]:
    """What an event names at random and later ones repeat, by its place."""
    item = content.get("item")
    if isinstance(item, dict):
        for field in ("id", "call_id"):
            if item.get(field):
                yield (content.get("output_index"), field), item[field]


def _times(content: Content) -> Iterator[tuple[Content, str]]:
    """Where an event says when the answer was begun."""
    if "created" in content:
        yield content, "created"
    response = content.get("response")
    if isinstance(response, dict) and "created_at" in response:
        yield response, "created_at"


def _keep(content: Content, left: set[tuple[int, Lane]]) -> None:
    """Take out of a chunk all but these lanes of its choices."""
    scopes = {scope for scope, _ in left}
    content["choices"] = [choice for choice in content["choices"] if choice["index"] in scopes]
    for choice in content["choices"]:
        at = choice["index"]
        if (at, ("finish_reason",)) not in left:
            choice["finish_reason"] = None
        if "text" in choice and (at, ("text",)) not in left:
            choice["text"] = ""
        delta = choice.get("delta")
        if not delta:
            continue
        for field in ("role", "reasoning", "content"):
            if (at, (field,)) not in left:
                delta.pop(field, None)
        calls = [_call_left(call, at, left) for call in delta.pop("tool_calls", None) or []]
        if kept := [call for call in calls if call is not None]:
            delta["tool_calls"] = kept


def _call_left(call: Content, at: int, left: set[tuple[int, Lane]]) -> Content | None:
    """An item of a chunk's tool calls without its head, where that was told; None where nothing of it is new. A call's
    head and the beginning of its arguments may be two items of one chunk."""
    function = call.get("function") or {}
    if function.get("name") and (at, ("call", call["index"])) in left:
        return call
    if function.get("arguments"):
        return {"index": call["index"], "function": {"arguments": function["arguments"]}}
    return None
