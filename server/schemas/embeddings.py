"""Wire types of `/embeddings`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.schemas.common import MANY, ONE, Many, one_or_many

MAX_TEXTS = 256

Text = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(BaseModel):
    """Exactly one of `text` and `input`. Unknown fields are ignored and named in `X-Ignored-Fields`."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        json_schema_extra={"oneOf": [{"required": ["text"]}, {"required": ["input"]}]},
    )

    text: Text | None = Field(None, examples=["Sample text for embedding"])
    input: (
        Annotated[
            Annotated[Text, Tag(ONE)] | Annotated[Many[Text], Field(min_length=1, max_length=MAX_TEXTS), Tag(MANY)],
            one_or_many("a string or a list of strings"),
        ]
        | None
    ) = Field(None, description="OpenAI's name for it: a text or a list of texts")
    model: str | None = Field(
        None, max_length=128, description="The default embedding model if left out", examples=["qwen3-embedding-0.6b"]
    )

    @model_validator(mode="after")
    def _one_of(self) -> "EmbeddingRequest":
        if self.text is None and self.input is None:
            raise PydanticCustomError("missing", "text: Field required (or OpenAI's name for it, input)")
        if self.text is not None and self.input is not None:
            raise PydanticCustomError("both", "text: give text or input, not both")
        return self

    @property
    def texts(self) -> list[str]:
        given = self.text if self.text is not None else self.input
        return [given] if isinstance(given, str) else list(given or [])


class Embedding(BaseModel):
    object: Literal["embedding"]
    embedding: list[float]
    index: int


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["embedding"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
