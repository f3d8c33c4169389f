"""`/health` and its two short forms. They need no key and tell what is so at this moment."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Literal

from fastapi import APIRouter, Request, Response

from server.core.registry import ModelType, Registry
from server.fleet import Fleet
from server.schemas.service import Health, Readiness, WorkerHealth

router = APIRouter(tags=["service"])


async def check(request: Request) -> Health:
    """Unhealthy: chat cannot work (embeddings, where no chat model is configured). Degraded: it works, but
    something else does not."""
    state = request.app.state
    fleet: Fleet = state.dispatcher.fleet
    registry: Registry = state.registry
    chat, embedding = _loaded(fleet, registry, "chat"), _loaded(fleet, registry, "embedding")
    rabbitmq = state.dispatcher.connected
    database, heard = await asyncio.gather(state.store.answers(), state.dispatcher.heard())
    blocked = state.dispatcher.blocked
    status: Literal["healthy", "degraded", "unhealthy"]
    missing = [m for m in registry.models if not fleet.has(m.type, m.id) and m.id not in state.dispatcher.on_demand]
    needed = registry.default("chat") or registry.default("embedding")
    if blocked or not (rabbitmq and database and needed and needed not in missing):
        status = "unhealthy"
    elif missing or not any(w.type == "archive" and w.ready and not w.problem for w in fleet.workers()):
        status = "degraded"
    else:
        status = "healthy"
    problems = [
        *([] if rabbitmq else ["RabbitMQ is not connected"]),
        *([f"RabbitMQ takes nothing: {blocked}"] if blocked else []),
        *(["RabbitMQ does not answer"] if rabbitmq and not heard and not blocked else []),
        *([] if database else ["Postgres does not answer"]),
        *(f"no {m.type} worker for {m.id} is ready" for m in missing),
        *([] if fleet.has("archive") else ["no archivist is ready"]),
        *fleet.problems(),
    ]
    now = time.time()
    workers = [
        WorkerHealth(
            worker=w.worker,
            metrics_port=w.metrics_port,
            type=w.type,
            model=w.model,
            ready=w.ready,
            running=w.running,
            waiting=w.waiting,
            tokens_per_s=w.tokens_per_s,
            seconds_since_progress=round(now - w.progress_at, 1) if w.progress_at else None,
        )
        for w in fleet.workers()
    ]
    return Health(
        status=status,
        model_loaded=chat,
        embedding_model_loaded=embedding,
        rabbitmq_connected=rabbitmq,
        database_connected=database,
        workers=workers,
        problems=problems,
        notes=[m.description for m in registry.models if m.stand_in_for],
        timestamp=datetime.now(UTC),
    )


def _loaded(fleet: Fleet, registry: Registry, type_: ModelType) -> bool:
    default = registry.default(type_)
    return default is not None and fleet.has(type_, default.id)


@router.get("/health", responses={503: {"model": Health, "description": "Unhealthy"}})
async def health(request: Request, response: Response) -> Health:
    """Whether the service works, part by part."""
    result = await check(request)
    response.status_code = 503 if result.status == "unhealthy" else 200
    return result


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Whether this process runs."""
    return {"status": "live"}


@router.get("/health/ready", responses={503: {"model": Readiness, "description": "Not ready for requests"}})
async def ready(request: Request, response: Response) -> Readiness:
    """Whether this process should be sent requests."""
    if request.app.state.draining:
        response.status_code = 503
        return Readiness(status="not ready", problems=["this server is stopping"])
    result = await check(request)
    response.status_code = 503 if result.status == "unhealthy" else 200
    return Readiness(status="ready" if result.status != "unhealthy" else "not ready", problems=result.problems)
