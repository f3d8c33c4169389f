"""Anthropic's paths."""

from fastapi import APIRouter, Request, Response

from server.dialects import anthropic
from server.keyed import KeyedRoute
from server.routes import KEYED_ANTHROPIC, made_once, streaming
from server.schemas.anthropic import CountTokensRequest, MessagesRequest
from server.schemas.dialects import AnthropicError, AnthropicMessage, TokenCount

router = APIRouter(tags=["Anthropic"], route_class=KeyedRoute, responses=KEYED_ANTHROPIC)

EVENTS = streaming("An event as JSON, by its name")


@router.post("/v1/messages", response_model=AnthropicMessage, **made_once(AnthropicError, EVENTS))
async def messages(request: Request, body: MessagesRequest) -> Response:
    """A message."""
    return await anthropic.messages(request, body)


@router.post("/v1/messages/count_tokens", response_model=TokenCount, **made_once(AnthropicError, in_session=False))
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """How many tokens a message's request would have."""
    return await anthropic.count_tokens(request, body)
