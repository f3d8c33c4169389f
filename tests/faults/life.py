"""A service whose worker counts (tests/faults/counting.py), and what is done with it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.process import Child
from tests.faults.dialects import text_in
from tests.faults.rig import MODEL, Rig, until


@dataclass
class Life:
    """Two server processes, a worker and an archivist over one broker and database."""

    parts: Rig
    urls: list[str]
    servers: list[Child]
    worker: Child
    client: httpx.AsyncClient
    other: httpx.AsyncClient
    settings: dict[str, str] = field(default_factory=dict)

    def begun(self) -> list[str]:
        """What was asked in the jobs that a worker has begun."""
        return self._written("begun")

    def stopped(self) -> list[float]:
        """When each job was stopped that a worker had begun, in Unix seconds."""
        return [float(line) for line in self._written("stopped")]

    def _written(self, name: str) -> list[str]:
        path = self.parts.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def told(self, event: str) -> list[dict[str, Any]]:
        """When workers begun, or ended, jobs: `at`, `asked_at` and `deadline` in Unix seconds, and what was `asked`."""
        return [told for told in map(json.loads, self._written("told")) if told["event"] == event]

    async def new_worker(self, slots: int = 8) -> Child:
        """Counts, as soon as it is heard of."""
        argv = ("tests.faults.counting", "--model", MODEL, "--slots", str(slots))
        files = {name.upper(): str(self.parts.folder / name) for name in ("begun", "stopped", "told")}
        child = await self.parts.run("counting", *argv, **files, **self.settings)
        await until(self.ready)
        return child

    async def ready(self) -> bool:
        """Whether a worker is there, and heard by both servers."""
        for client in (self.client, self.other):
            if not (await client.get("/health")).json()["model_loaded"]:
                return False
        return True

    async def running(self) -> int:
        """Jobs in the hands of workers, as they say themselves."""
        return await self._measured(f'qwen3_jobs_running{{model="{MODEL}"}} ')

    async def jobs(self, outcome: str) -> int:
        """Jobs that ended so, as the workers count them."""
        return await self._measured(f'qwen3_jobs_total{{model="{MODEL}",outcome="{outcome}"}} ')

    async def _measured(self, name: str) -> int:
        """The sum over the workers' own metrics."""
        ports = {worker["metrics_port"] for worker in await self._workers()}
        async with httpx.AsyncClient(trust_env=False) as client:
            pages = [(await client.get(f"http://127.0.0.1:{port}/metrics")).text for port in ports]
        return sum(int(float(line.removeprefix(name))) for page in pages for line in page.splitlines() if name in line)

    async def _workers(self) -> list[dict[str, Any]]:
        workers = (await self.other.get("/health")).json()["workers"]
        return [worker for worker in workers if worker["type"] == "chat"]

    async def queued(self) -> int:
        """Jobs that wait in the broker."""
        page = (await self.other.get("/metrics")).text
        name = f'qwen3_queue_messages{{lane="interactive",model="{MODEL}"}} '
        return next(int(float(line.removeprefix(name))) for line in page.splitlines() if line.startswith(name))

    async def history(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = (await self.other.get("/chat/history")).json()
        return entries

    async def usage(self) -> tuple[int, int]:
        """Requests and tokens."""
        told = (await self.other.get("/usage")).json()
        return told["total_requests"], told["total_tokens"]


@asynccontextmanager
async def life(parts: Rig, slots: int = 8, **settings: str) -> AsyncIterator[Life]:
    (first, one), (second, two) = await asyncio.gather(
        parts.server("server-1", **settings), parts.server("server-2", **settings)
    )
    async with parts.client(first) as client, parts.client(second) as other:
        made = Life(parts, [first, second], [one, two], one, client, other, settings)
        await parts.archive(**settings)
        made.worker = await made.new_worker(slots)
        yield made


def say(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


async def counting(rig: Rig, name: str, *options: str, **settings: str) -> Child:
    """A worker that counts, by name; not waited for."""
    begun = str(rig.folder / f"{name}.begun")
    return await rig.run(name, "tests.faults.counting", "--model", MODEL, *options, BEGUN=begun, **settings)


def begun(rig: Rig, name: str) -> list[str]:
    """What was asked in the jobs that it has begun."""
    path = rig.folder / f"{name}.begun"
    return path.read_text().splitlines() if path.exists() else []


CHAT = "/v1/chat/completions"


@dataclass
class Event:
    id: str
    data: str

    @property
    def text(self) -> str:
        return text_in(self.data)


async def events(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of a stream, as the standard has them; comments are left out."""
    id_ = ""
    data: list[str] = []
    async for line in response.aiter_lines():
        field, _, value = line.partition(":")
        if not line and data:
            yield Event(id_, "\n".join(data))
            data = []
        elif field == "id":
            id_ = value.strip()
        elif field == "data":
            data.append(value.strip())


def numbers(count: int) -> str:
    """What the worker says in so many tokens."""
    return "".join(f" {n}" for n in range(count))
