"""Thin handlers, a module a subject."""

from typing import Any

from pydantic import BaseModel

from server.schemas.dialects import AnthropicError, OpenAIError
from server.schemas.service import ErrorBody

FAILURES = {
    400: "A field is missing, malformed or out of range",
    401: "No key, or one that is not valid",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "Too many requests, or the model's queue is full: see Retry-After",
    431: "The headers are too large",
    500: "The engine failed",
    503: "A part of the service is not there: see Retry-After",
    504: "The request took too long",
}
"""How a keyed request can fail."""

Responses = dict[int | str, dict[str, Any]]


def _documented(body: type[BaseModel], failures: dict[int, str]) -> Responses:
    return {status: {"model": body, "description": description} for status, description in failures.items()}


NOT_FOUND = {404: "No such model, or no such request of this key"}
KEYED = _documented(ErrorBody, FAILURES)
KEYED_OPENAI = _documented(OpenAIError, FAILURES | NOT_FOUND)
KEYED_ANTHROPIC = _documented(AnthropicError, FAILURES | NOT_FOUND | {529: "A part of the service is not there"})


def streaming(what: str) -> Responses:
    """For routes that answer in events when asked to; `what` an event's `data` is."""
    schema = {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": what}},
        "required": ["data"],
    }
    return {200: {"content": {"text/event-stream": {"schema": schema}}}}
