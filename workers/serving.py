"""vLLM's serving layer, one adapter an API: a body in the dialect's own shape in, its JSON out.

Templates, sampling, reasoning, tool parsers and the dialects' events are all vLLM's; what stands here is how
each API is called, heard and refused. Besides engine.py, grammars.py and the logits processors all that knows vLLM.
"""

import asyncio
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError

from server.core import tracing
from server.core.conversation import MEDIA
from server.core.errors import ContextExceeded, InvalidRequest, ServiceError, from_status
from server.core.messages import Api

logger = logging.getLogger(__name__)

Heard = Callable[[bytes], bool]
"""Takes the JSON of each answer or chunk; says whether it carries any choice."""

TEMPLATE_TOKENS = 1024
"""More than any chat template adds around the messages."""


class EngineDied(ServiceError):
    """The engine is gone: nothing this process does can succeed any more."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Of a stream, as a frame carries it; `only_counts` of the chunk that has tokens and no choice."""

    data: bytes
    only_counts: bool = False


class Serving(ABC):
    """One API of vLLM's. Both methods raise ServiceError, or EngineDied."""

    def __init__(self, client: Any, state: Any) -> None:
        self._client = client
        self._state = state

    async def complete(self, body: dict[str, Any], request_id: str, heard: Heard) -> bytes:
        """The JSON of a whole answer."""
        return self._whole(await self._start(body | {"stream": False}, request_id), heard)

    async def stream(self, body: dict[str, Any], request_id: str, heard: Heard) -> AsyncIterator[Piece]:
        """The pieces of an answer. Ending the iteration early stops the generation."""
        events = self._told(await self._start(body, request_id), request_id)
        try:
            async for piece in self._pieces(events, heard):
                yield piece
        finally:
            await events.aclose()

    async def halt(self, request_id: str) -> None:
        """End an answer where it is, as if it were whole, with its tokens counted; vLLM's finish_reason is "abort".

        Nothing where the engine does not have it yet, or no more.
        """
        # An answer to several prompts has an id for each, and each API a prefix of its own.
        mine = [id_ for id_ in self._client.output_processor.external_req_ids if request_id in id_]
        if mine:
            await self._client.abort(mine)

    async def _told(self, events: Any, request_id: str) -> AsyncGenerator[Any, None]:
        """vLLM's events. Most of its streams tell an error in one; those that raise it are heard here."""
        try:
            async for event in events:
                yield event
        except Exception as exc:
            raise self._error_of(exc, request_id) from exc
        finally:
            await events.aclose()

    @abstractmethod
    async def _ask(self, body: dict[str, Any], request_id: str) -> Any:
        """vLLM's answer: a response, an ErrorResponse, or a generator of events."""

    @abstractmethod
    def _whole(self, response: Any, heard: Heard) -> bytes: ...

    @abstractmethod
    def _pieces(self, events: Any, heard: Heard) -> AsyncGenerator[Piece, None]: ...

    async def _start(self, body: dict[str, Any], request_id: str) -> Any:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        try:
            response = await self._ask(body, request_id)
        except ValidationError as exc:
            first = exc.errors()[0]
            param = ".".join(str(step) for step in first["loc"])
            raise InvalidRequest(f"{param}: {first['msg']}" if param else first["msg"], param=param or None) from exc
        except InvalidRequest:
            raise
        except Exception as exc:
            raise self._error_of(exc, request_id) from exc
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError  # which vLLM turns into a response of its own
        if isinstance(response, ErrorResponse):
            raise _refusal(response.error.code, response.error.message, response.error.param)
        return response

    def _error_of(self, exc: Exception, request_id: str) -> ServiceError:
        """What vLLM raised, by its own table of which exception is whose fault. Raises EngineDied.

        What is not the caller's is logged here, and told without its text.
        """
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        self._check_alive()
        error = create_error_response(exc).error
        if error.code >= 500:
            logger.error("generation failed", exc_info=exc, extra={"action": "generate", "request_id": request_id})
        return _refusal(error.code, error.message, error.param)

    def _check_alive(self) -> None:
        if self._client.errored:
            raise EngineDied("The engine died.")

    def _json_of(self, event: str) -> str:
        """The JSON of a chat's or completion's event, empty for the last one. Raises what an error event says."""
        data = event.removeprefix("data: ").rstrip()
        if data.startswith('{"error"'):
            error = json.loads(data)["error"]
            self._check_alive()
            raise _refusal(int(error["code"]), error["message"], error.get("param"))
        return "" if data == "[DONE]" else data


def _from() -> Any:
    """The HTTP request that vLLM reads a trace from, to put its own span there; None where nothing is traced."""
    if not (traceparent := tracing.current().traceparent):
        return None
    from starlette.requests import Request

    return Request({"type": "http", "headers": [(b"traceparent", traceparent.encode())]})


def _refusal(code: int, message: str, param: str | None) -> ServiceError:
    """vLLM's error as ours: its words where the request is at fault, none of them where the engine is."""
    if code >= 500:
        return from_status(code, "The engine failed on this request.")
    if "maximum context length" in message:
        return ContextExceeded(_plain(message), param=param)
    return from_status(code, _plain(message), param)


def _plain(message: str) -> str:
    """Without the value that vLLM repeats at its end, which may be long."""
    return re.sub(r" \(parameter=\w+, value=.*\)$", "", message, flags=re.DOTALL)


COUNTED = {"include_usage": True}
"""Every stream ends with its tokens: history wants them, and whoever did not ask is not shown them."""


@cache
def _chat_request() -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    class Request(ChatCompletionRequest):  # type: ignore[misc]  # vLLM is Any to the type checker
        def resolve_reasoning_ended(self, *args: Any) -> Any:
            """Whether the thought is over before it begins; to vLLM it is where it is hidden, and a grammar would
            hold the thought already."""
            shown = self.model_copy(update={"include_reasoning": True})
            return ChatCompletionRequest.resolve_reasoning_ended(shown, *args)

    return Request


class Chat(Serving):
    async def _ask(self, body: dict[str, Any], request_id: str) -> Any:
        options = {"stream_options": COUNTED} if body["stream"] else {}
        return await self._generate(_chat_request()(**body, **options, request_id=request_id))

    async def _generate(self, request: Any) -> Any:
        await self._check_fits(request)
        return await self._state.openai_serving_chat.create_chat_completion(request, _from())

    async def _check_fits(self, request: Any) -> None:
        """Refuse a `max_tokens` that the prompt leaves no room for; vLLM would quietly give fewer tokens.

        A byte is at least a token's worth of text, so most requests are let through without a count.
        """
        limit: int = self._client.model_config.max_model_len
        wanted: int = request.max_completion_tokens or request.max_tokens or 0
        if not wanted or wanted > limit:
            return  # bounded, or refused, by vLLM itself
        text = request.model_dump_json(include={"messages", "tools"}).encode()
        plain = not any(f'"{kind}"'.encode() in text for kind in MEDIA)  # whose tokens their text does not tell
        if plain and len(text) + TEMPLATE_TOKENS + wanted <= limit:
            return  # sure to fit
        rendered = await self._state.openai_serving_chat.render_chat_request(request.model_copy(deep=True))
        if not isinstance(rendered, tuple):
            return  # a refusal, which the request itself meets as well
        prompt = len(rendered[1][0]["prompt_token_ids"])
        if prompt + wanted > limit:
            raise ContextExceeded(
                f"max_tokens: {wanted} tokens do not fit after a prompt of {prompt} in a context of {limit}. "
                f"Ask for at most {limit - prompt}.",
                param="max_tokens",
            )

    def _whole(self, response: Any, heard: Heard) -> bytes:
        data: bytes = response.model_dump_json(exclude_none=True).encode()
        heard(data)
        return data

    async def _pieces(self, events: Any, heard: Heard) -> AsyncGenerator[Piece, None]:
        async for event in events:
            if data := self._json_of(event).encode():
                yield Piece(data, only_counts=not heard(data))


class Completions(Chat):
    async def _ask(self, body: dict[str, Any], request_id: str) -> Any:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        options = {"stream_options": COUNTED} if body["stream"] else {}
        request = CompletionRequest(**body, **options, request_id=request_id)
        self._check_tokens(request.prompt)
        return await self._state.openai_serving_completion.create_completion(request, _from())

    def _check_tokens(self, prompt: Any) -> None:
        """Refuse ids that the model has room for and the tokenizer no token: vLLM breaks on the echo of such."""
        known = len(self._client.get_tokenizer())
        given = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        for index, one in enumerate(given):
            if not isinstance(one, str) and max(one) >= known:
                param = "prompt" if one is prompt else f"prompt.{index}"
                raise InvalidRequest(f"{param}: holds a token id that the model does not have.", param=param)


class Messages(Chat):
    """Anthropic's: a chat to the engine; vLLM converts the request there and the answer back."""

    async def _ask(self, body: dict[str, Any], request_id: str) -> Any:
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

        request = self._as_chat(AnthropicMessagesRequest(**body))
        request.request_id = request_id
        return await self._generate(request)

    def _as_chat(self, request: Any) -> Any:
        serving = self._state.anthropic_serving_messages
        return serving.to_chat_completion_request(request, merge_inline_system=serving._merge_inline_system)

    def _whole(self, response: Any, heard: Heard) -> bytes:
        super()._whole(response, heard)
        for call in response.choices[0].message.tool_calls or []:
            # A call that max_tokens cut short is no JSON, and the converter takes nothing else.
            if not _is_object(call.function.arguments):
                call.function.arguments = "{}"
        answer = self._state.anthropic_serving_messages.messages_full_converter(response)
        return bytes(answer.model_dump_json(exclude_none=True).encode())

    async def _pieces(self, events: Any, heard: Heard) -> AsyncGenerator[Piece, None]:
        failure: list[ServiceError] = []

        async def chunks() -> AsyncGenerator[str, None]:
            async for event in events:
                try:
                    data = self._json_of(event)
                except ServiceError as exc:
                    # Thrown through the converter it would become an event of its own.
                    failure.append(exc)
                    return
                if data:
                    heard(data.encode())
                yield event

        async for event in self._state.anthropic_serving_messages.message_stream_converter(chunks()):
            name, _, data = event.rstrip().partition("\n")
            name = name.removeprefix("event: ")
            if name == "error":
                raise _refusal(500, "", None)
            yield Piece(f"{name}\n{data.removeprefix('data: ')}".encode())
        if failure:
            raise failure[0]


class CountTokens(Messages):
    async def _ask(self, body: dict[str, Any], request_id: str) -> Any:
        from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest

        fields = {name: value for name, value in body.items() if name != "stream"}
        return await self._state.anthropic_serving_messages.count_tokens(AnthropicCountTokensRequest(**fields), None)

    def _whole(self, response: Any, _heard: Heard) -> bytes:
        return bytes(response.model_dump_json(include={"input_tokens"}).encode())


class Responses(Serving):
    async def _ask(self, body: dict[str, Any], request_id: str) -> Any:
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        request = ResponsesRequest(**body, request_id=f"resp_{request_id}")
        return await self._state.openai_serving_responses.create_responses(request, _from())

    def _whole(self, response: Any, heard: Heard) -> bytes:
        data: bytes = response.model_dump_json(by_alias=True).encode()
        heard(data)
        return data

    async def _pieces(self, events: Any, heard: Heard) -> AsyncGenerator[Piece, None]:
        opening: list[Piece] = []
        async for event in events:
            if event.type in ("response.completed", "response.incomplete"):
                heard(event.response.model_dump_json(by_alias=True).encode())
            elif event.type == "error":
                self._check_alive()
                raise _refusal(500, "", None)
            piece = Piece(f"{event.type}\n{event.model_dump_json(by_alias=True)}".encode())
            if event.type in ("response.created", "response.in_progress"):
                # vLLM says these before it has looked at the request: what it refuses must not begin a stream.
                opening.append(piece)
                continue
            for each in [*opening, piece]:
                yield each
            opening.clear()


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def servings(client: Any, state: Any) -> dict[Api, Serving]:
    """An adapter for each API of a chat model."""
    return {
        "chat": Chat(client, state),
        "completions": Completions(client, state),
        "responses": Responses(client, state),
        "messages": Messages(client, state),
        "count_tokens": CountTokens(client, state),
    }
