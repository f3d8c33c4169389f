"""What the service remembers for a key: `/chat/history`, `/chat/sessions`, `/chat/stats`, `/chat/similar`, `/usage`."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from server.db.store import HistoryFilter, Row, Store
from server.dialects import memory
from server.keyed import KeyedRoute
from server.routes import KEYED
from server.schemas.chat import Usage
from server.schemas.history import (
    ChatStats,
    HistoryEntry,
    Session,
    SimilarChat,
    SimilarRequest,
    UsageStats,
)

router = APIRouter(tags=["history"], route_class=KeyedRoute, responses=KEYED)

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**31 - 1)]
Filter = Annotated[str | None, Query(pattern=r"^[\x21-\x7e]{1,128}$")]


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


@router.get("/chat/history")
async def history(
    request: Request, limit: Limit = 50, offset: Offset = 0, model: Filter = None, session_id: Filter = None
) -> list[HistoryEntry]:
    """The key's chats, newest first."""
    filter_ = HistoryFilter(limit, offset, model, session_id)
    rows = await _store(request).history(request.state.principal.key_id, filter_)
    return [HistoryEntry(**_without_tokens(row), usage=_usage(row)) for row in rows]


def _usage(row: Row) -> Usage:
    prompt, completion = row["prompt_tokens"], row["completion_tokens"]
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _without_tokens(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("prompt_tokens", "completion_tokens")}


@router.get("/chat/sessions")
async def sessions(request: Request, limit: Limit = 50, offset: Offset = 0) -> list[Session]:
    """The key's sessions, the last used first."""
    rows = await _store(request).sessions(request.state.principal.key_id, limit, offset)
    return [Session(**_without_tokens(row), total_tokens=_usage(row).total_tokens) for row in rows]


@router.get("/chat/stats")
async def stats(request: Request) -> ChatStats:
    """The key's chats in numbers, from daily roll-ups. Days and months are UTC's."""
    key_id = request.state.principal.key_id
    rows = [row for row in await _store(request).usage(key_id) if row["type"] == "chat"]
    total = sum(row["requests"] for row in rows)
    prompt, completion = sum(row["prompt_tokens"] for row in rows), sum(row["completion_tokens"] for row in rows)
    return ChatStats(
        total_chats=total,
        total_sessions=await _store(request).count_sessions(key_id),
        chats_today=sum(row["requests_today"] for row in rows),
        chats_this_month=sum(row["requests_this_month"] for row in rows),
        models_used={row["model"]: row["requests"] for row in rows},
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        average_tokens_per_chat=_average(prompt + completion, total),
    )


def _average(tokens: int, requests: int) -> float:
    return round(tokens / requests, 2) if requests else 0


@router.post("/chat/similar")
async def similar(request: Request, body: SimilarRequest) -> list[SimilarChat]:
    """The key's past chats closest in meaning to the query, best first."""
    rows = await memory.similar(request, body.query, body.limit, body.threshold)
    return [SimilarChat(**row) for row in rows]


@router.get("/usage")
async def usage(request: Request) -> UsageStats:
    """The key's requests and tokens, chats and embeddings, from daily roll-ups. Days and months are UTC's."""
    rows = await _store(request).usage(request.state.principal.key_id)
    total = sum(row["requests"] for row in rows)
    tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
    models: dict[str, int] = {}
    for row in rows:
        models[row["model"]] = models.get(row["model"], 0) + row["requests"]
    return UsageStats(
        total_requests=total,
        requests_today=sum(row["requests_today"] for row in rows),
        requests_this_month=sum(row["requests_this_month"] for row in rows),
        models_used=models,
        total_tokens=tokens,
        average_tokens_per_request=_average(tokens, total),
    )
