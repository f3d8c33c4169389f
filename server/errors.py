"""Errors as the service's own dialect tells them: `{"error", "status_code", "timestamp"}`."""

import reprlib
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.core.errors import ServiceError
from server.schemas.common import TAGS

MAX_SHOWN = 5
"""How many wrong fields one answer names."""


def error_body(status: int, message: str) -> dict[str, Any]:
    return {"error": message, "status_code": status, "timestamp": datetime.now(UTC).isoformat()}


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(
        orjson.dumps(error_body(status, message)),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )


def _service_error(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ServiceError)
    headers = {}
    if exc.retry_after_s is not None:
        headers["Retry-After"] = str(exc.retry_after_s)
    if exc.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return error_response(exc.status, exc.message, headers)


def _invalid(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    return error_response(400, describe(exc.errors()))


def describe(errors: Any) -> str:
    """Which fields are wrong and why, in one line: `max_tokens: Input should be … (got 'many')`."""
    shown = []
    for error in errors[:MAX_SHOWN]:
        if error["type"] == "json_invalid":
            return f"The body is not valid JSON: {error['ctx']['error']}."
        where = ".".join(str(step) for step in error["loc"][1:] if step not in TAGS)
        if not where and error["type"] == "missing":
            return error["msg"] if ":" in error["msg"] else "The body is missing: send a JSON object."
        got = error.get("input")
        value = f" (got {_short(got)})" if error["type"] not in ("missing", "both") and where else ""
        shown.append(f"{where}: {error['msg']}{value}" if where else str(error["msg"]))
    more = f"; and {len(errors) - MAX_SHOWN} more" if len(errors) > MAX_SHOWN else ""
    return "; ".join(shown) + more


def _short(value: Any) -> str:
    # reprlib stops early in deep and in long values, where repr would recurse or copy.
    text = reprlib.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _http(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    method, path = request.method, ascii(request.url.path)[1:-1]
    if exc.status_code == HTTPStatus.NOT_FOUND:
        message = f"There is no {path} here. The API is listed at /docs."
    elif exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{method} is not allowed on {path}."
    elif exc.status_code == HTTPStatus.BAD_REQUEST:
        message = "The body could not be read as JSON in UTF-8."
    else:
        message = HTTPStatus(exc.status_code).phrase
    return error_response(exc.status_code, message, dict(exc.headers or {}))


def _gone(_request: Request, _exc: Exception) -> Response:
    """Nobody reads this; the status is nginx's for a client that left, and shows in the metrics."""
    return Response(status_code=499)


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
