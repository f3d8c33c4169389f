"""Any order of asking, leaving, stopping, killing and restarting: each request ends once, and all tell the same.

Hypothesis chooses the order. The broker, the database, the server and the worker are real processes; the worker's
engine only echoes, slowly, so that most faults hit an answer in the making.
"""

import asyncio
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from server.auth import hash_key
from server.db.pool import make_pool
from server.process import Child
from tests.faults.rig import MODEL, Rig, answers, rig, until

WORDS, PAUSE_S = 20, 0.05
ANSWER = "abc" * WORDS
REFUSALS = {429, 503, 504}


@dataclass
class Asked:
    """One request. `outcome` is set once: answered, refused, broken (an error after the start) or left."""

    stream: bool
    outcome: str = ""
    request_id: str = ""
    text: str = ""
    task: asyncio.Task[None] | None = None


@dataclass
class Parts:
    """A rig on a loop of its own, with one server and one worker that may be dead."""

    made: Rig
    url: str
    port: int
    server: Child
    worker: Child
    workers: int = 1


class Loop:
    """Runs coroutines for callers that have no loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop()


@pytest.fixture(scope="module")
def parts(loop: Loop) -> Iterator[Parts]:
    stack = AsyncExitStack()

    async def begin() -> Parts:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        made = await stack.enter_async_context(rig(Path(folder)))
        url, server = await made.server()
        worker = await made.echo("echo-1", *SLOWLY)
        await made.archive()
        return Parts(made, url, int(url.rpartition(":")[2]), server, worker)

    made = loop.run(begin())
    yield made
    loop.run(stack.aclose())


SLOWLY = ("--words", str(WORDS), "--pause", str(PAUSE_S))


async def ask(client: httpx.AsyncClient, one: Asked) -> None:
    """Ask, and say how it ended."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": one.stream, "temperature": 0}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            one.request_id = response.headers.get("x-request-id", "")
            if response.status_code != 200:
                await response.aread()
                assert response.json()["error"]["message"]
                assert response.status_code in REFUSALS, response.text
                one.outcome = "refused"
            elif one.stream:
                one.outcome = await _read(response, one)
            else:
                await response.aread()
                one.text = response.json()["choices"][0]["message"]["content"]
                one.outcome = "answered"
    except httpx.TransportError:
        one.outcome = "broken"  # the server was killed
    except asyncio.CancelledError:
        one.outcome = "left"


async def _read(response: httpx.Response, one: Asked) -> str:
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return "answered"
        if not line.startswith("data: "):
            continue
        chunk = httpx.Response(200, content=line[6:]).json()
        if "error" in chunk:
            return "broken"
        for choice in chunk["choices"]:
            one.text += choice["delta"].get("content") or ""
    raise AssertionError("a stream ended without an error and without an end")


async def kept(made: Rig, key_hash: bytes) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """A key's records by request id, and what it is billed for."""
    pool = make_pool(made.database_url, max_size=1)
    await pool.open(wait=True)
    try:
        async with pool.connection() as connection:
            rows = await connection.execute(
                "SELECT request_id, messages, finish_reason, completion_tokens FROM chats"
                " WHERE key_id = (SELECT id FROM api_keys WHERE hash = %s)",
                [key_hash],
            )
            records = {row["request_id"]: row for row in await rows.fetchall()}
            billed = await connection.execute(
                "SELECT coalesce(sum(requests), 0)::int AS requests,"
                " coalesce(sum(completion_tokens), 0)::int AS completion_tokens FROM usage_daily"
                " WHERE key_id = (SELECT id FROM api_keys WHERE hash = %s)",
                [key_hash],
            )
            (usage,) = await billed.fetchall()
            return records, usage
    finally:
        await pool.close()


def machine_of(loop: Loop, parts: Parts) -> type[RuleBasedStateMachine]:
    """The rules, over these parts. Each example has a key of its own."""

    class AnyOrder(RuleBasedStateMachine):
        requests = Bundle("requests")

        @initialize()
        def begin(self) -> None:
            self.asked: list[Asked] = []
            self.key = loop.run(parts.made.new_key("any order"))
            self.client = parts.made.client(parts.url, self.key)
            self.recover()

        @rule(target=requests, stream=st.booleans())
        def submit(self, stream: bool) -> Asked:
            one = Asked(stream)

            async def begin() -> None:
                one.task = asyncio.create_task(ask(self.client, one))

            loop.run(begin())
            self.asked.append(one)
            return one

        @rule(tenths=st.integers(1, 8))
        def wait(self, tenths: int) -> None:
            loop.run(asyncio.sleep(tenths / 10))

        @rule(one=requests)
        def leave(self, one: Asked) -> None:
            async def cancel() -> None:
                assert one.task is not None
                one.task.cancel()

            loop.run(cancel())

        @rule(one=requests)
        def stop(self, one: Asked) -> None:
            """By its id, where a client knows it: once the answer has begun."""

            async def delete() -> None:
                try:
                    answer = await self.client.delete(f"/v1/requests/{one.request_id}")
                except httpx.TransportError:
                    return
                assert answer.status_code in {200, 404, 409, *REFUSALS}, answer.text

            if one.request_id:
                loop.run(delete())

        @rule()
        def kill_the_worker(self) -> None:
            _kill(loop, parts.worker)

        @rule()
        def kill_the_server(self) -> None:
            _kill(loop, parts.server)

        @rule()
        def recover(self) -> None:
            loop.run(_recover(parts))

        def teardown(self) -> None:
            """Then every request has come to one end, and history, usage and what clients saw agree."""
            if not hasattr(self, "client"):
                return
            loop.run(_recover(parts))
            loop.run(_ended(self.asked))
            records, usage = loop.run(_settled(parts.made, self.key, self.asked))
            assert usage["requests"] == len(records)
            assert usage["completion_tokens"] == sum(record["completion_tokens"] for record in records.values())
            ids = [one.request_id for one in self.asked if one.request_id]
            assert len(set(ids)) == len(ids)
            for one in self.asked:
                record = records.get(one.request_id)
                assert one.outcome, one
                if one.outcome == "answered":
                    assert one.text == ANSWER
                    assert record is not None
                    assert record["messages"][-1]["content"] == ANSWER
                    assert record["finish_reason"] == "stop"
                assert ANSWER.startswith(one.text), one  # nothing twice, nothing missing in the middle
                if record is not None:
                    said = record["messages"][-1]["content"]
                    assert ANSWER.startswith(said)
                    assert record["completion_tokens"] * len("abc") == len(said)
            loop.run(self.client.aclose())

    return AnyOrder


def _kill(loop: Loop, child: Child) -> None:
    async def kill() -> None:
        if not child.exited:
            child.process.kill()
            await child.process.wait()

    loop.run(kill())


async def _recover(parts: Parts) -> None:
    """A server and a worker run, and know of each other."""
    if parts.server.exited:
        parts.server = await parts.made.run("server", "server", "serve", "--port", str(parts.port))
        await until(lambda: answers(f"{parts.url}/health"))
    if parts.worker.exited:
        parts.workers += 1
        parts.worker = await parts.made.echo(f"echo-{parts.workers}", *SLOWLY)

    async def healthy() -> bool:
        async with parts.made.client(parts.url) as client:
            return bool((await client.get("/health")).json()["status"] == "healthy")

    await until(healthy)


async def _ended(asked: list[Asked]) -> None:
    for one in asked:
        assert one.task is not None
        try:
            await one.task
        except asyncio.CancelledError:
            one.outcome = "left"  # before it had begun


async def _settled(made: Rig, key: str, asked: list[Asked]) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """The records, once each answer has its own and no more come."""
    key_hash = hash_key(key)
    last = -1

    async def all_there() -> bool:
        nonlocal last
        records, _ = await kept(made, key_hash)
        there = all(one.request_id in records for one in asked if one.outcome == "answered")
        still, last = len(records) == last, len(records)
        await asyncio.sleep(1)
        return there and still

    await until(all_there, timeout_s=60)
    return await kept(made, key_hash)


def test_any_order(loop: Loop, parts: Parts) -> None:
    run_state_machine_as_test(
        machine_of(loop, parts),
        settings=settings(
            max_examples=8, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
