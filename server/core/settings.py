"""The service's settings: command line over environment over these defaults.

Built once in `__main__` and passed down; nothing else reads the environment. The README's table of
settings is held against this class by a test.
"""

from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.core.errors import ServiceError

SECRETS = frozenset({"api_key", "database_url", "amqp_url"})
"""Never shown, not even where they are wrong."""


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
    amqp_url: str = Field("", description="RabbitMQ; unset: a private one in `DATA_DIR`")
    api_key: str = Field(
        "", description="Keys, comma-separated, the first is the admin's; unset: one is made and shown once"
    )
    rate_limit_per_minute: int = Field(50, ge=0, description="Requests a key may make each minute; 0: no limit")
    max_body_bytes: int = Field(
        4 * 2**20, ge=1024, le=8 * 2**20, description="Largest request body, 8388608 at the most; past it 413"
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
    queue_max_jobs: int = Field(512, ge=1, description="Jobs that may wait for a model; past it 429")
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
    drain_timeout_s: float = Field(
        30, ge=0, allow_inf_nan=False, description="What running requests get to finish on SIGTERM"
    )
    front_cores: str = Field(
        "",
        pattern=r"^(\d+(,\d+)*)?$",
        description="Cores, comma-separated, that a chat worker keeps to, leaving its engine the others; set by `up`",
    )
    log_level: str = Field("INFO", pattern="(?i)^(debug|info|warning|error)$", description="Least severe log line")

    @field_validator("api_key")
    @classmethod
    def _printable(cls, value: str) -> str:
        for key in filter(None, value.split(",")):
            if not key.strip().isascii() or not key.strip().isprintable() or " " in key.strip():
                raise ValueError("a key is printable ASCII without spaces")
        return value

    @property
    def media_domains(self) -> list[str]:
        return [host.strip().lower() for host in self.allowed_media_domains.split(",") if host.strip()]

    @property
    def front(self) -> set[int]:
        """`front_cores` as numbers."""
        return {int(core) for core in self.front_cores.split(",") if core}

    @property
    def api_keys(self) -> list[str]:
        return [key.strip() for key in self.api_key.split(",") if key.strip()]


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, with what was `given` on the command line (None: not given).

    Raises BadSettings naming each wrong variable.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except pydantic.ValidationError as exc:
        wrong = []
        for error in exc.errors():
            name = str(error["loc"][0])
            got = "" if name in SECRETS else f" (got {error['input']!r})"
            wrong.append(f"{name.upper()}: {error['msg']}{got}")
        raise BadSettings("Wrong settings: " + "; ".join(wrong)) from None
