"""What happens to every request whatever its end: an id, headers, its metrics, and the door to other origins."""

import functools
import logging
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.core import metrics, tracing
from server.core.errors import EngineFailed, HeadersTooLarge
from server.core.http import HARDENING
from server.core.tracing import NOTHING, Span, Start
from server.errors import PREFIX, Dialect, dialect_of, error_response
from server.limits import MAX_HEADER_BYTES, clients_traceparent
from server.rate import RateState

logger = logging.getLogger(__name__)

UNANSWERED = 499
"""nginx's status for a client that left before it had an answer."""

REFUSED_FOR_NOW = (503, 529)
"""Of these there are many at once, and what is amiss has its own line."""

UNTRACED = ("/health", "/metrics")
"""What is asked every few seconds, and tells nothing of a request."""

METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
"""Others have one name between them in traces, as anything can be sent."""

CLIENT_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

EXPOSED = (
    "Anthropic-RateLimit-Requests-Limit",
    "Anthropic-RateLimit-Requests-Remaining",
    "Anthropic-RateLimit-Requests-Reset",
    "OpenAI-Processing-Ms",
    "Request-Id",
    "Retry-After",
    "X-Client-Request-Id",
    "X-Ignored-Fields",
    "X-RateLimit-Limit",
    "X-RateLimit-Limit-Requests",
    "X-RateLimit-Remaining",
    "X-RateLimit-Remaining-Requests",
    "X-RateLimit-Reset",
    "X-RateLimit-Reset-Requests",
    "X-Request-Id",
    "X-Session-Id",
    "X-Should-Retry",
    "X-Stand-In",
)
"""Headers that a page of an allowed origin may read."""


class Accounting:
    """Outside everything of ours, so that errors of every kind are counted and labelled as well."""

    def __init__(
        self, app: ASGIApp, direct: Mapping[tuple[str, str], Route] | None = None, origins: Sequence[str] = ()
    ) -> None:
        """`direct`: by method and path, the routes that are called without the framework's looking for them.

        `origins` may call from a browser, where keys travel in headers and never in cookies; no others may.
        """
        self._app = app
        self._direct = direct or {}
        self._handle: ASGIApp = self._answer
        if origins:
            self._handle = CORSMiddleware(
                self._answer,
                allow_origins=origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],  # SDKs have many of their own
                expose_headers=EXPOSED,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        state = scope.setdefault("state", {})
        state["started"], state["model"], state["request_id"] = started, "", secrets.token_hex(16)
        status = UNANSWERED
        span = request_span(scope)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _labelled(message["headers"], scope, state)
                if getattr(scope["app"].state, "draining", False):
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        with span:
            try:
                await self._handle(scope, receive, send_with_headers)
            except Exception:
                # Here rather than in the framework's outermost layer, so that it is counted and labelled too.
                logger.exception("unexpected error", extra=_fields(scope))
                if status != UNANSWERED:
                    metrics.errors.labels(EngineFailed.__name__, str(EngineFailed.status)).inc()  # of a stream, cut off
                    raise
                failed = EngineFailed("Something went wrong here. The server's log has the details.")
                await error_response(failed, Request(scope))(scope, receive, send_with_headers)
            finally:
                # The route's template, not the path: labels stay few whatever is asked for.
                route = scope.get("route")
                endpoint = getattr(route, "path", "unknown").removeprefix(PREFIX)
                took_s = time.monotonic() - started
                _count(endpoint, state["model"], status, took_s)
                if principal := state.get("principal"):
                    _of_key(metrics.key_label(principal.key_id), f"{status // 100}xx").inc()
                if span is not NOTHING:
                    tell_answer(span, scope, endpoint, status)
                failed_here = status >= 500 and status not in REFUSED_FOR_NOW
                if failed_here or logger.isEnabledFor(logging.DEBUG):
                    level = logging.WARNING if failed_here else logging.DEBUG
                    extra = _fields(scope) | {"endpoint": endpoint, "status": status, "took_s": round(took_s, 4)}
                    logger.log(level, "request answered", extra=extra)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADER_BYTES:
            error = HeadersTooLarge(f"The headers have {size} bytes; at most {MAX_HEADER_BYTES} are read.")
            await error_response(error, Request(scope))(scope, receive, send)
            return
        route = self._direct.get((scope["method"], scope["path"]))
        if route is None:
            await self._app(scope, receive, send)
        else:
            scope["route"] = route
            await route.app(scope, receive, send)


def request_span(scope: Scope) -> Span:
    """A request's, which goes on with its client's trace."""
    if not tracing.on() or scope["path"].removeprefix(PREFIX).startswith(UNTRACED):
        return NOTHING
    method = scope["method"] if scope["method"] in METHODS else "_OTHER"
    attributes = {"http.request.method": method, "url.scheme": scope["scheme"]}
    if scope.get("http_version"):
        attributes["network.protocol.version"] = scope["http_version"]
    return tracing.begin(Start(_named(method), "server", clients_traceparent(Headers(scope=scope)), attributes))


def _named(method: str) -> str:
    return method if method in METHODS else "HTTP"


def tell_answer(span: Span, scope: Scope, endpoint: str, status: int) -> None:
    """What is known at a request's end. Not its path: what is no route may be anything, a key among it."""
    state = scope["state"]
    attributes = {"http.response.status_code": status, "qwen3.request.id": state["request_id"]}
    if endpoint != "unknown":
        span.rename(f"{_named(scope['method'])} {endpoint}")
        attributes["http.route"] = endpoint
    if state["model"]:
        attributes["gen_ai.request.model"] = state["model"]
    span.tell(attributes)
    if status >= 500:
        span.fail(str(status))


def _fields(scope: Scope) -> dict[str, str]:
    """What log lines about a request say of it."""
    told = {"action": "request", "request_id": scope["state"]["request_id"]}
    if given := client_request_id(Headers(scope=scope)):
        told["client_request_id"] = given
    return told


def client_request_id(headers: Headers) -> str:
    """The client's own name for its request, empty if it has none or not a proper one.

    It never becomes the request's id: that tells records, cancels and answers of all keys apart, and a client that
    chose it could choose another's, or the same one twice to be billed once.
    """
    given = headers.get("x-client-request-id") or headers.get("x-request-id") or ""
    return given if CLIENT_REQUEST_ID.fullmatch(given) else ""


@functools.cache  # bounded as the labels are
def _requests(endpoint: str, model: str, status: int) -> Counter:
    return metrics.requests.labels(endpoint, model, str(status))


@functools.cache
def _of_key(key: str, status: str) -> Counter:
    return metrics.key_requests.labels(key, status)


@functools.cache
def _duration(endpoint: str, model: str) -> Histogram:
    return metrics.request_duration.labels(endpoint, model)


def _count(endpoint: str, model: str, status: int, took_s: float) -> None:
    _requests(endpoint, model, status).inc()
    if status < 400:
        _duration(endpoint, model).observe(took_s)


def _labelled(headers: Iterable[tuple[bytes, bytes]], scope: Scope, state: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """With the request's id and its key's rate, by our names and by those of the dialect, and what browsers heed."""
    answered = list(headers)
    own = {name for name, _ in answered}
    answered += [pair for pair in HARDENING if pair[0] not in own]
    asked = Headers(scope=scope)
    told = {"x-request-id": state["request_id"]}
    if given := client_request_id(asked):
        told["x-client-request-id"] = given
    dialect = dialect_of(scope["path"], asked)
    if dialect == "openai":
        told["openai-processing-ms"] = str(round(1000 * (time.monotonic() - state["started"])))
    elif dialect == "anthropic":
        told["request-id"] = state["request_id"]
    rate: RateState | None = state.get("rate")
    if rate is not None:
        told |= _rate_headers(rate, dialect)
    return answered + [(name.encode(), value.encode()) for name, value in told.items()]


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
