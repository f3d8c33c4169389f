"""vLLM's own OpenAI server over the same weights and with the same engine options as a model of this service."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

from benchmarks.stack import other_server
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
async def stock_server(spec: ModelSpec) -> AsyncIterator[Stock]:
    """Runs until the context ends. Raises DidNotStart.

    The logits processors of this service are left out: vLLM's server has none of its own.
    """
    port = free_port()
    options = {name: value for name, value in engine_options(spec, []).items() if name != "logits_processors"}
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), *engine_argv(options)]
    url = f"http://127.0.0.1:{port}"
    async with other_server(argv, f"{url}/health", VLLM_NO_USAGE_STATS="1") as process:
        yield Stock(url, process)
