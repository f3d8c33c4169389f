"""Workers that are killed one after the other while they end many answers a second."""

import asyncio
from collections import Counter

from tests.faults.chats import ask, healthy, kept
from tests.faults.rig import Rig, until

KILLS = 8
CLIENTS = 24


async def test_every_chat_is_answered_once(parts: Rig) -> None:
    url, _ = await parts.server(REQUEST_TIMEOUT_S="20")
    await parts.archive()
    workers = [await parts.echo(f"echo-{number}", "--words", "4") for number in range(2)]
    async with parts.client(url, await parts.new_key("asking")) as client:
        await healthy(client)
        told: list[int] = []
        over = asyncio.Event()

        async def keep_asking() -> None:
            while not over.is_set():
                told.append((await ask(client)).status_code)

        # Given clients that ask without a pause
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(keep_asking())
            # When one of two workers is killed, again and again, and started again each time
            for number in range(KILLS):
                before = len(told)
                await until(lambda before=before: len(told) > before + 10 * CLIENTS)
                worker = workers.pop(0)
                worker.process.kill()
                await worker.stop(timeout_s=1)
                workers.append(await parts.echo(f"echo-{number}-again", "--words", "4"))
            over.set()
        # Then each chat was answered, and each is in history and billed once
        print(f"{len(told)} chats: {Counter(told)}")
        assert set(told) == {200}, Counter(told)

        async def all_kept() -> bool:
            return len(await kept(parts)) >= len(told)

        await until(all_kept)
        assert len(await kept(parts)) == (await client.get("/usage")).json()["total_requests"] == len(told)
