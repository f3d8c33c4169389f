"""The messages' encodings: what goes in comes out, and who may read what another version wrote."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core.messages import (
    Cancel,
    EmbeddingResult,
    ErrorFrame,
    Frame,
    Job,
    Record,
    Status,
    decode,
    decode_embeddings,
    decode_frames,
    encode,
    encode_embeddings,
    encode_frames,
)

AWKWARD = 'nul \x00, quote " \\, line\nbreak, ünïcödé, 日本, 🦀, \u202ertl, \u2028'

JOB = Job(
    id="a1",
    model="qwen3-0.6b",
    endpoint="/chat",
    body={"messages": [{"role": "user", "content": AWKWARD}], "temperature": 0.7, "stream": False, "stop": None},
    key_id=7,
    reply_to="replies.server-1",
    created_at=1700000000.25,
    deadline=1700000300.25,
    session_id="session-1",
    recorded=False,
    traceparent="00-ab-cd-01",
)
RECORD = Record(
    request_id="a1",
    type="chat",
    key_id=7,
    model="qwen3-0.6b",
    endpoint="/chat",
    prompt_tokens=3,
    completion_tokens=4,
    created_at=1.5,
    finished_at=2.5,
    session_id="session-1",
    messages=[{"role": "user", "content": AWKWARD}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
    finish_reason="stop",
    texts=0,
)
FIELDS = {"request_id": "a", "run": "r", "seq": 3, "kind": "chunk", "data": b"\x00x"}
FRAME = Frame("a", "r", 3, "chunk", b"\x00x")
STATUS = Status("chat-host-1", "chat", "qwen3-0.6b", True, 3, 1, 55.5, 12.0, 9100, 4, 0.25, 13.0)


@pytest.mark.parametrize(
    "message",
    [JOB, RECORD, STATUS, Cancel("a1"), ErrorFrame(400, AWKWARD, "messages.0"), ErrorFrame(500, "")],
    ids=lambda message: type(message).__name__,
)
def test_a_message_comes_back_as_it_was(message: Any) -> None:
    assert decode(type(message), encode(message)) == message


def test_a_dead_job_can_be_read_by_a_person() -> None:
    # When a job is encoded, then its fields stand there in JSON, by their names
    body = encode(JOB)
    assert b'"model":"qwen3-0.6b"' in body
    assert "日本".encode() in body


@pytest.mark.parametrize("message", [JOB, RECORD, STATUS, Cancel("a1")], ids=lambda message: type(message).__name__)
def test_an_older_process_reads_a_newer_message(message: Any) -> None:
    # Given a message with a field that this version does not know
    newer = msgspec.json.encode({**msgspec.to_builtins(message), "priority": {"class": "gold"}})
    # When it is read, then what is known of it is as it was
    assert decode(type(message), newer) == message


def test_a_newer_process_reads_an_older_message() -> None:
    # Given a job without the fields that have defaults
    fields = msgspec.to_builtins(JOB)
    older = {k: v for k, v in fields.items() if k not in ("session_id", "recorded", "traceparent")}
    # When it is read
    job = decode(Job, msgspec.json.encode(older))
    # Then the defaults stand in
    assert (job.session_id, job.recorded, job.traceparent) == ("", True, "")
    assert job.body == JOB.body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"{",
        b'{"id": "x"}',
        b"\xff\xfe",
        encode(JOB)[:-1],
        encode(JOB) + b"x",
        encode(JOB).replace(b'"key_id":7', b'"key_id":"7"'),
        encode(JOB).replace(b'"a1"', b"null"),
        encode(JOB)[:-1] + b',"body":' + b'{"x":' * 5000 + b"0" + b"}" * 5001,
    ],
)
def test_what_is_no_job_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(Job, body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        encode_frames([FRAME])[:-1],
        msgspec.msgpack.encode([{"request_id": "a"}]),
        msgspec.msgpack.encode([{**FIELDS, "kind": "gossip"}]),
        msgspec.msgpack.encode({}),
    ],
)
def test_what_are_no_frames_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_frames(body)


def test_frames_of_a_newer_version_are_read() -> None:
    newer = msgspec.msgpack.encode([{**FIELDS, "lane": "batch"}])
    assert decode_frames(newer) == [FRAME]


FRAMES = st.builds(
    Frame,
    request_id=st.text(st.characters(exclude_categories=["Cs"])),
    run=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    seq=st.integers(0, 2**40),
    kind=st.sampled_from(["started", "chunk", "usage", "result", "error", "done"]),
    data=st.binary(max_size=200),
)


@given(st.lists(FRAMES, max_size=20))
@settings(deadline=None)
def test_any_frames_come_back_in_order(frames: list[Frame]) -> None:
    assert decode_frames(encode_frames(frames)) == frames


def test_vectors_come_back_bit_for_bit() -> None:
    # Given vectors with values that text would round
    vectors = np.array([[0.1, -1e-30, 3.4e38], [np.pi, 0.0, -0.0]], dtype="<f4")
    result = EmbeddingResult("vectors", 3, 5, vectors.tobytes())
    # When they travel
    arrived = decode_embeddings(encode_embeddings(result))
    # Then nothing about them has changed
    assert arrived == result
    assert np.frombuffer(arrived.vectors, "<f4").reshape(-1, 3).tobytes() == vectors.tobytes()
