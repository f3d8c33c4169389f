"""Postgres is killed for a minute, is frozen, and runs out of disk."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.faults.chats import ask, health, healthy, is_refused, kept
from tests.faults.disk import disk, fill
from tests.faults.rig import Rig, kept_alive, rig, until

DOWN_S = 60
"""What is promised."""
READS = ("/chat/history", "/chat/sessions", "/chat/stats", "/usage")


@pytest.fixture
def parts(own_parts: Rig) -> Rig:
    """What is done here is done to the stores."""
    return own_parts


def postgres_processes(parts: Rig) -> list[psutil.Process]:
    postmaster = psutil.Process(parts.postgres._server.get_pid())
    return [postmaster, *postmaster.children(recursive=True)]


async def reads_are_refused(client: httpx.AsyncClient) -> bool:
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*(client.get(path) for path in READS))
    return all(is_refused(answer) for answer in answers)


async def waiting_in_the_queue(client: httpx.AsyncClient) -> int:
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("qwen3_history_queue_messages "):
            return int(float(line.split()[1]))
    return -1


async def answered_in_time(client: httpx.AsyncClient, session_id: str) -> bool:
    async with asyncio.timeout(6):
        answer = await ask(client, "/chat", session_id=session_id)
    assert answer.status_code == 200, answer.text
    return True


async def all_are_kept(parts: Rig, client: httpx.AsyncClient, count: int) -> None:
    """As many chats as were answered, each once, in history and in usage."""

    async def there() -> bool:
        answer = await client.get("/usage")
        if answer.status_code != 200:
            return False
        requests: int = answer.json()["total_requests"]
        assert requests <= count
        return requests == count

    await until(there, 60)
    rows = await kept(parts)
    assert len(rows) == len({row["session_id"] for row in rows}) == count
    assert (await client.get("/chat/stats")).json()["total_chats"] == count


async def test_postgres_is_down_for_a_minute(parts: Rig) -> None:
    # Given a key that is in use, and one that is not yet
    url, _ = await parts.server(RATE_LIMIT_PER_MINUTE="100000")
    await parts.echo()
    archive = await parts.archive()
    other = await parts.new_key("other")
    async with parts.client(url) as client, parts.client(url, other) as unseen, parts.client(url, "qk-wrong") as wrong:
        await healthy(client)
        chats = 0
        for _ in range(3):
            await answered_in_time(client, f"s{(chats := chats + 1)}")
        # When Postgres is killed
        down_at = time.monotonic()
        for process in postgres_processes(parts):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.wait_for(parts.postgres.ended(), 20)
        # Then chats go on, and what reads history is refused
        while (down_s := time.monotonic() - down_at) < DOWN_S:
            await answered_in_time(client, f"s{(chats := chats + 1)}")
            if chats % 20 == 5:
                assert await reads_are_refused(client)
                # A key that nobody has asked for may be right: it is not called wrong
                assert is_refused(await ask(unseen))
                assert is_refused(await ask(wrong))
                # An SDK's own token beside the key in use does no harm
                both = {"Authorization": "Bearer sk-dummy", "x-api-key": parts.key}
                answer = await client.post("/v1/chat/completions", json=_body(f"s{(chats := chats + 1)}"), headers=both)
                assert answer.status_code == 200, answer.text
                told = await health(client)
                assert told["database_connected"] is False
                assert told["status"] != "healthy"
            if chats % 20 == 15 and down_s > DOWN_S / 2 and archive.exited is False:
                # And the one that writes is killed meanwhile
                archive.process.kill()
                await archive.process.wait()
                archive = await parts.archive()
            await asyncio.sleep(0.5)
        # And what was said waits in the queue

        async def all_wait() -> bool:
            return await waiting_in_the_queue(client) == chats - 3

        await until(all_wait, 10)
        print(f"{chats - 3} chats in {DOWN_S} s without Postgres")
        # When it is back
        await parts.postgres.start()
        back_at = time.monotonic()
        # Then all of it is there, once
        await all_are_kept(parts, client, chats)
        print(f"all kept {time.monotonic() - back_at:.1f} s after it was back")

        async def none_wait() -> bool:
            return await waiting_in_the_queue(client) == 0

        await until(none_wait, 10)
        # And the other keys are known, or not
        assert (await ask(unseen)).status_code == 200
        assert (await ask(wrong)).status_code == 401


def _body(session_id: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "hello"}], "session_id": session_id}


async def test_postgres_is_frozen(parts: Rig) -> None:
    # Given a key that is in use
    url, _ = await parts.server(RATE_LIMIT_PER_MINUTE="100000")
    await parts.echo()
    await parts.archive()
    other = await parts.new_key("other")
    async with parts.client(url) as client, parts.client(url, other) as unseen:
        await healthy(client)
        assert await answered_in_time(client, "s1")
        # And a pool of connections, each of which will hang
        await asyncio.gather(*(client.get(path) for path in READS * 4))
        # When Postgres no longer moves
        frozen = postgres_processes(parts)
        for process in frozen:
            process.suspend()
        try:
            # Then chats go on, what reads is refused, and nothing hangs
            chats, began = 1, time.monotonic()
            while time.monotonic() - began < 30:
                await answered_in_time(client, f"s{(chats := chats + 1)}")
                if chats % 10 == 3:
                    assert await reads_are_refused(client)
                    async with asyncio.timeout(10):
                        assert is_refused(await ask(unseen))
                    async with asyncio.timeout(10):
                        assert (await health(client))["database_connected"] is False
                await asyncio.sleep(0.3)
        finally:
            for process in frozen:
                with contextlib.suppress(psutil.NoSuchProcess):
                    os.kill(process.pid, signal.SIGCONT)
        # When it moves again, then all of it is there, once
        await all_are_kept(parts, client, chats)
        assert (await ask(unseen)).status_code == 200


async def test_postgres_disk_is_full(tmp_path: Path) -> None:
    # Given a Postgres on a small disk of its own, started again when it ends, as `up` does
    folder = tmp_path / "postgres"
    with disk(folder, mebibytes=250):
        async with rig(tmp_path) as parts, kept_alive(parts.postgres):
            url, _ = await parts.server(RATE_LIMIT_PER_MINUTE="100000")
            await parts.echo()
            archive = await parts.archive()
            async with parts.client(url) as client:
                await healthy(client)
                assert await answered_in_time(client, "s1")
                await all_are_kept(parts, client, 1)
                # When somebody fills it to the last byte
                hog = fill(folder)
                # Then chats go on, and wait in the queue
                chats = 1
                for _ in range(300):
                    text = os.urandom(2000).hex()
                    async with asyncio.timeout(10):
                        answer = await ask(client, "/chat", text=text, session_id=f"s{(chats := chats + 1)}")
                    assert answer.status_code == 200, answer.text
                    async with asyncio.timeout(20):
                        read = await client.get("/chat/history?limit=1")
                    assert read.status_code == 200 or is_refused(read)

                async def some_wait() -> bool:
                    return await waiting_in_the_queue(client) > 0

                await until(some_wait)
                # And the log says why
                assert archive.log is not None
                log = archive.log.read_text()
                assert '"sqlstate": "53100"' in log or "OperationalError" in log, log[-2000:]
                # When there is room again, then all of it is there, once
                hog.unlink()
                await all_are_kept(parts, client, chats)
                await healthy(client)
