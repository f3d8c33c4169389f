"""Texts in, vectors out, for whoever needs some: the embedding routes and the search of past chats."""

import asyncio
from typing import Any

import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from server.core.messages import EmbeddingResult, decode_embeddings, vectors_of
from server.core.registry import ModelSpec
from server.dispatch import Call, part
from server.errors import PREFIX
from server.limits import traceparent
from server.schemas.embeddings import MAX_TEXTS
from server.sse import unless_disconnected

Vectors = NDArray[np.float32]


async def embed(
    request: Request,
    spec: ModelSpec,
    texts: list[Any],
    *,
    input_type: str = "document",
    truncate: bool = False,
    recorded: bool = True,
) -> tuple[Vectors, int]:
    """Vectors, float32 (n_texts, dimensions), L2-normalised, and the tokens they cost. Raises ServiceError.

    A text is a string or a list of token ids. More than one job holds are several jobs, put together in order.
    """
    calls = [
        Call(
            request_id=part(request.state.request_id, start // MAX_TEXTS),
            spec=spec,
            endpoint=request.scope["route"].path.removeprefix(PREFIX),
            api="embeddings",
            body={
                "input": texts[start : start + MAX_TEXTS],
                "first": start,
                "input_type": input_type,
                "space": spec.vector_space,
                "truncate": truncate,
            },
            key_id=request.state.principal.key_id,
            recorded=recorded,
            traceparent=traceparent(request.headers),
            weight=request.state.principal.weight,
        )
        for start in range(0, len(texts), MAX_TEXTS)
    ]
    results = await unless_disconnected(request, _all(request, calls))
    vectors = np.concatenate([vectors_of(result) for result in results])
    return vectors, sum(result.prompt_tokens for result in results)


async def _all(request: Request, calls: list[Call]) -> list[EmbeddingResult]:
    """Each call's result. The first that fails ends the others."""
    tasks = [asyncio.create_task(_one(request, call)) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _one(request: Request, call: Call) -> EmbeddingResult:
    ticket = await request.app.state.dispatcher.submit(call)
    try:
        return decode_embeddings((await ticket.next()).data)
    finally:
        ticket.close()
