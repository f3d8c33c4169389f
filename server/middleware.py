"""What happens to every request whatever its end: an id, the rate's headers, and its metrics."""

import functools
import logging
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.core import metrics
from server.core.errors import EngineFailed, HeadersTooLarge
from server.errors import PREFIX, Dialect, dialect_of, error_response
from server.limits import MAX_HEADER_BYTES
from server.rate import RateState

logger = logging.getLogger(__name__)

UNANSWERED = 499
"""nginx's status for a client that left before it had an answer."""


class Accounting:
    """Outside everything of ours, so that errors of every kind are counted and labelled as well."""

    def __init__(self, app: ASGIApp, direct: Mapping[tuple[str, str], Route] | None = None) -> None:
        """`direct`: by method and path, the routes that are called without the framework's looking for them."""
        self._app = app
        self._direct = direct or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        state = scope.setdefault("state", {})
        state["started"], state["model"], state["request_id"] = started, "", secrets.token_hex(16)
        status = UNANSWERED

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_labels(scope, state)]
                if getattr(scope["app"].state, "draining", False):
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            size = sum(len(name) + len(value) for name, value in scope["headers"])
            if size > MAX_HEADER_BYTES:
                error = HeadersTooLarge(f"The headers have {size} bytes; at most {MAX_HEADER_BYTES} are read.")
                await error_response(error, Request(scope))(scope, receive, send_with_headers)
                return
            route = self._direct.get((scope["method"], scope["path"]))
            if route is None:
                await self._app(scope, receive, send_with_headers)
            else:
                scope["route"] = route
                await route.app(scope, receive, send_with_headers)
        except Exception:
            # Here rather than in the framework's outermost layer, so that it is counted and labelled too.
            logger.exception("unexpected error", extra={"action": "request", "request_id": state["request_id"]})
            if status != UNANSWERED:
                raise
            failed = EngineFailed("Something went wrong here. The server's log has the details.")
            await error_response(failed, Request(scope))(scope, receive, send_with_headers)
        finally:
            # The route's template, not the path: labels stay few whatever is asked for.
            route = scope.get("route")
            endpoint = getattr(route, "path", "unknown").removeprefix(PREFIX)
            _count(endpoint, state["model"], status, time.monotonic() - started)


@functools.cache  # bounded as the labels are
def _requests(endpoint: str, model: str, status: int) -> Counter:
    return metrics.requests.labels(endpoint, model, str(status))


@functools.cache
def _duration(endpoint: str, model: str) -> Histogram:
    return metrics.request_duration.labels(endpoint, model)


def _count(endpoint: str, model: str, status: int, took_s: float) -> None:
    _requests(endpoint, model, status).inc()
    if status < 400:
        _duration(endpoint, model).observe(took_s)


def _labels(scope: Scope, state: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """Headers with the request's id and its key's rate, by our names and by those of the dialect."""
    told = {"x-request-id": state["request_id"]}
    dialect = dialect_of(scope["path"], Headers(scope=scope))
    if dialect == "openai":
        told["openai-processing-ms"] = str(round(1000 * (time.monotonic() - state["started"])))
    elif dialect == "anthropic":
        told["request-id"] = state["request_id"]
    rate: RateState | None = state.get("rate")
    if rate is not None:
        told |= _rate_headers(rate, dialect)
    return [(name.encode(), value.encode()) for name, value in told.items()]


def _rate_headers(rate: RateState, dialect: Dialect) -> dict[str, str]:
    limit, remaining = str(rate.limit), str(rate.remaining)
    told = {
        "x-ratelimit-limit": limit,
        "x-ratelimit-remaining": remaining,
        "x-ratelimit-reset": str(rate.reset_at),
    }
    if dialect == "openai":
        told["x-ratelimit-limit-requests"] = limit
        told["x-ratelimit-remaining-requests"] = remaining
        told["x-ratelimit-reset-requests"] = f"{max(0, rate.reset_at - int(time.time()))}s"
    elif dialect == "anthropic":
        told["anthropic-ratelimit-requests-limit"] = limit
        told["anthropic-ratelimit-requests-remaining"] = remaining
        told["anthropic-ratelimit-requests-reset"] = datetime.fromtimestamp(rate.reset_at, UTC).isoformat()
    return told
