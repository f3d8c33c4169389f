"""What the soak with faults calls lost, doubled, garbled or unexplained."""

from typing import Any, cast

import aiohttp
import pytest

from benchmarks.asking import Asked, Clients
from benchmarks.fault_soak import Inflicted, explain
from benchmarks.stack import Service

QUESTION, ANSWER = "Say hello.", "Hello there."
FAULT = Inflicted("broker killed", 100, 101, 110)


def one(number: int, outcome: str = "answered", **fields: Any) -> Asked:
    """While no fault was there, unless told otherwise."""
    usual = {"request_id": f"r{number}", "began_at": 10.0, "ended_at": 11.0}
    if outcome == "answered":
        usual |= {"text": ANSWER, "completion_tokens": 3}
    return Asked(QUESTION, outcome=outcome, **(usual | fields))


def record(text: str = ANSWER, finish_reason: str = "stop", completion_tokens: int = 3) -> dict[str, Any]:
    return {"text": text, "finish_reason": finish_reason, "completion_tokens": completion_tokens}


def explained(asked: list[Asked], kept: dict[str, dict[str, Any]], **usage: int) -> dict[str, Any]:
    clients = Clients(cast(aiohttp.ClientSession, None), cast(Service, None), asked, {QUESTION: ANSWER})
    tokens = sum(each["completion_tokens"] for each in kept.values())
    return explain(clients, [FAULT], kept, {"requests": len(kept), "completion_tokens": tokens} | usage)


def test_nothing_is_wrong() -> None:
    asked = [
        one(1),
        one(2, "left", text="Hello", end="leave"),
        one(3, "stopped", text="Hello", end="stop"),
        one(4, "refused", ended_at=100.5),
        one(5, "refused", request_id="", began_at=109.0, ended_at=120.0),
        one(6, kind="embedding", text=""),
        *(one(7, key="k", kind="twice") for _ in range(2)),
    ]
    cancelled = record("Hello", "cancelled", 1)
    kept = {"r1": record(), "r2": cancelled, "r3": cancelled, "r6": record("", "embedding", 0), "r7": record()}
    told = explained(asked, kept | {"of the nameless": cancelled})
    wrong = ("lost", "garbled", "doubled", "unbilled", "unexplained", "recorded_and_never_asked")
    assert not any(told[verdict] for verdict in (*wrong, "tokens_billed_beyond_records"))
    assert told["outcomes"] == {"answered": 4, "left": 1, "stopped": 1, "refused": 2}
    assert told["healed_s"] == {"broker killed": [9]}


@pytest.mark.parametrize(
    ("verdict", "asked", "kept"),
    [
        ("lost", [one(1)], {}),
        ("garbled", [one(1, text="Hello Hello")], {"r1": record("Hello Hello")}),
        ("garbled", [one(1, "left", text="ello")], {"r1": record("Hello", "cancelled", 1)}),
        ("garbled", [one(1)], {"r1": record("Hello")}),
        ("garbled", [one(1)], {"r1": record(completion_tokens=2)}),
        ("doubled", [one(1, key="k"), one(2, key="k")], {"r1": record(), "r2": record()}),
        ("unbilled", [one(1, "left", text="Hello")], {}),
        ("unexplained", [one(1, "no end")], {}),
        ("unexplained", [one(1, "refused")], {}),
        ("recorded_and_never_asked", [one(1)], {"r1": record(), "r2": record()}),
    ],
)
def test_something_is_wrong(verdict: str, asked: list[Asked], kept: dict[str, dict[str, Any]]) -> None:
    assert explained(asked, kept)[verdict]


def test_what_is_billed_twice_is_doubled() -> None:
    assert explained([one(1)], {"r1": record()}, requests=2)["doubled"] == 1
    assert explained([one(1)], {"r1": record()}, completion_tokens=6)["tokens_billed_beyond_records"] == 3


def test_a_key_may_be_answered_anew_after_a_fault() -> None:
    asked = [one(1, key="k", ended_at=105.0), one(2, key="k", ended_at=105.0)]
    assert not explained(asked, {"r1": record(), "r2": record()})["doubled"]
