"""The fleet: which workers count as there, by what they said and how long ago."""

from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import pytest

from server import fleet as fleet_module
from server.core import topology
from server.core.amqp import AmqpLink, Delivery
from server.core.messages import Status, encode
from server.fleet import FORGOTTEN_S, STALE_S, Fleet


class FakeLink:
    """Remembers what was declared, and hands over messages as the broker would."""

    listen = AmqpLink.listen

    def __init__(self) -> None:
        self.fanouts: list[str] = []
        self.queues: dict[str, bool] = {}
        self.bindings: list[tuple[str, str]] = []
        self.handlers: dict[str, Callable[[Delivery], None]] = {}

    async def declare_fanout(self, exchange: str) -> None:
        self.fanouts.append(exchange)

    async def declare_queue(self, name: str, *, exclusive: bool = False) -> None:
        self.queues[name] = exclusive

    async def bind(self, queue: str, exchange: str) -> None:
        self.bindings.append((queue, exchange))

    async def consume(self, queue: str, on_message: Callable[[Delivery], None]) -> None:
        self.handlers[queue] = on_message

    def deliver(self, body: bytes) -> None:
        (handler,) = self.handlers.values()
        handler(Delivery(body, 1, 1, None))


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    made = FakeClock()
    monkeypatch.setattr(fleet_module, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


@pytest.fixture
async def fleet(link: FakeLink, clock: FakeClock) -> Fleet:
    made = Fleet()
    await made.consume(link)  # type: ignore[arg-type]
    return made


def chat(worker: str = "chat-1", model: str = "talker", *, ready: bool = True, running: int = 0) -> bytes:
    return encode(Status(worker, "chat", model, ready, running=running))


async def test_the_fleet_hears_the_status_fanout(fleet: Fleet, link: FakeLink) -> None:
    # Then it has a queue of its own that goes with it, bound to the fanout
    ((queue, exclusive),) = link.queues.items()
    assert exclusive
    assert link.fanouts == [topology.STATUS]
    assert link.bindings == [(queue, topology.STATUS)]
    # And nobody is there before somebody speaks
    assert fleet.workers() == []
    assert not fleet.has("chat", "talker")


async def test_two_servers_hear_by_two_queues(link: FakeLink) -> None:
    await Fleet().consume(link)  # type: ignore[arg-type]
    await Fleet().consume(link)  # type: ignore[arg-type]
    assert len(link.queues) == 2


async def test_a_worker_is_known_by_its_last_word(fleet: Fleet, link: FakeLink) -> None:
    # When two workers speak, one of them twice
    link.deliver(chat("chat-2", running=1))
    link.deliver(chat("chat-1", running=2))
    link.deliver(chat("chat-2", running=3))
    # Then each is there once, by name, as it last said
    assert [(w.worker, w.running) for w in fleet.workers()] == [("chat-1", 2), ("chat-2", 3)]


async def test_a_worker_not_heard_of_is_forgotten(fleet: Fleet, link: FakeLink, clock: FakeClock) -> None:
    # Given two workers, of which one goes on to speak
    link.deliver(chat("chat-1"))
    link.deliver(chat("chat-2", "other"))
    clock.now += STALE_S
    link.deliver(chat("chat-1"))
    # Then at the limit both are there
    assert fleet.has("chat", "other")
    # When the limit has passed
    clock.now += 0.1
    # Then only one is
    assert [w.worker for w in fleet.workers()] == ["chat-1"]
    assert fleet.has("chat", "talker")
    assert not fleet.has("chat", "other")


async def test_a_forgotten_worker_that_speaks_is_back(fleet: Fleet, link: FakeLink, clock: FakeClock) -> None:
    link.deliver(chat())
    clock.now += STALE_S + 1
    assert not fleet.has("chat", "talker")
    link.deliver(chat())
    assert fleet.has("chat", "talker")


async def test_a_worker_that_loads_or_drains_does_not_count(fleet: Fleet, link: FakeLink) -> None:
    # Given a worker that is there and not ready
    link.deliver(chat(ready=False))
    assert [w.worker for w in fleet.workers()] == ["chat-1"]
    assert not fleet.has("chat", "talker")
    # When it is, then it counts
    link.deliver(chat(ready=True))
    assert fleet.has("chat", "talker")
    # And no more when it drains
    link.deliver(chat(ready=False))
    assert not fleet.has("chat", "talker")


async def test_one_ready_worker_of_several_is_enough(fleet: Fleet, link: FakeLink) -> None:
    link.deliver(chat("chat-1", ready=False))
    link.deliver(chat("chat-2", ready=True))
    link.deliver(chat("chat-3", ready=False))
    assert fleet.has("chat", "talker")


async def test_type_and_model_must_both_fit(fleet: Fleet, link: FakeLink) -> None:
    link.deliver(chat(model="talker"))
    link.deliver(encode(Status("embedding-1", "embedding", "vectors", True)))
    assert fleet.has("embedding", "vectors")
    assert not fleet.has("embedding", "talker")
    assert not fleet.has("chat", "vectors")
    assert not fleet.has("chat")
    # And the archivist, who has no model, is found without one
    assert not fleet.has("archive")
    link.deliver(encode(Status("archive-1", "archive", "", True)))
    assert fleet.has("archive")


NEWER = msgspec.json.encode({**msgspec.to_builtins(Status("rerank-1", "chat", "m", True)), "type": "rerank"})


@pytest.mark.parametrize("body", [b"{}", b"\xff", NEWER], ids=["no status", "no JSON", "a type of a newer version"])
async def test_a_word_nobody_understands_is_passed_over(fleet: Fleet, link: FakeLink, body: bytes) -> None:
    # Given a worker that is known
    link.deliver(chat())
    # When something arrives that is no status of this version, then nothing is raised: pika would drop the
    # connection for it, and with that the answers of every request under way
    link.deliver(body)
    # And who was known still is
    assert [w.worker for w in fleet.workers()] == ["chat-1"]


async def test_a_worker_that_falls_silent_is_missed_by_name(fleet: Fleet, link: FakeLink, clock: FakeClock) -> None:
    # Given two workers, of which one leaves as it was asked to
    link.deliver(chat("chat-1"))
    link.deliver(chat("chat-2"))
    link.deliver(encode(Status("chat-2", "chat", "talker", ready=False, leaving=True)))
    assert [w.worker for w in fleet.workers()] == ["chat-1"]
    assert fleet.problems() == []
    # When both are silent, then only the other is missed
    clock.now += STALE_S + 1
    assert fleet.problems() == ["chat worker chat-1 (talker): not heard of for 6 s"]
    # Until nobody cares any more
    clock.now += FORGOTTEN_S
    assert fleet.problems() == []


async def test_a_worker_says_itself_what_is_wrong(fleet: Fleet, link: FakeLink) -> None:
    link.deliver(encode(Status("chat-1", "chat", "talker", ready=False, problem="its engine sleeps")))
    assert fleet.problems() == ["chat worker chat-1 (talker): its engine sleeps"]
    link.deliver(chat("chat-1"))
    assert fleet.problems() == []
