"""Wire types of `/chat`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag

from server.schemas.common import MANY, ONE, one_or_many

SessionId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$", examples=["session-123"])]
"""Printable ASCII without spaces: it travels in a header."""


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(ONE)] | Annotated[list[TextPart], Tag(MANY)],
        one_or_many("a string or a list of text parts"),
    ]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = Field(False, description="Send a last chunk that counts the tokens")


class ChatRequest(BaseModel):
    """Unknown fields are ignored and named in the response's `X-Ignored-Fields`."""

    model_config = ConfigDict(strict=True, extra="allow")

    messages: list[Message] = Field(
        min_length=1, examples=[[{"role": "user", "content": "What is the capital of France?"}]]
    )
    model: str | None = Field(
        None, max_length=128, description="The default chat model if left out", examples=["qwen3-0.6b"]
    )
    max_tokens: int = Field(100, ge=1, le=2**31 - 1, description="Most tokens to generate")
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(0.9, ge=0, le=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    session_id: SessionId | None = Field(None, description="Groups chats; made if left out")
    enable_thinking: bool = Field(False, description="Think before answering; thoughts come as `reasoning`")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning: str | None = Field(None, description="What it thought, with `enable_thinking`")


class Choice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"] | str | None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    session_id: str
