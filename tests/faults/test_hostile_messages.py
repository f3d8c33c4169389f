"""Messages that no process of ours would send, straight into the real queues: refused, and the others unharmed."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server.core import topology
from server.core.amqp import AmqpLink
from server.core.messages import Frame, decode_frames, encode_frames
from tests.faults.broker import ctl
from tests.faults.guarded import Guarded
from tests.faults.rig import MODEL, Rig, until

JOBS = topology.jobs_queue(MODEL, "interactive")
HUGE = 10**30


@asynccontextmanager
async def link(parts: Rig) -> AsyncIterator[AmqpLink]:
    async def nothing(_link: AmqpLink) -> None:
        """It only sends, and asks."""

    made = AmqpLink(parts.amqp_url, "stranger", nothing)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def job(**fields: Any) -> dict[str, Any]:
    now = time.time()
    right = {
        "id": f"hostile-{uuid.uuid4().hex}",
        "model": MODEL,
        "endpoint": "/chat",
        "body": {"messages": [{"role": "user", "content": "hi"}]},
        "key_id": 1,
        "reply_to": "replies.nobody",
        "created_at": now,
        "deadline": now + 60,
    }
    return right | fields


def record(**fields: Any) -> dict[str, Any]:
    now = time.time()
    right = {
        "request_id": f"hostile-{uuid.uuid4().hex}",
        "type": "chat",
        "key_id": 1,
        "model": MODEL,
        "endpoint": "/chat",
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "created_at": now,
        "finished_at": now,
        "session_id": "hostile",
        "messages": [{"role": "user", "content": "hi"}],
        "finish_reason": "stop",
    }
    return right | fields


NOT_JSON = [b"", b"\x00", b"[]", b"null", b"{", b"\x80\x04\x95", b'{"id": "\\ud800"}', b"[" * 100_000, b"\xff" * 100]

JOBS_REFUSED: list[dict[str, Any]] = [
    {"id": 5},
    {"id": ""},
    {"id": "x" * 300},
    {"id": "a\x00b"},
    {"id": "a b"},
    {"id": None},
    {"model": "another"},
    {"model": "x" * 300},
    {"body": []},
    {"body": "x"},
    {"key_id": -1},
    {"key_id": HUGE},
    {"key_id": "1"},
    {"key_id": 1.5},
    {"deadline": -1},
    {"deadline": "soon"},
    {"created_at": -1},
    {"created_at": 1e300},
    {"api": "images"},
    {"lane": "fast"},
    {"recorded": "yes"},
    {"session_id": "a\x00b"},
    {"session_id": "x" * 300},
    {"traceparent": "x" * 5000},
    {"endpoint": "a\x00b"},
    # What would make answers into records, jobs and dead letters, or be too long for the broker
    {"reply_to": "history"},
    {"reply_to": "dead.v2"},
    {"reply_to": JOBS},
    {"reply_to": ""},
    {"reply_to": "replies." + "x" * 300},
    {"reply_to": "replies.a\x00b"},
]

JOBS_ANSWERED: list[dict[str, Any]] = [
    {"body": {}},
    {"body": {"messages": 5}},
    {"body": {"prompt": "x"}, "api": "completions"},
    {"body": {"input": ["x"]}, "api": "embeddings"},
    {"deadline": 0},
    {"deadline": 1e300, "body": {}},
]

NESTED = b"[" * 5000 + b"]" * 5000
"""Deeper than Python calls itself."""

RECORDS_REFUSED: list[dict[str, Any]] = [
    {"request_id": 5},
    {"request_id": "x" * 300},
    {"request_id": "a\x00b"},
    {"type": "image"},
    {"key_id": 2**62},
    {"key_id": HUGE},
    {"key_id": -1},
    {"key_id": 0},
    {"model": "a\x00b"},
    {"endpoint": "a\x00b"},
    {"session_id": "a\x00b"},
    {"session_id": "x" * 300},
    {"finish_reason": "a\x00b"},
    {"prompt_tokens": -1000},
    {"completion_tokens": HUGE},
    {"prompt_tokens": "1"},
    {"created_at": -1},
    {"created_at": 1e300},
    {"created_at": 250_000_000_000},
    {"messages": "x"},
    {"messages": [5]},
    {"texts": -1, "type": "embedding"},
]


@pytest.fixture
async def stranger(guarded: Guarded) -> AsyncIterator[AmqpLink]:
    async with link(guarded.parts) as made:
        yield made


async def dead(stranger: AmqpLink) -> int:
    return (await stranger.declare_queue(topology.DEAD))[0]


async def all_dead(stranger: AmqpLink, queue: str, bodies: list[bytes]) -> None:
    """Each is given up on, and nothing else is."""
    before = await dead(stranger)
    for body in bodies:
        await stranger.publish(queue, body)

    async def settled() -> bool:
        return await dead(stranger) >= before + len(bodies)

    await until(settled)
    await asyncio.sleep(0.3)
    assert await dead(stranger) == before + len(bodies)


async def still_works(guarded: Guarded) -> None:
    """A chat is answered, and recorded once."""
    assert not guarded.worker.exited
    session = f"well-{uuid.uuid4().hex}"
    async with guarded.parts.client(guarded.url, guarded.key) as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "session_id": session}
        assert (await client.post("/chat", json=body)).status_code == 200

        async def kept() -> Any:
            return (await client.get("/chat/history", params={"session_id": session})).json()

        assert len(await until(kept)) == 1


async def test_what_is_no_job_is_given_up_on(guarded: Guarded, stranger: AmqpLink) -> None:
    bodies = [*NOT_JSON, *(json.dumps(job(**fields)).encode() for fields in JOBS_REFUSED)]
    await all_dead(stranger, JOBS, bodies)
    await still_works(guarded)


async def test_a_job_that_cannot_be_done_is_answered_with_an_error(guarded: Guarded) -> None:
    # Given a reply queue of a stranger's own
    replies = f"replies.stranger-{uuid.uuid4().hex[:8]}"
    told: dict[str, list[str]] = {}

    async def setup(stranger: AmqpLink) -> None:
        await stranger.declare_queue(replies, exclusive=True)
        await stranger.consume(replies, lambda delivery: note(delivery.body))

    def note(body: bytes) -> None:
        for frame in decode_frames(body):
            told.setdefault(frame.request_id, []).append(frame.kind)

    stranger = AmqpLink(guarded.parts.amqp_url, "stranger", setup)
    await stranger.start()
    try:
        # When jobs come that no engine can do
        jobs = [job(reply_to=replies, **fields) for fields in JOBS_ANSWERED]
        for each in jobs:
            await stranger.publish(JOBS, json.dumps(each).encode())
        # Then each is answered with an error, once
        await until(lambda: all(told.get(each["id"], [])[-1:] == ["error"] for each in jobs))
    finally:
        await stranger.close()
    await still_works(guarded)


async def test_a_second_job_of_one_id_takes_no_slot(guarded: Guarded, stranger: AmqpLink) -> None:
    # Given one job that comes at once far more often than the worker has slots
    one = json.dumps(job(id=f"again-{uuid.uuid4().hex}")).encode()
    confirmed = [stranger.publish_soon(JOBS, one) for _ in range(500)]
    await asyncio.gather(*confirmed)
    # Then the worker is soon done with all of them, and takes what follows as before
    await until(lambda: settled(guarded))
    await still_works(guarded)


async def settled(guarded: Guarded) -> bool:
    async with guarded.parts.client(guarded.url) as client:
        workers = (await client.get("/health")).json()["workers"]
        return all(worker["running"] == 0 for worker in workers)


async def test_what_is_no_record_is_given_up_on_and_the_others_are_kept(guarded: Guarded, stranger: AmqpLink) -> None:
    # Given records of a key that exists, between others that Postgres will never take
    async with guarded.parts.store() as store:
        key_id = next(row["id"] for row in await store.list_keys() if row["name"] == "eve")
    good = [json.dumps(record(key_id=key_id, session_id="kept")).encode() for _ in range(20)]
    bad = [*NOT_JSON, *(json.dumps(record(**({"key_id": key_id} | fields))).encode() for fields in RECORDS_REFUSED)]
    bad += [body.replace(b'"hi"', NESTED) for body in bad[-1:]]
    before = await dead(stranger)
    mixed = [body for pair in zip(good * 2, bad, strict=False) for body in pair] + bad[len(good) * 2 :]
    # When they come together
    await asyncio.gather(*(stranger.publish(topology.HISTORY, body) for body in mixed))

    async def settled() -> bool:
        return await dead(stranger) >= before + len(bad)

    await until(settled)
    assert await dead(stranger) == before + len(bad)
    # Then each good one is there, once, though it came twice, and reading it back works
    async with guarded.parts.client(guarded.url, guarded.other_key) as client:

        async def kept() -> Any:
            return (await client.get("/chat/history", params={"session_id": "kept"})).json()

        found = await until(kept)
        assert len(found) == len(good)
        assert (await client.get("/usage")).json()["total_tokens"] == 2 * len(good)
    await still_works(guarded)


async def test_strange_frames_statuses_asks_and_cancels_harm_nobody(guarded: Guarded, stranger: AmqpLink) -> None:
    # Given all that listens: fanouts, and the reply queues of those who wait for answers
    listed = await ctl(guarded.parts.rabbitmq, "--quiet", "list_queues", "--vhost", guarded.parts.vhost, "name")
    replies = [name for name in listed.split() if name.startswith("replies.")]
    assert replies
    garbage = [*NOT_JSON, b'{"request_id": 5}', b'{"request_id": "x"}', json.dumps({"worker": 5}).encode()]
    garbage += [encode_frames([Frame("x", "y", 10**9, "chunk", b"{}")]), encode_frames([])]
    # When each is told what it does not understand
    for body in garbage:
        for fanout in (topology.CONTROL, topology.STATUS, topology.ASKS, topology.DEAD_LETTERS):
            stranger.broadcast(fanout, body)
        for queue in replies:
            stranger.send(queue, body)
    # Then all goes on
    await still_works(guarded)
    async with guarded.parts.client(guarded.url) as client:
        assert (await client.get("/health")).json()["rabbitmq_connected"]
