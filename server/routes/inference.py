"""`/chat`, `/embeddings` and `/models` of the service's own dialect."""

from fastapi import APIRouter, Request, Response

from server.dialects import native
from server.keyed import KeyedRoute
from server.routes import KEYED, made_once, streaming
from server.schemas.chat import ChatRequest, ChatResponse
from server.schemas.embeddings import EmbeddingRequest, EmbeddingResponse
from server.schemas.service import ErrorBody, ModelEntry

router = APIRouter(tags=["inference"], route_class=KeyedRoute, responses=KEYED)

STREAM = streaming("A chat.completion.chunk as JSON, at last [DONE]")


@router.post("/chat", response_model=ChatResponse, **made_once(ErrorBody, STREAM))
async def chat(request: Request, body: ChatRequest) -> Response:
    """A chat completion. With `stream` the answer is `chat.completion.chunk` events and `[DONE]`."""
    return await native.chat(request, body)


@router.post("/embeddings", response_model=EmbeddingResponse, **made_once(ErrorBody, in_session=False))
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Vectors of a text, or of up to 256."""
    return await native.embeddings(request, body)


@router.get("/models", response_model=list[ModelEntry], response_model_exclude_none=True)
async def models(request: Request) -> list[ModelEntry]:
    """The models that answer here."""
    return [
        ModelEntry(
            id=model.id,
            name=model.name,
            type=model.type,
            context_length=model.context_length,
            description=model.description,
            stand_in_for=list(model.stand_in_for) or None,
        )
        for model in request.app.state.registry.models
    ]
