"""Three samplers that vLLM lacks: a repetition penalty with a window, DRY and XTC.

Owns their rules and their state per request; vLLM loads the class in its engine process and tells it of
every change of the batch. Knows nothing of HTTP, of queues or of what a client calls these parameters:
they come in `SamplingParams.extra_args`, under the names of `SamplerParams`.

In a step they come after grammars and `logit_bias`, and before vLLM's own penalties, temperature, `min_p`,
`top_k` and `top_p`.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

Ids = NDArray[np.int64]

MAX_MATCH_BEYOND = 64
"""DRY measures a repetition up to this many tokens beyond the allowed length; a longer one counts as that."""

MAX_DRY_PENALTY = 1e4
"""The most that DRY takes off a logit. Logits are tens apart, so this is as good as a ban, and stays finite:
the one token that a grammar leaves remains possible."""

SEQUENCE_BREAKERS = ("\n", ":", '"', "*")
"""The defaults of the proposal: https://github.com/oobabooga/text-generation-webui/pull/5677"""

_LAST_N_MAX = 2**31 - 1

_RANGES: dict[str, tuple[float, float]] = {
    "repeat_penalty": (1e-3, 1e3),
    "repeat_last_n": (-1, _LAST_N_MAX),
    "dry_multiplier": (0.0, MAX_DRY_PENALTY),
    "dry_base": (1.0, 1e3),
    "dry_allowed_length": (0, 256),  # a step's work grows with it when the text is one long repetition
    "dry_penalty_last_n": (0, _LAST_N_MAX),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "xtc_min_keep": (0, _LAST_N_MAX),
}
"""Both ends are allowed, and keep every logit finite that was."""


@dataclass(frozen=True, slots=True)
class SamplerParams:
    """What a request asks of the three samplers. The defaults leave all of them off.

    The defaults of DRY and XTC are those of their proposals, `repeat_last_n` is llama.cpp's.
    """

    repeat_penalty: float = 1.0
    """1 is off."""
    repeat_last_n: int = 64
    """Tokens of prompt and output; -1 is all of them, 0 is off."""
    dry_multiplier: float = 0.0
    """In logits; 0 is off."""
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    """Tokens that may repeat for free."""
    dry_penalty_last_n: int = 0
    """Tokens of prompt and output; 0 is all of them."""
    xtc_probability: float = 0.0
    """Of each step; 0 is off."""
    xtc_threshold: float = 0.1
    xtc_min_keep: int = 1
    """Tokens above the threshold that stay; 0 counts as 1."""

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> "SamplerParams":
        """The parameters among `extra_args`; None is as good as absent. Raises VLLMValidationError."""
        given = {name: value for name, value in (extra_args or {}).items() if name in _RANGES and value is not None}
        for field in fields(cls):
            if field.name not in given:
                continue
            value, (low, high) = given[field.name], _RANGES[field.name]
            kinds = int if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "a whole number" if field.type is int else "a number"
                raise VLLMValidationError(
                    f"{field.name}: must be {kind} from {low:g} to {high:g}.", parameter=field.name
                )
        return cls(**given)

    @property
    def repeats(self) -> bool:
        return self.repeat_penalty != 1 and self.repeat_last_n != 0

    @property
    def dries(self) -> bool:
        return self.dry_multiplier > 0

    @property
    def excludes(self) -> bool:
        return self.xtc_probability > 0


class ExtraSamplers(LogitsProcessor):  # type: ignore[misc]  # vLLM is Any here
    """The three samplers for a whole batch: the windowed penalty, then DRY, then XTC.

    Rows of requests that ask for none of them are not touched; a batch of such rows costs nothing.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._model_config = vllm_config.model_config
        self._rows: dict[int, _Row] = {}
        self._breakers: Ids | None = None
        # Of its own, and seeded as vLLM seeds a worker: with tensor parallelism every rank samples for
        # itself, and they must toss alike.
        self._random = random.Random(self._model_config.seed)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Called for every request, in the process of the API. Raises VLLMValidationError, a refusal."""
        SamplerParams.read(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """No: each of the three may change the most probable token, so greedy requests need them too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch. The order, removed before added before moved, is vLLM's."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            # A request that was preempted comes again as a new one, with all of its output.
            self._rows.pop(index, None)
            wanted = SamplerParams.read(params.extra_args)
            if wanted.repeats or wanted.dries or wanted.excludes:
                self._rows[index] = _Row(wanted, params.seed, _Context(prompt, output))
            if wanted.dries and self._breakers is None:
                self._breakers = self._load_breakers()
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change float32 (n_requests, vocab_size) in place."""
        if self._rows:
            self._penalize_window(logits)
            self._penalize_repetition(logits)
            self._exclude_top_choices(logits)
        return logits

    def _penalize_window(self, logits: torch.Tensor) -> None:
        """Distinct tokens of the window: a positive logit is divided by the penalty, any other multiplied.

        The rule of llama.cpp's `penalties` sampler, after CTRL (arXiv:1909.05858).
        """
        edits: list[_Edit] = []
        for index, row in self._rows.items():
            if row.params.repeats:
                window = row.context.last(row.params.repeat_last_n)
                edits.append((index, window, np.full(window.size, row.params.repeat_penalty)))
        if edits:
            rows, ids, penalties = _gather(edits, logits)
            # A token that stands in the window twice is here twice. Both read the logit before either
            # writes, and write the same, so it is penalized once.
            before = logits[rows, ids]
            logits[rows, ids] = torch.where(before > 0, before / penalties, before * penalties)

    def _penalize_repetition(self, logits: torch.Tensor) -> None:
        """DRY: what would prolong a repetition of m tokens loses multiplier * base**(m - allowed_length).

        As proposed in https://github.com/oobabooga/text-generation-webui/pull/5677.
        """
        edits: list[_Edit] = []
        for index, row in self._rows.items():
            params = row.params
            if params.dries:
                assert self._breakers is not None
                tokens = row.context.last(params.dry_penalty_last_n or -1)
                ids, lengths = continuations(tokens, params.dry_allowed_length, self._breakers)
                penalties = params.dry_multiplier * np.power(params.dry_base, lengths - params.dry_allowed_length)
                edits.append((index, ids, np.minimum(penalties, MAX_DRY_PENALTY)))
        if edits:
            rows, ids, penalties = _gather(edits, logits)
            logits[rows, ids] -= penalties

    def _exclude_top_choices(self, logits: torch.Tensor) -> None:
        """XTC: at a step that the coin picks, of the tokens above the threshold only the least probable stay.

        As proposed in https://github.com/oobabooga/text-generation-webui/pull/6335. Among equally probable
        tokens those with the lower ids go first.
        """
        picked = [(index, row.params) for index, row in self._rows.items() if row.is_picked(self._random)]
        if not picked:
            return
        device = logits.device
        rows = torch.tensor([index for index, _ in picked], device=device)
        # A token that is banned already, by a grammar say, must not be the one that stays, as a threshold of
        # 0 would have it: its probability is 0, which is below this.
        least = torch.finfo(torch.float32).tiny
        thresholds = torch.tensor([[max(params.xtc_threshold, least)] for _, params in picked], device=device)
        kept = torch.tensor([max(1, params.xtc_min_keep) for _, params in picked], device=device)
        chosen = logits[rows]
        above = chosen.softmax(dim=-1) >= thresholds
        at, ids = above.nonzero(as_tuple=True)
        # By logits, which order as probabilities do without their rounding. Sorted twice, so that each
        # row's tokens lie together, the most probable first.
        order = chosen[at, ids].argsort(descending=True, stable=True)
        order = order[at[order].argsort(stable=True)]
        at, ids = at[order], ids[order]
        counts = above.sum(dim=1)
        rank = torch.arange(at.numel(), device=device) - (counts.cumsum(0) - counts)[at]
        out = rank < (counts - kept)[at]
        logits[rows[at[out]], ids[out]] = -torch.inf

    def _load_breakers(self) -> Ids:
        """At the first request with DRY: where vLLM does not hold the tokenizer yet, loading costs a second."""
        from vllm.tokenizers import cached_tokenizer_from_config

        return breaker_ids(cached_tokenizer_from_config(self._model_config))


def breaker_ids(tokenizer: Any) -> Ids:
    """The tokens that end a sequence for DRY, sorted; none where there is no tokenizer.

    Beside the proposal's these are all special and added tokens. A chat template puts the same ones around
    every message, and a model that could not end its turn or its thought as it did before would run on.
    """
    if tokenizer is None:
        return np.empty(0, np.int64)
    # Behind a letter, as some tokenizers put a space before a text's first word.
    ids = {tokenizer.encode("a" + breaker, add_special_tokens=False)[-1] for breaker in SEQUENCE_BREAKERS}
    return np.array(sorted(ids.union(tokenizer.all_special_ids, tokenizer.get_added_vocab().values())), np.int64)


def continuations(tokens: Ids, allowed_length: int, breakers: Ids) -> tuple[Ids, Ids]:
    """Which tokens would prolong a repetition, and the length of the longest that each would: int64 (n,) both.

    A repetition is a run of tokens at the end that also stands earlier; what followed it there would
    prolong it. It holds no breaker, and has at least `allowed_length` tokens and at least one. A breaker
    itself prolongs nothing.
    """
    newest_first = tokens[: -(allowed_length + MAX_MATCH_BEYOND) - 1 : -1]
    breaks = np.flatnonzero(np.isin(newest_first, breakers))
    reach = int(breaks[0]) if breaks.size else newest_first.size
    if reach < max(1, allowed_length):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # At each place but the last: does the run that ends here still match, and how far did it.
    matches = tokens[:-1] == tokens[-1]
    lengths = matches.astype(np.int64)
    for back in range(1, reach):
        matches[back - 1] = False  # the text begins here
        matches[back:] &= tokens[: -1 - back] == newest_first[back]
        if not matches.any():
            break
        lengths += matches
    ends = np.flatnonzero(lengths >= max(1, allowed_length))
    ends = ends[np.isin(tokens[ends + 1], breakers, invert=True)]
    ids, which = np.unique(tokens[ends + 1], return_inverse=True)
    longest = np.zeros(ids.size, np.int64)
    np.maximum.at(longest, which, lengths[ends])
    return ids, longest


def coin(seed: int, step: int) -> float:
    """A number in [0, 1) for a step of a seeded request, the same on every machine.

    A function of nothing else, so that preemption and whoever shares the batch leave the text as it is.
    """
    digest = blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # as many bits as a float holds


@dataclass(frozen=True, slots=True)
class _Row:
    params: SamplerParams
    seed: int | None
    context: "_Context"

    def is_picked(self, unseeded: random.Random) -> bool:
        """Whether XTC acts at this step."""
        if not self.params.excludes:
            return False
        toss = unseeded.random() if self.seed is None else coin(self.seed, self.context.output_tokens)
        return toss < self.params.xtc_probability


class _Context:
    """A request's tokens in one growing array: a step copies its own tokens only, not the whole text.

    `output` is vLLM's own list, which grows with every step. `prompt` is None where vectors were given.
    """

    def __init__(self, prompt: list[int] | None, output: list[int]) -> None:
        self._output = output
        self._prompt_tokens = self._filled = len(prompt or ())
        self._tokens = np.empty(self._filled + len(output) + 256, np.int64)
        self._tokens[: self._filled] = prompt or ()

    @property
    def output_tokens(self) -> int:
        return len(self._output)

    def last(self, n: int) -> Ids:
        """The last n tokens, -1 for all. A view, good until the next call."""
        # Fewer than before, if vLLM had to take back tokens.
        start = min(self._filled, self._prompt_tokens + len(self._output))
        new = self._output[start - self._prompt_tokens :]
        # With asynchronous scheduling a token is -1 until it is known, as when `update_state` is called.
        # vLLM fills it in right before the processors run (`update_async_output_token_ids`), so none is
        # met here; if one were, it must not stay.
        while new and new[-1] < 0:
            new.pop()
        self._filled = start + len(new)
        if self._filled > self._tokens.size:
            self._tokens = np.concatenate([self._tokens, np.empty(self._filled, np.int64)])
        self._tokens[start : self._filled] = new
        return self._tokens[max(0, self._filled - n) if n >= 0 else 0 : self._filled]


_Edit = tuple[int, Ids, NDArray[np.float64]]
"""A row, tokens in it, and a number for each."""


def _gather(edits: list[_Edit], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All edits as one: rows, ids, and numbers in the type of the logits, (n,) each, on their device."""
    rows = np.repeat([index for index, _, _ in edits], [ids.size for _, ids, _ in edits])
    ids = np.concatenate([ids for _, ids, _ in edits])
    numbers = np.concatenate([numbers for _, _, numbers in edits])
    # A tokenizer may know ids that the model has no logit for, and a prompt may hold them.
    known = (ids >= 0) & (ids < logits.shape[-1])
    rows, ids, numbers = rows[known], ids[known], numbers[known]
    return (
        torch.from_numpy(rows).to(logits.device),
        torch.from_numpy(ids).to(logits.device),
        torch.from_numpy(numbers).to(logits.device, logits.dtype),
    )
