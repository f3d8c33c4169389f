"""`/v1/requests/{id}` through either of two server processes: where a request stands, and stopping it."""

import asyncio
import json
from typing import Any

import httpx
import psycopg
import pytest

from server.errors import dialect_of
from tests.faults.dialects import STREAMING, body_of
from tests.faults.life import CHAT, Life, events, life, numbers, say
from tests.faults.rig import Rig, until
from tests.faults.test_hostile_http import SHAPES

UNKNOWN = "0" * 32


async def look(client: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    answer = await client.get(f"/v1/requests/{request_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def recorded(client: httpx.AsyncClient, request_id: str) -> dict[str, Any] | None:
    """The request once it is in the history, which may be a moment after its end."""
    found = await look(client, request_id)
    return found if found["finish_reason"] else None


async def test_running_requests_are_stopped_through_another_server(parts: Rig) -> None:
    async with life(parts) as running:
        made = await asyncio.gather(*(stopped(running, path) for path in STREAMING))
        assert await running.running() == 0
        # And each is recorded once, and billed for exactly what was made
        entries = await until(lambda: _history(running, len(STREAMING)))
        assert sorted(entry["usage"]["completion_tokens"] for entry in entries) == sorted(made)
        assert await running.usage() == (len(STREAMING), len(STREAMING) + sum(made))


async def stopped(running: Life, path: str) -> int:
    """Stops a stream; how many tokens were made for it."""
    async with running.client.stream("POST", path, json=body_of(path, path, stream=True)) as response:
        # Given a stream of one server
        reading = events(response)
        read = [await anext(reading) for _ in range(20)]
        request_id = response.headers["x-request-id"]
        for client in (running.client, running.other):
            found = await look(client, request_id)
            assert (found["status"], found["endpoint"], found["usage"]) == ("running", path, None)
        # When another one is told to stop it
        answer = await running.other.delete(f"/v1/requests/{request_id}")
        # Then it has stopped, and the client hears why
        assert answer.json()["status"] == "cancelled"
        read += [event async for event in reading]
    told = json.loads(read[-1].data)
    in_shape(told, path)
    assert "cancelled" in read[-1].data
    for client in (running.client, running.other):
        found = await until(lambda client=client: recorded(client, request_id))
        assert found["status"] == found["finish_reason"] == "cancelled"
        made: int = found["usage"]["completion_tokens"]
        assert found["message"] == {"role": "assistant", "content": numbers(made)}
    text = "".join(event.text for event in read[:-1])
    assert numbers(made).startswith(text)
    assert 0 <= len(numbers(made)) - len(text) <= 5 * len(" 100")  # what was on its way when it stopped
    # And to stop it once more changes nothing
    assert (await running.other.delete(f"/v1/requests/{request_id}")).json()["status"] == "cancelled"
    return made


def in_shape(told: dict[str, Any], path: str) -> None:
    """An error event as the path's dialect has it."""
    if path == "/v1/responses":
        assert told == {"type": "error", "code": "cancelled", "param": None} | {
            name: told[name] for name in ("message", "sequence_number")
        }
    else:
        SHAPES[dialect_of(path, {})].model_validate(told, extra="forbid")


async def test_queued_requests_are_stopped_through_another_server(parts: Rig) -> None:
    async with life(parts, slots=1) as running:
        # Given requests in each dialect that wait for a worker, streamed and not
        holding = asyncio.create_task(running.client.post(CHAT, json=say("hold")))
        await until(running.begun)
        waiting = {
            (path, stream): asyncio.create_task(
                running.client.post(
                    path,
                    json=body_of(path, path, stream=stream),
                    headers={"Idempotency-Key": f"{path} {stream}"},
                )
            )
            for path in STREAMING
            for stream in (True, False)
        }
        # (whose ids nobody has told their clients yet; the claims of their Idempotency-Keys know them)
        await until(lambda: queued(running, len(waiting)))
        ids = claimed(running.parts.database_url)
        assert len(ids) == len(waiting)
        for request_id in ids:
            assert (await look(running.other, request_id))["status"] == "queued"
            # When they are stopped
            answer = await running.other.delete(f"/v1/requests/{request_id}")
            assert answer.json()["status"] == "cancelled"
            assert (await look(running.other, request_id))["status"] == "cancelled"
        # Then their clients are told so
        for (path, stream), task in waiting.items():
            refused = await task
            if refused.status_code == 200:  # a stream that told where it stands had begun
                assert stream
                (told,) = [json.loads(line[6:]) for line in refused.text.splitlines() if line.startswith("data: ")]
            else:
                assert refused.status_code == 499
                told = refused.json()
            assert "cancelled" in json.dumps(told)
            if refused.status_code == 499:
                SHAPES[dialect_of(path, {})].model_validate(told, extra="forbid")
        # And they are never begun, recorded or billed
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        assert (await running.client.post(CHAT, json=say("next", max_tokens=1))).status_code == 200
        assert running.begun() == ["hold", "next"]
        entries = await until(lambda: _history(running, 2))
        assert [entry["finish_reason"] for entry in entries] == ["stop", "cancelled"]
        assert await running.usage() == (2, sum(entry["usage"]["total_tokens"] for entry in entries))


async def queued(running: Life, count: int) -> bool:
    return await running.queued() == count


async def _history(running: Life, count: int) -> list[dict[str, Any]] | None:
    entries = await running.history()
    return entries if len(entries) >= count else None


def claimed(database_url: str) -> list[str]:
    with psycopg.connect(database_url) as connection:
        return [str(request_id) for (request_id,) in connection.execute("SELECT request_id FROM kept_answers")]


async def test_who_left_a_request_without_a_key_finds_what_was_made_of_it(parts: Rig) -> None:
    async with life(parts) as running:
        # Given an unstreamed request whose client leaves
        with pytest.raises(httpx.ReadTimeout):
            await running.client.post(CHAT, json=say("count"), timeout=1)
        (entry,) = await until(running.history)
        with psycopg.connect(parts.database_url) as connection:
            ((request_id,),) = connection.execute("SELECT request_id FROM chats").fetchall()
        # Then any server tells how far it came
        for client in (running.client, running.other):
            found = await look(client, request_id)
            assert found["status"] == found["finish_reason"] == "cancelled"
            assert found["message"] == {"role": "assistant", "content": numbers(entry["usage"]["completion_tokens"])}
            assert found["usage"] == entry["usage"]


async def test_a_request_is_stopped_while_its_worker_is_dead(parts: Rig) -> None:
    async with life(parts) as running:
        body = say("count", max_tokens=300, stream=True, temperature=0)
        async with running.client.stream("POST", CHAT, json=body) as response:
            # Given a stream whose worker is killed
            reading = events(response)
            read = [await anext(reading) for _ in range(20)]
            await running.worker.stop(timeout_s=0)
            # When it is stopped before there is another one
            request_id = response.headers["x-request-id"]
            assert (await running.other.delete(f"/v1/requests/{request_id}")).json()["status"] == "running"
            await running.new_worker()
            # Then that one does not go on with it
            read += [event async for event in reading]
        assert '"code":"cancelled"' in read[-1].data
        assert (await look(running.other, request_id))["status"] == "cancelled"


async def test_a_finished_request_gives_its_answer(parts: Rig) -> None:
    async with life(parts) as running:
        answer = await running.client.post(CHAT, json=say("count", max_tokens=5))
        request_id = answer.headers["x-request-id"]
        found = await until(lambda: recorded(running.other, request_id))
        assert (found["status"], found["finish_reason"]) == ("completed", "stop")
        assert found["message"] == answer.json()["choices"][0]["message"]
        assert answer.json()["usage"] == answer.json()["usage"] | found["usage"]
        # And to stop it comes too late
        assert (await running.other.delete(f"/v1/requests/{request_id}")).json()["status"] == "completed"


async def test_a_foreign_request_looks_like_one_that_never_was(parts: Rig) -> None:
    async with life(parts) as running, running.client.stream("POST", CHAT, json=say("count", stream=True)) as response:
        mine = response.headers["x-request-id"]
        done = (await running.client.post(CHAT, json=say("x", max_tokens=1))).headers["x-request-id"]
        # Given another key, and requests that run and have finished
        for url in running.urls:
            async with parts.client(url, await parts.new_key("stranger" + url)) as stranger:
                for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
                    unknown = await stranger.request(method, f"/v1/requests/{UNKNOWN}{path}")
                    assert unknown.status_code == 404
                    for request_id in (mine, done):
                        # When that key asks for them, or stops them
                        answer = await stranger.request(method, f"/v1/requests/{request_id}{path}")
                        # Then they are not there
                        assert answer.status_code == 404
                        assert answer.text == unknown.text.replace(UNKNOWN, request_id)
                        same = {name for name in unknown.headers if name not in ("date",)}
                        assert {name for name in answer.headers if name not in ("date",)} == same
        # And go on
        assert (await look(running.other, mine))["status"] == "running"


async def test_what_can_be_no_id_is_not_found(parts: Rig) -> None:
    async with life(parts) as running:
        for odd in ("x", "%00", "%F0%9F%98%80", "a" * 500, "' OR 1=1 --"):
            for method in ("GET", "DELETE"):
                answer = await running.client.request(method, f"/v1/requests/{odd}")
                assert answer.status_code == 404, answer.text
                assert answer.json()["error"]["type"] == "invalid_request_error"
