"""What happens to every request whatever its end: an id, the rate's headers, and its metrics."""

import logging
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.core import metrics
from server.core.errors import EngineFailed, HeadersTooLarge
from server.errors import PREFIX, dialect_of, error_response
from server.limits import MAX_HEADER_BYTES

logger = logging.getLogger(__name__)

UNANSWERED = 499
"""nginx's status for a client that left before it had an answer."""


class Accounting:
    """Outside everything of ours, so that errors of every kind are counted and labelled as well."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        state = scope.setdefault("state", {})
        state["started"], state["model"], state["request_id"] = started, "", uuid.uuid4().hex
        status = UNANSWERED

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                _label(headers, scope, state)
            await send(message)

        try:
            size = sum(len(name) + len(value) for name, value in scope["headers"])
            if size > MAX_HEADER_BYTES:
                error = HeadersTooLarge(f"The headers have {size} bytes; at most {MAX_HEADER_BYTES} are read.")
                await error_response(error, Request(scope))(scope, receive, send_with_headers)
                return
            await self._app(scope, receive, send_with_headers)
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
            metrics.requests.labels(endpoint, state["model"], str(status)).inc()
            if status < 400:
                metrics.request_duration.labels(endpoint, state["model"]).observe(time.monotonic() - started)


def _label(headers: MutableHeaders, scope: Scope, state: dict[str, Any]) -> None:
    """The request's id and its key's rate, by our names and by those of the dialect."""
    headers["X-Request-Id"] = state["request_id"]
    dialect = dialect_of(scope["path"], Headers(scope=scope))
    if dialect == "openai":
        headers["OpenAI-Processing-Ms"] = str(round(1000 * (time.monotonic() - state["started"])))
    elif dialect == "anthropic":
        headers["Request-Id"] = state["request_id"]
    rate = state.get("rate")
    if rate is None:
        return
    headers["X-RateLimit-Limit"] = str(rate.limit)
    headers["X-RateLimit-Remaining"] = str(rate.remaining)
    headers["X-RateLimit-Reset"] = str(rate.reset_at)
    if dialect == "openai":
        headers["X-RateLimit-Limit-Requests"] = str(rate.limit)
        headers["X-RateLimit-Remaining-Requests"] = str(rate.remaining)
        headers["X-RateLimit-Reset-Requests"] = f"{max(0, rate.reset_at - int(time.time()))}s"
    elif dialect == "anthropic":
        headers["Anthropic-RateLimit-Requests-Limit"] = str(rate.limit)
        headers["Anthropic-RateLimit-Requests-Remaining"] = str(rate.remaining)
        headers["Anthropic-RateLimit-Requests-Reset"] = datetime.fromtimestamp(rate.reset_at, UTC).isoformat()
