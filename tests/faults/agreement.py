"""What clients saw (tries.py), what is recorded, and what the service says of it: each question came to one end.

A fault excuses no more than what the README's table takes back: a worker's death nothing, a server's death its own
requests and their kept answers, a cut of the broker's connections whatever was under way.
"""

from collections import Counter
from typing import Any

from tests.faults.life import numbers
from tests.faults.tries import Question, Try

DEATHS_GIVEN_UP = 4
"""After so many deaths of its workers a job is given up (server/core/topology.py)."""

Record = dict[str, Any]
"""`question`, `answer`, `finish_reason`, `completion_tokens`."""


def check(questions: list[Question], records: dict[str, Record], begun: Counter[str]) -> None:
    """`records` by request id; `begun`: how often a worker has begun a question, by its name."""
    for question in questions:
        mine = {id_: record for id_, record in records.items() if record["question"] == question.name}
        for one in question.tries:
            assert_explained(one)
            assert_recorded(one, records.get(one.request_id))
        assert_once(question, mine, begun[question.name])
    assert {record["question"] for record in records.values()} <= {question.name for question in questions}


def assert_explained(one: Try) -> None:
    """It ended as it may, with what it may have been told."""
    q = one.question
    assert q.text.startswith(one.text), one  # nothing twice, nothing missing in the middle
    if q.kept and q.stream:
        assert [event.id for event in one.events] == [str(n) for n in range(1, len(one.events) + 1)], one
    cut, worker, server = q.met["cut"], q.met["worker"], q.lost_a_server()
    given_up = worker >= DEATHS_GIVEN_UP and one.status in (200, 500)
    match one.outcome:
        case "answered":
            assert (one.text, one.completion_tokens) == (q.text, q.tokens), one
        case "left":
            pass
        case "cut":
            assert q.met[one.server], one
        case "broken":
            assert (q.stopped and one.code == "cancelled") or cut or (q.kept and server) or given_up, one
        case "refused" if one.status == 499:
            assert q.stopped, one
        case "refused" if one.status == 503:
            assert cut or worker or server, one
        case "refused" if one.status == 404:  # the answer was not kept
            assert one.resumed, one
            assert cut or server or q.stopped, one
        case _:
            assert given_up, one


def goes_on(one: Try) -> bool:
    """Whether its answer is made to its end, though its client does not wait for it."""
    q = one.question
    return q.kept and not q.stopped and not disturbed(q) and bool(one.request_id)


def is_recorded(one: Try) -> bool:
    """Whether there must be a record of it. After its worker's death a second run may be stopped before it came as far
    as the first."""
    told = bool(one.text) and not one.question.met["worker"]
    return one.outcome == "answered" or goes_on(one) or told


def disturbed(q: Question) -> bool:
    return bool(q.met["cut"] or q.met["worker"] or q.lost_a_server())


def assert_recorded(one: Try, record: Record | None) -> None:
    if record is None:
        assert not is_recorded(one), one
        return
    if one.outcome == "answered":
        assert record["finish_reason"] == "stop", (one, record)
        assert (record["answer"], record["completion_tokens"]) == (one.text, one.completion_tokens), (one, record)
        return
    if goes_on(one):
        assert record["finish_reason"] == "stop", (one, record)
    if one.outcome in ("refused", "broken") and not disturbed(one.question):
        assert record["finish_reason"] == "cancelled", (one, record)
    if not one.question.met["worker"]:
        assert record["answer"].startswith(one.text), (one, record)


def assert_once(q: Question, mine: dict[str, Record], begun: int) -> None:
    """One generation and one record, as long as nothing made it necessary to begin anew."""
    known = {one.request_id for one in q.tries}
    for record in mine.values():
        assert record["answer"] == numbers(record["completion_tokens"]), (q.tries, record)
        if record["finish_reason"] == "stop":
            assert record["completion_tokens"] == q.tokens, (q.tries, record)
        else:
            assert record["finish_reason"] == "cancelled", (q.tries, record)
            left = any(one.outcome in ("left", "cut") for one in q.tries)
            assert q.stopped or left or q.met["cut"] or q.lost_a_server(), (q.tries, record)
    assert mine.keys() <= known or "" in known, (q.tries, mine)  # of some clients nobody was told the id
    anew = q.stopped or q.met["cut"] or q.lost_a_server()
    assert len(mine) <= (len(q.tries) if anew else 1), (q.tries, mine)
    if not anew:
        answered = [one for one in q.tries if one.outcome == "answered"]
        assert len({one.request_id for one in answered}) <= 1, q.tries
        assert begun <= 1 + q.met["worker"], (q.tries, begun)
        assert sum(not one.replayed for one in answered) <= 1 or not q.kept, q.tries


def assert_told(record: Record | None, request: dict[str, Any] | None, tries: list[Try]) -> None:
    """`request` is what `GET /v1/requests/{id}` says; None where it is not known."""
    if record is None:
        assert request is None or request["status"] in ("failed", "cancelled"), (request, tries)
        return
    assert request is not None, (record, tries)
    assert request["status"] == ("completed" if record["finish_reason"] == "stop" else "cancelled"), (request, tries)
    assert request["finish_reason"] == record["finish_reason"], (request, tries)
    assert request["usage"]["completion_tokens"] == record["completion_tokens"], (request, tries)
    assert request["message"] == {"role": "assistant", "content": record["answer"]}, (request, tries)


def assert_stopped(one: Try, request_id: str, status: int, told: str) -> None:
    """What DELETE answered while that request was made, and how its client fared."""
    q = one.question
    cut, server = q.met["cut"], q.lost_a_server()
    if status != 200:
        assert (status == 404 and (cut or server)) or (status == 503 and cut), (one, status, told)
        return
    if one.request_id != request_id or cut or server:
        return
    ended = {"completed": {"answered", "left"}, "cancelled": {"broken", "refused", "left"}}
    if told in ended:
        assert one.outcome in ended[told], (one, told)
    else:
        assert q.met["worker"], (one, told)  # nobody was there to stop it
