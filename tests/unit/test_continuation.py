"""A stream that another run goes on with: the joined text is that of one run, however either was cut into chunks."""

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.core.continuation import may_continue
from server.core.errors import AnswerLost
from server.core.inbox import Waiter
from server.core.messages import Api, Frame, Job

TEXT = st.text(alphabet=st.sampled_from('ab \n"é🙂'), min_size=1, max_size=12)
Answer = tuple[str, str, list[str]]
"""Reasoning, content, and the arguments of each tool call."""
ANSWERS = st.tuples(TEXT, TEXT, st.lists(TEXT, max_size=2))
Cut = Callable[[str], list[str]]
_ids = itertools.count()


def job(api: Api = "chat", **body: Any) -> Job:
    now = time.time()
    fields = {"stream": True, "temperature": 0, **body}
    return Job("id", "m", "/x", fields, 1, "replies.x", now, now + 60, api=api)


@st.composite
def cutters(draw: st.DrawFn) -> Cut:
    """Cuts texts into chunks of one to a few characters, another way each time."""
    sizes = itertools.cycle(draw(st.lists(st.integers(1, 5), min_size=1, max_size=6)))

    def cut(text: str) -> list[str]:
        pieces = []
        while text:
            size = next(sizes)
            pieces.append(text[:size])
            text = text[size:]
        return pieces

    return cut


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Answer, Answer]:
    """An answer, and one that is like it, except that texts may end earlier or later."""
    first = draw(ANSWERS)

    def like(text: str) -> str:
        kept = draw(st.integers(1, len(text))) if draw(st.booleans()) else len(text)
        return text[:kept] + (draw(TEXT) if draw(st.booleans()) else "")

    return first, (like(first[0]), like(first[1]), [like(arguments) for arguments in first[2]])


def chat(answer: Answer, cut: Cut) -> list[bytes]:
    """A chat's chunks, as the engine makes them."""
    reasoning, content, calls = answer
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning": piece} for piece in cut(reasoning)] + [{"content": piece} for piece in cut(content)]
    items: list[dict[str, Any]] = []
    for index, arguments in enumerate(calls):
        first, *rest = cut(arguments)
        head = {"id": f"call-{next(_ids)}", "type": "function", "index": index}
        if len(first) % 2:  # some engines tell the name by itself
            items.append({**head, "function": {"name": f"f{index}", "arguments": first}})
        else:
            items.append({**head, "function": {"name": f"f{index}"}})
            rest = [first, *rest]
        items += [{"index": index, "function": {"arguments": piece}} for piece in rest]
    for together in cut("-" * len(items)):  # and where tokens come together, several items in one chunk
        deltas.append({"tool_calls": items[: len(together)]})
        items = items[len(together) :]
    chunks = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    chunks.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    created = next(_ids)
    return [json.dumps({"id": "x", "created": created, "choices": [chunk]}).encode() for chunk in chunks]


def completions(answer: Answer, cut: Cut) -> list[bytes]:
    """Two answers side by side."""
    texts = [[(index, piece) for piece in cut(text)] for index, text in enumerate(answer[:2])]
    told = [pair for pairs in itertools.zip_longest(*texts) for pair in pairs if pair]
    chunks = [{"index": index, "text": piece, "finish_reason": None} for index, piece in told]
    chunks += [{"index": index, "text": "", "finish_reason": "length"} for index in range(2)]
    return [json.dumps({"id": "x", "created": next(_ids), "choices": [chunk]}).encode() for chunk in chunks]


def events(*told: dict[str, Any]) -> list[bytes]:
    return [event["type"].encode() + b"\n" + json.dumps(event).encode() for event in told]


def messages(answer: Answer, cut: Cut) -> list[bytes]:
    """Anthropic's events."""
    reasoning, content, calls = answer
    blocks: list[tuple[dict[str, Any], str, str, str]] = [
        ({"type": "thinking"}, "thinking_delta", "thinking", reasoning),
        ({"type": "text"}, "text_delta", "text", content),
    ]
    for index, arguments in enumerate(calls):
        block = {"type": "tool_use", "id": f"toolu-{next(_ids)}", "name": f"f{index}"}
        blocks.append((block, "input_json_delta", "partial_json", arguments))
    told: list[dict[str, Any]] = [{"type": "message_start", "message": {"id": "x"}}]
    for index, (block, kind, field, text) in enumerate(blocks):
        told.append({"type": "content_block_start", "index": index, "content_block": block})
        for piece in cut(text):
            told.append({"type": "content_block_delta", "index": index, "delta": {"type": kind, field: piece}})
        if kind == "thinking_delta":
            signed = {"type": "signature_delta", "signature": f"{next(_ids)}"}
            told.append({"type": "content_block_delta", "index": index, "delta": signed})
        told.append({"type": "content_block_stop", "index": index})
    told.append({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}})
    return events(*told, {"type": "message_stop"})


def responses(answer: Answer, cut: Cut) -> list[bytes]:
    """The events of a response, whose items have ids."""
    begun = {"id": "resp_id", "created_at": next(_ids)}
    told: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    items = []
    for index, text in enumerate([*answer[:2], *answer[2]]):
        id_ = f"item-{next(_ids)}-"
        item = {"id": id_, "type": "function_call", "call_id": f"call-{next(_ids)}-", "name": f"f{index}"}
        at = {"output_index": index, "item_id": id_}
        told.append({"type": "response.output_item.added", "output_index": index, "item": item})
        told += [{"type": "response.function_call_arguments.delta", **at, "delta": piece} for piece in cut(text)]
        told.append({"type": "response.function_call_arguments.done", **at, "arguments": text})
        items.append({**item, "arguments": text})
        told.append({"type": "response.output_item.done", "output_index": index, "item": items[-1]})
    told.append({"type": "response.completed", "response": {**begun, "output": items}})
    return events(*({**event, "sequence_number": number} for number, event in enumerate(told)))


MAKERS: dict[Api, Callable[[Answer, Cut], list[bytes]]] = {
    "chat": chat,
    "completions": completions,
    "messages": messages,
    "responses": responses,
}


def run_of(name: str, chunks: list[bytes]) -> list[Frame]:
    """The frames of a run, its end included."""
    middle = [Frame("id", name, seq, "chunk", data) for seq, data in enumerate(chunks, 1)]
    last = len(middle) + 1
    counts = b'{"choices":[],"usage":{"completion_tokens":7}}'
    return [Frame("id", name, 0, "started"), *middle, Frame("id", name, last, "usage", counts),
            Frame("id", name, last + 1, "done")]  # fmt: skip


def joined(chunks: list[bytes]) -> dict[Any, Any]:
    """What a client makes of a stream: the texts by field, and what is told once, which must come once."""
    texts: dict[Any, str] = {}
    once: dict[Any, Any] = {}
    order: list[Any] = []

    def add(key: Any, text: str) -> None:
        texts[key] = texts.get(key, "") + text
        if key not in order:
            order.append(key)

    for data in chunks:
        name, _, body = data.partition(b"\n") if not data.startswith(b"{") else (b"", b"", data)
        content = json.loads(body)
        if not name:
            assert content["choices"], "a chunk without a choice"
            for choice in content["choices"]:
                at = choice["index"]
                assert (at, "finish") not in once, "text after the end"
                delta = choice.get("delta") or {}
                for field in ("reasoning", "content"):
                    add((at, field), delta.get(field) or "")
                assert not delta.get("reasoning") or not texts[at, "content"], "a thought after the answer"
                add((at, "text"), choice.get("text") or "")
                for call in delta.get("tool_calls") or []:
                    if call["function"].get("name"):
                        assert (at, call["index"]) not in once, "a tool call twice"
                        once[at, call["index"]] = (call["function"]["name"], call["type"], bool(call["id"]))
                    add((at, "call", call["index"]), call["function"].get("arguments", ""))
                if delta.get("role"):
                    assert (at, "role") not in once
                    once[at, "role"] = True
                if choice["finish_reason"]:
                    once[at, "finish"] = choice["finish_reason"]
            continue
        key = (content["type"], content.get("index"), content.get("output_index"))
        delta = content.get("delta")
        ended = [("content_block_stop", *key[1:], None), ("response.output_item.done", *key[1:], None)]
        assert not any(end in once for end in ended), "a delta after its end"
        if isinstance(delta, str):
            add(key, delta)
        elif delta and delta.get("type") in ("text_delta", "thinking_delta", "input_json_delta"):
            add(key, delta.get("text") or delta.get("thinking") or delta.get("partial_json"))
        else:
            key = (*key, (delta or {}).get("type"))
            assert key not in once, "an event twice"
            once[key] = True
            order.append(key)
    return {"texts": {k: v for k, v in texts.items() if v}, "once": once, "order": order}


async def told_by(waiter: Waiter) -> tuple[list[Frame], AnswerLost | None]:
    """Everything that was handed on, and how it ended."""
    frames: list[Frame] = []
    while not frames or frames[-1].kind != "done":
        try:
            frames.append(await waiter.next())
        except AnswerLost as exc:
            return frames, exc
    return frames, None


def data_of(frames: list[Frame]) -> list[bytes]:
    return [frame.data for frame in frames if frame.kind == "chunk"]


@pytest.mark.parametrize("api", MAKERS)
@given(
    answer=ANSWERS, cuts=st.tuples(cutters(), cutters(), cutters()), ends=st.tuples(st.floats(0, 1), st.floats(0, 1))
)
async def test_two_lost_workers_leave_no_trace(
    api: Api, answer: Answer, cuts: tuple[Cut, Cut, Cut], ends: tuple[float, float]
) -> None:
    # Given an answer, and workers that are lost somewhere in it
    make = MAKERS[api]
    whole = joined(make(answer, lambda text: [text]))
    waiter = Waiter(job(api))
    # When the last of three runs comes to its end
    for name, cut, end in zip("abc", cuts, (*ends, 1.0), strict=True):
        frames = run_of(name, make(answer, cut))
        for frame in frames if name == "c" else frames[: int(end * (len(frames) - 1))]:
            waiter.put(frame)
    frames, error = await told_by(waiter)
    waiter.close()
    # Then the client has what one run would have told, once
    assert error is None
    assert joined(data_of(frames)) == whole
    assert [frame.kind for frame in frames].count("usage") == 1
    contents = [json.loads(data.partition(b"\n")[2] or data) for data in data_of(frames)]
    if api == "responses":
        assert [content["sequence_number"] for content in contents] == list(range(len(contents)))
        added = [content["item"] for content in contents if content["type"].endswith("added")]
        ended = contents[-1]["response"]
        assert [(item["id"], item["call_id"]) for item in ended["output"]] == [
            (item["id"], item["call_id"]) for item in added
        ]
        assert ended["created_at"] == contents[0]["response"]["created_at"]
    if api == "chat":
        assert len({content["created"] for content in contents}) == 1


@pytest.mark.parametrize("api", MAKERS)
@given(
    answers=pairs() | st.tuples(ANSWERS, ANSWERS),
    cuts=st.tuples(cutters(), cutters()),
    end=st.floats(0, 1) | st.just(1.0),
)
async def test_what_was_told_is_a_beginning_of_one_answer(
    api: Api, answers: tuple[Answer, Answer], cuts: tuple[Cut, Cut], end: float
) -> None:
    # Given a second run that says what it likes
    make = MAKERS[api]
    waiter = Waiter(job(api))
    first = run_of("a", make(answers[0], cuts[0]))
    cut_at = int(end * (len(first) - 2))
    for frame in first[:cut_at]:
        waiter.put(frame)
    for frame in run_of("b", make(answers[1], cuts[1])):
        waiter.put(frame)
    frames, error = await told_by(waiter)
    waiter.close()
    got = joined(data_of(frames))
    second = joined(make(answers[1], cuts[1]))
    if error is None:
        # Then it is the second's answer as if there had been no other
        assert got == second
    else:
        # Or what was told and an error; and what came between goes on with an answer that did begin like that
        told = data_of(first[:cut_at])
        assert data_of(frames)[: len(told)] == told
        grown = {key for key, text in got["texts"].items() if text != joined(told)["texts"].get(key)}
        assert all(second["texts"][key].startswith(got["texts"][key]) for key in grown)


@pytest.mark.parametrize(
    ("body", "api", "expected"),
    [
        ({"temperature": 0}, "chat", True),
        ({"temperature": 0.7, "seed": 0}, "completions", True),
        ({"temperature": 0}, "messages", True),
        ({"temperature": 0}, "responses", True),
        ({"temperature": 0.7}, "chat", False),
        ({"temperature": None}, "chat", False),
        ({"temperature": 0, "logprobs": True}, "chat", False),
        ({"temperature": 0, "logprobs": 0}, "completions", False),
        ({"temperature": 0, "logprobs": False}, "chat", True),
        ({"temperature": 0, "include": ["message.output_text.logprobs"]}, "responses", False),
        ({"temperature": 0, "stream": False}, "chat", False),
    ],
)
def test_who_is_continued(body: dict[str, Any], api: Api, expected: bool) -> None:
    assert may_continue(job(api, **body)) is expected


async def test_who_samples_is_told_that_the_answer_is_lost() -> None:
    waiter = Waiter(job(temperature=1))
    answer: Answer = ("a", "b", [])
    for frame in [*run_of("a", chat(answer, list))[:4], *run_of("b", chat(answer, list))]:
        waiter.put(frame)
    frames, error = await told_by(waiter)
    waiter.close()
    assert error is not None
    assert len(frames) == 3
