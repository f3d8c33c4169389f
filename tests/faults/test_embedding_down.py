"""The embedding worker is killed: who chats does not notice, and vectors come later."""

import asyncio
import time
from pathlib import Path

import httpx

from server.process import Child
from tests.faults.chats import ask, healthy, is_refused
from tests.faults.rig import MODEL, Rig, until
from tests.models.tiny_embedding import build

TINY = "tiny-embedding"
DEADLINE_S = 8


async def test_the_embedding_worker_is_killed(parts: Rig, tmp_path: Path) -> None:
    # Given a chat that can be found by meaning
    embedding = {"type": "embedding", "source": str(build(tmp_path / "tiny")), "context_length": 64, "dtype": "float32"}
    parts.serve(**{MODEL: {}, TINY: embedding})
    url, _ = await parts.server(REQUEST_TIMEOUT_S=str(DEADLINE_S))
    await parts.echo("echo", "--words", "3")
    await parts.archive()

    async def start() -> Child:
        return await parts.run("embedding", "workers", "embedding", "--model", TINY)

    worker = await start()
    async with parts.client(url) as client:
        await healthy(client, timeout_s=60)

        async def found(session_id: str) -> bool:
            query = {"query": "one two three", "threshold": 0, "limit": 50}
            answer = await client.post("/chat/similar", json=query)
            return answer.status_code == 200 and session_id in [chat["session_id"] for chat in answer.json()]

        assert (await ask(client, "/chat", text="one two three", session_id="before")).status_code == 200
        await until(lambda: found("before"))
        # When the worker is killed
        worker.process.kill()
        killed_at = time.monotonic()

        def asked() -> list[asyncio.Task[httpx.Response]]:
            return [
                asyncio.create_task(client.post("/embeddings", json={"text": "hello"})),
                asyncio.create_task(client.post("/v1/embeddings", json={"model": TINY, "input": "hello"})),
                asyncio.create_task(client.post("/chat/similar", json={"query": "hello"})),
            ]

        # Then who asks at once waits, up to the deadline; and then for nothing any more
        for task in asked():
            answer = await asyncio.wait_for(task, DEADLINE_S + 5)
            assert answer.status_code == 504 or is_refused(answer), answer.text
        for task in asked():
            answer = await asyncio.wait_for(task, DEADLINE_S - 3)
            assert is_refused(answer)
        # And chats go on
        for n in range(10):
            assert (await ask(client, "/chat", text="one two three", session_id=f"without-{n}")).status_code == 200
        assert (await client.get("/chat/history")).json()[0]["session_id"].startswith("without-")
        told = (await client.get("/health")).json()
        assert (told["status"], told["embedding_model_loaded"]) == ("degraded", False)
        # When it is back
        await start()
        await healthy(client, timeout_s=60)
        print(f"back {time.monotonic() - killed_at:.0f} s after it was killed")
        # Then chats without a vector get theirs
        for n in range(10):
            await until(lambda n=n: found(f"without-{n}"))  # type: ignore[misc]
        assert (await client.post("/embeddings", json={"text": "hello"})).status_code == 200
