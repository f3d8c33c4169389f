"""What happens to every request whatever its end: an id, the rate's headers, and its metrics."""

import logging
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.core import metrics
from server.errors import error_response

logger = logging.getLogger(__name__)

PREFIX = "/qwen3"
"""The API is served under this prefix too, as its documented base URL has it."""


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
                headers["X-Request-Id"] = state["request_id"]
                if rate := state.get("rate"):
                    headers["X-RateLimit-Limit"] = str(rate.limit)
                    headers["X-RateLimit-Remaining"] = str(rate.remaining)
                    headers["X-RateLimit-Reset"] = str(rate.reset_at)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            # Here rather than in the framework's outermost layer, so that it is counted and labelled too.
            logger.exception("unexpected error", extra={"action": "request", "request_id": state["request_id"]})
            if status != UNANSWERED:
                raise
            response = error_response(500, "Something went wrong here. The server's log has the details.")
            await response(scope, receive, send_with_headers)
        finally:
            # The route's template, not the path: labels stay few whatever is asked for.
            route = scope.get("route")
            endpoint = getattr(route, "path", "unknown").removeprefix(PREFIX)
            metrics.requests.labels(endpoint, state["model"], str(status)).inc()
            if status < 400:
                metrics.request_duration.labels(endpoint, state["model"]).observe(time.monotonic() - started)
