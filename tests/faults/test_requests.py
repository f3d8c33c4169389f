"""`/v1/requests/{id}` through either of two server processes: where a request stands, and stopping it."""

import asyncio
from typing import Any

import httpx
import psycopg

from tests.faults.life import CHAT, Life, events, life, numbers, say
from tests.faults.rig import Rig, until

UNKNOWN = "0" * 32


async def look(client: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    answer = await client.get(f"/v1/requests/{request_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_running_request_is_stopped_through_another_server(parts: Rig) -> None:
    async with life(parts) as running, running.client.stream("POST", CHAT, json=say("count", stream=True)) as response:
        # Given a stream of one server
        reading = events(response)
        read = [await anext(reading) for _ in range(20)]
        request_id = response.headers["x-request-id"]
        for client in (running.client, running.other):
            found = await look(client, request_id)
            assert (found["status"], found["endpoint"], found["usage"]) == ("running", CHAT, None)
        # When another one is told to stop it
        answer = await running.other.delete(f"/v1/requests/{request_id}")
        # Then it has stopped, the client hears why, and is billed for exactly what was made
        assert answer.json()["status"] == "cancelled"
        assert await running.running() == 0
        read += [event async for event in reading]
        assert '"code":"cancelled"' in read[-1].data
        (entry,) = await until(running.history)
        made = entry["usage"]["completion_tokens"]
        text = "".join(event.text for event in read[:-1])
        assert numbers(made).startswith(text)
        assert 0 <= made - len(read[:-1]) <= 5  # what was on its way when it stopped
        for client in (running.client, running.other):
            found = await look(client, request_id)
            assert found["status"] == found["finish_reason"] == "cancelled"
            assert found["message"] == entry["messages"][-1] == {"role": "assistant", "content": numbers(made)}
            assert found["usage"]["completion_tokens"] == made
        # And to stop it once more changes nothing
        assert (await running.other.delete(f"/v1/requests/{request_id}")).json()["status"] == "cancelled"
        assert len(await running.history()) == 1


async def test_a_queued_request_is_stopped_through_another_server(parts: Rig) -> None:
    async with life(parts, slots=1) as running:
        holding = asyncio.create_task(running.client.post(CHAT, json=say("hold", max_tokens=150)))
        await until(running.begun)
        key = {"Idempotency-Key": "known"}
        waiting = asyncio.create_task(running.client.post(CHAT, json=say("wait"), headers=key))
        # (whose id nobody has told its client yet; the claim of its Idempotency-Key knows it)
        await until(lambda: queued(running))
        request_id = claimed(running.parts.database_url)
        assert (await look(running.other, request_id))["status"] == "queued"
        answer = await running.other.delete(f"/v1/requests/{request_id}")
        # Then its client is told at once, and it is never begun
        assert answer.json()["status"] == "cancelled"
        refused = await waiting
        assert refused.status_code == 499
        assert refused.json()["error"]["code"] == "cancelled"
        assert (await look(running.other, request_id))["status"] == "cancelled"
        assert (await holding).json()["usage"]["completion_tokens"] == 150
        assert (await running.client.post(CHAT, json=say("next", max_tokens=1))).status_code == 200
        assert running.begun() == ["hold", "next"]


async def queued(running: Life) -> bool:
    return await running.queued() == 1


def claimed(database_url: str) -> str:
    with psycopg.connect(database_url) as connection:
        ((request_id,),) = connection.execute("SELECT request_id FROM kept_answers").fetchall()
        return str(request_id)


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

        async def whole() -> Any:
            found = await look(running.other, request_id)
            return found if found["usage"] else None

        found = await until(whole)
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
