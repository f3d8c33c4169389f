"""RabbitMQ is killed, cut off, goes dumb, and runs out of memory and of disk."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.core import topology
from server.fleet import STALE_S
from server.process import Child
from tests.faults.broker import Proxy, ctl, jobs_waiting, killed, without_memory
from tests.faults.chats import (
    ANTHROPIC,
    NATIVE,
    OPENAI,
    Stream,
    ask,
    health,
    healthy,
    is_cut_off,
    is_refused,
    kept,
    serves,
)
from tests.faults.disk import disk, fill
from tests.faults.life import counting, numbers
from tests.faults.rig import MODEL, Rig, Stores, kept_alive, own_folder, rig, sharing, until

RECONNECT_S = 10
"""What is promised."""
NOTICED_S = 10
"""The same, for a connection that goes dumb; noticed by heartbeats, so that 3 s are added where that is measured."""
FOR_EVER = 10_000
"""Tokens: at 50 a second, an answer that no command and no busy machine is slower than."""
HELD = "qwen3-held"


def counts(stream: Stream) -> int:
    """How far it has come. Fails unless it has every number until there."""
    text = stream.text
    count = text.count(" ")
    assert text == numbers(count)
    return count


async def all_refused(client: httpx.AsyncClient) -> bool:
    """Each dialect refuses, and nothing hangs."""
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*(ask(client, path) for path in (OPENAI, NATIVE, ANTHROPIC)))
    return all(is_refused(answer) for answer in answers)


async def busy(client: httpx.AsyncClient) -> float | None:
    """How busy the workers are, as this server tells those who scale by it."""
    text = (await client.get("/metrics")).text
    found = re.search(rf'^qwen3_workers_busy{{model="{MODEL}"}} (.+)$', text, re.MULTILINE)
    return float(found[1]) if found else None


async def test_rabbitmq_is_killed_and_comes_back(fragile: Rig) -> None:
    # Given streams that run, and a job that was accepted, for a worker that is not there yet
    parts = fragile
    parts.serve(**{MODEL: {}, HELD: {}})
    url, _ = await parts.server(START_ON_DEMAND=HELD)
    await counting(parts, "counting")
    await parts.archive()
    async with parts.client(url) as client:
        await healthy(client)
        streams = [Stream(client, path, max_tokens=FOR_EVER) for path in (OPENAI, NATIVE)]
        for stream in streams:
            await stream.begun()
        waiting = asyncio.create_task(ask(client, model=HELD))

        async def accepted() -> bool:
            return await jobs_waiting(parts.amqp_url, HELD) == 1

        await until(accepted)
        # When the broker is killed
        killed_at = time.monotonic()
        async with killed(parts.rabbitmq):
            # Then the streams end with an error, and so does what waited
            for stream in streams:
                await stream.end(10)
                assert is_cut_off(stream)
            assert is_refused(await asyncio.wait_for(waiting, 10))
            # And meanwhile whoever asks is refused at once
            assert await all_refused(client)
            assert (await health(client))["rabbitmq_connected"] is False
            assert "\nqwen3_broker_connected 0.0\n" in (await client.get("/metrics")).text
            print(f"refused {time.monotonic() - killed_at:.1f} s after the kill")
        # When it is back
        back_at = time.monotonic()
        # Then the service is within 10 s
        await until(lambda: serves(client), RECONNECT_S)
        print(f"answered {time.monotonic() - back_at:.1f} s after the broker was back")
        # And the accepted job is still there, for the worker that comes
        assert await accepted()
        await parts.run("held", "benchmarks.echo", "--model", HELD)

        async def taken() -> bool:
            return await jobs_waiting(parts.amqp_url, HELD) == 0

        await until(taken)
        await healthy(client)


@dataclass
class Reached:
    """A service over the shared broker, whose server and worker reach it through something that can be cut and go
    dumb. Whoever does that to it leaves it whole."""

    parts: Rig
    client: httpx.AsyncClient
    worker: Child
    servers_way: Proxy
    workers_way: Proxy


@pytest.fixture(scope="module")
async def reached(tmp_path_factory: pytest.TempPathFactory, shared: Stores) -> AsyncIterator[Reached]:
    async with AsyncExitStack() as stack:
        parts = await stack.enter_async_context(sharing(tmp_path_factory.mktemp("reached"), shared))
        ways = Proxy(parts.amqp_url), Proxy(parts.amqp_url)
        for way in ways:
            await way.start()
            stack.push_async_callback(way.stop)
        url, _ = await parts.server(AMQP_URL=ways[0].url)
        worker = await counting(parts, "counting", AMQP_URL=ways[1].url)
        await parts.archive()
        client = await stack.enter_async_context(parts.client(url))
        yield Reached(parts, client, worker, *ways)
        await parts.stop()  # while there is a way to the broker


async def running(reached: Reached, **fields: Any) -> Stream:
    await healthy(reached.client)
    stream = Stream(reached.client, **{"max_tokens": FOR_EVER, **fields})
    await stream.begun()
    return stream


async def test_all_connections_are_closed(reached: Reached) -> None:
    # Given a stream that runs
    stream, client = await running(reached), reached.client
    # When the broker closes all its connections
    await ctl(reached.parts.rabbitmq, "close_all_connections", "--vhost", reached.parts.vhost, "test")
    closed_at = time.monotonic()
    # Then the stream ends with an error, and within 10 s all are back
    await stream.end(10)
    assert is_cut_off(stream)
    await until(lambda: serves(client), RECONNECT_S)
    assert time.monotonic() - closed_at < RECONNECT_S
    # And what is said from then on is kept
    assert (await ask(client, NATIVE, session_id="after")).status_code == 200
    await until(lambda: is_kept(reached.parts, "after"))


async def is_kept(parts: Rig, session_id: str) -> bool:
    return session_id in [row["session_id"] for row in await kept(parts) if row["finish_reason"] == "stop"]


async def test_what_is_declared_keeps_the_rules_of_rabbitmq_4(reached: Reached) -> None:
    # Given all that declares; when the broker is asked what it has
    await healthy(reached.client)
    columns = ("name", "type", "durable", "exclusive", "arguments")
    vhost = ("--vhost", reached.parts.vhost)
    listed = await ctl(reached.parts.rabbitmq, "--quiet", "list_queues", *vhost, *columns, "--formatter", "json")
    queues = json.loads(listed)
    # Then nothing is transient but what is one connection's, and all else is in quorum queues with a limit, what an
    # earlier version may have left aside
    assert {topology.HISTORY, topology.DEAD} <= {queue["name"] for queue in queues}
    for queue in queues:
        assert queue["durable"] or queue["exclusive"], queue
        if not queue["exclusive"] and queue["name"] != topology.HISTORY_BEFORE:
            assert queue["type"] in ("quorum", "rabbit_quorum_queue"), queue
            assert "x-delivery-limit" in str(queue["arguments"]), queue


async def test_a_servers_connection_is_cut(reached: Reached) -> None:
    # Given a stream that runs; when the server's way to the broker is cut
    stream = await running(reached)
    assert reached.servers_way.cut() > 0
    cut_at = time.monotonic()
    # Then the stream ends with an error, and the server is back
    await stream.end(10)
    assert is_cut_off(stream)
    await until(lambda: serves(reached.client), RECONNECT_S)
    assert time.monotonic() - cut_at < RECONNECT_S


async def test_a_servers_connection_goes_dumb(reached: Reached) -> None:
    # Given a stream that runs; when the server's way to the broker swallows all
    stream, client = await running(reached), reached.client
    reached.servers_way.go_dumb()
    dumb_at = time.monotonic()
    try:
        # Then whoever asks waits no longer than it takes to notice
        asked = [asyncio.create_task(ask(client, path)) for path in (OPENAI, NATIVE, ANTHROPIC)]
        for task in asked:
            assert is_refused(await asyncio.wait_for(task, NOTICED_S + 3))
        # And the stream ends with an error
        await stream.end(NOTICED_S + 3)
        assert is_cut_off(stream)
        print(f"noticed after {stream.ended_at - dumb_at:.1f} s")
        assert await all_refused(client)
    finally:
        # When it passes things on again
        reached.servers_way.heal()
    healed_at = time.monotonic()
    # Then the server is back
    await until(lambda: serves(client), RECONNECT_S)
    print(f"answered {time.monotonic() - healed_at:.1f} s after it was healed")


async def test_a_workers_connection_goes_dumb(reached: Reached) -> None:
    # Given a stream of some seconds; when the worker's way to the broker swallows all
    stream, client = await running(reached, max_tokens=100), reached.client
    assert reached.worker.log is not None
    log = reached.worker.log
    lost_before = log.read_text().count("broker connection ended")
    reached.workers_way.go_dumb()
    try:

        async def gone() -> bool:
            return (await health(client))["model_loaded"] is False

        await until(gone, NOTICED_S)
        # Then whoever asks is refused at once
        assert await all_refused(client)
        # When it passes things on again, after the worker has noticed
        await until(lambda: log.read_text().count("broker connection ended") > lost_before)
    finally:
        reached.workers_way.heal()
    # Then the worker is back
    await until(lambda: serves(client), RECONNECT_S)
    # And the stream has its whole text, or an error at its end
    await stream.end(40)
    assert (stream.done and stream.text == numbers(100)) or is_cut_off(stream)


async def at_rest(client: httpx.AsyncClient) -> bool:
    """Whether the queue is empty and no worker has anything in hand."""
    empty = f'qwen3_queue_messages{{lane="interactive",model="{MODEL}"}} 0.0'
    workers = [worker for worker in (await health(client))["workers"] if worker["type"] == "chat"]
    idle = bool(workers) and not any(worker["running"] or worker["waiting"] for worker in workers)
    return idle and empty in (await client.get("/metrics")).text


async def test_rabbitmqs_memory_alarm(fragile: Rig) -> None:
    # Given a stream that runs, and two more servers, which send the broker nothing and so are not told
    parts = fragile
    url, server = await parts.server()
    idle_url, _ = await parts.server("idle")
    quiet_url, _ = await parts.server("quiet")
    await counting(parts, "counting")
    await parts.archive()
    async with parts.client(url) as client, parts.client(idle_url) as idle, parts.client(quiet_url) as quiet:
        await healthy(client)
        stream = Stream(client, max_tokens=FOR_EVER)
        await stream.begun()
        await until(lambda: busy(idle))
        await healthy(quiet)
        # When the broker has no memory left
        async with without_memory(parts.rabbitmq):
            # Then one that is asked how it is says so all the same

            async def told() -> bool:
                return "RabbitMQ takes nothing: low on memory" in (await health(quiet))["problems"]

            await until(told, 2 * STALE_S)
            assert (await quiet.get("/health/ready")).status_code == 503
            # And one that is scraped does not say that the worker, which cannot tell how it fares, has nothing to do

            async def unknown() -> bool:
                told = await busy(idle)
                assert told != 0
                return told is None

            await until(unknown, 2 * STALE_S)
            client.headers["X-Session-Id"] = "refused"
            # And requests are refused, the first ones as well, which tell the server that it is so
            async with asyncio.timeout(10):
                first = await asyncio.gather(*(ask(client) for _ in range(10)))
            assert all(is_refused(answer) for answer in first)
            assert await all_refused(client)
            assert "RabbitMQ takes nothing: low on memory" in (await health(client))["problems"]
            # And a request that is made is known to the server that has it; another, that cannot ask, says so
            where = f"/v1/requests/{stream.request_id}"
            assert (await client.get(where)).json()["status"] == "running"
            for other in (idle, quiet):
                assert is_refused(await other.get(where))
                assert is_refused(await other.delete(where))
            # And none of them is held: 100 MB are asked for, and not kept
            before = psutil.Process(server.process.pid).memory_info().rss
            text = "x" * 500_000
            for _ in range(10):
                answers = await asyncio.gather(*(ask(client, text=text) for _ in range(20)))
                assert all(is_refused(answer) for answer in answers)
            grown = psutil.Process(server.process.pid).memory_info().rss - before
            print(f"grown by {grown / 2**20:.0f} MiB")
            assert grown < 64 * 2**20
            # And the stream neither ends nor fails: it waits
            waited_at = counts(stream)
            await asyncio.sleep(1)
            assert stream.ended_at == 0
            assert counts(stream) == waited_at
            assert await unknown()
            del client.headers["X-Session-Id"]
        # When there is memory again, then all goes on by itself, the stream from where it was
        await until(lambda: serves(client), RECONNECT_S)
        await until(lambda: counts(stream) > waited_at + 100)
        stream.leave()
        # And what was refused is not answered all the same, later, for nobody
        await until(lambda: at_rest(client))
        assert (await ask(client, NATIVE, session_id="after")).status_code == 200
        await until(lambda: is_kept(parts, "after"))
        rows = await kept(parts)
        assert [row for row in rows if row["session_id"] == "refused"] == []
        assert len({row["request_id"] for row in rows}) == len(rows)


async def test_rabbitmqs_disk_is_full(tmp_path: Path) -> None:
    # Given a broker on a small disk of its own, started again when it ends, as `up` does
    with own_folder() as folder, disk(folder / "rabbitmq", mebibytes=600):
        async with rig(tmp_path, folder) as parts, kept_alive(parts.rabbitmq) as said:
            url, _ = await parts.server()
            await parts.echo("echo", "--words", "10", "--pause", "0.3")
            await parts.archive()
            async with parts.client(url) as client:
                await healthy(client)
                # When somebody fills it to the last byte
                hog = fill(folder / "rabbitmq")
                # Then requests are refused, as soon as the broker has noticed, and none hangs but the one, at the most,
                # that a worker had begun by then: the broker does not read its answer any more
                client.timeout = httpx.Timeout(300)
                asked: list[asyncio.Task[httpx.Response]] = []

                async def told() -> httpx.Response | None:
                    asking = asyncio.create_task(ask(client, NATIVE, session_id=f"s{len(asked)}"))
                    asked.append(asking)
                    await asyncio.wait({asking}, timeout=15)
                    assert sum(not each.done() for each in asked) <= 1
                    return asking.result() if asking.done() else None

                async def refused() -> bool:
                    answer = await told()
                    return answer is not None and answer.status_code != 200 and is_refused(answer)

                async def answered() -> bool:
                    answer = await told()
                    return answer is not None and answer.status_code == 200

                async def named() -> bool:
                    """Whether the server's log and its health say what is full."""
                    await refused()
                    log = (parts.folder / "server.log").read_text()
                    problems = " ".join((await health(client))["problems"])
                    full = "free some of what it is low on" in log and '"reason": "low on disk"' in log
                    return full and ("low on disk" in problems or any("is full" in line for line in said))

                await until(refused, 60)
                for _ in range(10):
                    assert await refused()
                await until(named, 60)
                print(f"{len(asked)} asked until it was named; `up` would say {said}")
                # When there is room again
                hog.unlink()
                # Then all goes on by itself
                await until(answered, 90)
                await healthy(client)
                # And all that was answered is kept, each once. (Of a message that the broker did not confirm nobody
                # knows; what is refused so and taken all the same is stopped, which this worker is too fast for.)
                statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
                assert set(statuses) <= {200, 503}
                answered_ids = {f"s{number}" for number, status in enumerate(statuses) if status == 200}

                async def all_kept() -> bool:
                    ids = [row["session_id"] for row in await kept(parts)]
                    assert len(ids) == len(set(ids))
                    return answered_ids <= set(ids)

                assert answered_ids
                await until(all_kept)
