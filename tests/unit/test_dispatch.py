"""What a server process knows of the requests it took: where each stands, for its own key alone."""

import time

import pytest

from server import dispatch
from server.app import create_app
from server.core.errors import BrokerUnavailable, Cancelled, EngineFailed, NoWorker
from server.core.inbox import Waiter
from server.core.messages import ErrorFrame, Frame, Job
from server.core.settings import BadSettings, Settings
from server.dispatch import Call, Dispatcher, Ticket, again, part
from tests.unit.fake_requests import REGISTRY, SEER, TALKER

KEY = 1


@pytest.fixture
def dispatcher() -> Dispatcher:
    """Connected to no broker."""
    return Dispatcher(Settings(amqp_url="amqp://127.0.0.1:1/"), REGISTRY)


def submit(dispatcher: Dispatcher, id_: str) -> Ticket:
    now = time.time()
    waiter = Waiter(Job(id_, "talker", "/chat", {}, KEY, "replies.x", now, now + 10))
    waiter.sent = True
    dispatcher.inbox.waiting[id_] = waiter
    return Ticket(waiter, dispatcher._lines["talker"], dispatcher._end)


def put(dispatcher: Dispatcher, id_: str, kind: str, data: bytes = b"", seq: int = 0) -> None:
    dispatcher.inbox.waiting[id_].put(Frame(id_, "run", seq, kind, data))  # type: ignore[arg-type]


def status(dispatcher: Dispatcher, id_: str, key_id: int = KEY) -> str | None:
    state = dispatcher.state(id_, key_id)
    return state.status if state is not None else None


async def test_a_request_goes_from_state_to_state(dispatcher: Dispatcher) -> None:
    ticket = submit(dispatcher, "r")
    assert status(dispatcher, "r") == "queued"
    put(dispatcher, "r", "started")
    assert status(dispatcher, "r") == "running"
    put(dispatcher, "r", "result", b"{}", seq=1)
    await ticket.next()
    assert status(dispatcher, "r") == "completed"
    ticket.close()
    assert status(dispatcher, "r") == "completed"
    assert dispatcher.inbox.waiting == {}
    # For its own key alone
    assert status(dispatcher, "r", key_id=2) is None
    assert status(dispatcher, "other") is None


async def test_who_asks_for_a_model_that_starts_on_demand_is_not_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given no workers, of two models, one of which may be without any for a while
    monkeypatch.setattr(Dispatcher, "connected", True)
    settings = Settings(amqp_url="amqp://127.0.0.1:1/", start_on_demand=" talker,,")
    made = Dispatcher(settings, REGISTRY)
    # Then a request for it goes on to the broker, which is not there, and one for the other does not
    with pytest.raises(BrokerUnavailable):
        await made.submit(Call("1", TALKER, "/chat", "chat", {}, KEY))
    with pytest.raises(NoWorker, match="seer"):
        await made.submit(Call("2", SEER, "/chat", "chat", {}, KEY))


def test_a_model_to_start_on_demand_must_be_one() -> None:
    with pytest.raises(BadSettings, match="START_ON_DEMAND: nobody: no such model"):
        create_app(Settings(start_on_demand="talker,nobody"), REGISTRY)


async def test_how_it_failed_is_known(dispatcher: Dispatcher) -> None:
    ticket = submit(dispatcher, "r")
    dispatcher.inbox.waiting["r"].put(EngineFailed("It broke."))
    with pytest.raises(EngineFailed):
        await ticket.next()
    ticket.close()
    state = dispatcher.state("r", KEY)
    assert state is not None
    assert (state.status, state.error) == ("failed", ErrorFrame(500, "It broke."))


async def test_a_client_that_leaves_has_cancelled(dispatcher: Dispatcher) -> None:
    submit(dispatcher, "r").close()
    assert status(dispatcher, "r") == "cancelled"


async def test_what_waits_is_cancelled_at_once_and_what_runs_by_its_worker(dispatcher: Dispatcher) -> None:
    waits, runs = submit(dispatcher, "waits"), submit(dispatcher, "runs")
    put(dispatcher, "runs", "started")
    # Another key stops nothing
    assert dispatcher.cancel("waits", 2) is None
    assert status(dispatcher, "waits") == "queued"
    cancelled, running = dispatcher.cancel("waits", KEY), dispatcher.cancel("runs", KEY)
    assert cancelled is not None
    assert running is not None
    assert (cancelled.status, running.status) == ("cancelled", "running")
    with pytest.raises(Cancelled):
        await waits.next()
    put(dispatcher, "runs", "error", b'{"status": 499, "message": "The request was cancelled."}', seq=1)
    with pytest.raises(Cancelled):
        await runs.next()
    assert status(dispatcher, "waits") == status(dispatcher, "runs") == "cancelled"


async def test_a_job_that_was_asked_again_is_the_same_request(dispatcher: Dispatcher) -> None:
    first = submit(dispatcher, "r")
    dispatcher.inbox.waiting["r"].put(EngineFailed("Too long."))
    with pytest.raises(EngineFailed):
        await first.next()
    submit(dispatcher, again("r"))
    state = dispatcher.state("r", KEY)
    assert state is not None
    assert (state.request_id, state.status) == ("r", "queued")


async def test_several_jobs_at_once_are_one_request(dispatcher: Dispatcher) -> None:
    # Given a request of three jobs, of which one is done
    tickets = [submit(dispatcher, part("r", number)) for number in range(3)]
    put(dispatcher, "r", "result", b"{}")
    await tickets[0].next()
    put(dispatcher, "r.1", "started")
    # Then it is not over
    state = dispatcher.state("r", KEY)
    assert state is not None
    assert (state.request_id, state.status) == ("r", "running")
    # When it is stopped; then the others are
    cancelled = dispatcher.cancel("r", KEY)
    assert cancelled is not None
    assert cancelled.status == "cancelled"
    with pytest.raises(Cancelled):
        await tickets[2].next()
    tickets[1].close()  # as whoever puts them together does
    assert status(dispatcher, "r") == "cancelled"


async def test_of_several_jobs_the_one_that_failed_says_how_the_request_ended(dispatcher: Dispatcher) -> None:
    first, last = submit(dispatcher, "r"), submit(dispatcher, part("r", 1))
    put(dispatcher, "r.1", "error", b'{"status": 500, "message": "broken"}')
    with pytest.raises(EngineFailed):
        await last.next()
    first.close()
    assert status(dispatcher, "r") == "failed"


async def test_the_oldest_ends_are_forgotten_first(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_ENDED", 2)
    for id_ in "abc":
        submit(dispatcher, id_).close()
    assert [status(dispatcher, id_) for id_ in "abc"] == [None, "cancelled", "cancelled"]
    monkeypatch.setattr(dispatch, "ENDED_S", 0.0)
    submit(dispatcher, "d").close()
    assert [status(dispatcher, id_) for id_ in "bc"] == [None, None]
