"""The key's own past chats, found by meaning: for `/chat/similar`, and for the models' `-search` variants."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from server.core.conversation import excerpt, recalled
from server.core.errors import Unavailable
from server.core.registry import ModelSpec
from server.core.settings import Settings
from server.db.store import Row, SimilarQuery
from server.dialects.vectors import embed

MOST_CHATS = 5
"""How many past chats are put before one question."""
CANDIDATES = 20
"""How many are looked at for them: what was asked and answered before is often asked and answered again."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """`context` goes before the question, empty where nothing was found; `sources` say what stands in it."""

    context: str = ""
    sources: list[dict[str, Any]] = field(default_factory=list)


NOTHING = Recalled()


async def similar(request: Request, query: str, limit: int, threshold: float, *, truncate: bool = False) -> list[Row]:
    """The key's chats closest in meaning to the query, best first. Raises ServiceError.

    A query longer than the embedding model takes is refused, or cut with `truncate`.
    """
    spec = request.app.state.registry.default("embedding")
    if spec is None:
        raise Unavailable("No embedding model is configured, so chats cannot be searched by meaning.")
    vectors, _ = await embed(request, spec, [query], input_type="query", truncate=truncate, recorded=False)
    rows: list[Row] = await request.app.state.store.similar(
        request.state.principal.key_id, SimilarQuery(spec.vector_space, vectors[0], limit, threshold)
    )
    return rows


async def recall(request: Request, spec: ModelSpec, question: str) -> Recalled:
    """What of the key's past chats is put before a question to this model.

    The bound on tokens is kept in bytes of UTF-8: no token is shorter than one, and the server has no tokenizer.
    """
    settings: Settings = request.app.state.settings
    if not question.strip():
        return NOTHING
    rows = await similar(request, question, CANDIDATES, settings.search_threshold, truncate=True)
    left = min(settings.search_max_tokens, spec.context_length // 4) - len(recalled([]))
    excerpts: list[str] = []
    sources: list[dict[str, Any]] = []
    for row in rows:
        text = excerpt(row["messages"])
        size = len(text.encode()) + 2
        if not text or text in excerpts or size > left or len(excerpts) == MOST_CHATS:
            continue  # it says nothing, or nothing new; or a shorter one may still fit
        left -= size
        excerpts.append(text)
        sources.append({key: row[key] for key in ("id", "session_id", "similarity")})
    if not excerpts:
        return NOTHING
    return Recalled(recalled(excerpts), sources)
