"""Wire types of what is remembered: history, sessions, statistics, similar chats, usage."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from server.schemas.chat import Usage


class HistoryEntry(BaseModel):
    id: int
    session_id: str
    model: str
    messages: list[dict[str, Any]]
    usage: Usage
    finish_reason: str
    created_at: datetime


class Session(BaseModel):
    session_id: str
    chats: int
    total_tokens: int
    created_at: datetime
    updated_at: datetime


class ChatStats(BaseModel):
    total_chats: int
    total_sessions: int
    chats_today: int
    chats_this_month: int
    models_used: dict[str, int] = Field(description="Chats by model")
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    average_tokens_per_chat: float


class SimilarRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    query: str = Field(min_length=1, examples=["What is the capital of France?"])
    limit: int = Field(5, ge=1, le=100)
    threshold: float = Field(0.7, ge=0, le=1, description="Least cosine similarity")


class SimilarChat(BaseModel):
    id: int
    session_id: str
    similarity: float = Field(description="Cosine, 0 to 1")
    messages: list[dict[str, Any]]
    created_at: datetime


class UsageStats(BaseModel):
    total_requests: int
    requests_today: int
    requests_this_month: int
    models_used: dict[str, int] = Field(description="Requests by model")
    total_tokens: int
    average_tokens_per_request: float
