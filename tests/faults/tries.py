"""What clients of a counting worker (counting.py) ask, and what each of them saw, event by event."""

import asyncio
import json
from collections import Counter
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.faults.life import CHAT, Event, events, numbers, say


@dataclass(eq=False)
class Question:
    """Asked once or, where it is to be `kept` (its name is its Idempotency-Key), as often as one likes. `met` counts
    the faults in its lifetime, `servers` are those that were asked."""

    name: str
    tokens: int
    stream: bool
    kept: bool
    met: Counter[str] = field(default_factory=Counter)
    servers: set[str] = field(default_factory=set)
    stopped: bool = False
    tries: list["Try"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole answer."""
        return numbers(self.tokens)

    @property
    def over(self) -> bool:
        """No fault meets it any more. What was refused or broken may still be under way in a worker: its record counts
        on that worker's life."""
        return all(one.outcome == "answered" for one in self.tries)

    def lost_a_server(self) -> bool:
        return any(self.met[server] for server in self.servers)


@dataclass(eq=False)
class Try:
    """One client. `outcome`: answered, refused (before the answer), broken (an error event in it), cut (the connection
    ended), left (by the client itself); empty while it lasts. `status` and `code` are the error's. `resumed`:
    whether the client came back to the same answer, with the id of its last event."""

    question: Question
    server: str = ""
    outcome: str = ""
    request_id: str = ""
    status: int = 0
    code: str | None = None
    events: list[Event] = field(default_factory=list)
    text: str = ""
    completion_tokens: int = -1
    replayed: bool = False
    resumed: bool = False
    task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        q = self.question
        return (
            f"<{q.name}: {q.tokens} tokens{' streamed' if q.stream else ''}{' kept' if q.kept else ''}, {self.server}, "
            f"met {dict(q.met)}, {self.outcome or 'open'} {self.status or ''} {self.code or ''} {self.request_id[:6]} "
            f"{len(self.text.split())} told>"
        )

    def begin(self, server: str, work: Coroutine[Any, Any, None]) -> None:
        self.server, self.outcome = server, ""
        self.question.servers.add(server)
        self.task = asyncio.create_task(work)

    async def leave(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.outcome = self.outcome or "left"  # before it had begun

    async def ask(self, client: httpx.AsyncClient) -> None:
        q = self.question
        body = say(q.name, max_tokens=q.tokens, stream=q.stream, temperature=0)
        if q.stream:
            body["stream_options"] = {"include_usage": True}
        headers = {"Idempotency-Key": q.name} if q.kept else {}
        await self._hear(client.stream("POST", CHAT, json=body, headers=headers))

    async def resume(self, client: httpx.AsyncClient) -> None:
        """Go on with a stream after the last event that came."""
        self.resumed = True
        path = f"/v1/requests/{self.request_id}/events"
        last = {"Last-Event-ID": self.events[-1].id} if self.events else {}
        await self._hear(client.stream("GET", path, headers=last))

    async def _hear(self, asking: AbstractAsyncContextManager[httpx.Response]) -> None:
        try:
            async with asking as response:
                self.status = response.status_code
                if response.status_code != 200:
                    self._note(json.loads(await response.aread()))
                    self.outcome = "refused"
                    self.request_id = self.request_id or response.headers["x-request-id"]
                    return
                assert self.request_id in ("", response.headers["x-request-id"])
                self.request_id = response.headers["x-request-id"]
                self.replayed = "idempotent-replayed" in response.headers
                await (self._read(response) if self.question.stream else self._take(response))
        except httpx.TransportError:
            self.outcome = self.outcome or "cut"
        except asyncio.CancelledError:
            self.outcome = self.outcome or "left"

    async def _take(self, response: httpx.Response) -> None:
        whole = json.loads(await response.aread())
        self.text = whole["choices"][0]["message"]["content"]
        self.completion_tokens = whole["usage"]["completion_tokens"]
        self.outcome = "answered"

    async def _read(self, response: httpx.Response) -> None:
        async for event in events(response):
            assert not self.outcome, f"{event} after the end"
            content = {} if event.data == "[DONE]" else json.loads(event.data)
            if "error" in content:
                self._note(content)
                self.outcome = "broken"
                continue
            self.events.append(event)
            self.text += event.text
            if usage := content.get("usage"):
                self.completion_tokens = usage["completion_tokens"]
            if not content:
                self.outcome = "answered"
        assert self.outcome, "a stream ended without an error and without an end"

    def _note(self, told: dict[str, Any]) -> None:
        assert told["error"]["message"]
        self.code = told["error"]["code"]
