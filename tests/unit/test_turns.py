"""Turns: nobody starves, shares follow weights, and a newcomer is among the next two."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.turns import MAX_IDLE_KEYS, Turns

KEYS = st.integers(1, 6)
TOKENS = st.integers(1, 1000)


class Slots:
    """An engine that runs so many at once: whenever one ends, the next is started."""

    def __init__(self, turns: Turns[tuple[int, int]], count: int) -> None:
        self.turns = turns
        self.count = count
        self.running: deque[tuple[int, int, float]] = deque()
        self.had: dict[int, int] = {}

    def fill(self) -> list[int]:
        """The keys whose jobs are started."""
        started = []
        while len(self.running) < self.count and len(self.turns):
            (key, tokens), charged = self.turns.pop()
            self.running.append((key, tokens, charged))
            started.append(key)
        return started

    def end(self, which: int) -> list[int]:
        self.running.rotate(which)
        key, tokens, charged = self.running.popleft()
        self.had[key] = self.had.get(key, 0) + tokens
        self.turns.settle(key, charged, tokens)
        return self.fill()


@given(st.lists(st.tuples(KEYS, TOKENS)))
def test_everything_comes_out_once_and_each_keys_in_order(items: list[tuple[int, int]]) -> None:
    turns: Turns[tuple[int, int]] = Turns()
    for place, (key, _) in enumerate(items):
        turns.add(key, (key, place))
    came = [turns.pop()[0] for _ in range(len(turns))]
    assert sorted(place for _, place in came) == list(range(len(items)))
    for key in {key for key, _ in items}:
        mine = [place for whose, place in came if whose == key]
        assert mine == sorted(mine)


@given(
    st.lists(st.tuples(KEYS, TOKENS), min_size=40, max_size=80),
    st.integers(1, 8),
    st.integers(0, 30),
    st.lists(st.integers(0, 7), min_size=40, max_size=40),
)
def test_a_newcomer_is_among_the_next_two(
    flood: list[tuple[int, int]], slots: int, before: int, order: list[int]
) -> None:
    # Given keys that flood with jobs of any size, each of which has had turns, and slots that are freed in any order
    turns: Turns[tuple[int, int]] = Turns()
    engine = Slots(turns, slots)
    for key in {key for key, _ in flood}:
        turns.add(key, (key, 1))
        engine.fill()
    while engine.running and len(turns):
        engine.end(0)
    for key, tokens in flood:
        turns.add(key, (key, tokens))
    engine.fill()
    for which in order[:before]:
        engine.end(which)
    # When a key comes that was not there
    turns.add(99, (99, 1000))
    # Then its job has begun when two others have ended
    begun = [key for which in order[before : before + 2] for key in engine.end(which)]
    assert 99 in begun or not begun


@given(st.dictionaries(KEYS, st.integers(1, 10), min_size=2), st.lists(TOKENS, min_size=400, max_size=400))
def test_shares_follow_weights_and_nobody_starves(weights: dict[int, int], costs: list[int]) -> None:
    # Given keys that always have something waiting, with weights and with sizes of jobs of their own
    turns: Turns[tuple[int, int]] = Turns()
    engine = Slots(turns, 4)
    size = {key: 10 * key for key in weights}
    for key, weight in weights.items():
        for cost in costs[:400]:
            turns.add(key, (key, size[key] + cost % 5), weight)
    # When many have run, one after the other
    engine.fill()
    for _ in range(300):
        engine.end(0)
    # Then what each has had by weight differs by no more than what is running, and a job
    by_weight = {key: engine.had.get(key, 0) / weight for key, weight in weights.items()}
    assert max(by_weight.values()) - min(by_weight.values()) <= 5 * 65


def test_a_key_saves_up_no_turns_and_pays_for_none_it_had_alone() -> None:
    turns: Turns[tuple[int, int]] = Turns()
    engine = Slots(turns, 1)
    # Given a key that was away while another had much
    for key in [1] + [2] * 50:
        turns.add(key, (key, 100))
        engine.fill()
        engine.end(0)
    # When both want many turns, then they share them
    for _ in range(10):
        turns.add(1, (1, 100))
        turns.add(2, (2, 100))
    begun = engine.fill()
    while len(turns) > 2:
        begun += engine.end(0)
        assert abs(begun.count(1) - begun.count(2)) <= 2


def test_a_key_with_large_jobs_has_fewer_turns() -> None:
    turns: Turns[tuple[int, int]] = Turns()
    engine = Slots(turns, 1)
    for _ in range(40):
        turns.add(1, (1, 300))
        turns.add(2, (2, 100))
    begun = engine.fill()
    for _ in range(39):
        begun += engine.end(0)
    assert 28 <= begun.count(2) <= 32


def test_who_is_removed_costs_nothing_and_does_not_come() -> None:
    turns: Turns[str] = Turns()
    first, second = "first", "second"
    turns.add(1, first)
    turns.add(1, second)
    assert turns.remove(1, first)
    assert not turns.remove(1, first)
    assert not turns.remove(7, second)
    assert (len(turns), turns.pop(), len(turns)) == (1, ("second", 0.0), 0)
    with pytest.raises(ValueError, match="empty"):
        turns.pop()


def test_clear_gives_all_that_waited() -> None:
    turns: Turns[int] = Turns()
    for key in (1, 2, 1):
        turns.add(key, key)
    assert sorted(turns.clear()) == [1, 1, 2]
    assert len(turns) == 0


def test_accounts_do_not_pile_up() -> None:
    turns: Turns[int] = Turns()
    for key in range(3 * MAX_IDLE_KEYS):
        turns.add(key, key)
        turns.pop()
    assert len(turns._accounts) <= MAX_IDLE_KEYS + 1
    turns.settle(0, 0.0, 5)  # of a key that was forgotten


def test_jobs_that_cost_less_than_usual_overtake_nobody() -> None:
    # Given a key whose jobs were large, and of which eight small ones run
    turns: Turns[tuple[int, int]] = Turns()
    engine = Slots(turns, 8)
    for number in range(60):
        turns.add(1, (1, 1000 if number < 24 else 1))
    engine.fill()
    for _ in range(26):
        engine.end(0)
    # When another key comes, and they end
    turns.add(99, (99, 1))
    # Then its job has begun when two of them have
    assert 99 in engine.end(0) + engine.end(0)
