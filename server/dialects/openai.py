"""OpenAI's dialect: `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` and `/v1/models`.

The worker's engine speaks it by itself. What is done here: bounds, the names other dialects' clients use, and
what the engine does not know (sources, both names of reasoning, more counts).
"""

import base64
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
from fastapi import Request, Response
from numpy.typing import NDArray

from server import limits
from server.core.conversation import last_question
from server.core.errors import InvalidRequest, ServiceError
from server.core.registry import ModelSpec, Registry
from server.dialects.relay import Question, Turn, ask, ignored_of, json_response, must_answer, notes
from server.dialects.vectors import embed
from server.errors import error_body
from server.media import check_media
from server.schemas.openai import ChatCompletionsRequest, CompletionsRequest, EmbeddingsRequest, Generation
from server.sse import DONE, SseResponse, event
from server.variants import Variant, names, resolve


def question_of(request: Request, body: ChatCompletionsRequest) -> Question:
    """A chat as the engine is to get it. Raises InvalidRequest."""
    state = request.app.state
    variant = resolve(state.registry, body.model)
    ignored = _ignored(body)
    _check(body)
    messages = [message.for_engine() for message in body.messages]
    check_media(messages, "messages", variant.spec, state.settings.media_domains)
    fields: dict[str, Any] = {
        "model": variant.spec.id,
        "messages": messages,
        **body.shared_fields(),
        **body.for_engine(),
        **_thinking(body, variant),
    }
    if body.repetition_penalty is not None:
        fields["repetition_penalty"] = body.repetition_penalty
    for name in ("max_completion_tokens", "max_tokens", "parallel_tool_calls", "include_reasoning"):
        if (value := getattr(body, name)) is not None:
            fields[name] = value
    if body.tools:
        fields["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
        if body.tool_choice not in (None, "none", "auto"):
            # The engine holds arguments to their schema only for strict tools; a forced call must be right too.
            for tool in fields["tools"]:
                tool["function"]["strict"] = True
        if body.tool_choice is not None:
            choice = body.tool_choice
            fields["tool_choice"] = choice if isinstance(choice, str) else choice.model_dump()
    return Question(variant, "chat", fields, text=last_question(messages), ignored=ignored)


def _ignored(body: Generation | EmbeddingsRequest) -> tuple[str, ...]:
    """The names of fields that nobody reads. Raises InvalidRequest for those that are refused."""
    limits.refuse(body.model_extra or {})
    return ignored_of(body)


def _check(body: ChatCompletionsRequest) -> None:
    limits.check_template_kwargs(body.chat_template_kwargs or {})
    for index, tool in enumerate(body.tools or []):
        if tool.function.parameters is not None:
            limits.check_schema(tool.function.parameters, f"tools.{index}.function.parameters")
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        raise InvalidRequest("tool_choice: there are no tools to choose from.", param="tool_choice")
    if not isinstance(body.tool_choice, str | None):
        chosen = body.tool_choice.function.name
        if chosen not in [tool.function.name for tool in body.tools or []]:
            raise InvalidRequest(f"tool_choice.function.name: {chosen!r} is none of the tools.", param="tool_choice")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true.", param="top_logprobs")
    check_shared(body)


def check_shared(body: Generation) -> None:
    """What the types alone do not say. Raises InvalidRequest."""
    if body.logit_bias is not None:
        limits.check_logit_bias(body.logit_bias)
    if (body.n or 1) > 1 and body.temperature == 0:
        raise InvalidRequest(f"n: {body.n} answers at a temperature of 0 would all be the same.", param="n")
    most = getattr(body, "max_completion_tokens", None) or getattr(body, "max_tokens", None)
    if most is not None and (body.min_tokens or 0) > most:
        raise InvalidRequest(f"min_tokens: {body.min_tokens} are more than max_tokens, {most}.", param="min_tokens")
    schema_format = body.response_format
    if schema_format is not None and schema_format.type == "json_schema":
        limits.check_schema(schema_format.json_schema.json_schema, "response_format.json_schema.schema")


def _thinking(body: ChatCompletionsRequest, variant: Variant) -> dict[str, Any]:
    """The switch, wherever it was set; unset, the model's template decides. A field wins over the model's name."""
    switch = body.enable_thinking
    if switch is None:
        switch = (body.chat_template_kwargs or {}).get("enable_thinking")
    if switch is None and body.reasoning_effort is None and variant.thinking:
        switch = True
    fields: dict[str, Any] = {}
    if switch is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": switch}
    bounds = {}
    budget = body.thinking_budget if body.thinking_budget is not None else body.thinking_token_budget
    if budget is not None:
        bounds["thinking_budget"] = budget
    if switch is not False and _promises(body):
        bounds |= must_answer(variant.spec, body.max_completion_tokens or body.max_tokens)
    if bounds:
        fields["vllm_xargs"] = (body.for_engine().get("vllm_xargs") or {}) | bounds
    return fields


def _promises(body: ChatCompletionsRequest) -> bool:
    """Whether a call or an answer of some form is promised."""
    forced = body.tool_choice not in (None, "none", "auto")
    return forced or (body.response_format is not None and body.response_format.type != "text")


def wants_usage(body: Generation) -> bool:
    """Whether a stream is to end with its counts."""
    asked = body.stream_options is not None and body.stream_options.include_usage
    return asked or bool(getattr(body, "include_usage", None))


async def chat(request: Request, body: ChatCompletionsRequest) -> Response:
    """Answer `/v1/chat/completions`. Raises ServiceError; once a stream has begun, errors are events in it."""
    turn = await ask(request, question_of(request, body))
    if body.stream:
        return SseResponse(turn.from_queue(_stream(turn, wants_usage(body))), turn.headers, turn.close)
    turn.close()
    return json_response(completion(turn), turn.headers)


def completion(turn: Turn) -> dict[str, Any]:
    """A whole chat completion."""
    result = turn.whole()
    for choice in result["choices"]:
        message = choice["message"]
        message.setdefault("content", None)
        _name_twice(message)
    if "prompt_text" in result:
        result["prompt"] = result.pop("prompt_text")
    if turn.sources:
        result["sources"] = turn.sources
    return result


def _name_twice(message: dict[str, Any]) -> None:
    """Thoughts under both names that clients know."""
    if message.get("reasoning") is not None:
        message["reasoning_content"] = message["reasoning"]


async def _stream(turn: Turn, wants_usage: bool) -> AsyncGenerator[bytes, None]:
    try:
        async for frame in turn.frames():
            if frame.kind == "usage":
                if wants_usage:
                    yield event(turn.counted(frame))
            elif frame is turn.first:
                yield event(orjson.dumps(turn.opening()))
            elif b'"reasoning":' in frame.data:
                chunk = orjson.loads(frame.data)
                for choice in chunk["choices"]:
                    _name_twice(choice["delta"])
                yield event(orjson.dumps(chunk))
            else:
                yield event(frame.data)
        yield DONE
    except ServiceError as exc:
        yield event(orjson.dumps(error_body(exc, "openai")))


async def completions(request: Request, body: CompletionsRequest) -> Response:
    """Answer `/v1/completions`. Raises ServiceError; once a stream has begun, errors are events in it."""
    variant = resolve(request.app.state.registry, body.model)
    if variant.thinking or variant.search:
        raise InvalidRequest("model: plain completions have no -thinking and no -search.", param="model")
    ignored = _ignored(body)
    check_shared(body)
    if body.response_format is not None and body.response_format.type != "text":
        # The engine would wait for the end of a thought before it holds the text to anything.
        raise InvalidRequest("response_format: only chats have it: see /v1/chat/completions.", param="response_format")
    prompts = len(body.prompt) if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else 1
    if prompts * (body.n or 1) > limits.MAX_PROMPTS:
        told = f"prompt: {prompts} prompts with n of {body.n} are more than {limits.MAX_PROMPTS} answers."
        raise InvalidRequest(told, param="prompt")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("logprobs: not with echo, which would need those of the prompt.", param="logprobs")
    fields = {"model": variant.spec.id, "prompt": body.prompt, **body.shared_fields()}
    for name in ("max_tokens", "echo", "logprobs", "top_k", "min_p"):
        if (value := getattr(body, name)) is not None:
            fields[name] = value
    turn = await ask(request, Question(variant, "completions", fields, ignored=ignored))
    if body.stream:
        return SseResponse(turn.from_queue(_stream(turn, wants_usage(body))), turn.headers, turn.close)
    turn.close()
    return json_response(turn.whole(), turn.headers)


async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    """Answer `/v1/embeddings`. Raises ServiceError."""
    spec = request.app.state.registry.resolve(body.model, "embedding")
    ignored = _ignored(body)
    vectors, tokens = await embed(request, spec, body.texts, input_type=body.input_type or "document")
    if body.dimensions is not None:
        vectors = _cut(vectors, body.dimensions, spec)
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if as_text else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    content = {"object": "list", "data": data, "model": spec.id, "usage": usage}
    return json_response(content, notes(body.model, spec, ignored))


def _cut(vectors: NDArray[np.float32], dimensions: int, spec: ModelSpec) -> NDArray[np.float32]:
    """The first `dimensions` of each vector, L2-normalised again: float32 (n_texts, dimensions)."""
    if dimensions > vectors.shape[1]:
        raise InvalidRequest(
            f"dimensions: {spec.id} has {vectors.shape[1]}, so {dimensions} are too many.", param="dimensions"
        )
    cut = vectors[:, :dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.ascontiguousarray(cut / np.where(lengths > 0, lengths, 1))


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode()


def models(registry: Registry, created: int, *, variants: bool) -> dict[str, Any]:
    """The list of models: OpenAI's envelope and Anthropic's in one, as each ignores the other's fields.

    `created`, in Unix seconds, is when this server began to serve them.
    """
    searchable = registry.default("embedding") is not None
    data = [
        _model(spec, name, created)
        for spec in registry.models
        for name in names(spec, variants=variants)
        if searchable or name == spec.id or not name.endswith("-search")
    ]
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, "has_more": False, **ids}


def find_model(registry: Registry, created: int, name: str) -> dict[str, Any]:
    """One model, by any name it answers to. Raises UnknownModel."""
    spec = registry.get(name)
    return _model(spec or resolve(registry, name).spec, name, created)


def _model(spec: ModelSpec, name: str, created: int) -> dict[str, Any]:
    """One model of the list, by one of its names."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "qwen3-inference-service",
        "name": name,
        "upstream_id": spec.id,
        "display_name": spec.name,
        "type": "model",
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
        "max_model_len": spec.context_length,
    }
