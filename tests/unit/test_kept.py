"""The log of a kept answer, whoever reads it and from where; and what makes two requests the same."""

import asyncio

import orjson
import pytest

from server.answers import Kept, Log
from server.core.errors import AnswerLost, InvalidRequest
from server.core.messages import Head
from server.kept import _fingerprint, _key_of, last_event_id
from tests.unit.fake_requests import request_of

HEAD = Head(200, {}, "text/event-stream", ": keep-alive\n\n")


async def collect(log: Log, after: int) -> list[bytes]:
    return [made async for made in log.follow(after)]


async def test_readers_get_each_event_once_from_where_they_are() -> None:
    # Given readers from the beginning, from the middle, and from beyond what there is yet
    log = Log()
    log.begin(HEAD)
    log.add(b"1")
    log.add(b"2")
    reading = [asyncio.create_task(collect(log, after)) for after in (0, 1, 3, 9)]
    await asyncio.sleep(0)
    # When the rest comes, some of it at once
    log.add(b"3")
    log.add(b"4")
    await asyncio.sleep(0)
    log.add(b"5")
    log.end()
    # Then each has what was to come
    found = await asyncio.gather(*reading, collect(log, 4))
    assert found == [[b"1", b"2", b"3", b"4", b"5"], [b"2", b"3", b"4", b"5"], [b"4", b"5"], [], [b"5"]]


async def test_who_reads_a_lost_answer_is_told_after_what_there_is() -> None:
    log = Log()
    waiting = asyncio.create_task(log.begun())
    await asyncio.sleep(0)
    log.end(lost=True)
    with pytest.raises(AnswerLost):
        await waiting
    log = Log()
    log.begin(HEAD)
    log.add(b"1")
    log.end(lost=True)
    reading = log.follow(0)
    assert await anext(reading) == b"1"
    with pytest.raises(AnswerLost):
        await anext(reading)


async def test_only_the_last_reader_to_leave_begins_the_time_of_grace() -> None:
    # Given an answer in the making with two readers
    kept = Kept("r", 1, grace_s=0.05)
    kept.task = asyncio.create_task(asyncio.sleep(10))
    kept.join()
    kept.join()
    # When one leaves, and the other comes back in time
    kept.leave()
    await asyncio.sleep(0.1)
    kept.leave()
    kept.join()
    await asyncio.sleep(0.1)
    assert not kept.task.done()
    # And then leaves for good
    kept.leave()
    await asyncio.sleep(0.1)
    assert kept.task.cancelled()


async def test_what_has_ended_is_settled_however_long_that_takes() -> None:
    # Given an answer that nobody reads any more, which ends within the time of grace
    kept = Kept("r", 1, grace_s=0.05)
    kept.task = asyncio.create_task(asyncio.sleep(10))
    kept.join()
    kept.leave()
    kept.log.end()
    # When that time is over, and it has still to be kept or let go of
    await asyncio.sleep(0.1)
    # Then nobody keeps it from that
    assert not kept.task.done()
    kept.task.cancel()


def test_what_nests_deeper_than_can_be_sorted_is_the_same_as_it_was_sent() -> None:
    request, deep = request_of(), b'{"user": ' + b"[" * 500 + b"]" * 500 + b"}"
    assert _fingerprint(request, deep) == _fingerprint(request, deep)
    assert _fingerprint(request, deep) != _fingerprint(request, deep + b" ")


def test_requests_are_the_same_in_whatever_order_they_say_it() -> None:
    request = request_of()
    first = _fingerprint(request, orjson.dumps({"a": 1, "b": {"c": 2, "d": 3}}))
    assert first == _fingerprint(request, b'{ "b": {"d": 3, "c": 2}, "a": 1 }')
    assert first != _fingerprint(request, b'{"b": {"d": 3, "c": 2}, "a": 2}')
    request.scope["path"] = "/qwen3/v1/x"
    request = type(request)(request.scope)
    assert first == _fingerprint(request, b'{"b": {"d": 3, "c": 2}, "a": 1}')


@pytest.mark.parametrize("given", ["", "x", "-1", "1.0", "1" * 10, "٣"])
def test_an_event_id_is_a_number(given: str) -> None:
    request = request_of()
    request.scope["headers"] = [(b"last-event-id", given.encode("latin-1", "replace"))]
    with pytest.raises(InvalidRequest) as refused:
        last_event_id(request)
    assert refused.value.param == "Last-Event-ID"


def test_without_an_event_id_all_of_it_is_read() -> None:
    assert last_event_id(request_of()) == 0
    assert last_event_id(request_of(headers={"Last-Event-ID": "41"})) == 41


@pytest.mark.parametrize("given", ["", "x" * 256, "a\tb", "é"])
def test_an_idempotency_key_is_printable_and_not_long(given: str) -> None:
    with pytest.raises(InvalidRequest):
        _key_of(request_of(headers={"Idempotency-Key": given}))
    assert _key_of(request_of(headers={"Idempotency-Key": "x" * 255})) == "x" * 255
