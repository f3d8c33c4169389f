"""The models this service serves, read from models.yaml. A model is an entry there; no code knows one.

Mistakes fail at start and name the line: unknown keys, wrong types, duplicate ids, two defaults of a type.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.core.errors import UnknownModel
from server.core.settings import BadSettings

ModelType = Literal["chat", "embedding"]
Modality = Literal["text", "image", "audio", "video"]
Dtype = Literal["auto", "float32", "bfloat16"]

FOREIGN: dict[ModelType, tuple[str, ...]] = {
    "chat": ("dimensions", "query_prompt", "pooling", "dtype"),
    "embedding": ("engine", "modalities"),
}
"""Fields that say nothing of a model of this type."""


SAFE_FORMATS = frozenset(
    {"safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "sharded_state", "mistral", "dummy"}
)
"""vLLM's formats of weights that are data; the others may be pickles, which are programs."""


class ModelSpec(BaseModel):
    """One entry of models.yaml.

    `source` is a hub id or a local folder (it starts with `/`, `./`, `../` or `~`). Of chat models alone,
    `engine` takes vLLM's own option names and `modalities` says what messages may hold. `dimensions`,
    `query_prompt` and `pooling` override what an embedding model's own files say; `dtype` is the number format it
    runs in, `auto` the faster one on the worker's machine. `stand_in_for` is written by `up` alone, into the smoke
    profile it makes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    name: str = Field(min_length=1)
    type: ModelType
    source: str = Field(min_length=1)
    revision: str | None = None
    context_length: int = Field(gt=0)
    description: str = ""
    default: bool = False
    enabled: bool = True
    engine: dict[str, Any] = {}
    modalities: tuple[Modality, ...] = ("text",)
    dimensions: int | None = Field(None, gt=0)
    query_prompt: str | None = None
    pooling: Literal["mean", "cls", "lasttoken", "max"] | None = None
    dtype: Dtype = "auto"
    stand_in_for: tuple[str, ...] = ()

    @field_validator("engine")
    @classmethod
    def _runs_no_code_of_the_weights(cls, engine: dict[str, Any]) -> dict[str, Any]:
        named = {name.replace("-", "_"): value for name, value in engine.items()}
        if named.get("trust_remote_code"):
            raise ValueError("trust_remote_code is not offered: it runs what comes with the weights")
        if str(named.get("load_format", "safetensors")) not in SAFE_FORMATS:
            raise ValueError(f"load_format must be one of {', '.join(sorted(SAFE_FORMATS))}: others may be pickles")
        return engine

    @property
    def extra_samplers(self) -> bool:
        """Whether the engine has the samplers of our own; it cannot together with speculative decoding, and
        `logits_processors: []` among its options leaves them out."""
        return self.engine.get("logits_processors") != [] and "speculative_config" not in self.engine

    @property
    def vector_space(self) -> str:
        """Names what this model's vectors can be compared with: those of the same weights, made alike.

        `dtype` is no part of it: bfloat16 turns a vector by a cosine of 0.999 at the least, less than any search tells.
        """
        made = f"{self.source}|{self.revision}|{self.pooling}|{self.dimensions}"
        return f"{self.id}:{hashlib.sha256(made.encode()).hexdigest()[:8]}"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    models: list[ModelSpec] = Field(min_length=1)


@dataclass(frozen=True)
class Registry:
    """The enabled models, in the file's order."""

    models: tuple[ModelSpec, ...]

    @cached_property
    def _by_id(self) -> dict[str, ModelSpec]:
        return {model.id: model for model in self.models}

    @cached_property
    def _stand_ins(self) -> dict[str, ModelSpec]:
        return {missing: model for model in self.models for missing in model.stand_in_for}

    def of_type(self, type_: ModelType) -> list[ModelSpec]:
        return [model for model in self.models if model.type == type_]

    def default(self, type_: ModelType) -> ModelSpec | None:
        """The type's default, or its first model, or None."""
        models = self.of_type(type_)
        return next((model for model in models if model.default), models[0] if models else None)

    def get(self, model_id: str) -> ModelSpec | None:
        """The model that answers for `model_id`. In the smoke profile that may be a stand-in, with an id of its own."""
        return self._by_id.get(model_id) or self._stand_ins.get(model_id)

    def resolve(self, model_id: str | None, type_: ModelType) -> ModelSpec:
        """The model that answers for `model_id` (None: the default's). Raises UnknownModel."""
        model = self.default(type_) if model_id is None else self.get(model_id)
        known = ", ".join(sorted(m.id for m in self.of_type(type_))) or "none"
        if model is None and model_id is None:
            raise UnknownModel(f"No {type_} model is served here.", param="model")
        if model is None:
            raise UnknownModel(f"Invalid model specified: {model_id!r} is not served. Known: {known}.", param="model")
        if model.type != type_:
            raise UnknownModel(
                f"Invalid model specified: {model_id!r} is for {model.type}, not for {type_}. Known: {known}.",
                param="model",
            )
        return model


def is_folder(source: str) -> bool:
    """Whether a `source` is a local folder rather than a hub's id."""
    return source.startswith(("/", "./", "../", "~"))


def _line_of(root: yaml.Node | None, path: tuple[int | str, ...]) -> int:
    """The line (from 1) of the node at `path`, or of the last node on the way there."""
    line = 1
    node = root
    for step in path:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(step):
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                break
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line


def line_of_option(path: Path, model_id: str, option: str) -> int:
    """The line of an entry's engine option, for who finds only later that it is wrong."""
    text = path.read_text(encoding="utf-8")
    entries = yaml.safe_load(text)["models"]
    index = next(i for i, entry in enumerate(entries) if entry["id"] == model_id)
    return _line_of(yaml.compose(text, Loader=yaml.SafeLoader), ("models", index, "engine", option))


def _check_unique(models: list[ModelSpec], path: Path, root: yaml.Node) -> None:
    seen: dict[str, int] = {}
    defaults: dict[str, int] = {}
    for index, model in enumerate(models):
        line = _line_of(root, ("models", index, "id"))
        if model.id in seen:
            raise BadSettings(f"{path}:{line}: id {model.id!r} is taken already by line {seen[model.id]}")
        seen[model.id] = line
        if model.default and model.enabled:
            line = _line_of(root, ("models", index, "default"))
            if model.type in defaults:
                raise BadSettings(
                    f"{path}:{line}: a second default of type {model.type!r}; the first is on line "
                    f"{defaults[model.type]}"
                )
            defaults[model.type] = line
        for name in FOREIGN[model.type]:
            if name in model.model_fields_set and getattr(model, name) not in (None, {}):
                line = _line_of(root, ("models", index, name))
                raise BadSettings(f"{path}:{line}: {name}: is not for {model.type} models, as {model.id!r} is")


def _anchored(model: ModelSpec, folder: Path) -> ModelSpec:
    """The model with its local folder's full path: relative ones start at models.yaml."""
    if not is_folder(model.source):
        return model
    source = (folder / Path(model.source).expanduser()).resolve()
    return model.model_copy(update={"source": str(source)})


def load_registry(path: Path) -> Registry:
    """Read models.yaml. Raises BadSettings as `FILE:LINE: what is wrong`."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as exc:
        raise BadSettings(f"{path}: cannot be read ({exc.strerror}). Name it with --models or MODELS_FILE.") from exc
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        raise BadSettings(f"{path}:{line}: not valid YAML: {exc.problem}") from exc
    except (ValueError, yaml.reader.ReaderError) as exc:
        raise BadSettings(f"{path}:1: not valid YAML: not text in UTF-8, or an impossible date") from exc
    try:
        models = _File.model_validate(content).models
    except pydantic.ValidationError as exc:
        # A mistyped key is missing as well; its own line says more.
        error = sorted(exc.errors(), key=lambda error: error["type"] != "extra_forbidden")[0]
        where = ".".join(str(step) for step in error["loc"])
        what = "unknown key" if error["type"] == "extra_forbidden" else re.sub(r"^Input s", "s", error["msg"])
        raise BadSettings(f"{path}:{_line_of(root, error['loc'])}: {where}: {what}") from exc
    assert root is not None
    _check_unique(models, path, root)
    anchored = []
    for index, model in enumerate(models):
        try:
            anchored.append(_anchored(model, path.parent))
        except RuntimeError as exc:
            line = _line_of(root, ("models", index, "source"))
            raise BadSettings(f"{path}:{line}: source: there is no such home folder") from exc
    return Registry(tuple(model for model in anchored if model.enabled))
