"""Thin handlers, a module a subject."""

from typing import Annotated, Any

from fastapi import Depends, Header
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


def _idempotency_key(
    given: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            pattern=r"^[ -~]{1,255}$",
            description="Any text of your own: the request is made once, and sent again with it gets the same answer",
        ),
    ] = None,
) -> None:
    """For the document: server/kept.py reads it."""


def _last_event_id(
    given: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            pattern=r"^[0-9]{1,9}$",
            description="The last event that was received of this answer: only what comes after it is sent",
        ),
    ] = None,
) -> None:
    """For the document: server/kept.py reads it."""


def _session_id(
    given: Annotated[
        str | None,
        Header(
            alias="X-Session-Id",
            pattern=r"^[!-~]{1,128}$",
            description="Groups chats; made if left out",
        ),
    ] = None,
) -> None:
    """For the document: server/dialects/relay.py reads it."""


def _client_request_id(
    given: Annotated[
        str | None,
        Header(alias="X-Client-Request-Id", description="Any text of your own, which comes back and is logged"),
    ] = None,
) -> None:
    """For the document: server/middleware.py reads it."""


NAMED = [Depends(_client_request_id)]
"""What any request may say."""
RESUMED = [Depends(_last_event_id)]
FAILURES_ONCE = {
    404: "No answer that Last-Event-ID could go on with, or no such model",
    422: "The Idempotency-Key stands for another request",
    499: "The request was stopped by DELETE /v1/requests/{request_id}",
}


def made_once(error: type[BaseModel], answer: Responses | None = None, *, in_session: bool = True) -> dict[str, Any]:
    """For routes that generate or embed: the headers that they heed, and how these fail. `answer` is the 200."""
    headers = [Depends(_idempotency_key), *RESUMED, *([Depends(_session_id)] if in_session else [])]
    return {"dependencies": headers, "responses": _documented(error, FAILURES_ONCE) | (answer or {})}
