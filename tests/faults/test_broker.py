"""RabbitMQ is killed, cut off, goes dumb, and runs out of memory and of disk."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from server.core import topology
from server.core.amqp import AmqpLink
from server.fleet import STALE_S
from tests.faults.broker import Proxy, ctl, kill
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
from tests.faults.rig import MODEL, Rig, kept_alive, rig, until

RECONNECT_S = 10
"""What is promised."""
NOTICED_S = 10
"""The same, for a connection that goes dumb; noticed by heartbeats, so that 3 s are added where that is measured."""
SLOW = ("--words", "300", "--pause", "0.05")
"""An answer that takes 15 s."""
HELD = "qwen3-held"


@pytest.fixture
def parts(own_parts: Rig) -> Rig:
    """What is done here is done to the stores."""
    return own_parts


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


async def jobs_waiting(rig: Rig, model: str) -> tuple[int, int]:
    """Jobs in the model's queue, and who consumes it."""
    asked: list[tuple[int, int]] = []

    async def setup(link: AmqpLink) -> None:
        asked.append(await link.declare_queue(topology.jobs_queue(model, "interactive"), passive=True))

    link = AmqpLink(rig.amqp_url, "test", setup)
    await link.start()
    await link.close()
    return asked[-1]


async def test_rabbitmq_is_killed_and_comes_back(parts: Rig) -> None:
    # Given streams that run, and a job that was accepted and that its worker, which is frozen, cannot finish
    parts.serve(**{MODEL: {}, HELD: {}})
    url, _ = await parts.server()
    await parts.echo("echo", *SLOW)
    held = await parts.run("held", "benchmarks.echo", "--model", HELD)
    await parts.archive()
    async with parts.client(url) as client:
        await healthy(client)
        streams = [Stream(client, path) for path in (OPENAI, NATIVE)]
        for stream in streams:
            await stream.begun()
        os.kill(held.process.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(ask(client, model=HELD))
        await asyncio.sleep(0.5)
        # When the broker is killed
        killed_at = time.monotonic()
        await kill(parts.rabbitmq)
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
        await parts.rabbitmq.start()
        back_at = time.monotonic()
        # Then the service is within 10 s
        await until(lambda: serves(client), RECONNECT_S)
        print(f"answered {time.monotonic() - back_at:.1f} s after the broker was back")
        # And the accepted job is still there, for whoever takes it
        assert (await jobs_waiting(parts, HELD))[0] == 1
        os.kill(held.process.pid, signal.SIGCONT)

        async def taken() -> bool:
            return await jobs_waiting(parts, HELD) == (0, 2)

        await until(taken, RECONNECT_S)
        await healthy(client)


async def test_all_connections_are_closed(parts: Rig) -> None:
    # Given a stream that runs
    url, _ = await parts.server()
    await parts.echo("echo", "--words", "100", "--pause", "0.05")
    await parts.archive()
    async with parts.client(url) as client:
        await healthy(client)
        stream = Stream(client)
        await stream.begun()
        # When the broker closes all its connections
        await ctl(parts.rabbitmq, "close_all_connections", "test")
        closed_at = time.monotonic()
        # Then the stream ends with an error, and within 10 s all are back
        await stream.end(10)
        assert is_cut_off(stream)
        await until(lambda: serves(client), RECONNECT_S)
        assert time.monotonic() - closed_at < RECONNECT_S
        # And what is said from then on is kept
        assert (await ask(client)).status_code == 200
        await until(lambda: _kept_some(parts))
        await healthy(client)


async def _kept_some(parts: Rig) -> bool:
    return any(row["finish_reason"] == "stop" for row in await kept(parts))


async def test_what_is_declared_keeps_the_rules_of_rabbitmq_4(parts: Rig) -> None:
    # Given all that declares
    url, _ = await parts.server()
    await parts.echo()
    await parts.archive()
    async with parts.client(url) as client:
        await healthy(client)
    # When the broker is asked what it has
    columns = ("name", "type", "durable", "exclusive", "arguments")
    queues = json.loads(await ctl(parts.rabbitmq, "--quiet", "list_queues", *columns, "--formatter", "json"))
    # Then nothing is transient but what is one connection's, and jobs and records are in quorum queues with a limit
    assert {topology.HISTORY, topology.DEAD} <= {queue["name"] for queue in queues}
    for queue in queues:
        assert queue["durable"] or queue["exclusive"], queue
        if queue["name"].startswith("jobs.") or queue["name"] == topology.HISTORY:
            assert queue["type"] in ("quorum", "rabbit_quorum_queue"), queue
            assert "x-delivery-limit" in str(queue["arguments"]), queue


@asynccontextmanager
async def through(parts: Rig) -> AsyncIterator[Proxy]:
    proxy = Proxy(parts.amqp_url)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()


async def test_a_servers_connection_is_cut(parts: Rig) -> None:
    # Given a server that reaches the broker through something that can be cut
    async with through(parts) as proxy:
        url, _ = await parts.server(AMQP_URL=proxy.url)
        await parts.echo("echo", "--words", "100", "--pause", "0.05")
        await parts.archive()
        async with parts.client(url) as client:
            await healthy(client)
            stream = Stream(client)
            await stream.begun()
            # When that is
            assert proxy.cut() > 0
            cut_at = time.monotonic()
            # Then the stream ends with an error, and the server is back
            await stream.end(5)
            assert is_cut_off(stream)
            await until(lambda: serves(client), RECONNECT_S)
            assert time.monotonic() - cut_at < RECONNECT_S


async def test_a_servers_connection_goes_dumb(parts: Rig) -> None:
    # Given a server that reaches the broker through something that can swallow all
    async with through(parts) as proxy:
        url, _ = await parts.server(AMQP_URL=proxy.url)
        await parts.echo("echo", *SLOW)
        await parts.archive()
        async with parts.client(url) as client:
            await healthy(client)
            stream = Stream(client)
            await stream.begun()
            # When it does
            proxy.go_dumb()
            dumb_at = time.monotonic()
            # Then whoever asks waits no longer than it takes to notice
            asked = [asyncio.create_task(ask(client, path)) for path in (OPENAI, NATIVE, ANTHROPIC)]
            for task in asked:
                assert is_refused(await asyncio.wait_for(task, NOTICED_S + 3))
            # And the stream ends with an error
            await stream.end(NOTICED_S + 3)
            assert is_cut_off(stream)
            print(f"noticed after {stream.ended_at - dumb_at:.1f} s")
            assert await all_refused(client)
            # When it passes things on again
            proxy.heal()
            healed_at = time.monotonic()
            # Then the server is back
            await until(lambda: serves(client), RECONNECT_S)
            print(f"answered {time.monotonic() - healed_at:.1f} s after it was healed")


async def test_a_workers_connection_goes_dumb(parts: Rig) -> None:
    # Given a worker that reaches the broker through something that can swallow all
    async with through(parts) as proxy:
        url, _ = await parts.server()
        await parts.echo("echo", *SLOW, AMQP_URL=proxy.url)
        await parts.archive()
        async with parts.client(url) as client:
            await healthy(client)
            stream = Stream(client)
            await stream.begun()
            # When it does
            proxy.go_dumb()

            async def gone() -> bool:
                return (await health(client))["model_loaded"] is False

            await until(gone, 10)
            # Then whoever asks is refused at once
            assert await all_refused(client)
            # When it passes things on again, then the worker is back
            await asyncio.sleep(NOTICED_S)
            proxy.heal()
            await until(lambda: serves(client), RECONNECT_S)
            # And the stream has its whole text, or an error at its end
            await stream.end(40)
            assert (stream.done and stream.text == "abc" * 300) or is_cut_off(stream)


async def test_rabbitmqs_memory_alarm(parts: Rig) -> None:
    # Given a stream that runs, and a second server, which sends the broker nothing and so is not told
    url, server = await parts.server()
    idle_url, _ = await parts.server("idle")
    await parts.echo("echo", "--words", "200", "--pause", "0.05")
    await parts.archive()
    async with parts.client(url) as client, parts.client(idle_url) as idle:
        await healthy(client)
        stream = Stream(client)
        await stream.begun()
        await until(lambda: busy(idle))
        # When the broker has no memory left
        await ctl(parts.rabbitmq, "set_vm_memory_high_watermark", "0")
        # Then the second one does not say that the worker, which cannot tell how it fares, has nothing to do

        async def unknown() -> bool:
            told = await busy(idle)
            assert told != 0
            return told is None

        await until(unknown, 2 * STALE_S)
        client.headers["X-Session-Id"] = "refused"
        # Then requests are refused, the first ones as well, which tell the server that it is so
        async with asyncio.timeout(10):
            first = await asyncio.gather(*(ask(client) for _ in range(10)))
        assert all(is_refused(answer) for answer in first)
        assert await all_refused(client)
        # And none of them is held: 200 MB are asked for, and not kept
        before = psutil.Process(server.process.pid).memory_info().rss
        text = "x" * 500_000
        for _ in range(20):
            answers = await asyncio.gather(*(ask(client, text=text) for _ in range(20)))
            assert all(is_refused(answer) for answer in answers)
        grown = psutil.Process(server.process.pid).memory_info().rss - before
        print(f"grown by {grown / 2**20:.0f} MiB")
        assert grown < 100 * 2**20
        # And the stream neither ends nor fails: it waits
        await asyncio.sleep(STALE_S)
        assert stream.ended_at == 0
        assert await unknown()
        # When there is memory again
        del client.headers["X-Session-Id"]
        await ctl(parts.rabbitmq, "set_vm_memory_high_watermark", "0.4")
        # Then all goes on by itself, the stream from where it was
        await until(lambda: serves(client), RECONNECT_S)
        await stream.end(30)
        assert stream.done
        assert stream.text == "abc" * 200
        await healthy(client)
        # And what was refused was not answered all the same, later, for nobody

        await until(lambda: _kept_some(parts))
        await asyncio.sleep(12)  # longer than an answer takes
        finished = [row for row in await kept(parts) if row["finish_reason"] == "stop"]
        assert [row for row in finished if row["session_id"] == "refused"] == []
        assert len({row["request_id"] for row in finished}) == len(finished)


async def test_rabbitmqs_disk_is_full(tmp_path: Path) -> None:
    # Given a broker on a small disk of its own, started again when it ends, as `up` does
    folder = tmp_path / "rabbitmq"
    with disk(folder, mebibytes=600):
        async with rig(tmp_path) as parts, kept_alive(parts.rabbitmq):
            url, server = await parts.server()
            await parts.echo()
            await parts.archive()
            async with parts.client(url) as client:
                await healthy(client)
                # When somebody fills it to the last byte
                hog = fill(folder)
                # Then requests are refused, as soon as the broker has noticed, and none hangs
                statuses: list[int] = []

                async def refused() -> bool:
                    async with asyncio.timeout(15):
                        answer = await ask(client, NATIVE, session_id=f"s{len(statuses)}")
                    statuses.append(answer.status_code)
                    assert answer.status_code in (200, 503), answer.text
                    return answer.status_code == 503 and is_refused(answer)

                async def answered() -> bool:
                    return not await refused()

                await until(refused, 60)
                for _ in range(20):
                    assert await refused()
                    await asyncio.sleep(0.5)
                assert b"amqp" in Path(server.log or "").read_bytes()
                print(f"{statuses.count(200)} answered before it was noticed")
                # When there is room again
                hog.unlink()
                # Then all goes on by itself
                await until(answered, 90)
                await healthy(client)
                # And all that was answered is kept, each once. (Of a message that the broker did not confirm nobody
                # knows; what is refused so and taken all the same is stopped, which this worker is too fast for.)
                answered_ids = {f"s{number}" for number, status in enumerate(statuses) if status == 200}

                async def all_kept() -> bool:
                    ids = [row["session_id"] for row in await kept(parts)]
                    assert len(ids) == len(set(ids))
                    return answered_ids <= set(ids)

                assert answered_ids
                await until(all_kept)
