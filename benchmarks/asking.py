"""Clients of the soak with faults (fault_soak.py): what they ask, when they leave, and how each was answered."""

import asyncio
import random
import socket
import time
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import orjson

from benchmarks.stack import Service

QUESTIONS = ("What is the capital of France?", "Tell me about rivers.", "Say hello.")
KINDS = {"streamed": 8, "whole": 4, "embedding": 4, "resumed": 2, "twice": 2}
"""Kinds of requests, by how often they come. Resumed: the client is cut off by itself in the middle, and reads on by
Last-Event-ID. Twice: two clients ask the same with one Idempotency-Key."""
CLEAR = {408, 429, 500, 502, 503, 504}
"""Statuses of a request that a fault ended; anything else that is not 200 is unexplained."""
ANSWER_WITHIN_S = 330.0
"""A little more than a request's own deadline."""
AWAY_S = 0.5
"""For which a client is gone that resumes."""
SAME = 0.999
"""Cosine of two vectors of one text, which the company in a batch may round differently."""
STALLED_READER_S = 10
"""What the service grants a client that does not read, in this soak."""


@dataclass(slots=True)
class Asked:
    """One client's request. `end`: what it does before it is over (leave, stop). `outcome`: answered, refused, left,
    stopped, or what is unexplained about it. `key` is its Idempotency-Key; `last_event` the number of events it has."""

    question: str
    kind: str = "streamed"
    end: str = ""
    key: str = ""
    outcome: str = ""
    request_id: str = ""
    text: str = ""
    completion_tokens: int = 0
    last_event: bytes = b""
    began_at: float = field(default_factory=time.monotonic)
    ended_at: float = 0.0


@dataclass(slots=True)
class Clients:
    """`asked` is every request so far; `texts` and `vectors` are the right answers, by question."""

    session: aiohttp.ClientSession
    ours: Service
    asked: list[Asked] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    vectors: dict[str, list[float]] = field(default_factory=dict)

    async def learn(self) -> None:
        """The right answers, while nothing is wrong."""
        for question in QUESTIONS:
            one = await self.ask(Asked(question))
            self.texts[question] = one.text
            await self.ask(Asked(question, "embedding"))

    async def keep_asking(self, rate: float, leaving: float, stopped: float) -> None:
        """So many clients a second at random moments, until cancelled; then waits for what is on its way."""
        asking: set[asyncio.Task[Any]] = set()
        ends, weights = ("leave", "stop", ""), (leaving, stopped, 1 - leaving - stopped)
        try:
            while True:
                await asyncio.sleep(random.expovariate(rate))
                (kind,) = random.choices(list(KINDS), list(KINDS.values()))
                end = random.choices(ends, weights)[0] if kind == "streamed" else ""
                key = uuid.uuid4().hex if kind in ("resumed", "twice") else ""
                question = random.choice(QUESTIONS)
                for _ in range(2 if kind == "twice" else 1):
                    task = asyncio.create_task(self.ask(Asked(question, kind, end, key)))
                    asking.add(task)
                    task.add_done_callback(asking.discard)
        finally:
            await asyncio.gather(*asking)

    async def ask(self, one: Asked) -> Asked:
        """Have one question answered; fills in `one`."""
        self.asked.append(one)
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                one.outcome = await self._ask(one)
        except TimeoutError:
            one.outcome = "no end"
        except aiohttp.ClientError:
            one.outcome = "refused"  # the connection went with the server
        one.ended_at = time.monotonic()
        return one

    async def _ask(self, one: Asked) -> str:
        path, body = self._request(one)
        headers = {"Idempotency-Key": one.key} if one.key else {}
        async with self.session.post(path, json=body, headers=headers) as response:
            outcome = await self._hear(response, one)
        if outcome != "away":
            return outcome
        await asyncio.sleep(AWAY_S)
        headers = {"Last-Event-ID": one.last_event.decode()}
        async with self.session.get(f"/v1/requests/{one.request_id}/events", headers=headers) as response:
            # What failed, or went with its server, is not kept: explained where there was a fault.
            return "refused" if response.status == 404 else await self._hear(response, one)

    def _request(self, one: Asked) -> tuple[str, dict[str, Any]]:
        model = self.ours.registry.default("embedding" if one.kind == "embedding" else "chat")
        assert model is not None
        if one.kind == "embedding":
            return "/v1/embeddings", {"model": model.id, "input": one.question, "encoding_format": "float"}
        body = {
            "model": model.id,
            "messages": [{"role": "user", "content": one.question}],
            "temperature": 0,
            "max_tokens": 64,
        }
        if one.kind in ("streamed", "resumed"):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return "/v1/chat/completions", body

    async def _hear(self, response: aiohttp.ClientResponse, one: Asked) -> str:
        if response.status != 200:
            one.request_id = one.request_id or response.headers.get("X-Request-Id", "")
            return await _refusal(response)
        one.request_id = response.headers["X-Request-Id"]
        if one.kind in ("streamed", "resumed"):
            return await self._read(response, one)
        answer = orjson.loads(await response.read())
        if one.kind == "embedding":
            return self._compare(answer["data"][0]["embedding"], one)
        one.text = answer["choices"][0]["message"]["content"]
        one.completion_tokens = answer["usage"]["completion_tokens"]
        return "answered"

    def _compare(self, vector: list[float], one: Asked) -> str:
        right = np.asarray(self.vectors.setdefault(one.question, vector))
        cosine = right @ vector / (np.linalg.norm(right) * np.linalg.norm(vector))
        return "answered" if cosine > SAME else f"another vector, cosine {cosine:.3f}"

    async def _read(self, response: aiohttp.ClientResponse, one: Asked) -> str:
        stopping, resumed = False, bool(one.text)
        async for line in response.content:
            if line.startswith(b"id: "):
                number = line[4:].strip()
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                return "answered"
            chunk = orjson.loads(data)
            if "error" in chunk:
                return "stopped" if stopping else "refused"
            for choice in chunk["choices"]:
                one.text += choice["delta"].get("content") or ""
            if chunk.get("usage"):
                one.completion_tokens = chunk["usage"]["completion_tokens"]
            if one.text and one.kind == "resumed" and not resumed:
                one.last_event = number
                return "away"
            if one.text and one.end == "leave":
                return "left"
            if one.text and one.end == "stop" and not stopping:
                stopping = True
                async with self.session.delete(f"/v1/requests/{one.request_id}") as stopped:
                    await stopped.read()
        return "cut short without an error"

    async def many_at_once(self, count: int) -> None:
        await asyncio.gather(*(self.ask(Asked(random.choice(QUESTIONS))) for _ in range(count)))

    async def stalled_reader(self) -> None:
        """Ask for more than buffers hold, read no more than its head, and see the connection cut."""
        one = Asked("Count.", "stalled", "leave")
        self.asked.append(one)
        _, body = self._request(one)
        body |= {"stream": True, "n": 4, "temperature": 1, "max_tokens": 1500, "ignore_eos": True}
        body |= {"logprobs": True, "top_logprobs": 20}  # 10 MB and more, past what the sockets' buffers take
        content = orjson.dumps(body)
        at = urlsplit(self.ours.url)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.ours.key}\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    await loop.sock_connect(connection, (str(at.hostname), int(at.port or 80)))
                    await loop.sock_sendall(connection, head.encode() + b"Content-Length: %d\r\n\r\n" % len(content))
                    await loop.sock_sendall(connection, content)
                    told = (await loop.sock_recv(connection, 2048)).decode(errors="replace")
                    named = [line for line in told.splitlines() if line.lower().startswith("x-request-id:")]
                    one.request_id = named[0].partition(":")[2].strip() if named else ""
                    await asyncio.sleep(3 * STALLED_READER_S)
                    rest = b""
                    while piece := await loop.sock_recv(connection, 65536):
                        rest = (rest + piece)[-100:]
                one.outcome = "read to its end" if b"[DONE]" in rest else "left"
            except TimeoutError:
                one.outcome = "never cut"
            except OSError:
                one.outcome = "left"  # reset, as it should be
        one.ended_at = time.monotonic()


async def _refusal(response: aiohttp.ClientResponse) -> str:
    try:
        message = orjson.loads(await response.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{response.status} without an error"
    return "refused" if response.status in CLEAR else f"{response.status}: {message}"
