"""Asking, leaving, coming back, stopping, killing, cutting in any order: each request ends once, and all agree on it.

Hypothesis chooses the order. Broker, database, two servers, an archivist and a worker are real processes; the worker's
engine only counts, slowly, so that most faults hit an answer in the making. What fails is printed step by step, and
with the line that has Hypothesis do it again.
"""

import asyncio
import itertools
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from server.private import free_port
from server.process import Child
from tests.faults.agreement import Record, assert_stopped, assert_told, check, is_recorded
from tests.faults.broker import Proxy
from tests.faults.rig import MODEL, Rig, Stores, sharing, until
from tests.faults.tries import Question, Try

SERVERS = ("server-1", "server-2")
SLOTS = 4
"""Fewer than what is often asked at once, so that some wait."""


class Loop:
    """Runs coroutines for callers that have no loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)


@dataclass
class Service:
    """The service's processes by name, some of which may be dead, and the way to their broker. `ports` are what they
    answer on: workers on a new one each time, by which servers are known to have heard of them."""

    rig: Rig
    proxy: Proxy
    ports: dict[str, int] = field(default_factory=dict)
    children: dict[str, Child] = field(default_factory=dict)

    def url(self, server: str) -> str:
        return f"http://127.0.0.1:{self.ports[server]}"

    def begun(self) -> Counter[str]:
        path = self.rig.folder / "begun"
        return Counter(path.read_text().splitlines() if path.exists() else [])

    async def kill(self, name: str) -> None:
        self.children[name].process.kill()
        await self.children[name].process.wait()

    async def cut(self) -> None:
        self.proxy.cut()

    async def recover(self) -> None:
        """All run, and the servers know of the workers."""
        for name in ("worker", "archivist", *SERVERS):
            if name not in self.children or self.children[name].exited:
                self.children[name] = await self._start(name)
        await until(self._whole)

    async def _start(self, name: str) -> Child:
        if name in SERVERS:
            port = self.ports.setdefault(name, free_port())
            return await self.rig.run(name, "server", "serve", "--port", str(port))
        port = self.ports[name] = free_port()
        if name == "archivist":
            return await self.rig.archive(METRICS_PORT=str(port))
        argv = ("tests.faults.counting", "--model", MODEL, "--slots", str(SLOTS))
        return await self.rig.run(name, *argv, METRICS_PORT=str(port), BEGUN=str(self.rig.folder / "begun"))

    async def _whole(self) -> bool:
        wanted = {self.ports["worker"], self.ports["archivist"]}
        async with httpx.AsyncClient(trust_env=False) as client:
            for name in SERVERS:
                try:
                    told = (await client.get(f"{self.url(name)}/health")).json()
                except httpx.TransportError:
                    return False
                ready = {worker["metrics_port"] for worker in told["workers"] if worker["ready"]}
                if told["status"] != "healthy" or not wanted <= ready:
                    return False
        return True

    async def idle(self) -> bool:
        """Whether the worker has nothing in hand, and no finished chat waits."""
        page = f"http://127.0.0.1:{self.ports['worker']}/metrics"
        async with httpx.AsyncClient(trust_env=False) as client:
            running = (await client.get(page)).text
            waiting = (await client.get(f"{self.url(SERVERS[0])}/metrics")).text
        return f'qwen3_jobs_running{{model="{MODEL}"}} 0.0' in running and "qwen3_history_queue_messages 0.0" in waiting


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop()


@pytest.fixture(scope="module")
def service(loop: Loop, shared: Stores) -> Iterator[Service]:
    stack = AsyncExitStack()

    async def begin() -> Service:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rig = await stack.enter_async_context(sharing(folder, shared))
        proxy = Proxy(rig.amqp_url)
        await proxy.start()
        stack.push_async_callback(proxy.stop)
        rig.amqp_url = proxy.url
        made = Service(rig, proxy)
        await made.recover()
        return made

    yield loop.run(begin())
    loop.run(stack.aclose())


@dataclass
class Stop:
    """A DELETE: what was stopped, and what was told of it."""

    one: Try
    request_id: str
    status: int = 0
    told: str = ""
    task: asyncio.Task[None] | None = None

    async def send(self, client: httpx.AsyncClient) -> None:
        try:
            answer = await client.delete(f"/v1/requests/{self.request_id}")
        except httpx.TransportError:
            return  # the server it was sent to is dead
        self.status, self.told = answer.status_code, answer.json().get("status", "")


async def recorded(rig: Rig, key_name: str) -> dict[str, Record]:
    """A key's records by request id."""
    async with rig.store() as store, store._pool.connection() as connection:
        rows = await connection.execute(
            "SELECT request_id, messages, finish_reason, completion_tokens FROM chats"
            " WHERE key_id = (SELECT id FROM api_keys WHERE name = %s)",
            [key_name],
        )
        records = await rows.fetchall()
    for row in records:
        said = row.pop("messages")
        row["question"], row["answer"] = said[0]["content"], said[-1]["content"]
    return {row.pop("request_id"): row for row in records}


async def settled(service: Service, key_name: str, wanted: set[str]) -> dict[str, Record]:
    """The records, once those wanted are there and nothing is under way."""
    last: dict[str, Record] = {}

    async def all_there() -> bool:
        nonlocal last
        idle, before, last = await service.idle(), last, await recorded(service.rig, key_name)
        await asyncio.sleep(0.3)  # the archivist may have some in hand
        return idle and wanted <= last.keys() and before == last

    await until(all_there, timeout_s=30)
    return last


Kind = tuple[int, bool, bool]
KINDS = st.tuples(st.integers(10, 80), st.booleans(), st.booleans())
"""Tokens, streamed, kept."""
ACTS = ("submit",) * 4 + ("leave", "come back", "come back", "stop", "break", "recover", "wait")
VICTIMS = ("worker", "worker", "archivist", *SERVERS, "cut")


def machine_of(loop: Loop, service: Service) -> type[RuleBasedStateMachine]:
    """The rules, over this service. Each example has a key of its own."""
    examples = itertools.count()

    class AnyOrder(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.began = time.monotonic()
            self.key_name = f"example {next(examples)}"
            self.questions: list[Question] = []
            self.stops: list[Stop] = []
            self.standing: Counter[str] = Counter()
            loop.run(service.recover())
            key = loop.run(service.rig.new_key(self.key_name))
            self.clients = {name: service.rig.client(service.url(name), key) for name in SERVERS}

        def say(self, *what: object) -> None:
            """Shown where the test fails."""
            print(f"{self.key_name} {time.monotonic() - self.began:6.2f} s ", *what)

        @rule(
            what=st.sampled_from(ACTS),
            kinds=st.lists(KINDS, min_size=1, max_size=3),
            n=st.integers(0, 99),
            server=st.sampled_from(SERVERS),
            victim=st.sampled_from(VICTIMS),
        )
        def act(self, what: str, kinds: list[Kind], n: int, server: str, victim: str) -> None:
            """One rule, since Hypothesis leaves whole rules out of an example. `n` chooses among what there is, by its
            remainder: that depends on time, which no strategy may."""
            match what:
                case "submit":
                    self.submit(kinds, server)
                case "leave":
                    self.leave(n)
                case "come back":
                    self.come_back(n, server)
                case "stop":
                    self.stop(n, server)
                case "break":
                    self.fault(victim)
                case "recover" if self.standing:
                    self.recover()
            loop.run(asyncio.sleep(n / 200))

        def submit(self, kinds: list[Kind], server: str) -> None:
            first = len(self.questions)
            new = [Question(f"{self.key_name}, {n}", *kind) for n, kind in enumerate(kinds, first)]
            self.questions += new
            for question in new:
                self._try(question, server)

        def _try(self, question: Question, server: str) -> Try:
            one = Try(question)
            question.tries.append(one)
            self._begin(one, server, one.ask)
            return one

        def _begin(self, one: Try, server: str, how: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
            self.say(how.__name__, server, one)
            met = one.question.met
            met.update(self.standing - met)

            async def begin() -> None:
                one.begin(server, how(self.clients[server]))

            loop.run(begin())

        def leave(self, n: int) -> None:
            if open_ := [one for one in self._tries() if not one.outcome]:
                one = open_[n % len(open_)]
                self.say("leave", one)
                loop.run(one.leave())

        def come_back(self, n: int, server: str) -> None:
            """With the same Idempotency-Key, or with the id of the last event."""
            kept = [one for one in self._tries() if one.question.kept]
            left = [one for one in kept if one.question.stream and one.request_id and one.outcome in ("left", "cut")]
            if left and n % 2:
                one = left[n % len(left)]
                self._begin(one, server, one.resume)
            elif kept:
                self._try(kept[n % len(kept)].question, server)

        def stop(self, n: int, server: str) -> None:
            """By its id, where its client knows it: once the answer has begun."""
            known = [one for one in self._tries() if one.request_id and one.outcome in ("", "left", "cut")]
            if not known:
                return
            one = known[n % len(known)]
            self.say("stop", one)
            one.question.stopped = True
            stop = Stop(one, one.request_id)
            self.stops.append(stop)

            async def begin() -> None:
                stop.task = asyncio.create_task(stop.send(self.clients[server]))

            loop.run(begin())

        def fault(self, name: str) -> None:
            """A process is killed, or every connection to the broker is cut."""
            if self.standing.total() == 2 or (name != "cut" and service.children[name].exited):
                return
            self.say("fault", name)
            # Noted before it is done, so that nothing ends by it unexplained.
            self.standing[name] += 1
            for question in self.questions:
                if not question.over:
                    question.met[name] += 1
            loop.run(service.cut() if name == "cut" else service.kill(name))

        def recover(self) -> None:
            self.say("recover")
            loop.run(service.recover())
            self.standing.clear()

        def _tries(self) -> list[Try]:
            return [one for question in self.questions for one in question.tries]

        def teardown(self) -> None:
            """Then every request has come to one end, and history, usage and what clients saw agree."""
            if not hasattr(self, "clients"):
                return
            self.recover()
            loop.run(self._agree())

        async def _agree(self) -> None:
            every = self._tries()
            await asyncio.gather(
                *(one.task for one in every if one.task), *(stop.task for stop in self.stops if stop.task)
            )
            wanted = {one.request_id for one in every if is_recorded(one)}
            records = await settled(service, self.key_name, wanted)
            for one in every:
                self.say("ended", one)
            check(self.questions, records, service.begun())
            for stop in self.stops:
                if stop.status:
                    assert_stopped(stop.one, stop.request_id, stop.status, stop.told)
            client = self.clients[SERVERS[len(every) % 2]]
            for request_id in {one.request_id for one in every if one.request_id} | records.keys():
                answer = await client.get(f"/v1/requests/{request_id}")
                assert answer.status_code in (200, 404), answer.text
                request = answer.json() if answer.status_code == 200 else None
                assert_told(records.get(request_id), request, [o for o in every if o.request_id == request_id])
            history = (await client.get("/chat/history?limit=1000")).json()
            kept = [(entry["messages"][0]["content"], entry["messages"][-1]["content"]) for entry in history]
            assert sorted(kept) == sorted((record["question"], record["answer"]) for record in records.values())
            usage = (await client.get("/usage")).json()
            assert usage["total_requests"] == len(records)
            made = sum(record["completion_tokens"] for record in records.values())
            assert usage["total_tokens"] == len(records) + made  # a question counts as one token
            for client in self.clients.values():
                await client.aclose()

    return AnyOrder


def test_any_order(loop: Loop, service: Service) -> None:
    run_state_machine_as_test(
        machine_of(loop, service),
        settings=settings(
            max_examples=6,
            stateful_step_count=30,
            deadline=None,
            print_blob=True,
            phases=(Phase.reuse, Phase.generate),  # to shrink takes many minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
