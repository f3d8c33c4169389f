"""vLLM's own OpenAI server over the same weights and with the same engine options as a model of this service."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from benchmarks.stack import PROJECT, DidNotStart
from server.core.registry import ModelSpec
from server.private import free_port
from workers.engine import engine_argv, engine_options


@dataclass(frozen=True, slots=True)
class Stock:
    url: str
    process: psutil.Process

    def outside_the_engine(self) -> list[psutil.Process]:
        """Its processes but for the engine's own."""
        children = [
            child for child in self.process.children(recursive=True) if "VLLM::" not in "".join(child.cmdline())
        ]
        return [self.process, *children]


@asynccontextmanager
async def stock_server(spec: ModelSpec, folder: Path) -> AsyncIterator[Stock]:
    """Runs until the context ends; its log goes to `folder`. Raises DidNotStart.

    The logits processors of this service are left out: vLLM's server has none of its own.
    """
    port = free_port()
    options = {name: value for name, value in engine_options(spec, []).items() if name != "logits_processors"}
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), *engine_argv(options)]
    log = folder / "vllm.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=PROJECT, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"}, stdout=out, stderr=out
        )
    try:
        async with aiohttp.ClientSession() as client:
            while not await _answers(client, f"http://127.0.0.1:{port}/health"):
                if process.returncode is not None:
                    raise DidNotStart(log.read_text()[-4000:])
                await asyncio.sleep(0.5)
        yield Stock(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _answers(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
