"""What a process tells of the jobs that no worker has begun: their prompts' tokens, and the age of the oldest."""

import time
from unittest.mock import AsyncMock

import pytest
from prometheus_client import REGISTRY as EXPORTED

from server import exporter
from server.core import prompt_tokens, queued
from server.core.inbox import Waiter
from server.core.messages import Frame, Job, Status
from server.core.settings import Settings
from server.dispatch import Dispatcher
from tests.unit.fake_requests import REGISTRY

MODELS = ["talker", "seer"]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"messages": []}, 1),
        ({"prompt": "a" * 400}, 100),
        ({"prompt": ["a" * 40, "b" * 40], "max_tokens": 500, "stop": "c" * 400}, 20),
        ({"prompt": "界" * 40}, 30),
        ({"prompt": [1, 2, 3]}, 3),
        ({"prompt": [[1, 2, 3], [4]]}, 4),
        ({"input": ["\ud800" * 8]}, 2),
        ({"instructions": "a" * 40, "input": [{"content": [{"text": "b" * 29}]}]}, 20),
        ({"system": [{"text": "a" * 36}], "messages": [{"content": "b" * 33}], "temperature": 0.5}, 20),
        ({"tools": [{"parameters": {"type": ["string", "null"], "enum": ["a" * 60]}}]}, 22),
    ],
)
def test_a_prompt_is_estimated_by_its_bytes(body: dict[str, object], tokens: int) -> None:
    assert prompt_tokens.estimate(body) == tokens


def test_what_is_put_before_a_question_counts_and_a_picture_does_not() -> None:
    asked = {"type": "text", "text": "What is it?"}
    bare = prompt_tokens.estimate({"messages": [{"role": "user", "content": [asked]}]})
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    assert prompt_tokens.estimate({"messages": [{"role": "user", "content": [asked, picture]}]}) == bare
    assert prompt_tokens.estimate({"messages": [{"role": "user", "content": [asked]}]}, "a" * 400) == bare + 100


def test_a_prompt_nested_without_end_is_estimated() -> None:
    nested: dict[str, object] = {}
    for _ in range(5000):
        nested = {"a": nested}
    assert prompt_tokens.estimate({"tools": [nested]}) == 1250


@pytest.fixture
def dispatcher() -> Dispatcher:
    """Connected to no broker."""
    return Dispatcher(Settings(amqp_url="amqp://127.0.0.1:1/"), REGISTRY)


def job(id_: str, model: str = "talker", age_s: float = 0.0) -> Job:
    now = time.time()
    return Job(id_, model, "/v1/completions", {"prompt": "a" * 400}, 1, "replies.x", now - age_s, now + 10)


def wait(dispatcher: Dispatcher, *jobs: Job) -> None:
    for each in jobs:
        dispatcher.inbox.waiting[each.id] = Waiter(each)


def begin(dispatcher: Dispatcher, id_: str, worker: str = "", run: str = "a") -> None:
    dispatcher.inbox.waiting[id_].put(Frame(id_, run, 0, "started", worker.encode()))


def hear(dispatcher: Dispatcher, worker: str, **fields: object) -> None:
    status = Status(worker, "chat", "talker", ready=True, **fields)  # type: ignore[arg-type]
    dispatcher.fleet._seen[worker] = (time.monotonic(), status)


def told(name: str, model: str, lane: str = "interactive") -> float | None:
    return EXPORTED.get_sample_value(f"qwen3_queue_{name}", {"model": model, "lane": lane})


def tell(dispatcher: Dispatcher) -> tuple[float | None, float | None]:
    """Tokens, and seconds without their fraction, of the talker."""
    exporter._tell_queued(dispatcher, MODELS)
    age_s = told("oldest_age_seconds", "talker")
    return told("prompt_tokens", "talker"), None if age_s is None else int(age_s)


async def test_what_no_worker_has_begun_is_told_by_model(dispatcher: Dispatcher) -> None:
    # Given three requests for one model and one for another; whether they were sent makes no difference
    wait(dispatcher, job("1", age_s=30), job("2", age_s=20), job("3"), job("4", model="seer", age_s=5))
    dispatcher.inbox.waiting["1"].sent = True
    assert tell(dispatcher) == (300, 30)
    assert told("prompt_tokens", "seer") == 100
    # When a worker begins the oldest
    hear(dispatcher, "chat-1")
    begin(dispatcher, "1", "chat-1")
    # Then it does not count, nor does one that is over
    assert tell(dispatcher) == (200, 20)
    dispatcher.inbox.release("2")
    assert tell(dispatcher) == (100, 0)
    # And where nobody waits there are zeros, not nothing
    dispatcher.inbox.waiting.clear()
    assert tell(dispatcher) == (0, 0)
    assert told("prompt_tokens", "seer") == 0


async def test_what_a_lost_worker_had_begun_waits_again(dispatcher: Dispatcher) -> None:
    # Given two requests that a worker has begun, and one begun by a worker of an older version, which gave no name
    wait(dispatcher, job("1"), job("2"), job("3"))
    hear(dispatcher, "chat-1")
    begin(dispatcher, "1", "chat-1")
    begin(dispatcher, "2", "chat-1")
    begin(dispatcher, "3")
    assert tell(dispatcher)[0] == 0
    # When that worker is heard of no more, then what it had begun waits
    dispatcher.fleet._seen.clear()
    assert tell(dispatcher)[0] == 200
    # Until another begins it
    hear(dispatcher, "chat-2")
    begin(dispatcher, "1", "chat-2", run="b")
    assert tell(dispatcher)[0] == 100
    # And while the broker takes nothing, that nobody is heard of says nothing
    dispatcher.fleet._seen.clear()
    dispatcher.inbox.publisher._blocked = True
    assert tell(dispatcher)[0] == 0


async def test_lanes_are_told_apart(dispatcher: Dispatcher) -> None:
    queued.tell([Waiter(job("1"))], ["talker"], "batch")
    assert tell(dispatcher)[0] == 0
    assert told("prompt_tokens", "talker", "batch") == 100


async def test_the_busy_are_counted_in_workers(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dispatcher, "connected", True)
    monkeypatch.setattr(Dispatcher, "heard", AsyncMock(return_value=True))
    # Given two workers of 64 slots, one that drains, and one that is of another version and tells no slots
    hear(dispatcher, "chat-1", running=16, slots=64)
    hear(dispatcher, "chat-2", running=64, slots=64)
    hear(dispatcher, "chat-3", running=64)
    draining = Status("chat-4", "chat", "talker", ready=False, running=64, slots=64)
    dispatcher.fleet._seen["chat-4"] = (time.monotonic(), draining)
    # Then the first two count by what they do, and of a model without a worker there is a zero
    (family,) = await exporter._busy(dispatcher, MODELS)
    assert {sample.labels["model"]: sample.value for sample in family.samples} == {"talker": 1.25, "seer": 0}


async def test_the_busy_are_not_told_of_while_nobody_hears_them(dispatcher: Dispatcher) -> None:
    # Given a broker that is away, and workers that were heard before
    hear(dispatcher, "chat-1", running=16, slots=64)
    assert not dispatcher.connected
    # Then nothing is said, which is no zero
    assert await exporter._busy(dispatcher, MODELS) == []
