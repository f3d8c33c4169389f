"""Wire types about the service itself: errors, models, health."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field


class ErrorBody(BaseModel):
    error: str
    status_code: int
    timestamp: datetime


class ModelEntry(BaseModel):
    id: str
    name: str
    type: Literal["chat", "embedding"]
    context_length: int
    description: str
    stand_in_for: list[str] | None = Field(None, description="Models whose weights are missing, answered by this one")


class WorkerHealth(BaseModel):
    worker: str
    metrics_port: int
    type: Literal["chat", "embedding", "archive"]
    model: str
    ready: bool
    running: int
    waiting: int
    tokens_per_s: float
    seconds_since_progress: float | None


class Health(BaseModel):
    status: Literal["healthy", "degraded", "unhealthy"]
    model_loaded: bool
    embedding_model_loaded: bool
    rabbitmq_connected: bool
    database_connected: bool
    workers: list[WorkerHealth]
    problems: list[str] = Field(description="What is wrong, naming the worker where it is one")
    notes: list[str] = Field(description="What a person should know, such as stand-ins")
    timestamp: datetime


class Readiness(BaseModel):
    status: Literal["ready", "not ready"]
    problems: list[str] = Field(description="What is wrong; some of it need not keep requests from being answered")
