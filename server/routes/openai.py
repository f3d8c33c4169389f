"""OpenAI's paths, and those of the two dialects that are OpenAI's with a difference."""

from fastapi import APIRouter, Request, Response

from server.dialects import gateway, kawai, openai, responses
from server.dialects.relay import json_response
from server.keyed import KeyedRoute
from server.routes import KEYED_OPENAI, made_once, streaming
from server.schemas.dialects import ChatCompletion, Completion, EmbeddingList, Model, ModelList, OpenAIError
from server.schemas.dialects import Response as ResponseObject
from server.schemas.openai import ChatCompletionsRequest, CompletionsRequest, EmbeddingsRequest
from server.schemas.responses import ResponsesRequest

router = APIRouter(tags=["OpenAI"], route_class=KeyedRoute, responses=KEYED_OPENAI)

CHUNKS = streaming("A chat.completion.chunk as JSON, at last [DONE]")
TEXTS = streaming("A text_completion as JSON, or [DONE]")
EVENTS = streaming("A response event as JSON")
PIECES = streaming('`{"content": "…"}`')


@router.post("/v1/chat/completions", response_model=ChatCompletion, **made_once(OpenAIError, CHUNKS))
async def chat_completions(request: Request, body: ChatCompletionsRequest) -> Response:
    """A chat completion."""
    return await openai.chat(request, body)


@router.post("/v1/completions", response_model=Completion, **made_once(OpenAIError, TEXTS))
async def completions(request: Request, body: CompletionsRequest) -> Response:
    """A completion of plain text, without a chat template."""
    return await openai.completions(request, body)


@router.post("/v1/responses", response_model=ResponseObject, **made_once(OpenAIError, EVENTS))
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """A response. Nothing is stored: the conversation comes in `input`."""
    return await responses.respond(request, body)


@router.post("/v1/embeddings", response_model=EmbeddingList, **made_once(OpenAIError, in_session=False))
async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    """Vectors of texts, or of lists of token ids."""
    return await openai.embeddings(request, body)


@router.get("/kawai/v1/models", include_in_schema=False)
@router.get("/ai/v1/models", include_in_schema=False)
@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> Response:
    """The models that answer, and the variants of their names."""
    state = request.app.state
    return json_response(openai.models(state.registry, state.started_at, variants=not state.settings.simple_model_map))


@router.get("/v1/models/{model_id}", response_model=Model)
async def model(request: Request, model_id: str) -> Response:
    """One model, by any name it answers to."""
    state = request.app.state
    return json_response(openai.find_model(state.registry, state.started_at, model_id))


@router.post("/ai/v1/chat/completions", response_model=ChatCompletion, **made_once(OpenAIError, PIECES))
async def gateway_chat(request: Request, body: ChatCompletionsRequest) -> Response:
    """AI Service V1's chat: streams carry `{"content": "…"}`, and at last [DONE]."""
    return await gateway.chat(request, body)


@router.post("/kawai/v1/chat/completions", response_model=ChatCompletion, **made_once(OpenAIError, CHUNKS))
async def kawai_chat(request: Request, body: ChatCompletionsRequest) -> Response:
    """A chat completion with Kawai's defaults."""
    return await kawai.chat(request, body)
