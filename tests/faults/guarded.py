"""A service with tight bounds, for those who abuse it: what takes minutes elsewhere takes seconds here."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.process import Child
from tests.faults.rig import MODEL, Rig, until

RECEIVE_TIMEOUT_S = 2
STALLED_READER_S = 2
MAX_CONNECTIONS = 48
BUFFER_BYTES = 256 * 1024
SILENT = "qwen3-silent"
"""A model that is configured and that no worker serves."""
ORIGIN = "https://chat.example.com"


@dataclass
class Guarded:
    """`key` and `other_key` are of two users."""

    parts: Rig
    url: str
    server: Child
    worker: Child
    key: str
    other_key: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def logs(self) -> str:
        """All that its processes have logged, at every level."""
        return "\n".join(path.read_text() for path in sorted(self.parts.folder.glob("*.log")))

    async def is_well(self) -> None:
        """As at the start: the same processes, the server without a complaint, and chats are answered."""
        assert not self.server.exited
        assert not self.worker.exited
        log = (self.parts.folder / "server.log").read_text()
        for sign in ("unexpected error", "Exception in ASGI", "Traceback"):
            assert sign not in log, sign
        async with self.parts.client(self.url, self.key) as client:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "Are you well?"}]}
            assert (await client.post("/chat", json=body)).status_code == 200


@asynccontextmanager
async def guarded_service(parts: Rig) -> AsyncIterator[Guarded]:
    parts.serve(**{MODEL: {}, SILENT: {}})
    bounds = {
        "RECEIVE_TIMEOUT_S": str(RECEIVE_TIMEOUT_S),
        "STALLED_READER_S": str(STALLED_READER_S),
        "MAX_CONNECTIONS": str(MAX_CONNECTIONS),
        "STREAM_BUFFER_BYTES": str(BUFFER_BYTES),
        "CORS_ALLOWED_ORIGINS": f"https://other.example.com, {ORIGIN}",
        "LOG_LEVEL": logging.getLevelName(logging.DEBUG),
    }
    url, server = await parts.server(**bounds)
    worker = await parts.echo(LOG_LEVEL="DEBUG")
    await parts.archive(LOG_LEVEL="DEBUG")
    made = Guarded(parts, url, server, worker, await parts.new_key("ada"), await parts.new_key("eve"))
    async with parts.client(url) as client:

        async def echoing() -> bool:
            workers = (await client.get("/health")).json()["workers"]
            return {worker["type"] for worker in workers if worker["ready"]} == {"chat", "archive"}

        await until(echoing)
    yield made
