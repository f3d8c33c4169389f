"""A job that ends its worker each time: it is given up on, its client is told, and nobody else is harmed."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pika

from server.core import topology
from server.core.inbox import Inbox
from server.core.messages import Job, decode
from tests.faults.rig import MODEL, Rig, healthy, history, until


@asynccontextmanager
async def kept_alive(rig: Rig) -> AsyncIterator[list[int]]:
    """A worker that is started again whenever it ends, as `up` does; how it ended, each time."""
    ends: list[int] = []

    async def keep() -> None:
        while True:
            child = await rig.run(f"worker-{len(ends)}", "tests.faults.worker", "--model", MODEL)
            ends.append(await child.process.wait())

    keeping = asyncio.create_task(keep())
    try:
        yield ends
    finally:
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping


def dead_letters(amqp_url: str) -> list[tuple[Job, str]]:
    """What a person finds in `dead.v2`: each job and why it is there."""
    found = []
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        channel = connection.channel()
        while True:
            method, properties, body = channel.basic_get(topology.DEAD, auto_ack=True)
            if method is None:
                return found
            found.append((decode(Job, body), properties.headers["x-death"][0]["reason"]))


async def test_a_job_that_kills_its_worker_each_time(parts: Rig) -> None:
    # Given a service whose worker is started again when it ends
    url, _ = await parts.server()
    await parts.archive()
    async with kept_alive(parts) as ends, parts.client(url) as client:
        await until(lambda: healthy(client))

        async def ask(text: str, session: str) -> tuple[int, str, float]:
            body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
            began = time.monotonic()
            answer = await client.post("/v1/chat/completions", json=body, headers={"X-Session-Id": session})
            return answer.status_code, answer.text, time.monotonic() - began

        # When one job kills it, with others in its hands that take longer than it lives
        others = [ask("wait 0.6", f"other-{number}") for number in range(12)]
        poison = asyncio.create_task(ask("die", "poison"))
        answers = await asyncio.gather(*others)
        status, text, took_s = await poison
        # Then its client is told, long before its deadline
        assert status == 500, text
        assert "lost each time" in text
        assert took_s < 60
        # And the others have their answers
        assert [status for status, _, _ in answers] == [200] * 12, answers
        # And it was tried no more often than it should
        tries = topology.TRIES_TOGETHER + topology.TRIES_FEW + topology.TRIES_ALONE
        await until(lambda: len(ends) >= tries)
        # And a person finds it, with the reason
        ((job, reason),) = await until(lambda: asyncio.to_thread(dead_letters, parts.amqp_url))
        assert job.body["messages"][0]["content"] == "die"
        assert reason == "delivery_limit"
        # And each of the others is kept once
        kept = await until(lambda: history(client, 12))
        assert {entry["session_id"] for entry in kept} == {f"other-{number}" for number in range(12)}
        usage = (await client.get("/usage")).json()
        assert usage["total_requests"] == 12, usage
        assert len(ends) == tries


async def test_a_stream_whose_worker_dies_each_time_ends_with_an_error(parts: Rig) -> None:
    url, _ = await parts.server()
    async with kept_alive(parts), parts.client(url) as client:
        await until(lambda: healthy(client))
        body = {"model": MODEL, "messages": [{"role": "user", "content": "die"}], "stream": True, "temperature": 0}
        answer = await client.post("/v1/messages", json={**body, "max_tokens": 10})
        # Nothing was told yet, so it is a status
        assert answer.status_code == 500, answer.text
        assert "lost each time" in answer.text


async def test_a_job_whose_worker_dies_once_is_answered_by_another(parts: Rig, tmp_path: Path) -> None:
    # Given two workers, and a job that ends the first that takes it
    url, _ = await parts.server()
    await parts.archive()
    settings = {"DIED_ONCE": str(tmp_path / "died")}
    workers = [await parts.run(f"w-{n}", "tests.faults.worker", "--model", MODEL, **settings) for n in range(2)]
    async with parts.client(url) as client:
        await until(lambda: both_ready(client))
        body = {"model": MODEL, "messages": [{"role": "user", "content": "die once"}]}
        answer = await client.post("/v1/chat/completions", json=body)
        # Then the other one answers, and it is kept and counted once
        assert answer.status_code == 200, answer.text
        assert sum(worker.exited for worker in workers) == 1
        await until(lambda: history(client, 1))
        await asyncio.sleep(1)
        assert await history(client, 1)
        assert (await client.get("/usage")).json()["total_requests"] == 1


async def test_what_only_waited_is_not_suspected_for_its_workers_deaths(parts: Rig) -> None:
    # Given a worker whose slots are all held, and more jobs waiting at it than the suspects' queue takes
    inbox = Inbox(parts.amqp_url, "test", [MODEL], 64)
    await inbox.start()
    try:
        held = [job(inbox, "wait 2", 1) for _ in range(6)]
        waiting = [job(inbox, "hello", 2 + number % 40) for number in range(300)]
        argv, settings = ("tests.faults.worker", "--model", MODEL, "--slots", "6"), {"QUEUE_MAX_JOBS": "64"}
        for number in range(topology.TRIES_TOGETHER + 1):
            # When it is killed once more often than a job is delivered from its lane
            worker = await parts.run(f"worker-{number}", *argv, **settings)
            if not inbox.waiting:
                await until(lambda: taken(inbox, consumers=2))
                for each in held + waiting:
                    await inbox.submit(each, "interactive")
            await until(lambda: taken(inbox, consumers=2))
            worker.process.kill()
            await worker.process.wait()
        # Then the next one answers all of them
        await parts.run("worker-last", *argv, **settings)
        async with asyncio.timeout(30):
            for each in held + waiting:
                frame = await inbox.waiting[each.id].next()
                assert frame.kind == "result", frame
        # And suspected are at the most those that it had begun the last time, and nothing was given up on
        lines = "".join(path.read_text() for path in parts.folder.glob("worker-*.log")).splitlines()
        moved = [json.loads(line) for line in lines if '"suspect"' in line]
        suspected = {line["request_id"] for line in moved if line["queue"] == topology.suspects_queue(MODEL)}
        assert len(suspected) <= 6
        assert len({line["request_id"] for line in moved}) > 200
        assert await asyncio.to_thread(dead_letters, parts.amqp_url) == []
    finally:
        await inbox.close()


def job(inbox: Inbox, text: str, key_id: int) -> Job:
    now = time.time()
    body = {"messages": [{"role": "user", "content": text}]}
    id_ = secrets.token_hex(8)
    return Job(id_, MODEL, "/chat", body, key_id, inbox.queue, now, now + 100, recorded=False)


async def taken(inbox: Inbox, consumers: int) -> bool:
    """Whether a worker is there and has taken all that waited."""
    queue = topology.jobs_queue(MODEL, "interactive")
    return await inbox.publisher.declare_queue(queue, passive=True) == (0, consumers)


async def both_ready(client: httpx.AsyncClient) -> bool:
    workers = (await client.get("/health")).json()["workers"]
    return sum(worker["ready"] for worker in workers if worker["type"] == "chat") == 2
