"""SIGTERM: what runs is finished, nothing new is taken, and a rolling restart under load fails no request."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest

from server.process import Child
from tests.faults.broker import jobs_waiting
from tests.faults.chats import NATIVE, ask, is_refused, kept
from tests.faults.rig import MODEL, Rig, healthy, history, until
from tests.models.tiny_embedding import build

CLIENTS = 8


async def leave(child: Child) -> None:
    """Ask a process to stop, and wait until it has; it exits 0."""
    os.kill(child.process.pid, signal.SIGTERM)
    assert await asyncio.wait_for(child.process.wait(), 60) == 0, child.tail()


@dataclass
class Balancer:
    """Sends to whoever says that it is ready, asking twice a second, as a load balancer does."""

    urls: dict[str, bool] = field(default_factory=dict)

    async def watch(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            while True:
                for url in list(self.urls):
                    try:
                        answer = await client.get(f"{url}/health/ready")
                    except httpx.TransportError:
                        self.urls[url] = False
                    else:
                        self.urls[url] = answer.status_code == 200
                await asyncio.sleep(0.5)

    def choose(self, number: int) -> str:
        ready = [url for url, is_ready in self.urls.items() if is_ready]
        assert ready, "nobody is ready"
        return ready[number % len(ready)]


async def load(rig: Rig, choose: Callable[[int], str], stop: asyncio.Event) -> list[str]:
    """Steady load until `stop`: the sessions of all chats, each of which was answered."""
    done: list[str] = []

    async def ask(number: int) -> None:
        count = 0
        async with rig.client("") as client:
            while not stop.is_set():
                count += 1
                session = f"{number}-{count}"
                body = {"model": MODEL, "messages": [{"role": "user", "content": "wait 0.05"}]}
                url = f"{choose(number + count)}/v1/chat/completions"
                headers = {"X-Session-Id": session}
                if count % 2:
                    answer = await client.post(url, json=body, headers=headers)
                    assert answer.status_code == 200, answer.text
                else:
                    answer = await client.post(url, json=body | {"stream": True}, headers=headers)
                    assert answer.status_code == 200, answer.text
                    events = [line for line in answer.text.splitlines() if line.startswith("data: ")]  # no comments
                    assert events[-1] == "data: [DONE]", events
                    assert not any("error" in json.loads(event[6:]) for event in events[:-1])
                done.append(session)

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(ask(number))
    return done


async def worker(rig: Rig, name: str) -> Child:
    return await rig.run(name, "tests.faults.worker", "--model", MODEL)


async def ready_workers(client: httpx.AsyncClient, count: int) -> bool:
    workers = (await client.get("/health")).json()["workers"]
    return sum(worker["ready"] for worker in workers if worker["type"] == "chat") == count


async def each_is_kept(client: httpx.AsyncClient, sessions: list[str]) -> None:
    assert len(sessions) > 20 * CLIENTS
    await until(lambda: counted(client, len(sessions)))
    kept: list[str] = []
    while page := (await client.get(f"/chat/history?limit=100&offset={len(kept)}")).json():
        kept += [entry["session_id"] for entry in page]
    assert sorted(kept) == sorted(sessions)


async def counted(client: httpx.AsyncClient, count: int) -> bool:
    total: int = (await client.get("/usage")).json()["total_requests"]
    assert total <= count
    return total == count


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_a_rolling_restart_of_workers_and_servers(parts: Rig, processes: str) -> None:
    # Given two servers (of so many processes) behind a balancer, two workers, and steady load
    of = {"SERVER_WORKERS": processes}
    servers = dict([await parts.server("server-1", **of), await parts.server("server-2", **of)])
    workers = [await worker(parts, "worker-1"), await worker(parts, "worker-2")]
    await parts.archive()
    balancer, stop = Balancer(dict.fromkeys(servers, True)), asyncio.Event()
    (first, second) = servers
    async with parts.client(first) as client, parts.client(second) as other:
        await until(lambda: ready_workers(client, 2))
        await until(lambda: ready_workers(other, 2))
        watching = asyncio.create_task(balancer.watch())
        loading = asyncio.create_task(load(parts, balancer.choose, stop))
        # When one after the other is stopped and started again
        for number, child in enumerate(workers, 3):
            await asyncio.sleep(1)
            await leave(child)
            await worker(parts, f"worker-{number}")
            await until(lambda: ready_workers(client, 2))
        for url, child in servers.items():
            await asyncio.sleep(1)
            await leave(child)
            assert not loading.done(), loading.exception()
            port = url.rpartition(":")[2]
            await parts.run(f"server-{port}-again", "server", "serve", "--port", port, **of)
            await until(lambda url=url: balancer.urls[url])
        await asyncio.sleep(1)
        stop.set()
        sessions = await loading
        watching.cancel()
    # Then every request was answered, and is kept once
    async with parts.client(second) as client:
        await each_is_kept(client, sessions)


async def test_a_rolling_restart_of_the_processes_behind_one_port(parts: Rig) -> None:
    url, server = await parts.server(SERVER_WORKERS="2")
    await worker(parts, "worker-1")
    await parts.archive()
    stop = asyncio.Event()
    async with parts.client(url) as client:
        await until(lambda: ready_workers(client, 1))
        loading = asyncio.create_task(load(parts, lambda _number: url, stop))
        before = psutil.Process(server.process.pid).children()
        assert len(before) == 2
        for process in before:
            await asyncio.sleep(1)
            process.terminate()
            await until(lambda process=process: not process.is_running())
            await until(lambda: len(psutil.Process(server.process.pid).children()) == 2)
            await asyncio.sleep(3)  # until the new one serves
            assert not loading.done(), loading.exception()
        stop.set()
        sessions = await loading
    async with parts.client(url) as client:
        await each_is_kept(client, sessions)


async def running(client: httpx.AsyncClient, count: int) -> bool:
    workers = (await client.get("/health")).json()["workers"]
    return sum(worker["running"] for worker in workers if worker["type"] == "chat") == count


async def not_ready(client: httpx.AsyncClient) -> httpx.Response | None:
    answer = await client.get("/health/ready")
    return answer if answer.status_code == 503 else None


@pytest.mark.parametrize("kind", ["worker", "server"])
async def test_it_finishes_what_it_has_and_takes_nothing_new(parts: Rig, kind: str) -> None:
    # Given a chat in hand
    url, server = await parts.server()
    worker_ = await worker(parts, "worker-1")
    await parts.archive()
    async with parts.client(url) as client:
        await until(lambda: healthy(client))
        body = {"model": MODEL, "messages": [{"role": "user", "content": "wait 3"}]}
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: running(client, 1))
        # When it is asked to stop
        child = worker_ if kind == "worker" else server
        os.kill(child.process.pid, signal.SIGTERM)
        if kind == "server":
            # Then it says so to who asks whether it is ready
            ready = await until(lambda: not_ready(client))
            assert ready.json()["problems"] == ["this server is stopping"]
            assert ready.headers["connection"] == "close"
        else:
            # Then it takes nothing new
            await until(lambda: not_ready(client))
            late = await client.post("/v1/chat/completions", json=body)
            assert late.status_code == 503
        # And what it has is answered, and it exits 0
        assert (await asking).status_code == 200
        assert await asyncio.wait_for(child.process.wait(), 30) == 0
    if kind == "worker":
        async with parts.client(url) as client:
            assert await until(lambda: history(client, 1))
        # And it leaves nothing in its queue for another to do again
        assert await jobs_waiting(parts.amqp_url, MODEL) == 0


async def kept_at_least(rig: Rig, count: int) -> bool:
    return len(await kept(rig)) >= count


async def test_an_archivist_that_holds_what_it_cannot_write(parts: Rig) -> None:
    url, _ = await parts.server()
    await parts.echo()
    archive = await parts.archive()
    async with parts.client(url) as client:
        await until(lambda: healthy(client))
        # Given records in its hands, and a table that somebody else holds
        async with await psycopg.AsyncConnection.connect(parts.database_url) as holding:
            await holding.execute("LOCK TABLE chats IN EXCLUSIVE MODE")
            sessions = {f"held-{n}" for n in range(20)}
            for session_id in sessions:
                assert (await ask(client, NATIVE, session_id=session_id)).status_code == 200
            await until(lambda: waits_for_a_lock(parts))
            # When it is asked to stop, then it does, in time
            at = time.monotonic()
            await leave(archive)
            assert time.monotonic() - at < 15
            assert await kept(parts) == []
        # And the next one writes all of them, once; asked to stop in the middle of more, it finishes what it writes
        for again in range(3):
            archive = await parts.archive()
            more = {f"more-{again}-{n}" for n in range(200)}
            asking = [asyncio.create_task(ask(client, NATIVE, session_id=session_id)) for session_id in more]
            sessions |= more
            await until(lambda again=again: kept_at_least(parts, 20 + 200 * again + 1))
            await leave(archive)
            assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}
        await parts.archive()
        await until(lambda: kept_at_least(parts, len(sessions)))
        await asyncio.sleep(1)
        rows = [row["session_id"] for row in await kept(parts)]
        assert len(rows) == len(sessions)
        assert set(rows) == sessions
        assert await counted(client, len(sessions))


async def waits_for_a_lock(rig: Rig) -> bool:
    async with await psycopg.AsyncConnection.connect(rig.database_url) as conn:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        row = await (await conn.execute(query)).fetchone()
    return row is not None and row[0] > 0


async def test_an_embedding_worker_that_holds_texts(parts: Rig, tmp_path: Path) -> None:
    # Given a worker that has requests in hand: it stands still until they, and the signal, have reached it
    embedding = {"type": "embedding", "source": str(build(tmp_path / "tiny")), "context_length": 64, "dtype": "float32"}
    parts.serve(**{MODEL: {}, "tiny": embedding})
    url, _ = await parts.server()
    await parts.archive()
    holding = await parts.run("embedding", "workers", "embedding", "--model", "tiny")
    async with parts.client(url) as client:

        async def is_there() -> bool:
            return bool((await client.get("/health")).json()["embedding_model_loaded"])

        await until(is_there, 60)
        os.kill(holding.process.pid, signal.SIGSTOP)
        texts = [f"text {n}" for n in range(32)]
        asked = {"model": "tiny", "input": texts}
        asking = [asyncio.create_task(client.post("/v1/embeddings", json=asked)) for _ in range(8)]

        async def are_sent() -> bool:
            line = 'qwen3_requests_waiting{model="tiny"} 8.0'
            return line in (await client.get("/metrics")).text.splitlines()

        await until(are_sent)
        await asyncio.sleep(0.5)  # the broker passes them on at once
        # When it is asked to stop
        os.kill(holding.process.pid, signal.SIGTERM)
        os.kill(holding.process.pid, signal.SIGCONT)
        # Then each of them is answered by it, and it exits 0
        for answer in await asyncio.wait_for(asyncio.gather(*asking), 30):
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["data"]) == len(texts)
        assert await asyncio.wait_for(holding.process.wait(), 30) == 0, holding.tail()
        # And each is counted once
        await until(lambda: counted(client, 8))
        # And who comes now is told
        assert is_refused(await client.post("/v1/embeddings", json=asked))
