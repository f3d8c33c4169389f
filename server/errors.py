"""Errors in the shape of the dialect that was spoken: the service's own, OpenAI's or Anthropic's.

One table a dialect gives its names for the statuses of core/errors.py, and the few statuses it has otherwise.
"""

import reprlib
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Literal

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.core import metrics
from server.core.errors import (
    HeadersTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    Unavailable,
    UnknownModel,
    from_status,
)
from server.schemas.common import is_tag

MAX_SHOWN = 5
"""How many wrong fields one answer names."""

PREFIX = "/qwen3"
"""The API is served under this prefix too, as its documented base URL has it."""

Dialect = Literal["native", "openai", "anthropic"]

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""platform.claude.com/docs/en/api/errors; other 4xx are invalid_request_error, other 5xx api_error."""


def dialect_of(path: str, headers: Mapping[str, str]) -> Dialect:
    """The dialect of a request, for answers that are given before anything has read it."""
    path = path.removeprefix(PREFIX)
    if path.startswith("/v1/messages") or (path.startswith("/v1/models") and "anthropic-version" in headers):
        return "anthropic"
    return "openai" if path.startswith(("/v1/", "/ai/v1/", "/kawai/v1/")) else "native"


def status_of(error: ServiceError, dialect: Dialect) -> int:
    if isinstance(error, UnknownModel) and dialect != "native":
        return HTTPStatus.NOT_FOUND
    if isinstance(error, Unavailable) and dialect == "anthropic":
        return 529
    return error.status


def count_error(error: ServiceError) -> None:
    """Of one that is about to be told."""
    metrics.errors.labels(type(error).__name__, str(error.status)).inc()


def error_body(error: ServiceError, dialect: Dialect, request_id: str = "") -> dict[str, Any]:
    """The JSON of an error, whether it is the answer or an event in a stream. It is counted: it is about to be told."""
    count_error(error)
    status = status_of(error, dialect)
    if dialect == "openai":
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        told = {"message": error.message, "type": kind, "param": error.param, "code": error.code or None}
        return {"error": told}
    if dialect == "anthropic":
        kind = ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
    return {"error": error.message, "status_code": status, "timestamp": datetime.now(UTC).isoformat()}


def refusal(status: int, message: str, path: str) -> bytes:
    """The JSON of an error about what was no proper HTTP request, for the server beneath the framework."""
    error = HeadersTooLarge(message) if status == HeadersTooLarge.status else from_status(status, message)
    return orjson.dumps(error_body(error, dialect_of(path, {})))


def error_response(error: ServiceError, request: Request) -> Response:
    dialect = dialect_of(request.scope["path"], request.headers)
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.may_have_run:
        headers["X-Should-Retry"] = "false"
    return Response(
        orjson.dumps(error_body(error, dialect, getattr(request.state, "request_id", ""))),
        status_code=status_of(error, dialect),
        media_type="application/json",
        headers=headers,
    )


def answer_to(request: Request, exc: ServiceError | RequestValidationError | ClientDisconnect) -> Response:
    """What a request that ended so is answered."""
    if isinstance(exc, RequestValidationError):
        exc = InvalidRequest(describe(exc.errors()), param=_first_field(exc.errors()))
    if isinstance(exc, ServiceError):
        return error_response(exc, request)
    # Nobody reads this; the status is nginx's for a client that left, and shows in the metrics.
    return Response(status_code=499)


async def _ended(request: Request, exc: Exception) -> Response:
    """Async, as a plain function would be run in a thread."""
    assert isinstance(exc, ServiceError | RequestValidationError | ClientDisconnect)
    return answer_to(request, exc)


def _first_field(errors: Any) -> str | None:
    return _where(errors[0]) or None if errors[0]["type"] != "json_invalid" else None


def _where(error: Any) -> str:
    return ".".join(str(step) for step in error["loc"][1:] if not is_tag(step))


def describe(errors: Any) -> str:
    """Which fields are wrong and why, in one line: `max_tokens: Input should be … (got 'many')`."""
    shown = []
    for error in errors[:MAX_SHOWN]:
        if error["type"] == "json_invalid":
            return f"The body is not valid JSON: {error['ctx']['error']}."
        where = _where(error)
        if not where and error["type"] == "missing":
            return error["msg"] if ":" in error["msg"] else "The body is missing: send a JSON object."
        got = error.get("input")
        value = f" (got {short(got)})" if error["type"] not in ("missing", "both") and where else ""
        shown.append(f"{where}: {error['msg']}{value}" if where else str(error["msg"]))
    more = f"; and {len(errors) - MAX_SHOWN} more" if len(errors) > MAX_SHOWN else ""
    return "; ".join(shown) + more


def short(value: Any) -> str:
    # reprlib stops early in deep and in long values, where repr would recurse or copy.
    text = reprlib.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


async def _http(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    method, path = request.method, ascii(request.scope["path"])[1:-1]
    error: ServiceError
    if exc.status_code == HTTPStatus.NOT_FOUND:
        error = NotFound(f"There is no {path} here. The API is listed at /docs.")
    elif exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        error = MethodNotAllowed(f"{method} is not allowed on {path}.")
    elif exc.status_code == HTTPStatus.BAD_REQUEST:
        error = InvalidRequest("The body could not be read as JSON in UTF-8.")
    else:
        error = from_status(exc.status_code, HTTPStatus(exc.status_code).phrase)
    response = error_response(error, request)
    response.headers.update(exc.headers or {})
    return response


def add_error_handlers(app: FastAPI) -> None:
    for kind in (ServiceError, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(kind, _ended)
    app.add_exception_handler(HTTPException, _http)
