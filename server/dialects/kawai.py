"""Kawai's dialect: OpenAI's chat with the defaults that Kawai documents for it.

The parameters themselves are honoured on every chat route; only here does leaving one out mean these values.
"""

from typing import Any

from fastapi import Request, Response

from server.dialects import openai
from server.schemas.openai import ChatCompletionsRequest
from server.variants import resolve

DEFAULTS: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "repeat_penalty": 1.1,
    "repeat_last_n": 64,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "include_usage": True,
}
"""Those of DRY and XTC that only count once these two are switched on are the samplers' own on every route."""


async def chat(request: Request, body: ChatCompletionsRequest) -> Response:
    """Answer `/kawai/v1/chat/completions` as OpenAI's dialect does."""
    missing = {name: value for name, value in DEFAULTS.items() if getattr(body, name) is None}
    if body.enable_thinking is None and body.reasoning_effort is None and not body.chat_template_kwargs:
        missing["enable_thinking"] = True
    # What is said by another name is said.
    if body.stream_options is not None:
        missing.pop("include_usage", None)
    if body.repetition_penalty is not None:
        missing.pop("repeat_penalty", None)
    if not resolve(request.app.state.registry, body.model).spec.extra_samplers and body.repeat_last_n is None:
        missing.pop("repeat_last_n")
    return await openai.chat(request, body.model_copy(update=missing))
