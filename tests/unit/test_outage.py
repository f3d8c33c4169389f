"""The circuit breaker before Postgres: who waits for it, and who is told at once."""

import asyncio

import pytest

from server.core.errors import DatabaseUnavailable
from server.db import outage
from server.db.outage import Outage


class Database:
    """Answers with the count of what it was asked; while it is down, or silent, it does not."""

    def __init__(self) -> None:
        self.asked = self.pinged = 0
        self.down = self.silent = False

    async def question(self) -> int:
        self.asked += 1
        await self._try()
        return self.asked

    async def ping(self) -> None:
        self.pinged += 1
        await self._try()

    async def _try(self) -> None:
        if self.silent:
            await asyncio.sleep(0.05)
        if self.down or self.silent:
            raise DatabaseUnavailable("gone")


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setattr(outage, "LOOK_EVERY_S", 0.01)
    return Database()


@pytest.mark.parametrize("how", ["down", "silent"])
async def test_one_finds_out_and_the_others_are_told_until_it_answers_again(database: Database, how: str) -> None:
    breaker = Outage(database.ping)
    assert await breaker.ask(0.02, database.question) == 1
    # Given a database that is gone; when many ask, then it is asked once
    setattr(database, how, True)
    for _ in range(100):
        with pytest.raises(DatabaseUnavailable):
            await breaker.ask(0.02, database.question)
    assert database.asked == 2
    # And again once it is back, which somebody looks for meanwhile
    setattr(database, how, False)
    async with asyncio.timeout(5):
        while database.pinged == 0 or breaker._looking is not None:
            await asyncio.sleep(0.01)
    assert await breaker.ask(0.02, database.question) == 3


async def test_those_who_ask_together_wait_together_and_one_looks(database: Database) -> None:
    breaker = Outage(database.ping)
    database.silent = True
    answers = await asyncio.gather(*(breaker.ask(0.02, database.question) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(answer, DatabaseUnavailable) for answer in answers)
    assert database.asked == 5
    await asyncio.sleep(0)
    assert database.pinged == 1


async def test_a_look_that_goes_wrong_leaves_nobody_refused(database: Database) -> None:
    async def broken() -> None:
        raise ValueError

    breaker = Outage(broken)
    database.down = True
    with pytest.raises(DatabaseUnavailable):
        await breaker.ask(0.02, database.question)
    database.down = False
    looking = breaker._looking
    assert looking is not None
    await asyncio.gather(looking, return_exceptions=True)
    assert await breaker.ask(0.02, database.question) == 2
