"""How long a request may think, and that it does not stop there: a logits processor of vLLM's kind.

Two bounds come in `SamplingParams.extra_args`, in tokens, under the names of `Bounds`. vLLM has a bound of its own
(`thinking_token_budget`), which is not used: in 0.32 a request that takes the batch row of a finished one inherits
its bound, so that one client's thought would be ended in the middle of another client's answer.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor

TEMPLATE_TAIL = 8
"""Where a chat template opens or closes a thought itself, it does so within this many tokens of the prompt's end."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """`thinking_budget` counts from the token that opens a thought. `must_answer` is for requests whose answer is
    promised: it counts from the first token, and until the thought is over, generation cannot end.

    A grammar holds the answer and not the thought before it; without `must_answer` a model that stops in the
    middle of its thought would leave a forced tool call uncalled.
    """

    thinking_budget: int | None = None
    must_answer: int | None = None

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> "Bounds | None":
        """The bounds of a request, None where it has none."""
        given = extra_args or {}
        bounds = cls(given.get("thinking_budget"), given.get("must_answer"))
        return None if bounds == cls() else bounds


@dataclass(slots=True)
class _Thought:
    """A request that may be thinking. `output` is the engine's own growing list; `barred` may not come before the
    thought is over, and one of `ends` ends it; `opened` is where in the output the thought began, None before;
    `forced` counts the tokens of the end that have been forced."""

    bounds: Bounds
    output: list[int]
    barred: torch.Tensor
    ends: list[list[int]]
    opened: int | None = None
    seen: int = 0
    forced: int = 0

    def is_over(self) -> bool:
        """Whether a bound is reached."""
        budget, promised = self.bounds.thinking_budget, self.bounds.must_answer
        if budget is not None and self.opened is not None and len(self.output) - self.opened >= budget:
            return True
        return promised is not None and len(self.output) >= promised


class ThoughtBounds(LogitsProcessor):  # type: ignore[misc]  # vLLM is Any here
    """Ends thoughts at their bound; costs the requests that have none nothing."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        reasoning = vllm_config.reasoning_config
        self._start: list[int] = (reasoning and reasoning.reasoning_start_token_ids) or []
        self._end: list[int] = (reasoning and reasoning.natural_reasoning_end_token_ids) or []
        self._to_force: list[int] = (reasoning and reasoning.reasoning_end_token_ids) or []
        self._vllm_config = vllm_config
        self._implicit: list[int] | None = None
        self._device = device
        self._thinking: dict[int, _Thought] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Called for every request, in the process of the API. Raises VLLMValidationError, a refusal: what is no number
        would end the engine where it is compared with one."""
        bounds = Bounds.read(sampling_params.extra_args) or Bounds()
        for name, value in asdict(bounds).items():
            if value is not None and (type(value) is not int or value < 0):
                raise VLLMValidationError(f"{name}: must be a whole number from 0.", parameter=name)

    def is_argmax_invariant(self) -> bool:
        """It changes what greedy sampling takes."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._thinking, batch_update, self._watch)

    def _watch(self, params: Any, prompt: list[int] | None, output: list[int]) -> _Thought | None:
        bounds = Bounds.read(params.extra_args)
        tail = (prompt or [])[-TEMPLATE_TAIL:]
        if bounds is None or not self._end or _find(self._end, tail) is not None:
            return None
        if self._implicit is None:
            self._implicit = implicit_ends(self._vllm_config)
        structure = params.structured_outputs
        if structure is not None and structure.structural_tag is None:
            # vLLM would hold this very token to the grammar of the answer, which has no place for it.
            barred, ends = {*params.all_stop_token_ids, *self._implicit}, [self._end]
        else:
            barred, ends = params.all_stop_token_ids, [self._end, *([token] for token in self._implicit)]
        unsaid = torch.tensor(sorted(barred), dtype=torch.long, device=self._device)
        return _Thought(bounds, output, unsaid, ends, opened=None if _find(self._start, tail) is None else 0)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` float32 (n_requests, vocabulary), changed in place."""
        for index, thought in list(self._thinking.items()):
            if self._is_done(thought):
                del self._thinking[index]
            elif thought.forced or thought.is_over():
                logits[index] = float("-inf")
                logits[index, self._to_force[thought.forced]] = 0.0
                thought.forced += 1
            elif thought.bounds.must_answer is not None:
                logits[index, thought.barred] = float("-inf")
        return logits

    def _is_done(self, thought: _Thought) -> bool:
        """Whether the thought is over; looks at what was generated since the last look."""
        new = thought.output[thought.seen :]
        if thought.opened is None and (at := _find(self._start, new)) is not None:
            thought.opened = thought.seen + at + len(self._start)
        if thought.forced == len(self._to_force):
            return True
        if not thought.forced and any(_find(end, new) is not None for end in thought.ends):
            return True
        # The next look begins where an end, or a beginning, may have begun already.
        thought.seen = max(0, len(thought.output) - max(len(self._end), len(self._start)) + 1)
        return False


def implicit_ends(vllm_config: Any) -> list[int]:
    """Tokens that end a thought for vLLM's reasoning parser, and begin something else: a tool call with Qwen3's.

    From where the parser sees the end, the answer is held to its grammar; the bounds must see it where it does.
    """
    from vllm.reasoning import ReasoningParserManager
    from vllm.tokenizers import cached_tokenizer_from_config

    name = vllm_config.reasoning_config.reasoning_parser
    if not name:
        return []
    parser = ReasoningParserManager.get_reasoning_parser(name)(cached_tokenizer_from_config(vllm_config.model_config))
    ends = sorted(getattr(parser, "reasoning_end_token_ids", ()))  # of the parsers that have an engine's state machine
    return [end for end in ends if end not in vllm_config.reasoning_config.natural_reasoning_end_token_ids]


def _find(sequence: list[int], tokens: list[int]) -> int | None:
    """Where in the tokens the sequence begins last."""
    size = len(sequence)
    at = (at for at in range(len(tokens) - size, -1, -1) if tokens[at : at + size] == sequence)
    return next(at, None) if size else None
