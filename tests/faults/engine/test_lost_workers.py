"""A chat worker that is killed or freezes, with a real engine: what was accepted is answered, once."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.process import Child
from tests.faults.rig import Rig, answers, healthy, rig, until
from tests.processes import kept_to

MODEL = "qwen3-smoke"
FRONT = "1"
"""The core of all but the engine, as `up` has it: beside an engine that computes, this process would have no time."""
COUNT = [{"role": "user", "content": "Count to fifteen."}]
CHAT = {"model": MODEL, "messages": COUNT, "temperature": 0}
WEATHER = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}


class Service:
    """A server, an archivist, and one engine, which is started again only when a test says so."""

    def __init__(self, parts: Rig, url: str, cores: set[int]) -> None:
        self.parts = parts
        self.url = url
        self.cores = cores
        self.worker: Child
        self._started = 0

    async def start_worker(self) -> None:
        self._started += 1
        argv = ("workers", "chat", "--model", MODEL)
        self.worker = await self.parts.run(f"chat-{self._started}", *argv, cores=self.cores, FRONT_CORES=FRONT)

    async def ready(self, client: httpx.AsyncClient) -> None:
        await until(lambda: self.worker.exited or healthy(client), timeout_s=180)
        assert not self.worker.exited, self.worker.tail()

    def engine(self) -> psutil.Process:
        """The process that computes."""
        (core,) = [p for p in psutil.Process(self.worker.process.pid).children() if "EngineCore" in p.name()]
        return core


@pytest.fixture(scope="module")
def cores() -> Iterator[set[int]]:
    """The worker's; the tests and all else that they start keep to one of them."""
    with kept_to({int(FRONT)}) as before:
        yield before


@pytest.fixture(scope="module")
async def service(weights: Path, cores: set[int], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with rig(tmp_path_factory.mktemp("lost")) as parts:
        engine = {
            "reasoning_parser": "qwen3",
            "tool_call_parser": "hermes",
            "enable_auto_tool_choice": True,
            "kv_cache_memory_bytes": 256 * 1024**2,
            "dtype": "float32",
        }
        parts.serve(**{MODEL: {"source": str(weights), "engine": engine}})
        url, _ = await parts.server()
        await parts.archive()
        made = Service(parts, url, cores)
        await made.start_worker()
        async with parts.client(url) as client:
            await made.ready(client)
        yield made


def streams() -> dict[str, tuple[str, dict[str, Any]]]:
    """A stream of each kind: its path and its body. Only the completion goes on past the end of an answer: of what
    comes then vLLM's parsers leave out more or less, as the tokens happen to come to them one by one or together."""
    long = {"model": MODEL, "stream": True, "max_tokens": 1200}
    chat = {**long, "messages": COUNT}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
    weather = [{"role": "user", "content": "What is the weather in Tokyo and Paris?"}]
    sampled = {"temperature": 1.0, "seed": 7}
    return {
        "greedy": ("/v1/chat/completions", {**chat, "temperature": 0, "stream_options": {"include_usage": True}}),
        "seeded": ("/v1/chat/completions", {**chat, **sampled, "enable_thinking": True}),
        "choices": ("/v1/chat/completions", {**chat, **sampled, "n": 2}),
        "tools": ("/v1/chat/completions", {**chat, "temperature": 0, "messages": weather, "tools": [tool]}),
        "native": ("/chat", {**long, "messages": COUNT, "temperature": 0}),
        "completion": ("/v1/completions", {**long, "prompt": "One two", "ignore_eos": True, **sampled}),
        "gateway": ("/ai/v1/chat/completions", {**chat, "temperature": 0}),
        "messages": ("/v1/messages", {**long, "messages": COUNT, "temperature": 0, "top_k": 1}),
        "responses": ("/v1/responses", {"model": MODEL, "stream": True, "input": "Count to fifteen.", **sampled,
                                        "max_output_tokens": 1200, "top_p": 1.0}),
    }  # fmt: skip


async def read(client: httpx.AsyncClient, path: str, body: dict[str, Any], lines: list[str]) -> None:
    """The data of a stream's events, as they come."""
    async with client.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))


def text_of(lines: list[str]) -> dict[str, str]:
    """Every text of a stream, joined by the field and the place it stands in. Fails on an error event."""
    texts: dict[str, str] = {}

    def add(place: str, text: Any) -> None:
        if isinstance(text, str) and text:
            texts[place] = texts.get(place, "") + text

    for line in lines:
        if line == "[DONE]":
            texts["done"] = "yes"
            continue
        event = json.loads(line)
        assert "error" not in event, event
        assert event.get("type") != "error", event
        for choice in event.get("choices") or []:
            at = str(choice["index"])
            add(f"{at} text", choice.get("text"))
            add(f"{at} finish", choice.get("finish_reason"))
            delta = choice.get("delta") or {}
            for field in ("role", "content", "reasoning", "reasoning_content"):
                add(f"{at} {field}", delta.get(field))
            for call in delta.get("tool_calls") or []:
                for field in ("name", "arguments"):
                    add(f"{at} call {call['index']} {field}", call["function"].get(field))
        if "content" in event and "choices" not in event:
            add("content", event["content"])
        if usage := event.get("usage"):
            texts["tokens"] = str(usage.get("completion_tokens") or usage.get("output_tokens"))
        if (kind := event.get("type")) is None or kind == "ping":
            continue
        delta = event.get("delta")
        place = f"{kind} {event.get('index')} {event.get('output_index')}"
        if isinstance(delta, str):
            add(place, delta)
        elif kind == "content_block_delta":
            add(f"{place} {delta['type']}", delta.get("text") or delta.get("thinking") or delta.get("partial_json"))
        else:
            texts[place] = texts.get(place, "") + "once"
    return texts


def ends(data: str) -> str:
    """What an event is, by which the last one of a stream is known."""
    return data if data == "[DONE]" else str(json.loads(data).get("type"))


def cannot_go_on() -> dict[str, tuple[str, dict[str, Any]]]:
    """Long streams of which no second run can tell the rest."""
    chat = {"model": MODEL, "stream": True, "max_tokens": 1200, "messages": COUNT, "ignore_eos": True}
    return {
        "unseeded": ("/v1/chat/completions", {**chat, "temperature": 1.0}),
        "logprobs": ("/v1/chat/completions", {**chat, "temperature": 0, "logprobs": True}),
    }


class Held:
    """Streams of which an engine on hold has told the beginning, and a chat that it has told nothing of."""

    def __init__(
        self, service: Service, client: httpx.AsyncClient, asked: dict[str, tuple[str, dict[str, Any]]]
    ) -> None:
        self.service = service
        self.client = client
        self.asked = asked
        self.got: dict[str, list[str]] = {kind: [] for kind in asked}
        self.reading: list[asyncio.Task[None]] = []
        self.asking: asyncio.Task[httpx.Response]

    async def begin(self) -> bool:
        """False where a stream has ended before all had begun: some are short, and others use the cores too."""
        core = self.service.engine()
        core.suspend()
        self.reading = [
            asyncio.create_task(read(self.client, *asked, self.got[kind])) for kind, asked in self.asked.items()
        ]
        await until(lambda: running(self.client, len(self.got)))
        while not all(len(lines) >= 8 for lines in self.got.values()) and not self._ended():
            core.resume()
            await asyncio.sleep(0.002)
            core.suspend()
            await asyncio.sleep(0.03)
        self.asking = asyncio.create_task(self.client.post("/v1/chat/completions", json=CHAT))
        with suppress(TimeoutError):
            async with asyncio.timeout(4):  # not for long: a frozen engine is ended
                while not self._ended():
                    if await running(self.client, len(self.got) + 1):
                        return True
                    await asyncio.sleep(0.1)
        core.resume()
        await asyncio.gather(*self.reading, self.asking)
        return False

    def _ended(self) -> bool:
        return any(task.done() for task in self.reading)


@pytest.mark.timeout(900)
async def test_killed(service: Service) -> None:
    """In the middle of streams, and before the first token of a chat: one kill, for an engine takes long to start."""
    async with service.parts.client(service.url) as other, service.parts.client(service.url) as client:
        client.timeout = other.timeout = httpx.Timeout(300)
        # Given what each stream says when nothing happens
        kinds, cut = streams(), cannot_go_on()
        whole: dict[str, list[str]] = {kind: [] for kind in kinds}
        await asyncio.gather(*(read(other, *kinds[kind], whole[kind]) for kind in kinds))
        # When the worker is killed in the middle of all of them, and with a chat in its hands that has not begun
        for attempt in range(9):
            key = await service.parts.new_key(f"killed {attempt}")
            client.headers["Authorization"] = f"Bearer {key}"
            held = Held(service, client, kinds | cut)
            if await held.begin():
                break
        else:
            pytest.fail("a stream has always ended too early")
        got = held.got
        service.worker.process.kill()
        await service.worker.stop(timeout_s=1)
        assert not [kind for kind in kinds if ends(whole[kind][-1]) in map(ends, got[kind])]
        # Then new chats are refused meanwhile
        await until(lambda: refused(other, CHAT), timeout_s=15)
        told = {kind: list(got[kind]) for kind in cut}
        # And when it is started again
        await service.start_worker()
        await asyncio.gather(*held.reading)
        # Each stream goes on, and says what it would have said
        for kind in kinds:
            assert text_of(got[kind]) == text_of(whole[kind]), kind
        # Or ends with an error, and says nothing else any more
        for kind in cut:
            assert got[kind][:-1] == told[kind], kind
            error = json.loads(got[kind][-1])["error"]
            assert "The worker was lost in the middle of the answer" in error["message"], kind
        # And the chat is answered
        answer = await held.asking
        assert answer.status_code == 200, answer.text
        # And each is kept and counted once, as a whole; what was cut off is not made again, and is neither
        entries = await until(lambda: settled(client, len(kinds) + 1))
        assert len(entries) == len(kinds) + 1
        assert "cancelled" not in {entry["finish_reason"] for entry in entries}
        (kept,) = [entry for entry in entries if entry["session_id"] == answer.headers["x-session-id"]]
        assert kept["messages"][-1]["content"] == answer.json()["choices"][0]["message"]["content"]
        usage = (await client.get("/usage")).json()
        assert usage["total_requests"] == len(entries)
        assert usage["total_tokens"] == sum(entry["usage"]["total_tokens"] for entry in entries)


async def settled(client: httpx.AsyncClient, at_least: int) -> list[dict[str, Any]] | None:
    """The key's history, once it has so many entries and nothing runs any more."""
    if not await running(client, 0):
        return None
    await asyncio.sleep(2)
    entries: list[dict[str, Any]] = (await client.get("/chat/history?limit=100")).json()
    return entries if len(entries) >= at_least else None


async def running(client: httpx.AsyncClient, count: int) -> bool:
    workers = (await client.get("/health")).json()["workers"]
    return any(worker["running"] == count for worker in workers if worker["type"] == "chat")


async def refused(client: httpx.AsyncClient, body: dict[str, Any]) -> bool:
    try:
        answer = await client.post("/v1/chat/completions", json=body, timeout=1)
    except httpx.ReadTimeout:
        return False  # not noticed yet
    assert answer.status_code == 503
    return "retry-after" in answer.headers


async def freeze(
    service: Service, client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> tuple[float, asyncio.Task[None], list[str]]:
    """Freeze the engine in the middle of this stream: since when, who reads the stream, and what it has told."""
    core = service.engine()
    for _ in range(9):  # it may be over sooner than that
        lines: list[str] = []
        reading = asyncio.create_task(read(client, path, body, lines))
        await until(lambda lines=lines: len(lines) > 20)
        core.suspend()
        frozen_at = time.monotonic()
        await asyncio.sleep(0.5)
        if not reading.done():
            return frozen_at, reading, lines
        core.resume()
    pytest.fail("the stream was always over first")


@pytest.mark.timeout(900)
async def test_an_engine_that_freezes(service: Service) -> None:
    async with service.parts.client(service.url) as client:
        await service.ready(client)
        # When the process that computes freezes in the middle of a stream
        path, body = streams()["completion"]
        frozen_at, reading, lines = await freeze(service, client, path, body)
        # Then readiness fails within 15 s, and names the worker
        told = await until(lambda: not_ready(client), timeout_s=15)
        assert any("chat worker chat-" in problem for problem in told), told
        assert time.monotonic() - frozen_at < 15
        # And the worker ends by itself, and leaves nothing of it
        assert await asyncio.wait_for(service.worker.process.wait(), 30) == 1
        # And its stream goes on when it is started again
        await service.start_worker()
        await reading
        told_whole = text_of(lines)
        whole: list[str] = []
        await read(client, path, body, whole)
        assert told_whole == text_of(whole)


async def not_ready(client: httpx.AsyncClient) -> list[str] | None:
    answer = await client.get("/health/ready")
    problems: list[str] = answer.json()["problems"]
    return problems if answer.status_code == 503 and any("worker chat-" in problem for problem in problems) else None


async def test_a_long_step_is_no_freeze(service: Service) -> None:
    """The engine computes, and answers nothing for longer than a frozen one is let live."""
    async with service.parts.client(service.url) as client:
        await service.ready(client)
        assert await answers(f"{service.url}/health/ready")
        core = service.engine()
        # Given an engine that moves on now and then only
        for _ in range(60):
            core.suspend()
            await asyncio.sleep(0.2)
            core.resume()
            await asyncio.sleep(0.05)
        # Then it is let be
        assert not service.worker.exited
        answer = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": COUNT})
        assert answer.status_code == 200, answer.text


async def test_a_stream_is_finished_before_it_ends(service: Service) -> None:
    """The last one: no worker is left."""
    async with service.parts.client(service.url) as client:
        await service.ready(client)
        path, body = streams()["completion"]
        whole: list[str] = []
        await read(client, path, body, whole)
        # Given a stream in the middle
        _, reading, lines = await freeze(service, client, path, body)
        # When the worker is asked to stop
        os.kill(service.worker.process.pid, signal.SIGTERM)
        service.engine().resume()
        # Then it says all it has to say, and exits 0
        await reading
        assert text_of(lines) == text_of(whole)
        assert await asyncio.wait_for(service.worker.process.wait(), 60) == 0
        await until(lambda: refused(client, {"model": MODEL, "messages": COUNT}))
