"""Chats over HTTP: streams that are read in the background, and what refused requests have in common."""

import asyncio
import json
import time
from typing import Any

import httpx

from tests.faults.rig import MODEL, Rig, until

OPENAI, NATIVE, ANTHROPIC = "/v1/chat/completions", "/chat", "/v1/messages"


def body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 16, "messages": [{"role": "user", "content": text}], **fields}


class Stream:
    """A streamed chat: its events as they come. `ended_at` by the monotonic clock."""

    def __init__(self, client: httpx.AsyncClient, path: str = OPENAI, **fields: Any) -> None:
        self.events: list[Any] = []
        self.done = False
        self.status = 0
        self.request_id = ""
        self.ended_at = 0.0
        self._task = asyncio.create_task(self._read(client, path, body(**fields, stream=True)))

    async def _read(self, client: httpx.AsyncClient, path: str, asked: dict[str, Any]) -> None:
        async with client.stream("POST", path, json=asked) as response:
            self.status, self.request_id = response.status_code, response.headers["x-request-id"]
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self.events.append(json.loads(line[6:]))
        self.ended_at = time.monotonic()

    @property
    def text(self) -> str:
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    async def begun(self) -> None:
        await until(lambda: self.text)

    def leave(self) -> None:
        """As a client that has had enough."""
        self._task.cancel()

    async def end(self, timeout_s: float) -> None:
        """Wait for it; what went wrong in reading it is raised."""
        await asyncio.wait_for(asyncio.shield(self._task), timeout_s)


async def health(client: httpx.AsyncClient) -> dict[str, Any]:
    told: dict[str, Any] = (await client.get("/health")).json()
    return told


async def healthy(client: httpx.AsyncClient, timeout_s: float = 30.0) -> None:
    async def check() -> bool:
        return (await health(client))["status"] == "healthy"

    await until(check, timeout_s)


async def ask(client: httpx.AsyncClient, path: str = OPENAI, **fields: Any) -> httpx.Response:
    return await client.post(path, json=body(**fields))


async def serves(client: httpx.AsyncClient) -> bool:
    """Whether a chat is taken by a worker. Its answer is not waited for."""
    async with client.stream("POST", OPENAI, json=body(stream=True)) as response:
        await response.aread() if response.status_code != 200 else None
        assert response.status_code in (200, 503), response.text
        return response.status_code == 200


def is_refused(response: httpx.Response) -> bool:
    """503 (Anthropic's: 529) in the dialect's own shape, with a time to come again."""
    path, told = response.request.url.path, response.json()
    anthropic = path == ANTHROPIC
    assert response.status_code == (529 if anthropic else 503), (path, response.status_code, response.text)
    assert int(response.headers["Retry-After"]) > 0
    if anthropic:
        assert told["type"] == "error", told
        assert told["error"]["type"] == "overloaded_error", told
    elif path.startswith("/v1/"):
        assert told["error"]["type"] == "server_error", told
    else:
        assert told["status_code"] == 503, told
    return True


def is_cut_off(stream: Stream) -> bool:
    """It ends with an error event, and without the end of a whole answer."""
    assert stream.status == 200
    assert not stream.done
    last = stream.events[-1]
    assert "error" in last, last
    assert not [event for event in stream.events[:-1] if "error" in event]
    return True


async def kept(rig: Rig) -> list[dict[str, Any]]:
    """The finished chats in Postgres, of all keys."""
    async with rig.store() as store, store._pool.connection() as conn:
        query = "SELECT request_id, session_id, finish_reason FROM chats"
        return await (await conn.execute(query)).fetchall()
