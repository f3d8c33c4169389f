"""Turns: nobody starves, shares follow weights, and a newcomer is among the next two."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.turns import FIRST_GUESS, MAX_IDLE_KEYS, Expectation, Turns

KEYS = st.integers(1, 6)
TOKENS = st.integers(1, 1000)


@given(st.lists(st.tuples(KEYS, TOKENS)))
def test_everything_comes_out_once_and_each_keys_in_order(items: list[tuple[int, int]]) -> None:
    turns: Turns[tuple[int, int]] = Turns()
    for place, (key, tokens) in enumerate(items):
        turns.add(key, (key, place), tokens)
    came = [turns.pop() for _ in range(len(turns))]
    assert sorted(place for _, place in came) == list(range(len(items)))
    for key in {key for key, _ in items}:
        mine = [place for whose, place in came if whose == key]
        assert mine == sorted(mine)


@given(
    st.lists(st.tuples(KEYS, TOKENS, st.integers(1, 5)), min_size=1, max_size=60),
    st.lists(st.integers(-900, 900), max_size=60),
    st.integers(0, 60),
    TOKENS,
)
def test_a_newcomer_is_among_the_next_two(
    flood: list[tuple[int, int, int]], corrections: list[int], pops: int, tokens: int
) -> None:
    # Given any past of other keys, each of which has had a turn, and some of whose jobs cost more or less than expected
    turns: Turns[str] = Turns()
    for key, expected, weight in [*((key, 1, 1) for key, _, _ in flood), *flood]:
        turns.add(key, "flood", expected, weight)
    for index in range(len(flood) + min(pops, len(flood) - 1)):
        turns.pop()
        turns.charge(flood[index % len(flood)][0], corrections[index] if index < len(corrections) else 0)
    # When a key comes that has had nothing
    turns.add(99, "mine", tokens)
    # Then it waits for one turn at the most
    assert "mine" in [turns.pop() for _ in range(min(2, len(turns)))]


@given(st.dictionaries(KEYS, st.integers(1, 10), min_size=2), st.lists(TOKENS, min_size=300, max_size=300), st.data())
def test_shares_follow_weights_and_nobody_starves(
    weights: dict[int, int], costs: list[int], data: st.DataObject
) -> None:
    # Given keys that always have something waiting, with weights of their own
    turns: Turns[tuple[int, int]] = Turns()
    had = dict.fromkeys(weights, 0)
    for key, weight in weights.items():
        for _ in range(2):
            turns.add(key, (key, 10), 10, weight)
    # When turns are taken, whose real cost is told afterwards
    for cost in costs:
        key, expected = turns.pop()
        had[key] += cost
        turns.charge(key, cost - expected)
        turns.add(key, (key, expected), expected, weights[key])
    # Then what each has had by weight differs by no more than one job at each side
    by_weight = {key: had[key] / weights[key] for key in weights}
    assert max(by_weight.values()) - min(by_weight.values()) <= 2 * 1000
    # And when there were enough turns, everybody had one
    if sum(weights.values()) * 1000 // min(costs) < len(costs):
        assert all(had.values())


def test_a_key_saves_up_no_turns_and_pays_for_none_it_had_alone() -> None:
    turns: Turns[str] = Turns()
    # Given a key that was away while another had much
    turns.add(1, "a", 10)
    turns.pop()
    for _ in range(50):
        turns.add(2, "b", 100)
        turns.pop()
    # When both want many turns, then they share them, to within one
    for _ in range(5):
        turns.add(1, "a", 100)
        turns.add(2, "b", 100)
    had = ""
    while len(turns) > 1:
        had += turns.pop()
        assert abs(had.count("a") - had.count("b")) <= 2


def test_a_key_with_large_jobs_has_fewer_turns() -> None:
    turns: Turns[str] = Turns()
    for _ in range(8):
        turns.add(1, "L", 300)
        turns.add(2, "s", 100)
    assert sorted(turns.pop() for _ in range(8)) == ["L", "L", *"ssssss"]


def test_who_is_removed_costs_nothing_and_does_not_come() -> None:
    turns: Turns[str] = Turns()
    first, second = "first", "second"
    turns.add(1, first, 100)
    turns.add(1, second, 100)
    assert turns.remove(1, first)
    assert not turns.remove(1, first)
    assert not turns.remove(7, second)
    assert (len(turns), turns.pop(), len(turns)) == (1, "second", 0)
    with pytest.raises(ValueError, match="empty"):
        turns.pop()


def test_clear_gives_all_that_waited() -> None:
    turns: Turns[int] = Turns()
    for key in (1, 2, 1):
        turns.add(key, key, 1)
    assert sorted(turns.clear()) == [1, 1, 2]
    assert len(turns) == 0


def test_accounts_do_not_pile_up() -> None:
    turns: Turns[int] = Turns()
    for key in range(3 * MAX_IDLE_KEYS):
        turns.add(key, key, 1)
        turns.pop()
    assert len(turns._accounts) <= MAX_IDLE_KEYS + 1


def test_what_a_job_is_expected_to_cost() -> None:
    expectation = Expectation()
    # Given no answer yet, a guess, bounded by what was asked for
    assert expectation.tokens("chat", {}, 400) == 100 + FIRST_GUESS
    assert expectation.tokens("chat", {"max_tokens": 5}, 400) == 105
    assert expectation.tokens("chat", {"max_tokens": 5, "n": 3}, 400) == 115
    assert expectation.tokens("responses", {"max_output_tokens": 6}, 0) == 6
    assert expectation.tokens("embeddings", {"input": ["x"]}, 400) == 100
    # When answers turn out short, then the next are expected to be short too
    for _ in range(200):
        expectation.learn(20)
    assert expectation.tokens("chat", {}, 0) == 20
    # And nonsense in a message breaks nothing
    assert expectation.tokens("chat", {"max_tokens": "many", "n": -1}, 0) == 20
