"""Anthropic's paths."""

from fastapi import APIRouter, Request, Response

from server.dialects import anthropic
from server.keyed import KeyedRoute
from server.routes import KEYED_ANTHROPIC, streaming
from server.schemas.anthropic import CountTokensRequest, MessagesRequest
from server.schemas.dialects import AnthropicMessage, TokenCount

router = APIRouter(tags=["Anthropic"], route_class=KeyedRoute, responses=KEYED_ANTHROPIC)


@router.post("/v1/messages", response_model=AnthropicMessage, responses=streaming("An event as JSON, by its name"))
async def messages(request: Request, body: MessagesRequest) -> Response:
    """A message."""
    return await anthropic.messages(request, body)


@router.post("/v1/messages/count_tokens", response_model=TokenCount)
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """How many tokens a message's request would have."""
    return await anthropic.count_tokens(request, body)
