"""A whole chat worker that freezes under `up`: it is missed by name, ended, started again, and its work is done."""

import asyncio
import json
import time

import httpx
import psutil
import pytest

from server.core.watchdog import SILENT_S
from tests.faults.rig import until
from tests.processes import started
from tests.stack import Stack, say


def chat_worker(stack: Stack) -> psutil.Process:
    return started(str(stack.folder), "workers", "chat")


@pytest.mark.timeout(900)
async def test_a_worker_that_freezes_under_up(stack: Stack) -> None:
    headers = {"Authorization": f"Bearer {stack.key}"}
    async with httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=300, trust_env=False) as client:
        # Given a stream in the middle
        body = say("Count to fifteen.", model=None, temperature=0, stream=True, max_tokens=3000, ignore_eos=True)
        lines: list[str] = []

        async def read(told: list[str]) -> None:
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    told += [line.removeprefix("data: ")] if line.startswith("data: ") else []

        reading = asyncio.create_task(read(lines))
        worker = chat_worker(stack)
        await until(lambda: len(lines) > 20)
        # When the worker's process freezes
        worker.suspend()
        at, before = time.monotonic(), len(lines)
        # Then readiness fails within 15 s, and names it

        async def named() -> bool:
            answer = await client.get("/health/ready")
            problems = answer.json()["problems"]
            return answer.status_code == 503 and any("chat worker chat-" in p and "heard" in p for p in problems)

        await until(named, timeout_s=15)
        assert time.monotonic() - at < 15
        # And it is ended, with its engine, and started again
        await until(lambda: not worker.is_running(), timeout_s=SILENT_S + 15)

        async def healthy() -> bool:
            return (await client.get("/health")).status_code == 200

        await until(healthy, timeout_s=240)
        assert chat_worker(stack).pid != worker.pid
        # And the stream went on to its end, as if nothing had been
        await asyncio.wait_for(reading, 120)
        whole: list[str] = []
        await read(whole)
        assert lines[-1] == whole[-1] == "[DONE]"
        assert len(lines) > before
        assert content(lines) == content(whole)


def content(lines: list[str]) -> str:
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
