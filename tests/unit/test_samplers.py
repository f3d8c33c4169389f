"""The samplers: each against its rule written out in plain loops, in batches that change as vLLM's do."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from workers.samplers import MAX_DRY_PENALTY, MAX_MATCH_BEYOND, ExtraSamplers, SamplerParams, coin

LETTERS = "abcdefgh"
BREAKERS = ["\n", ":", '"', "*", "<|im_start|>", "<|im_end|>", "<think>"]
VOCAB = {token: index for index, token in enumerate([*LETTERS, *BREAKERS])}
BREAKER_IDS = {VOCAB[token] for token in BREAKERS}
INF = math.inf


@pytest.fixture(scope="session")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What the samplers know of a model: one with a token per character, and a chat template's tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    added = [
        {"id": VOCAB[text], "content": text, "special": text != "<think>"}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for text in ("<|im_start|>", "<|im_end|>", "<think>")
    ]
    characters = {token: index for token, index in VOCAB.items() if len(token) == 1}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": characters, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return SimpleNamespace(
        seed=0,
        skip_tokenizer_init=False,
        tokenizer=str(directory),
        runner_type="generate",
        tokenizer_mode="hf",
        tokenizer_revision=None,
        trust_remote_code=False,
    )


@dataclass
class Request:
    prompt: list[int] | None = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    params: SamplerParams | None = None
    seed: int | None = None

    @property
    def tokens(self) -> list[int]:
        return [*(self.prompt or []), *self.output]

    def added(self, index: int) -> Any:
        """As vLLM tells of it."""
        # Only what differs from the defaults, and a foreign key: others leave theirs here too.
        args = {name: getattr(self.params, name) for name in SamplerParams.__slots__} if self.params else {}
        wanted = {name: value for name, value in args.items() if value != getattr(SamplerParams(), name)}
        params = SimpleNamespace(extra_args={**wanted, "other": "x"} if self.params else None, seed=self.seed)
        return (index, params, self.prompt, self.output)


def ids(text: str) -> list[int]:
    return [VOCAB[character] for character in text]


def new(model_config: SimpleNamespace) -> ExtraSamplers:
    return ExtraSamplers(SimpleNamespace(model_config=model_config), torch.device("cpu"), False)


def start(model_config: SimpleNamespace, *requests: Request) -> ExtraSamplers:
    samplers = new(model_config)
    added = [request.added(index) for index, request in enumerate(requests)]
    samplers.update_state(BatchUpdate(batch_size=len(requests), removed=[], added=added, moved=[]))
    return samplers


def applied(samplers: ExtraSamplers, rows: Sequence[Sequence[float]]) -> list[list[float]]:
    logits = torch.tensor(rows, dtype=torch.float32)
    result = samplers.apply(logits)
    return [[float(x) for x in row] for row in result]


# The rules, in loops.


def plain_window(logits: list[float], tokens: list[int], params: SamplerParams) -> list[float]:
    n = params.repeat_last_n
    window = set(tokens if n == -1 else tokens[len(tokens) - n :] if 0 < n < len(tokens) else tokens if n else [])
    result = list(logits)
    for token in window:
        x, penalty = np.float32(result[token]), np.float32(params.repeat_penalty)
        result[token] = float(x / penalty if x > 0 else x * penalty)
    return result


def plain_dry(logits: list[float], tokens: list[int], params: SamplerParams) -> list[float]:
    if params.dry_multiplier == 0:
        return list(logits)
    if params.dry_penalty_last_n:
        tokens = tokens[-params.dry_penalty_last_n :]
    longest: dict[int, int] = {}
    for position in range(1, len(tokens)):
        length = 0
        while length < min(position, params.dry_allowed_length + MAX_MATCH_BEYOND):
            earlier, latest = tokens[position - 1 - length], tokens[len(tokens) - 1 - length]
            if earlier != latest or latest in BREAKER_IDS:
                break
            length += 1
        if length >= max(1, params.dry_allowed_length) and tokens[position] not in BREAKER_IDS:
            longest[tokens[position]] = max(length, longest.get(tokens[position], 0))
    result = list(logits)
    for token, length in longest.items():
        penalty = params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        result[token] = float(np.float32(result[token]) - np.float32(min(penalty, MAX_DRY_PENALTY)))
    return result


def plain_xtc(logits: list[float], params: SamplerParams) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    if total == 0:
        return list(logits)
    threshold = max(params.xtc_threshold, float(np.finfo(np.float32).tiny))
    above = [i for i, x in enumerate(logits) if math.exp(x) / total >= threshold]
    above.sort(key=lambda i: (-logits[i], i))
    result = list(logits)
    for i in above[: max(0, len(above) - max(1, params.xtc_min_keep))]:
        result[i] = -INF
    return result


def plain(logits: list[float], request: Request, toss: float = 0.0) -> list[float]:
    """All three in their order. `toss` is the coin of a request without a seed."""
    if (params := request.params) is None:
        return list(logits)
    result = plain_dry(plain_window(logits, request.tokens, params), request.tokens, params)
    if request.seed is not None:
        toss = coin(request.seed, len(request.output))
    return plain_xtc(result, params) if toss < params.xtc_probability else result


def assert_rows(rows: list[list[float]], expected: list[list[float]]) -> None:
    np.testing.assert_allclose(np.array(rows), np.array(expected), rtol=2e-6, atol=2e-6)


logit = st.one_of(st.floats(-12, 12, width=32), st.sampled_from([-INF, 0.0, 1.0, 2.0]))
text = st.lists(st.sampled_from([*range(4), *range(4), *range(4), *VOCAB.values()]), max_size=40)
sampler_params = st.builds(
    SamplerParams,
    repeat_penalty=st.sampled_from([1.0, 0.5, 1.1, 3.0]),
    repeat_last_n=st.sampled_from([-1, 0, 1, 3, 64]),
    dry_multiplier=st.sampled_from([0.0, 0.8, 3.0]),
    dry_base=st.sampled_from([1.0, 1.75, 4.0]),
    dry_allowed_length=st.integers(0, 4),
    dry_penalty_last_n=st.sampled_from([0, 1, 2, 7, 64]),
    # No threshold that equal logits could meet exactly: there the rounding decides.
    xtc_probability=st.sampled_from([0.0, 0.4, 1.0]),
    xtc_threshold=st.sampled_from([0.0, 0.013, 0.057, 0.11, 0.23, 0.47]),
    xtc_min_keep=st.integers(0, 3),
)
request_ = st.builds(
    Request,
    prompt=st.one_of(st.none(), text),
    output=text,
    params=st.one_of(st.none(), sampler_params),
    seed=st.integers(0, 2**31),
)


@given(st.lists(st.tuples(request_, st.lists(logit, min_size=len(VOCAB), max_size=len(VOCAB))), min_size=1, max_size=5))
@settings(deadline=None, max_examples=300)
def test_any_batch_is_sampled_by_the_rules(
    model_config: SimpleNamespace, batch: list[tuple[Request, list[float]]]
) -> None:
    # Given requests of any text and parameters, some without any
    requests, logits = [request for request, _ in batch], [row for _, row in batch]
    # When a step's logits are processed
    rows = applied(start(model_config, *requests), logits)
    # Then each row is what its own request's rules make of it
    assert_rows(rows, [plain(row, request) for request, row in batch])
    # And a row whose request asks for nothing is the same to the bit
    for row, request, before in zip(rows, requests, logits, strict=True):
        assert request.params is not None or row == before


def test_each_token_of_the_window_is_penalized_once(model_config: SimpleNamespace) -> None:
    # Given a window of three tokens, with b twice in it, over the border of prompt and output
    request = Request(ids("aab"), ids("cb"), SamplerParams(repeat_penalty=2.0, repeat_last_n=3))
    # When a logit is positive it is divided, when negative multiplied; a is too far back
    logits = [4.0, 4.0, -4.0, 4.0] + [0.0] * (len(VOCAB) - 4)
    assert applied(start(model_config, request), [logits])[0][:4] == [4.0, 2.0, -8.0, 4.0]


def test_dry_takes_more_the_longer_the_repetition(model_config: SimpleNamespace) -> None:
    # Given a text that ends as it began: c followed `ab` there, and d followed `b` elsewhere
    request = Request(ids("abcbd"), ids("ab"), SamplerParams(dry_multiplier=1.0, dry_base=3.0, dry_allowed_length=1))
    row = applied(start(model_config, request), [[0.0] * len(VOCAB)])[0]
    # Then each token loses by the longest match that it would prolong
    assert row[: len(LETTERS)] == [0, 0, -3, -1, 0, 0, 0, 0]


@pytest.mark.parametrize("breaker", BREAKERS)
def test_dry_neither_crosses_nor_penalizes_a_breaker(model_config: SimpleNamespace, breaker: str) -> None:
    params = SamplerParams(dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=1)
    # Given a repetition of two tokens, with a breaker before the last
    crossing = Request([*ids("a"), VOCAB[breaker], *ids("bc"), *ids("a"), VOCAB[breaker], *ids("b")], [], params)
    # And one that a breaker followed
    followed = Request([*ids("ab"), VOCAB[breaker], *ids("ab")], [], params)
    rows = applied(start(model_config, crossing, followed), [[0.0] * len(VOCAB)] * 2)
    # Then what counts of the first is what stands after the breaker
    assert rows[0] == [-1.0 if i == VOCAB["c"] else 0.0 for i in range(len(VOCAB))]
    # And the breaker itself is as likely as before
    assert rows[1] == [0.0] * len(VOCAB)


def test_the_longest_loop_leaves_finite_logits(model_config: SimpleNamespace) -> None:
    # Given a text that is nothing but a loop, and the strongest parameters
    params = SamplerParams(dry_multiplier=MAX_DRY_PENALTY, dry_base=1e3, dry_allowed_length=1)
    mild = SamplerParams(dry_multiplier=1.0, dry_base=1.01, dry_allowed_length=2)
    requests = [Request(ids("a") * 5000, [], params), Request(ids("a") * 5000, [], mild)]
    rows = applied(start(model_config, *requests), [[1.0] * len(VOCAB)] * 2)
    # Then the penalty is bounded, and so is the match that is measured
    assert rows[0][0] == 1 - MAX_DRY_PENALTY
    assert rows[1][0] == pytest.approx(1 - 1.01**MAX_MATCH_BEYOND)
    assert rows[0][1:] == rows[1][1:] == [1.0] * (len(VOCAB) - 1)


@pytest.mark.parametrize(
    ("min_keep", "threshold", "expected"),
    [
        (1, 0.1, [-INF, -INF, 0.2, 0.05]),  # the least probable of those above the threshold stays
        (0, 0.1, [-INF, -INF, 0.2, 0.05]),
        (2, 0.1, [-INF, 0.3, 0.2, 0.05]),
        (3, 0.1, [0.45, 0.3, 0.2, 0.05]),  # no more than may stay: nothing happens
        (1, 0.4, [0.45, 0.3, 0.2, 0.05]),  # only one above it
        (1, 0.6, [0.45, 0.3, 0.2, 0.05]),
        (1, 0.0, [-INF, -INF, -INF, 0.05]),  # what is impossible is not what stays
    ],
)
def test_xtc_excludes_the_top_choices(
    model_config: SimpleNamespace, min_keep: int, threshold: float, expected: list[float]
) -> None:
    params = SamplerParams(xtc_probability=1.0, xtc_threshold=threshold, xtc_min_keep=min_keep)
    logits = [math.log(p) for p in (0.45, 0.3, 0.2, 0.05)] + [-INF] * (len(VOCAB) - 4)
    row = applied(start(model_config, Request(params=params)), [logits])[0]
    assert [math.exp(x) or -INF for x in row[:4]] == pytest.approx(expected)
    assert row[4:] == logits[4:]


def test_of_equally_probable_tokens_xtc_excludes_the_lower_ids(model_config: SimpleNamespace) -> None:
    params = SamplerParams(xtc_probability=1.0, xtc_threshold=0.1, xtc_min_keep=2)
    row = applied(start(model_config, Request(params=params)), [[2.0] * 5 + [-9.0] * (len(VOCAB) - 5)])[0]
    assert row[:5] == [-INF, -INF, -INF, 2.0, 2.0]


class Engine:
    """Keeps a batch as vLLM's runner does: freed rows are filled, then closed up, then some are swapped."""

    def __init__(self, samplers: ExtraSamplers, random: Random) -> None:
        self.samplers = samplers
        self.random = random
        self.rows: list[Request] = []

    def change(self, leaving: list[Request], coming: list[Request]) -> None:
        rows: list[Request | None] = [None if any(r is row for row in leaving) else r for r in self.rows]
        removed = [index for index, row in enumerate(rows) if row is None]
        added = []
        for request in coming:
            index = removed.pop(0) if removed else len(rows)
            rows[index : index + 1] = [request]
            added.append(request.added(index))
        moved = []
        while None in rows:
            last, hole = rows.pop(), rows.index(None) if None in rows else len(rows)
            if last is not None and hole < len(rows):
                rows[hole] = last
                removed.remove(hole)
                moved.append((len(rows), hole, MoveDirectionality.UNIDIRECTIONAL))
        self.rows = [row for row in rows if row is not None]
        if len(self.rows) > 1 and self.random.random() < 0.5:
            a, b = self.random.sample(range(len(self.rows)), 2)
            self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        update = BatchUpdate(batch_size=len(self.rows), removed=removed, added=added, moved=moved)
        self.samplers.update_state(update if removed or added or moved else None)

    def step(self) -> list[tuple[Request, list[float], list[float]]]:
        """Each row's request, and a step's logits before and after."""
        # The tokens of the last step are not known yet when `update_state` is called.
        known = [row.output[-1:] for row in self.rows]
        logits = [[self.random.gauss(0, 3) for _ in VOCAB] for _ in self.rows]
        for row in self.rows:
            row.output[-1:] = [-1] * len(row.output[-1:])
        self.samplers.update_state(None)
        for row, tokens in zip(self.rows, known, strict=True):
            row.output[len(row.output) - len(tokens) :] = tokens
        return list(zip(self.rows, logits, applied(self.samplers, logits), strict=True))


@pytest.mark.parametrize("run", range(6))
def test_a_run_with_arrivals_departures_and_preemptions(model_config: SimpleNamespace, run: int) -> None:
    # Given a batch of requests of many kinds, each with a seed
    random = Random(run)
    engine = Engine(new(model_config), random)
    preempted: list[Request] = []

    def arrival() -> Request:
        params = SamplerParams(
            repeat_penalty=random.choice([1.0, 1.3]),
            repeat_last_n=random.choice([-1, 4, 30]),
            dry_multiplier=random.choice([0.0, 2.0]),
            dry_allowed_length=random.choice([1, 2]),
            dry_penalty_last_n=random.choice([0, 20]),
            xtc_probability=random.choice([0.0, 0.5]),
            xtc_threshold=0.07,
        )
        prompt = [random.choice([*range(3), *VOCAB.values()]) for _ in range(random.choice([1, 10, 400]))]
        return Request(prompt, [], random.choice([None, params, params]), seed=random.randrange(2**40))

    for _ in range(120):
        # When at each step some leave for good, some are preempted and come again, and some arrive
        leaving = [row for row in engine.rows if random.random() < 0.06]
        coming = [arrival() for _ in range(random.choice([0, 0, 0, 1, 2]))] if len(engine.rows) < 8 else []
        if preempted and random.random() < 0.5:
            again = preempted.pop()
            # with lists of its own, which hold all that it has written
            coming.append(replace(again, prompt=list(again.prompt or []), output=list(again.output)))
        preempted += [row for row in leaving if random.random() < 0.5]
        engine.change(leaving, coming)
        for request, before, after in engine.step():
            # Then each row is what the rules make of the text so far
            assert_rows([after], [plain([float(np.float32(x)) for x in before], request)])
            # And the most probable token is the next
            request.output.append(max(VOCAB.values(), key=lambda token: after[token]))


def test_a_row_that_is_filled_again_is_the_new_requests(model_config: SimpleNamespace) -> None:
    # Given a row whose request leaves in the step in which another takes it over
    request = Request(ids("ab"), [], SamplerParams(repeat_penalty=2.0))
    samplers = start(model_config, request, Request())
    # When the one that comes asks for something else, or for nothing
    other = Request(ids("c"), [], SamplerParams(repeat_penalty=4.0))
    samplers.update_state(
        BatchUpdate(batch_size=2, removed=[0, 1], added=[Request().added(0), other.added(1)], moved=[])
    )
    # Then nothing is left of the one that went
    rows = applied(samplers, [[1.0] * len(VOCAB)] * 2)
    assert rows[0] == [1.0] * len(VOCAB)
    assert rows[1] == [0.25 if i == VOCAB["c"] else 1.0 for i in range(len(VOCAB))]
    # And a row that a moved request takes over is that request's
    samplers.update_state(
        BatchUpdate(batch_size=1, removed=[], added=[], moved=[(0, 1, MoveDirectionality.UNIDIRECTIONAL)])
    )
    assert applied(samplers, [[1.0] * len(VOCAB)] * 2)[1] == [1.0] * len(VOCAB)


def test_tokens_that_vllm_takes_back_are_forgotten(model_config: SimpleNamespace) -> None:
    # Given a request whose last tokens have been read
    request = Request(ids("a"), ids("bcd"), SamplerParams(repeat_penalty=2.0, repeat_last_n=-1))
    samplers = start(model_config, request)
    applied(samplers, [[1.0] * len(VOCAB)])
    # When two are discarded and another comes in their place
    del request.output[1:]
    applied(samplers, [[1.0] * len(VOCAB)])
    request.output += ids("e")
    # Then the text is what it is now
    row = applied(samplers, [[1.0] * len(VOCAB)])[0]
    assert [i for i, x in enumerate(row) if x != 1] == ids("abe")


def test_a_token_that_is_not_known_yet_is_read_when_it_is(model_config: SimpleNamespace) -> None:
    request = Request(ids("a"), [*ids("b"), -1], SamplerParams(repeat_penalty=2.0, repeat_last_n=-1))
    samplers = start(model_config, request)
    applied(samplers, [[1.0] * len(VOCAB)])
    request.output[-1] = VOCAB["c"]
    row = applied(samplers, [[1.0] * len(VOCAB)])[0]
    assert [i for i, x in enumerate(row) if x != 1] == ids("abc")


def test_ids_without_a_logit_are_left_out(model_config: SimpleNamespace) -> None:
    # Given a prompt with an id beyond the model's vocabulary, inside a repetition too
    prompt = [0, len(VOCAB), 1, 0, len(VOCAB), 0, len(VOCAB), 0]
    params = SamplerParams(repeat_penalty=2.0, dry_multiplier=1.0, dry_allowed_length=1)
    row = applied(start(model_config, Request(prompt, [], params)), [[1.0] * len(VOCAB)])[0]
    # Then the tokens that have a logit are penalized
    assert [i for i, x in enumerate(row) if x != 1] == [0, 1]


def test_a_batch_without_samplers_is_not_touched(model_config: SimpleNamespace) -> None:
    # Given requests that ask for nothing, or for what is off, and a model whose tokenizer cannot be had
    nowhere = SimpleNamespace(**vars(model_config) | {"tokenizer": str(Path("/nowhere"))})
    off = SamplerParams(repeat_penalty=3.0, repeat_last_n=0, dry_base=3.0, xtc_threshold=0.2)
    samplers = start(nowhere, Request(ids("aaaa")), Request(ids("aaaa"), [], off))
    # Then the logits come back as they are
    logits = torch.randn(2, len(VOCAB))
    before = logits.clone()
    assert samplers.apply(logits) is logits
    assert torch.equal(logits, before)


def test_greedy_requests_are_sampled_too(model_config: SimpleNamespace) -> None:
    # vLLM leaves out what cannot change the most probable token where all requests are greedy
    assert not new(model_config).is_argmax_invariant()


def tosses(samplers: ExtraSamplers, request: Request, steps: int, row: int = 0) -> list[bool]:
    """Whether XTC acts at each of the steps."""
    acted = []
    for _ in range(steps):
        rows = applied(samplers, [[1.0, 1.0] + [-50.0] * (len(VOCAB) - 2)] * (row + 1))
        acted.append(rows[row][0] == -INF)
        request.output.append(0)
    return acted


def test_a_seed_decides_every_step_whoever_is_in_the_batch(model_config: SimpleNamespace) -> None:
    # Given a request with a seed, alone
    params = SamplerParams(xtc_probability=0.5)
    request = Request(ids("a"), [], params, seed=7)
    alone = tosses(start(model_config, request), request, 60)
    # When the same comes as the third of a batch, is preempted after 20 steps and goes on alone
    again = Request(ids("a"), [], params, seed=7)
    others = [Request(ids("b"), [], params), Request(ids("b"), [], params, seed=8)]
    first = tosses(start(model_config, *others, again), again, 20, row=2)
    resumed = replace(again, output=list(again.output))
    rest = tosses(start(model_config, resumed), resumed, 40)
    # Then it meets the same coins
    assert first + rest == alone
    # And another seed meets others
    other = Request(ids("a"), [], params, seed=8)
    assert tosses(start(model_config, other), other, 60) != alone


def test_coins_fall_as_often_as_they_are_asked_to(model_config: SimpleNamespace) -> None:
    # Given the coins of two seeds, which are the same at every run
    coins = np.array([[coin(seed, step) for step in range(4000)] for seed in (0, 1)])
    # Then they are spread evenly, and know nothing of each other or of the step before
    assert ((coins >= 0) & (coins < 1)).all()
    for probability in (0.1, 0.5, 0.9):
        assert (coins < probability).mean(axis=1) == pytest.approx(np.full(2, probability), abs=0.03)
    assert abs(np.corrcoef(coins)[0, 1]) < 0.05
    assert abs(np.corrcoef(coins[0, 1:], coins[0, :-1])[0, 1]) < 0.05


def test_unseeded_coins_fall_alike_on_every_rank(model_config: SimpleNamespace) -> None:
    # Given two workers that share a model, and probabilities of one half, none and all
    runs = []
    for _ in range(2):
        requests = [Request(params=SamplerParams(xtc_probability=p, xtc_threshold=0.1)) for p in (0.5, 1.0)]
        samplers = start(model_config, *requests, Request(params=SamplerParams(repeat_penalty=2.0)))
        logits = [[1.0, 1.0] + [-50.0] * (len(VOCAB) - 2)] * 3
        runs.append([[row[0] == -INF for row in applied(samplers, logits)] for _ in range(200)])
    # Then both toss alike
    assert runs[0] == runs[1]
    # And the half is sometimes, the others always and never
    half, always, never = zip(*runs[0], strict=True)
    assert 60 < sum(half) < 140
    assert all(always)
    assert not any(never)


@pytest.mark.parametrize(
    "args",
    [
        None,
        {},
        {"other": object()},
        {"repeat_penalty": 1, "repeat_last_n": -1},
        {"dry_multiplier": 0.8, "dry_base": 1, "dry_allowed_length": 0, "dry_penalty_last_n": 0},
        {"xtc_probability": 1, "xtc_threshold": 0, "xtc_min_keep": 0},
        dict.fromkeys(SamplerParams.__slots__),
    ],
)
def test_parameters_within_their_range_are_valid(args: dict[str, Any] | None) -> None:
    ExtraSamplers.validate_params(SimpleNamespace(extra_args=args))


@pytest.mark.parametrize("name", SamplerParams.__slots__)
def test_parameters_out_of_their_range_are_refused_by_name(name: str) -> None:
    wrong: list[Any] = ["1", True, [1], math.nan, INF, -INF, -2, 1e30]
    if name.endswith(("last_n", "length", "keep")):
        wrong.append(1.5)
    if name in ("repeat_penalty", "dry_base"):
        wrong.append(0)
    for value in wrong:
        with pytest.raises(VLLMValidationError, match=rf"^{name}: must be a .*number from") as refusal:
            ExtraSamplers.validate_params(SimpleNamespace(extra_args={name: value}))
        assert refusal.value.parameter == name
