"""Bounds on thoughts, step by step over a batch that changes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from workers.thoughts import Bounds, ThoughtBounds

START, END, STOP, WORD = 5, 6, 7, 8
VOCABULARY = 12
REASONING = SimpleNamespace(
    reasoning_parser="",
    reasoning_start_token_ids=[START],
    natural_reasoning_end_token_ids=[END],
    reasoning_end_token_ids=[END],
)


def processor(reasoning: Any = REASONING) -> ThoughtBounds:
    return ThoughtBounds(SimpleNamespace(reasoning_config=reasoning), torch.device("cpu"), False)


def params(**extra_args: int) -> Any:
    return SimpleNamespace(extra_args=extra_args, all_stop_token_ids={STOP}, structured_outputs=None)


def update(*, added: Any = (), removed: Any = (), moved: Any = ()) -> BatchUpdate:
    return BatchUpdate(batch_size=4, removed=list(removed), added=list(added), moved=list(moved))


def generate(bounds: dict[str, int], wishes: list[int], prompt: list[int] | None = None) -> list[int]:
    """What is generated greedily when the model would say `wishes`, a token a step, with STOP as its second wish."""
    made = processor()
    output: list[int] = []
    made.update_state(update(added=[(0, params(**bounds), prompt or [1, 2, 3], output)]))
    for wish in wishes:
        logits = torch.zeros(1, VOCABULARY)
        logits[0, wish] = 9.0
        logits[0, WORD] += 1.0  # said where the wish is forbidden
        output.append(int(made.apply(logits)[0].argmax()))
        made.update_state(None)
    return output


def test_a_thought_ends_at_its_budget() -> None:
    # When a model would think on and on, its thought is ended after three tokens
    assert generate({"thinking_budget": 3}, [START] + [WORD] * 6) == [START, WORD, WORD, WORD, END, WORD, WORD]


def test_a_budget_of_nothing() -> None:
    assert generate({"thinking_budget": 0}, [START, WORD, WORD]) == [START, END, WORD]


def test_a_shorter_thought_is_let_be() -> None:
    said = [START, WORD, END, WORD, WORD, STOP]
    assert generate({"thinking_budget": 3}, said) == said


def test_a_budget_counts_only_thoughts() -> None:
    said = [WORD] * 6
    assert generate({"thinking_budget": 3}, said) == said


def test_a_promised_answer_cannot_be_ended_in_a_thought() -> None:
    # When a model would stop while it thinks, it says its next wish instead
    assert generate({"must_answer": 9}, [START, STOP, STOP, END, STOP]) == [START, WORD, WORD, END, STOP]
    # Or before it has begun to think
    assert generate({"must_answer": 9}, [STOP, START, END, STOP]) == [WORD, START, END, STOP]


def test_a_promised_answer_comes_in_time() -> None:
    assert generate({"must_answer": 4}, [START] + [WORD] * 6) == [START, WORD, WORD, WORD, END, WORD, WORD]


def test_the_nearer_bound_holds() -> None:
    assert generate({"must_answer": 9, "thinking_budget": 2}, [START] + [WORD] * 4)[3] == END


def test_a_thought_that_the_template_closed_is_none() -> None:
    said = [STOP, WORD]
    assert generate({"must_answer": 1, "thinking_budget": 0}, said, [1, START, END, 2]) == said


def test_a_thought_that_the_template_opened_counts_from_the_start() -> None:
    assert generate({"thinking_budget": 2}, [WORD] * 4, [1, 2, START]) == [WORD, WORD, END, WORD]


def test_an_end_of_several_tokens_is_forced_whole() -> None:
    reasoning = SimpleNamespace(
        reasoning_parser="",
        reasoning_start_token_ids=[START],
        natural_reasoning_end_token_ids=[END, 9],
        reasoning_end_token_ids=[4, END, 9],
    )
    made, output = processor(reasoning), [START]
    made.update_state(update(added=[(0, params(thinking_budget=1), [1], output)]))
    for _ in range(6):
        logits = torch.zeros(1, VOCABULARY)
        logits[0, WORD] = 9.0
        output.append(int(made.apply(logits)[0].argmax()))
    assert output == [START, WORD, 4, END, 9, WORD, WORD]


@pytest.mark.parametrize("reasoning", [None, SimpleNamespace(**dict.fromkeys(vars(REASONING)))])
def test_a_model_that_does_not_think_is_let_be(reasoning: Any) -> None:
    made = processor(reasoning)
    made.update_state(update(added=[(0, params(thinking_budget=0, must_answer=0), [1], [])]))
    logits = torch.rand(1, VOCABULARY)
    assert torch.equal(made.apply(logits.clone()), logits)


def test_other_rows_are_untouched() -> None:
    made = processor()
    made.update_state(update(added=[(1, params(must_answer=5), [1], []), (0, params(), [1], [START])]))
    logits = torch.rand(3, VOCABULARY)
    changed = made.apply(logits.clone())
    assert torch.equal(changed[0], logits[0])
    assert torch.equal(changed[2], logits[2])
    assert changed[1, STOP] == float("-inf")


def test_a_row_s_next_request_inherits_nothing() -> None:
    # Given a bounded thought that ended unfinished in row 0, and a request without bounds in row 1
    made = processor()
    thinking, plain = [START, WORD], [WORD]
    made.update_state(update(added=[(0, params(thinking_budget=1), [1], thinking), (1, params(), [1], plain)]))
    # When the batch is condensed: the other request takes its row
    made.update_state(update(moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    logits = torch.rand(1, VOCABULARY)
    # Then nothing is forced on it
    assert torch.equal(made.apply(logits.clone()), logits)


def test_a_thought_keeps_its_bound_where_it_is_moved() -> None:
    made = processor()
    output = [START, WORD]
    made.update_state(update(added=[(0, params(thinking_budget=1), [1], output), (1, params(), [1], [])]))
    made.update_state(update(moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert int(made.apply(torch.rand(2, VOCABULARY))[1].argmax()) == END


def test_bounds_are_read_from_what_the_engine_is_given() -> None:
    assert Bounds.read(None) is None
    assert Bounds.read({"dry_multiplier": 1}) is None
    assert Bounds.read({"thinking_budget": 0}) == Bounds(thinking_budget=0)


@pytest.mark.parametrize("name", ["thinking_budget", "must_answer"])
@pytest.mark.parametrize("value", ["x", "5", 1.5, True, -1, [5]])
def test_what_is_no_number_is_refused_before_it_reaches_the_engine(name: str, value: Any) -> None:
    with pytest.raises(VLLMValidationError, match=f"^{name}: must be a whole number from 0"):
        ThoughtBounds.validate_params(SimpleNamespace(extra_args={name: value}))
    ThoughtBounds.validate_params(SimpleNamespace(extra_args={name: 0, "dry_multiplier": 1}))
    ThoughtBounds.validate_params(SimpleNamespace(extra_args=None))
