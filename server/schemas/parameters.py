"""What the sampler is told beyond temperature and top_p: one set of names on both chat routes."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from server.limits import MAX_TOP_LOGPROBS, MIN_XTC_THRESHOLD

MAX_INT32 = 2**31 - 1


def _switch(value: Any) -> Any:
    """Kawai documents `enable_thinking` as a string."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


Switch = Annotated[bool, BeforeValidator(_switch)]


class SamplingParameters(BaseModel):
    """Kawai's parameters. None: not given, so the model's own generation settings hold."""

    model_config = ConfigDict(strict=True)

    top_k: int | None = Field(None, ge=-1, le=MAX_INT32, description="Most probable tokens to keep; 0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability, as a share of the best token's")
    repeat_penalty: float | None = Field(None, gt=0, le=10, description="Divides the logits of earlier tokens")
    repeat_last_n: int | None = Field(
        None, ge=-1, le=MAX_INT32, description="How many tokens `repeat_penalty` looks back on; -1: all, 0: none"
    )
    dry_multiplier: float | None = Field(None, ge=0, le=100, description="Strength of DRY; 0: off")
    dry_base: float | None = Field(None, ge=1, le=10, description="How the penalty grows with the repetition (1.75)")
    dry_allowed_length: int | None = Field(None, ge=1, le=16, description="Repetition let be (2)")
    dry_penalty_last_n: int | None = Field(
        None, ge=-1, le=MAX_INT32, description="How many tokens DRY looks back on; 0 or -1: all"
    )
    xtc_probability: float | None = Field(None, ge=0, le=1, description="How often XTC acts; 0: never")
    xtc_threshold: float | None = Field(
        None, ge=MIN_XTC_THRESHOLD, le=1, description="Probability that makes a top choice (0.1)"
    )
    xtc_min_keep: int | None = Field(None, ge=0, le=MAX_INT32, description="Top choices that XTC leaves (1)")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="`none` switches thinking off, any other on"
    )
    return_prompt: bool | None = Field(None, description="Return the rendered prompt as `prompt`")
    include_usage: bool | None = Field(None, description="The same as `stream_options.include_usage`")
    logprobs: bool | None = Field(None, description="Log probabilities of the tokens")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="How many alternatives of each")

    def for_engine(self) -> dict[str, Any]:
        """By the engine's names; what it lacks goes to the samplers of our own."""
        own = {
            "dry_multiplier": self.dry_multiplier,
            "dry_base": self.dry_base,
            "dry_allowed_length": self.dry_allowed_length,
            # The engine's sampler has one word for the whole context.
            "dry_penalty_last_n": None if self.dry_penalty_last_n is None else max(self.dry_penalty_last_n, 0),
            "xtc_probability": self.xtc_probability,
            "xtc_threshold": self.xtc_threshold,
            "xtc_min_keep": self.xtc_min_keep,
        }
        if not self.dry_multiplier:
            own = {name: value for name, value in own.items() if not name.startswith("dry_")}
        if not self.xtc_probability:
            own = {name: value for name, value in own.items() if not name.startswith("xtc_")}
        fields: dict[str, Any] = {
            "top_k": self.top_k,
            "min_p": self.min_p,
            "reasoning_effort": self.reasoning_effort,
            "return_prompt_text": self.return_prompt,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
        }
        if self.repeat_last_n is None or self.repeat_last_n == -1:
            fields["repetition_penalty"] = self.repeat_penalty
        elif self.repeat_penalty is not None:
            own |= {"repeat_penalty": self.repeat_penalty, "repeat_last_n": self.repeat_last_n}
        fields["vllm_xargs"] = {name: value for name, value in own.items() if value is not None} or None
        return {name: value for name, value in fields.items() if value is not None}
