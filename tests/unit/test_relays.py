"""What a process does about an answer that another one makes, and about who asks it for one."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from server import relays
from server.answers import Kept
from server.core.errors import Unavailable
from server.core.messages import Ask, FrameKind, Head
from server.relays import Relays

MINE, OTHERS = "replies.mine", "replies.others"


class SilentPeers:
    """Nobody answers; `there` are the reply queues that are. Keeps what is answered here."""

    def __init__(self, *there: str) -> None:
        self.inbox = SimpleNamespace(queue=MINE)
        self.on_events: Any = None
        self.asked = 0
        self.answered: list[tuple[str, list[tuple[FrameKind, bytes]]]] = []
        self._there = there

    async def is_there(self, queue: str) -> bool:
        return queue in self._there

    @contextmanager
    def asking(self, ask: Ask, timeout_s: float) -> Iterator[Any]:
        self.asked += 1
        yield SimpleNamespace(next=asyncio.Event().wait)

    def tell(self, ask: Ask) -> None:
        assert ask.what == "leave"

    def answer(self, ask: Ask, first_seq: int, pieces: list[tuple[FrameKind, bytes]]) -> None:
        self.answered.append((ask.id, pieces))


def relays_of(peers: SilentPeers, *making: Kept) -> Relays:
    dispatcher: Any = SimpleNamespace(peers=peers, timeout_s=60, inbox=SimpleNamespace(on_return=None))
    return Relays({kept.request_id: kept for kept in making}, dispatcher)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "ANSWER_S", 0.05)
    monkeypatch.setattr(relays, "SILENT_S", 0.2)


async def test_a_silent_owner_is_asked_for_a_while_and_not_replaced() -> None:
    peers = SilentPeers(OTHERS)
    with pytest.raises(Unavailable) as told:
        await relays_of(peers).fetch(Ask("", "r", 1, "", "events", owner=OTHERS))
    assert told.value.retry_after_s
    assert not told.value.may_have_run  # clients may ask again on their own
    assert peers.asked > 2


@pytest.mark.parametrize("owner", [OTHERS, ""])
async def test_an_owner_that_is_gone_makes_nothing(owner: str) -> None:
    peers = SilentPeers()
    assert await relays_of(peers).fetch(Ask("", "r", 1, "", "events", owner=owner)) is None
    assert peers.asked == 1


async def test_only_the_owner_says_that_it_does_not_have_it() -> None:
    peers = SilentPeers()
    relays_of(peers, Kept("r", 1, grace_s=1))
    for id_, request_id, owner in (("a", "r", OTHERS), ("b", "x", OTHERS), ("c", "x", MINE)):
        peers.on_events(Ask(id_, request_id, 1, OTHERS, "events", owner=owner))
    await asyncio.sleep(0)
    assert [(id_, pieces[0][0]) for id_, pieces in peers.answered] == [("c", "done"), ("a", "chunk")]


async def test_who_left_before_the_answer_was_passed_on_leaves_nothing_behind() -> None:
    # Given a process that was frozen while another asked, gave up and asked again
    kept = Kept("r", 1, grace_s=0.01)
    kept.task = asyncio.create_task(asyncio.sleep(10))
    kept.join()
    peers = SilentPeers()
    made = relays_of(peers, kept)
    for number in range(3):
        ask = Ask(str(number), "r", 1, OTHERS, "events", owner=MINE)
        peers.on_events(ask)
        if number < 2:
            peers.on_events(Ask(ask.id, "r", 1, OTHERS, "leave"))
    await asyncio.sleep(0.05)
    # Then only the last is passed on, and when all have left, the answer is given up
    assert len(made.tasks()) == 1
    kept.log.begin(Head(200, {}, "", ""))
    peers.on_events(Ask("2", "r", 1, OTHERS, "leave"))
    await asyncio.sleep(0.05)
    assert made.tasks() == []
    assert not kept.task.done()
    kept.leave()
    await asyncio.sleep(0.05)
    assert kept.task.cancelled()
