"""vLLM, as one object. The only module that knows it, so that an upgrade is one file's work.

Owns the engine and its serving layer (templates, sampling, reasoning and tool parsers are all vLLM's);
knows nothing of queues, keys or history.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.core.errors import InvalidRequest, ServiceError, from_status
from server.core.registry import ModelSpec
from server.core.settings import BadSettings

logger = logging.getLogger(__name__)

CPU_DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 2 * 1024**3,
}
"""Where there is no GPU. Compiling costs minutes of start on few cores; vLLM would size the KV cache by a
share of all memory. What models.yaml says wins."""


TEMPLATE_TOKENS = 1024
"""More than any chat template adds around the messages."""


class EngineDied(ServiceError):
    """The engine is gone: nothing this process does can succeed any more."""


class ChatEngine:
    """A running engine. `max_num_seqs` is how many requests it batches at the most."""

    def __init__(self, client: Any, state: Any) -> None:
        self._client = client
        self._state = state
        self.max_num_seqs: int = client.vllm_config.scheduler_config.max_num_seqs

    async def complete(self, body: dict[str, Any], request_id: str) -> bytes:
        """The JSON of a whole chat completion. Raises ServiceError, or EngineDied."""
        response = await self._start(body | {"stream": False}, request_id)
        return bytes(response.model_dump_json(exclude_none=True).encode())

    async def stream(self, body: dict[str, Any], request_id: str) -> AsyncIterator[bytes]:
        """The JSON of each chunk; the last one has no choices and counts the tokens.

        Ending the iteration early stops the generation. Raises as `complete` does.
        """
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = await self._start(body | options, request_id)
        try:
            async for event in events:
                data = event[len("data: ") :].rstrip()
                if data.startswith('{"error"'):
                    error = json.loads(data)["error"]
                    self._check_alive()
                    raise _refusal(int(error["code"]), error["message"], error.get("param"))
                if data != "[DONE]":
                    yield data.encode()
        finally:
            await events.aclose()

    async def _start(self, body: dict[str, Any], request_id: str) -> Any:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        try:
            request = ChatCompletionRequest(**body, request_id=request_id)
            await self._check_fits(request, body)
            response = await self._state.openai_serving_chat.create_chat_completion(request, None)
        except ValidationError as exc:
            first = exc.errors()[0]
            param = ".".join(str(step) for step in first["loc"])
            raise InvalidRequest(f"{param}: {first['msg']}", param=param) from exc
        except InvalidRequest:
            raise
        except Exception as exc:
            # vLLM's own table of which exception is whose fault. What is not the caller's is logged
            # here and told without its text.
            self._check_alive()
            response = create_error_response(exc)
            if response.error.code >= 500:
                logger.exception("generation failed", extra={"action": "generate", "request_id": request_id})
                raise _refusal(response.error.code, "", None) from exc
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError  # which vLLM turns into a response of its own
        if isinstance(response, ErrorResponse):
            raise _refusal(response.error.code, response.error.message, response.error.param)
        return response

    async def _check_fits(self, request: Any, body: dict[str, Any]) -> None:
        """Refuse a `max_tokens` that the prompt leaves no room for; vLLM would quietly give fewer tokens.

        A byte is at least a token's worth of text, so most requests are let through without a count.
        """
        limit: int = self._client.model_config.max_model_len
        wanted: int = request.max_tokens or 0
        most = len(json.dumps([body["messages"], body.get("tools")])) + TEMPLATE_TOKENS
        if wanted > limit or most + wanted <= limit:
            return  # refused by vLLM itself, or sure to fit
        rendered = await self._state.openai_serving_chat.render_chat_request(request.model_copy(deep=True))
        if not isinstance(rendered, tuple):
            return  # a refusal, which the request itself meets as well
        prompt = len(rendered[1][0]["prompt_token_ids"])
        if prompt + wanted > limit:
            raise InvalidRequest(
                f"max_tokens: {wanted} tokens do not fit after a prompt of {prompt} in a context of {limit}. "
                f"Ask for at most {limit - prompt}.",
                param="max_tokens",
            )

    @property
    def alive(self) -> bool:
        return not self._client.errored

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineDied("The engine died.")


def _refusal(code: int, message: str, param: str | None) -> ServiceError:
    """vLLM's error as ours: its words where the request is at fault, none of them where the engine is."""
    if code >= 500:
        return from_status(code, "The engine failed on this request.")
    return from_status(code, re.sub(r" \(parameter=\w+, value=.*\)$", "", message), param)


def _has_gpu() -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


class UnknownOption(BadSettings):
    """An entry's `engine:` names `option`, which this vLLM does not have."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


def engine_arguments(spec: ModelSpec) -> Any:
    """vLLM's parsed arguments for a model. Raises UnknownOption."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    options = {
        **({} if _has_gpu() else CPU_DEFAULTS),
        **spec.engine,
        "model": spec.source,
        "served_model_name": spec.id,
        "max_model_len": spec.context_length,
    }
    if spec.revision is not None:
        options["revision"] = spec.revision
    known = vars(parser.parse_args([]))
    argv: list[str] = []
    for name, value in options.items():
        if name not in known:
            raise UnknownOption(name, f"model {spec.id!r}: engine: {name!r} is not an option of this vLLM")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            argv += [flag, value if isinstance(value, str) else json.dumps(value)]
    args = parser.parse_args(argv)
    validate_parsed_serve_args(args)
    return args


@asynccontextmanager
async def start_engine(spec: ModelSpec) -> AsyncIterator[ChatEngine]:
    """Load the model and serve it until the context ends. Takes a minute or two."""
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(Path(__file__).parent / "vllm_logging.json"))
    # Self-hosted: nothing about the requests or the machine leaves it.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

    args = engine_arguments(spec)
    async with build_async_engine_client(args) as client:
        state = State()
        await init_app_state(client, state, args, await client.get_supported_tasks())
        yield ChatEngine(client, state)
