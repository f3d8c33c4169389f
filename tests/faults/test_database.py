"""Postgres is killed for a minute, is frozen, and runs out of disk."""

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.faults.chats import ask, body, health, healthy, is_refused, kept
from tests.faults.disk import disk, fill
from tests.faults.rig import Rig, kept_alive, own_folder, rig, until

DOWN_S = 60
"""What is promised."""
FROZEN_S = 20
"""Longer than whatever waits for an answer."""
FULL = "the disk of Postgres is full"
READS = ("/chat/history", "/chat/sessions", "/chat/stats", "/usage")


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


def words() -> str:
    """4 kB that do not become less by compression."""
    return secrets.token_hex(2000)


@dataclass
class Chats:
    """One after the other; how long each took while Postgres was there, and since it was not."""

    client: httpx.AsyncClient
    before: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.before) + len(self.without)

    async def one(self, took: list[float], **headers: str) -> None:
        began = time.monotonic()
        async with asyncio.timeout(6):
            answer = await self.client.post(
                "/chat", json=body(words(), session_id=f"s{self.count + 1}"), headers=headers
            )
        assert answer.status_code == 200, answer.text
        took.append(time.monotonic() - began)

    def took_no_longer(self) -> None:
        """But for the one that noticed that Postgres is gone, and those that a busy machine held up."""
        usual = sorted(self.before)[-1]
        slow = [took for took in self.without if took > 3 * usual + 0.5]
        print(f"usually up to {usual:.3f} s; without Postgres {[round(took, 3) for took in self.without]}")
        assert len(slow) <= 1 + len(self.without) // 20, slow


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


@asynccontextmanager
async def killed(parts: Rig) -> AsyncIterator[None]:
    """From when Postgres runs no longer until it is started again."""
    for process in postgres_processes(parts):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    await asyncio.wait_for(parts.postgres.ended(), 20)
    try:
        yield
    finally:
        await parts.postgres.start()


@contextlib.contextmanager
def frozen(parts: Rig) -> Iterator[None]:
    processes = postgres_processes(parts)
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGCONT)


async def test_postgres_is_down_for_a_minute(fragile: Rig) -> None:
    # Given a key that is in use, and one that is not yet
    parts = fragile
    url, _ = await parts.server(RATE_LIMIT_PER_MINUTE="100000")
    await parts.echo()
    archive = await parts.archive()
    other = await parts.new_key("other")
    async with parts.client(url) as client, parts.client(url, other) as unseen, parts.client(url, "qk-wrong") as wrong:
        await healthy(client)
        chats = Chats(client)
        for _ in range(10):
            await chats.one(chats.before)
        await all_are_kept(parts, client, chats.count)
        # When Postgres is killed
        down_at = time.monotonic()
        async with killed(parts):
            # Then chats go on, and what reads history is refused
            while time.monotonic() - down_at < DOWN_S:
                await chats.one(chats.without)
                # An SDK's own token beside the key in use does no harm
                await chats.one(chats.without, **{"Authorization": "Bearer sk-dummy", "x-api-key": parts.key})
                if len(chats.without) % 20 == 10:
                    assert await reads_are_refused(client)
                    # A key that nobody has asked for may be right: it is not called wrong
                    assert is_refused(await ask(unseen))
                    assert is_refused(await ask(wrong))
                    told = await health(client)
                    assert told["database_connected"] is False
                    assert "\nqwen3_database_connected 0.0\n" in (await client.get("/metrics")).text
                    assert told["status"] != "healthy"
                if len(chats.without) == 40:
                    # And the one that writes is killed meanwhile
                    archive.process.kill()
                    await archive.process.wait()
                    archive = await parts.archive()
                await asyncio.sleep(0.5)
            # None of which waits for Postgres
            chats.took_no_longer()

            # And what was said waits in the queue
            async def all_wait() -> bool:
                return await waiting_in_the_queue(client) == len(chats.without)

            await until(all_wait)
        # When it is back
        back_at = time.monotonic()
        # Then all of it is there, once
        await all_are_kept(parts, client, chats.count)
        print(f"{len(chats.without)} chats kept {time.monotonic() - back_at:.1f} s after it was back")

        async def none_wait() -> bool:
            return await waiting_in_the_queue(client) == 0

        await until(none_wait)
        # And the other keys are known, or not
        assert (await ask(unseen)).status_code == 200
        assert (await ask(wrong)).status_code == 401


async def test_postgres_is_frozen(fragile: Rig) -> None:
    # Given a key that is in use
    parts = fragile
    url, _ = await parts.server(RATE_LIMIT_PER_MINUTE="100000")
    await parts.echo()
    await parts.archive()
    other = await parts.new_key("other")
    async with parts.client(url) as client, parts.client(url, other) as unseen:
        await healthy(client)
        chats = Chats(client)
        for _ in range(10):
            await chats.one(chats.before)
        # And a pool of connections, each of which will hang
        await asyncio.gather(*(client.get(path) for path in READS * 4))
        # When Postgres no longer moves
        began = time.monotonic()
        with frozen(parts):
            # Then chats go on, what reads is refused, and nothing hangs
            while time.monotonic() - began < FROZEN_S:
                await chats.one(chats.without)
                if len(chats.without) % 10 == 3:
                    assert await reads_are_refused(client)
                    async with asyncio.timeout(10):
                        assert is_refused(await ask(unseen))
                    async with asyncio.timeout(10):
                        assert (await health(client))["database_connected"] is False
                await asyncio.sleep(0.3)
        chats.took_no_longer()
        # When it moves again, then all of it is there, once
        await all_are_kept(parts, client, chats.count)

        async def known() -> bool:
            return (await ask(unseen)).status_code == 200

        await until(known)


async def test_postgres_disk_is_full(tmp_path: Path) -> None:
    # Given a Postgres on a small disk of its own, started again when it ends, as `up` does
    with own_folder() as folder, disk(folder / "postgres", mebibytes=250):
        async with rig(tmp_path, folder) as parts, kept_alive(parts.postgres):
            url, _ = await parts.server(RATE_LIMIT_PER_MINUTE="100000")
            await parts.echo()
            archive = await parts.archive()
            async with parts.client(url) as client:
                await healthy(client)
                chats = Chats(client)
                await chats.one(chats.before)
                await all_are_kept(parts, client, 1)
                # When somebody fills it to the last byte
                hog = fill(folder / "postgres")

                # Then what has to be written at once is refused: an Idempotency-Key
                async def refused() -> bool:
                    session_id = f"s{chats.count + 1}"
                    asked = body(words(), session_id=session_id)
                    async with asyncio.timeout(20):
                        answer = await client.post("/chat", json=asked, headers={"Idempotency-Key": session_id})
                    if answer.status_code == 200:  # there was room in what Postgres had taken before
                        chats.without.append(0)
                        return False
                    return is_refused(answer)

                await until(refused, 60)
                # And other chats go on, and wait in the queue
                for _ in range(20):
                    await chats.one(chats.without)

                async def some_wait() -> bool:
                    return await waiting_in_the_queue(client) > 0

                await until(some_wait)

                # And health says why, as do the logs, and what to do
                async def named() -> bool:
                    told = await health(client)
                    return told["status"] == "degraded" and FULL in " ".join(told["problems"])

                await until(named)
                assert archive.log is not None
                for log in (archive.log, parts.folder / "server.log"):
                    assert f'"message": "{FULL}: free some space' in log.read_text(), log
                # When there is room again, then all of it is there, once
                hog.unlink()
                await all_are_kept(parts, client, chats.count)
                await healthy(client)
                assert await refused() is False
