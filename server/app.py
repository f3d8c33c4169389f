"""The API server's application: what is alive while it runs, and what is served where."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Security
from fastapi.openapi.utils import get_openapi
from fastapi.security import APIKeyHeader, HTTPBearer

from server import docs, exporter
from server.auth import ensure_keys
from server.core import metrics, watchdog
from server.core.registry import Registry
from server.core.settings import BadSettings, Settings
from server.db.listen import listen
from server.db.outage import Outage
from server.db.pool import make_pool, open_pool
from server.db.store import Store
from server.dispatch import Dispatcher
from server.errors import PREFIX, add_error_handlers
from server.kept import Keeper
from server.keyed import direct_routes
from server.keys import CHANNEL, KeyCache
from server.middleware import Accounting
from server.rate import RateLimiter
from server.routes import NAMED, anthropic, health, history, inference, openai, requests

VERSION = "0.1.0"

FIRST_BEAT_S = 1.5
"""By then every live worker has told of itself, which it does once a second."""
LOOK_EVERY_S = 0.05
FRAMEWORKS = "HTTPValidationError"
"""The framework's error, by its name in the OpenAPI document."""


def create_app(settings: Settings, registry: Registry) -> FastAPI:
    """The application; it connects when it is started, and needs a migrated database. Raises BadSettings."""
    if unknown := settings.on_demand - {model.id for model in registry.models}:
        raise BadSettings(f"START_ON_DEMAND: {', '.join(sorted(unknown))}: no such model in {settings.models_file}")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pool = make_pool(settings.database_url)
        await open_pool(pool)
        app.state.store = Store(pool)
        outage = Outage(app.state.store.ping)
        app.state.keys = KeyCache(app.state.store, outage)
        app.state.rates = RateLimiter(app.state.store, settings.rate_limit_per_minute, outage)
        app.state.dispatcher = Dispatcher(settings, registry)
        await ensure_keys(app.state.store, settings)
        await app.state.dispatcher.start()
        await _hear_workers(app.state.dispatcher, registry)
        models = [model.id for model in registry.models]
        metrics.begin_server(model.id for model in registry.of_type("chat"))
        app.state.keeper = Keeper(settings, app.state.store, app.state.dispatcher)
        tasks = [
            asyncio.create_task(app.state.keeper.forget()),
            asyncio.create_task(listen(settings.database_url, CHANNEL, app.state.keys)),
            asyncio.create_task(exporter.keep_telling(app.state.dispatcher, models)),
            asyncio.create_task(watchdog.keep_beating()),
        ]
        try:
            yield
        finally:
            await app.state.keeper.close(app.state.drained_by - time.monotonic())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await app.state.dispatcher.close()
            await pool.close()

    app = FastAPI(
        title="Qwen3 inference service",
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # ours needs nothing from elsewhere
        redoc_url=None,
    )
    app.state.settings, app.state.registry = settings, registry
    app.state.started_at = int(time.time())
    app.state.draining, app.state.drained_by = False, 0.0
    add_error_handlers(app)
    # For the document only: KeyedRoute lets nobody past without a key.
    keyed: list[Any] = [
        Security(HTTPBearer(auto_error=False, description="Your API key")),
        Security(APIKeyHeader(name="x-api-key", auto_error=False, description="Your API key")),
        *NAMED,
    ]
    for prefix in ("", PREFIX):
        documented = not prefix
        app.include_router(health.router, prefix=prefix, include_in_schema=documented)
        app.include_router(exporter.router, prefix=prefix, include_in_schema=documented)
        for routes in (inference, history, openai, requests, anthropic):
            app.include_router(routes.router, prefix=prefix, include_in_schema=documented, dependencies=keyed)
    app.include_router(docs.router)
    app.add_middleware(Accounting, direct=direct_routes(app.routes), origins=settings.cors_origins)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


async def _hear_workers(dispatcher: Dispatcher, registry: Registry) -> None:
    """Whoever came before would be told that there are no workers, each time a server starts."""
    for _ in range(int(FIRST_BEAT_S / LOOK_EVERY_S)):
        if all(dispatcher.fleet.has(model.type, model.id) for model in registry.models):
            break
        await asyncio.sleep(LOOK_EVERY_S)


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that the framework promises where a field is wrong: that is a 400 here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                if FRAMEWORKS in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        for unused in (FRAMEWORKS, "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema
