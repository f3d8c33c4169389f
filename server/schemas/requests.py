"""Wire types of `/v1/requests`: where a request stands."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from server.schemas.chat import Usage


class RequestError(BaseModel):
    message: str
    code: str | None = None
    status_code: int


class RequestInfo(BaseModel):
    id: str
    object: Literal["request"] = "request"
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    model: str
    endpoint: str
    created_at: datetime
    queue_position: int | None = Field(None, description="How many jobs go before it, while it is queued")
    estimated_wait_s: float | None = Field(None, description="Until a worker takes it, while it is queued")
    finish_reason: str | None = None
    usage: Usage | None = Field(None, description="What is billed, once it is recorded")
    message: dict[str, Any] | None = Field(None, description="A chat's answer, once recorded; partial if cancelled")
    error: RequestError | None = None
