"""Thin handlers, a module a subject."""

from typing import Any

from server.schemas.service import ErrorBody

KEYED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "A field is missing, malformed or out of range",
        401: "No key, or one that is not valid",
        413: "The body is too large",
        429: "Too many requests, or the model's queue is full: see Retry-After",
        500: "The engine failed",
        503: "A part of the service is not there: see Retry-After",
        504: "The request took too long",
    }.items()
}
"""How a keyed request can fail."""
