"""The service's settings: command line over environment over these defaults.

Built once in `__main__` and passed down; nothing else reads the environment. The README's table of
settings is held against this class by a test.
"""

import re
from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.core.errors import ServiceError

SECRETS = frozenset({"api_key", "database_url", "amqp_url"})
"""Never shown, not even where they are wrong. Each may come from the file that `<name>_file` names instead."""

MAX_SECRET_BYTES = 64 * 1024

ORIGIN = re.compile(r"\*|https?://[a-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?")
"""As browsers send it: no path, no closing slash."""

PROTOCOL = "^(http/protobuf|grpc)$"
"""Of OTLP's, those that OpenTelemetry's Python packages speak."""


class BadSettings(ServiceError):
    """A setting, or models.yaml, is wrong. The message is for the person who starts the service."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(extra="ignore", env_ignore_empty=True)

    models_file: Path = Field(Path("models.yaml"), description="The models to serve")
    host: str = Field(
        "127.0.0.1", description="Address to listen on, workers' probes included; `0.0.0.0` for every interface"
    )
    port: int = Field(8000, ge=1, le=65535, description="Port of the API")
    server_workers: int = Field(1, ge=1, le=256, description="Processes of the API; they share the port and the limits")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of a worker's `/metrics` and `/health`; 0 takes a free one"
    )
    data_dir: Path = Field(Path(".data"), description="Database, broker, logs and made models of `./run`")
    database_url: str = Field("", description="Postgres with pgvector; unset: a private one in `DATA_DIR`")
    database_url_file: str = Field("", description="A file that holds `DATABASE_URL`, as containers mount secrets")
    amqp_url: str = Field("", description="RabbitMQ; unset: a private one in `DATA_DIR`")
    amqp_url_file: str = Field("", description="A file that holds `AMQP_URL`")
    api_key: str = Field(
        "", description="Keys, comma-separated, the first is the admin's; unset: one is made and shown once"
    )
    api_key_file: str = Field("", description="A file that holds `API_KEY`; its keys may stand on lines of their own")
    rate_limit_per_minute: int = Field(50, ge=0, description="Requests a key may make each minute; 0: no limit")
    max_body_bytes: int = Field(
        4 * 2**20, ge=1024, le=8 * 2**20, description="Largest request body, 8388608 at the most; past it 413"
    )
    max_connections: int = Field(
        1024,
        ge=8,
        description="Connections one process of the API keeps; one more ends the longest idle, else gets 503",
    )
    receive_timeout_s: float = Field(
        60, gt=0, allow_inf_nan=False, description="What a request's head, and its body, get to arrive in; past it 408"
    )
    stalled_reader_s: float = Field(
        30,
        gt=0,
        allow_inf_nan=False,
        description="How long a client may take nothing of its answer; then it is cut off",
    )
    stream_buffer_bytes: int = Field(
        1024 * 1024, ge=1024, description="What of a stream is kept for a client that does not read; past it, it ends"
    )
    cors_allowed_origins: str = Field(
        "", description="Origins, comma-separated, whose pages may call the API from a browser; `*`: any; unset: none"
    )
    allowed_media_domains: str = Field(
        "", description="Hosts, comma-separated, that images, audio and video may be fetched from; unset: none"
    )
    simple_model_map: bool = Field(
        False, description="`true`: `/v1/models` lists no `-thinking` and `-search` variants; they work all the same"
    )
    search_threshold: float = Field(
        0.5, ge=0, le=1, description="How similar a past chat must be for `-search` to use it"
    )
    search_max_tokens: int = Field(
        1024, ge=1, description="Most tokens that `-search` puts before a question; never over a quarter of the context"
    )
    queue_max_jobs: int = Field(
        512,
        ge=1,
        description="Jobs that may wait for a model at a server process, of one key at the most half of them; "
        "past it 429",
    )
    request_timeout_s: float = Field(
        300, gt=0, allow_inf_nan=False, description="Longest a request may take, its wait included"
    )
    resume_grace_s: float = Field(
        60,
        ge=0,
        allow_inf_nan=False,
        description="How long a request with an `Idempotency-Key` goes on after its client left",
    )
    idempotency_ttl_s: float = Field(
        86400, gt=0, allow_inf_nan=False, description="How long its answer is kept for the same key"
    )
    start_on_demand: str = Field(
        "",
        description="Models, comma-separated, that may have no worker for a while, scaled to zero: requests for them "
        "wait for one instead of a 503",
    )
    drain_timeout_s: float = Field(
        30, ge=0, allow_inf_nan=False, description="What running requests get to finish on SIGTERM"
    )
    front_cores: str = Field(
        "",
        pattern=r"^(\d+(,\d+)*)?$",
        description="Cores, comma-separated, that a chat worker keeps to, leaving its engine the others; set by `up`",
    )
    otel_exporter_otlp_endpoint: str = Field(
        "", description="Where traces go by OTLP, such as `http://collector:4318`; unset: none are made"
    )
    otel_exporter_otlp_traces_endpoint: str = Field(
        "", description="The same for traces alone, with the path, such as `http://collector:4318/v1/traces`; it wins"
    )
    otel_exporter_otlp_protocol: str = Field(
        "http/protobuf", pattern=PROTOCOL, description="How they go there: `http/protobuf`, or `grpc`"
    )
    otel_exporter_otlp_traces_protocol: str = Field(
        "", pattern=f"^$|{PROTOCOL}", description="The same for traces alone; it wins"
    )
    otel_traces_exporter: str = Field("otlp", pattern="^(otlp|none)$", description="`none`: no traces are made")
    otel_sdk_disabled: bool = Field(False, description="`true`: the same")
    log_level: str = Field("INFO", pattern="(?i)^(debug|info|warning|error)$", description="Least severe log line")

    @model_validator(mode="before")
    @classmethod
    def _from_files(cls, given: Any) -> Any:
        for name in SECRETS:
            if path := given.get(f"{name}_file"):
                if given.get(name):
                    raise ValueError(f"{name.upper()} and {name.upper()}_FILE are both set; one is enough")
                given = given | {name: _secret(name, Path(path))}
        return given

    @field_validator("cors_allowed_origins")
    @classmethod
    def _as_browsers_say(cls, value: str) -> str:
        for origin in _listed(value):
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin, such as https://chat.example.com")
        return value

    @field_validator("api_key")
    @classmethod
    def _printable(cls, value: str) -> str:
        for key in filter(None, value.split(",")):
            if not key.strip().isascii() or not key.strip().isprintable() or " " in key.strip():
                raise ValueError("a key is printable ASCII without spaces")
        return value

    @property
    def cors_origins(self) -> list[str]:
        return _listed(self.cors_allowed_origins)

    @property
    def media_domains(self) -> list[str]:
        return _listed(self.allowed_media_domains.lower())

    @property
    def on_demand(self) -> frozenset[str]:
        """`start_on_demand` as ids."""
        return frozenset(_listed(self.start_on_demand))

    @property
    def traces_endpoint(self) -> str:
        """Where traces go, with the path that HTTP has there; empty where none are made."""
        if self.otel_sdk_disabled or self.otel_traces_exporter == "none":
            return ""
        base = self.otel_exporter_otlp_endpoint
        path = "" if self.traces_protocol == "grpc" or not base else "/v1/traces"
        return self.otel_exporter_otlp_traces_endpoint or base.rstrip("/") + path

    @property
    def traces_protocol(self) -> str:
        return self.otel_exporter_otlp_traces_protocol or self.otel_exporter_otlp_protocol

    @property
    def front(self) -> set[int]:
        """`front_cores` as numbers."""
        return {int(core) for core in self.front_cores.split(",") if core}

    @property
    def api_keys(self) -> list[str]:
        return _listed(self.api_key)


def _listed(text: str) -> list[str]:
    """What commas separate; empty parts and the spaces around each are none of it."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _secret(name: str, path: Path) -> str:
    """A secret's file. Raises ValueError, which shows nothing of what is in it."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
        text = content.decode().strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ValueError(f"{name.upper()}_FILE: {path} cannot be read as text") from exc
    if not text or len(content) > MAX_SECRET_BYTES:
        raise ValueError(f"{name.upper()}_FILE: {path} is empty, or larger than {MAX_SECRET_BYTES} bytes")
    return ",".join(text.split()) if name == "api_key" else text


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, with what was `given` on the command line (None: not given).

    Raises BadSettings naming each wrong variable.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except pydantic.ValidationError as exc:
        wrong = []
        for error in exc.errors():
            if not error["loc"]:
                wrong.append(error["msg"].removeprefix("Value error, "))
                continue
            name = str(error["loc"][0])
            got = "" if name in SECRETS else f" (got {error['input']!r})"
            wrong.append(f"{name.upper()}: {error['msg']}{got}")
        raise BadSettings("Wrong settings: " + "; ".join(wrong)) from None
