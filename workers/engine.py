"""Starting vLLM with the options of a model's entry. How it is asked stands in serving.py.

Knows nothing of queues, keys or history.
"""

import contextlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from server.core.registry import ModelSpec
from server.core.settings import BadSettings, Settings
from workers.grammars import bound_whitespace
from workers.serving import servings

DEFAULTS: dict[str, Any] = {
    # One backend, named: vLLM keeps the first that a request needs, and "auto" may then hand it another's grammar.
    # White space only where JSON must have it: small models loop in it until max_tokens otherwise.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    # Pickled weights are programs. The registry lets no entry name a format that would read them.
    "load_format": "safetensors",
    # With tool_choice "none" the model is not shown the tools; shown them, it may call one all the same, as text.
    "exclude_tools_when_tool_choice_none": True,
}
"""Everywhere. What models.yaml says wins, here as below."""

CPU_DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 2 * 1024**3,
}
"""Where there is no GPU. Compiling costs minutes of start on few cores; vLLM would size the KV cache by a
share of all memory."""


FEW_CORES = {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"}
"""Where the engine's processes share a core: schedule and compute in one process. In two, vLLM's default on a CPU, they
hand each step over in shared memory and spin while they wait, on the cores that others need. Named by its path, because
vLLM turns the short name into the default there."""

SAMPLERS = ["workers.samplers:ExtraSamplers", "workers.thoughts:ThoughtBounds"]
"""Logits processors that requests can switch on."""


class ChatEngine:
    """A running engine. `serving` answers, an API each; `max_num_seqs` is how many requests it batches at the most."""

    def __init__(self, client: Any, state: Any) -> None:
        self._client = client
        self.serving = servings(client, state)
        self.max_num_seqs: int = client.vllm_config.scheduler_config.max_num_seqs

    @property
    def alive(self) -> bool:
        return not self._client.errored

    async def ask(self) -> None:
        """Something that only the engine's own process can answer, between two of its steps."""
        from vllm.v1.engine.exceptions import EngineDeadError

        with contextlib.suppress(EngineDeadError):  # which `alive` tells
            await self._client.is_paused()


def _has_gpu() -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


class UnknownOption(BadSettings):
    """An entry's `engine:` names `option`, which this vLLM does not have."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


def engine_options(
    spec: ModelSpec, media_domains: list[str], *, few_cores: bool = False, traces_endpoint: str = ""
) -> dict[str, Any]:
    """vLLM's options, by name, for a model that may fetch media from these hosts."""
    options = {
        **DEFAULTS,
        **({"logits_processors": SAMPLERS} if spec.extra_samplers else {}),
        **({} if _has_gpu() else CPU_DEFAULTS),
        **(FEW_CORES if few_cores else {}),
        **({"otlp_traces_endpoint": traces_endpoint} if traces_endpoint else {}),
        **spec.engine,
        "model": spec.source,
        "served_model_name": spec.id,
        "max_model_len": spec.context_length,
        # An empty list would let it fetch from anywhere.
        "allowed_media_domains": media_domains or ["none.invalid"],
    }
    if spec.revision is not None:
        options["revision"] = spec.revision
    return options


def engine_argv(options: dict[str, Any]) -> list[str]:
    """Options as vLLM's command line has them."""
    argv: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            argv += [flag, *value] if value else []
        else:
            argv += [flag, value if isinstance(value, str) else json.dumps(value)]
    return argv


def engine_arguments(spec: ModelSpec, options: dict[str, Any]) -> Any:
    """vLLM's parsed arguments for a model, of its `engine_options`. Raises UnknownOption."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    known = vars(parser.parse_args([]))
    for name in options:
        if name not in known:
            raise UnknownOption(name, f"model {spec.id!r}: engine: {name!r} is not an option of this vLLM")
    args = parser.parse_args(engine_argv(options))
    validate_parsed_serve_args(args)
    return args


@asynccontextmanager
async def start_engine(spec: ModelSpec, settings: Settings) -> AsyncIterator[ChatEngine]:
    """Load the model and serve it until the context ends. Takes a minute or two."""
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(Path(__file__).parent / "vllm_logging.json"))
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # what else a model brings is data, or is refused
    # Self-hosted: nothing about the requests or the machine leaves it.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A host that is allowed may not send the engine on to one that is not.
    os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"

    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

    if spec.extra_samplers:
        # vLLM 0.32 has two model runners; the newer one, which GPUs get, takes logits processors of another kind.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if settings.front:
        # vLLM says so to a computing process of its own only.
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0) - settings.front) or 1))
    bound_whitespace()
    if settings.traces_endpoint:
        # vLLM looks for nothing else, and takes gRPC without it.
        os.environ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = settings.traces_protocol
    options = engine_options(
        spec, settings.media_domains, few_cores=bool(settings.front), traces_endpoint=settings.traces_endpoint
    )
    args = engine_arguments(spec, options)
    async with build_async_engine_client(args) as client:
        state = State()
        await init_app_state(client, state, args, await client.get_supported_tasks())
        yield ChatEngine(client, state)
