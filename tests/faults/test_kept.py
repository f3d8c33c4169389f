"""Requests with an `Idempotency-Key`: one generation, the same answer; and streams that are resumed, by either of two
server processes."""

import asyncio
import os
import signal
import time
from functools import partial
from typing import Any

import httpx
import psycopg
import pytest

from tests.faults.dialects import STREAMING, body_of, text_in, text_of
from tests.faults.engine.test_hostile_texts import TEXTS
from tests.faults.life import CHAT, Event, Life, events, life, numbers, say
from tests.faults.rig import Rig, until

KEY = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}


async def read(client: httpx.AsyncClient, count: int | None, method: str, path: str, **given: Any) -> list[Event]:
    """The first `count` events of a stream (None: all), which is left then."""
    async with client.stream(method, path, **given) as response:
        assert response.status_code == 200, await response.aread()
        found = []
        async for event in events(response):
            found.append(event)
            if len(found) == count:
                break
        return found


def ids(found: list[Event]) -> list[int]:
    return [int(event.id) for event in found]


def text(found: list[Event]) -> str:
    return "".join(event.text for event in found)


async def test_the_same_key_is_answered_once_by_two_servers_at_once(parts: Rig) -> None:
    async with life(parts) as running:
        body = say("count", max_tokens=50)
        clients = [running.client, running.other] * 3
        answers = await asyncio.gather(*(client.post(CHAT, json=body, headers=KEY) for client in clients))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert len({answer.headers["x-request-id"] for answer in answers}) == 1
        assert len({answer.headers["x-session-id"] for answer in answers}) == 1
        assert sum("idempotent-replayed" in answer.headers for answer in answers) == 5
        # After it has finished as well, in whatever order its fields come
        for client in (running.client, running.other):
            later = await client.post(CHAT, json=dict(reversed(body.items())), headers=KEY)
            assert later.content == answers[0].content
            assert later.headers["idempotent-replayed"] == "true"
        assert running.begun() == ["count"]
        assert await until(running.history)
        assert await running.usage() == (1, 51)


async def test_the_same_key_with_another_request_is_refused(parts: Rig) -> None:
    async with life(parts) as running:
        assert (await running.client.post(CHAT, json=say("count", max_tokens=3), headers=KEY)).status_code == 200
        for path, body in ((CHAT, say("other")), ("/chat", say("count", max_tokens=3))):
            refused = await running.other.post(path, json=body, headers=KEY)
            assert refused.status_code == 422
            assert "stands for another request" in refused.text
        # A key of the service's is a name space of its own
        async with parts.client(running.urls[0], await parts.new_key("stranger")) as stranger:
            assert (await stranger.post(CHAT, json=say("other", max_tokens=1), headers=KEY)).status_code == 200
        assert running.begun() == ["count", "other"]
        for wrong in ("", "x" * 256, "a\tb"):
            refused = await running.client.post(CHAT, json=say("x"), headers={"Idempotency-Key": wrong})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "Idempotency-Key"


async def test_what_failed_is_tried_again(parts: Rig) -> None:
    async with life(parts) as running:
        url, _ = await parts.server("impatient", REQUEST_TIMEOUT_S="0.5")
        async with parts.client(url) as client:
            assert (await client.post(CHAT, json=say("count", max_tokens=60), headers=KEY)).status_code == 504
        answer = await running.other.post(CHAT, json=say("count", max_tokens=60), headers=KEY)
        assert answer.json()["usage"]["completion_tokens"] == 60
        assert len(running.begun()) == 2


async def test_a_key_is_forgotten_in_time(parts: Rig) -> None:
    async with life(parts) as running:
        url, _ = await parts.server("forgetful", IDEMPOTENCY_TTL_S="1")
        async with parts.client(url) as client:
            body = say("count", max_tokens=1)
            first = await client.post(CHAT, json=body, headers=KEY)
            await asyncio.sleep(1.1)
            second = await client.post(CHAT, json=body, headers=KEY)
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        assert len(running.begun()) == 2


@pytest.mark.parametrize("by", ["the same server", "another server"])
async def test_streams_of_every_dialect_are_resumed(parts: Rig, by: str) -> None:
    async with life(parts) as running:
        then = running.client if by == "the same server" else running.other
        await asyncio.gather(*(resumed(running, then, path) for path in STREAMING))
        assert sorted(running.begun()) == sorted(STREAMING)
        entries = await until(lambda: _history(running, len(STREAMING)))
        ended = {(entry["finish_reason"], entry["usage"]["completion_tokens"]) for entry in entries}
        assert (len(entries), ended) == (len(STREAMING), {("stop", 150)})


async def resumed(running: Life, then: httpx.AsyncClient, path: str) -> None:
    # Given a client that read a part of a stream, and was cut off
    body, key = body_of(path, path, 150, stream=True), {"Idempotency-Key": path}
    async with running.client.stream("POST", path, json=body, headers=key) as response:
        request_id = response.headers["x-request-id"]
        reading = events(response)
        found = [await anext(reading) for _ in range(30)]
    # When it reads on, is cut off again, and reads on to the end; by the request's id or its own key
    rest = f"/v1/requests/{request_id}/events"
    found += await read(then, 30, "GET", rest, headers={"Last-Event-ID": found[-1].id})
    found += await read(then, None, "POST", path, json=body, headers=key | {"Last-Event-ID": found[-1].id})
    # Then it has all of it, once
    assert ids(found) == list(range(1, len(found) + 1))
    assert text(found) == numbers(150)
    assert any(end in found[-1].data for end in ("[DONE]", "message_stop", "response.completed"))
    # And what is finished is there from any point, too
    for client in (running.client, running.other):
        assert await read(client, None, "GET", rest) == found
        assert await read(client, None, "GET", rest, headers={"Last-Event-ID": "100"}) == found[100:]
        assert await read(client, None, "GET", rest, headers={"Last-Event-ID": "9999"}) == []


async def test_who_left_an_unstreamed_request_finds_it_at_another_server(parts: Rig) -> None:
    async with life(parts) as running:
        # Given requests in each dialect whose clients leave before there is an answer
        asking = [
            asyncio.create_task(
                running.client.post(path, json=body_of(path, path, 150), headers={"Idempotency-Key": path})
            )
            for path in STREAMING
        ]
        await until(lambda: len(running.begun()) == len(STREAMING))
        for task in asking:
            task.cancel()
        with psycopg.connect(parts.database_url) as connection:
            rows = connection.execute("SELECT idempotency_key, request_id FROM kept_answers").fetchall()
        assert sorted(path for path, _ in rows) == sorted(STREAMING)
        for path, request_id in rows:
            # When they look for them at another server, then they are told that they go on
            where = f"/v1/requests/{request_id}"
            answer = await running.other.get(where)
            assert answer.status_code == 200, answer.text
            found = answer.json()
            assert (found["status"], found["endpoint"]) == ("running", path)
        for path, request_id in rows:
            # And have the whole answer, in its dialect, as soon as it is there; and who asks again has the same
            where = f"/v1/requests/{request_id}"
            whole = await running.other.get(f"{where}/events")
            assert text_of(whole.json()) == numbers(150)
            last = {"Last-Event-ID": "1"}  # of which it has none
            assert (await running.client.get(f"{where}/events", headers=last)).content == whole.content
            again = await running.other.post(path, json=body_of(path, path, 150), headers={"Idempotency-Key": path})
            assert again.content == whole.content
            found = await until(partial(recorded, running, where))
            assert (found["status"], found["message"]["content"]) == ("completed", numbers(150))
        assert sorted(running.begun()) == sorted(STREAMING)


async def recorded(running: Life, where: str) -> Any:
    answer = await running.other.get(where)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found if found["usage"] else None


async def test_two_read_one_stream(parts: Rig) -> None:
    async with life(parts) as running:
        body = say("count", max_tokens=100, stream=True)
        both = await asyncio.gather(
            *(read(client, None, "POST", CHAT, json=body, headers=KEY) for client in (running.client, running.other))
        )
        assert both[0] == both[1]
        assert text(both[0]) == numbers(100)
        assert running.begun() == ["count"]


async def test_without_a_reader_it_ends_after_its_time_of_grace(parts: Rig) -> None:
    async with life(parts) as running:
        url, _ = await parts.server("graceful", RESUME_GRACE_S="2")
        async with parts.client(url) as client:
            body = say("count", stream=True)
            found = await read(client, 10, "POST", CHAT, json=body, headers=KEY)
            # Resumed in time, elsewhere, it goes on
            await asyncio.sleep(1)
            found += await read(running.other, 100, "POST", CHAT, json=body, headers=KEY | {"Last-Event-ID": "10"})
            assert ids(found) == list(range(1, 111))
            left = time.monotonic()
            assert await running.running() == 1
            # And left for longer it is cancelled
            await until(lambda: _idle(running))
            assert 1 < time.monotonic() - left < 4
            (entry,) = await until(running.history)
            assert entry["finish_reason"] == "cancelled"
            gone = await client.post(CHAT, json=body, headers=KEY | {"Last-Event-ID": "110"})
            assert gone.status_code == 404


async def test_the_server_that_makes_an_answer_is_killed(parts: Rig) -> None:
    async with life(parts) as running:
        body = say("count", max_tokens=150, stream=True)
        first = asyncio.create_task(read(running.client, None, "POST", CHAT, json=body, headers=KEY))
        await until(running.begun)
        second = asyncio.create_task(read(running.other, None, "POST", CHAT, json=body, headers=KEY))
        await asyncio.sleep(1)
        os.kill(running.servers[0].process.pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            await first
        # Who read by way of another process is told
        told = await second
        assert '"error"' in told[-1].data
        assert ids(told[:-1]) == list(range(1, len(told)))
        # And whoever asks again gets a whole answer
        again = await read(running.other, None, "POST", CHAT, json=body, headers=KEY)
        assert text(again) == numbers(150)
        entries = await until(lambda: _history(running, 2))
        assert [entry["finish_reason"] for entry in entries] == ["stop", "cancelled"]


async def test_the_server_that_makes_an_answer_is_frozen_for_a_moment(parts: Rig) -> None:
    async with life(parts) as running:
        # Given answers that one server makes, streamed and not
        whole, streamed = say("whole", max_tokens=100), say("streamed", max_tokens=100, stream=True)
        keys = [{"Idempotency-Key": body["messages"][0]["content"]} for body in (whole, streamed)]
        mine = asyncio.create_task(running.client.post(CHAT, json=whole, headers=keys[0]))
        reading = asyncio.create_task(read(running.client, None, "POST", CHAT, json=streamed, headers=keys[1]))
        await until(lambda: len(running.begun()) == 2)
        # When it is frozen for longer than it takes to hear from it, and both are asked for at another
        os.kill(running.servers[0].process.pid, signal.SIGSTOP)
        again = asyncio.create_task(running.other.post(CHAT, json=whole, headers=keys[0]))
        following = asyncio.create_task(read(running.other, None, "POST", CHAT, json=streamed, headers=keys[1]))
        await asyncio.sleep(4)
        assert not again.done()
        os.kill(running.servers[0].process.pid, signal.SIGCONT)
        # Then they are the same answers, made once
        assert (await again).content == (await mine).content
        assert (await again).headers["idempotent-replayed"] == "true"
        assert await following == await reading
        assert text(await following) == numbers(100)
        assert sorted(running.begun()) == ["streamed", "whole"]
        entries = await until(lambda: _history(running, 2))
        assert [entry["finish_reason"] for entry in entries] == ["stop", "stop"]
        assert await running.usage() == (2, 202)


async def test_a_claim_whose_request_is_not_being_made_is_taken_over_at_once(parts: Rig) -> None:
    async with life(parts) as running:
        # Given a claim that its server knows nothing of: the database was lost before it could say who has it
        body = say("count", max_tokens=3)
        assert (await running.client.post(CHAT, json=body, headers=KEY)).status_code == 200
        with psycopg.connect(parts.database_url) as connection:
            ((owner,),) = connection.execute("SELECT owner FROM kept_answers").fetchall()
            connection.execute("UPDATE kept_answers SET head = NULL, events = NULL")
        assert owner.startswith("replies.")
        # Then the request is made anew, by whichever server
        answers = await asyncio.gather(*(c.post(CHAT, json=body, headers=KEY) for c in (running.other, running.client)))
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].content == answers[1].content
        assert running.begun() == ["count", "count"]


async def test_the_server_that_makes_an_answer_is_stopped(parts: Rig) -> None:
    async with life(parts) as running:
        # Given an answer that one server makes, and that is read by way of another
        body = say("count", max_tokens=150, stream=True)
        begun = await read(running.client, 10, "POST", CHAT, json=body, headers=KEY)
        second = asyncio.create_task(read(running.other, None, "POST", CHAT, json=body, headers=KEY))
        await asyncio.sleep(0.5)
        # When the one that makes it has to stop
        os.kill(running.servers[0].process.pid, signal.SIGTERM)
        # Then it finishes it first
        found = await second
        assert (text(found), found[-1].data) == (numbers(150), "[DONE]")
        assert await asyncio.wait_for(running.servers[0].process.wait(), 40) == 0
        # And whoever comes back finds it at the other
        rest = await read(running.other, None, "POST", CHAT, json=body, headers=KEY | {"Last-Event-ID": "10"})
        assert begun + rest == found
        assert running.begun() == ["count"]


async def test_nothing_is_kept_without_a_key(parts: Rig) -> None:
    async with life(parts) as running:
        async with running.client.stream("POST", CHAT, json=say("count", max_tokens=5, stream=True)) as response:
            found = [event async for event in events(response)]
        assert {event.id for event in found} == {""}
        path = f"/v1/requests/{response.headers['x-request-id']}/events"
        for client in (running.client, running.other):
            answer = await client.get(path)
            assert answer.status_code == 404
            assert "Idempotency-Key" in answer.json()["error"]["message"]
        for wrong in ("x", "-1", "1.5", "1" * 10):
            answer = await running.client.get(path, headers={"Last-Event-ID": wrong})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "Last-Event-ID"


async def _idle(running: Life) -> bool:
    return await running.running() == 0


async def _history(running: Life, count: int) -> list[dict[str, Any]] | None:
    entries = await running.history()
    return entries if len(entries) >= count else None


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_kept_byte_for_byte(parts: Rig, stream: bool) -> None:
    async with life(parts) as running:
        await asyncio.gather(*(said_and_kept(running, path, stream) for path in STREAMING))


async def said_and_kept(running: Life, path: str, stream: bool) -> None:
    # Given an answer with what databases and terminals choke on
    said = "\n".join(TEXTS.values())
    body, key = body_of(path, f"say {said}", stream=stream), {"Idempotency-Key": path}
    first = await running.client.post(path, json=body, headers=key)
    assert first.status_code == 200
    found = (
        "".join(text_in(line[6:]) for line in first.text.split("\n") if line.startswith("data: "))
        if stream
        else text_of(first.json())
    )
    assert found == said
    # Then it is the same wherever and however it is asked for again
    where = f"/v1/requests/{first.headers['x-request-id']}"
    for client in (running.client, running.other):
        assert (await client.post(path, json=body, headers=key)).content == first.content
        assert (await client.get(f"{where}/events")).content == first.content
    message = (await until(partial(recorded, running, where)))["message"]
    assert message == {"role": "assistant", "content": said}
