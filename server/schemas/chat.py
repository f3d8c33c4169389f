"""Wire types of `/chat`."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag

from server.limits import MAX_MESSAGES
from server.schemas.common import MANY, ONE, Many, one_or_many
from server.schemas.parameters import SamplingParameters, Switch

SESSION_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""Printable ASCII without spaces: it travels in a header."""
SessionId = Annotated[str, Field(pattern=f"^{SESSION_ID.pattern}$", examples=["session-123"])]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(ONE)] | Annotated[Many[TextPart], Tag(MANY)],
        one_or_many("a string or a list of text parts"),
    ]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = Field(False, description="Send a last chunk that counts the tokens")


class ChatRequest(SamplingParameters):
    """Unknown fields are ignored and named in the response's `X-Ignored-Fields`."""

    model_config = ConfigDict(strict=True, extra="allow")

    messages: Many[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
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
    enable_thinking: Switch | None = Field(
        None,
        description="Think before answering; thoughts come as `reasoning`. If left out, as `model` and "
        "`reasoning_effort` say, else not",
    )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatUsage(Usage):
    """`output_tokens` are the `completion_tokens`, thoughts included, by another name."""

    reasoning_tokens: int
    output_tokens: int
    tokens_per_second: float


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning: str | None = Field(None, description="What it thought, with `enable_thinking`")


class Choice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"] | str | None
    logprobs: dict[str, Any] | None = None


class Source(BaseModel):
    """A past chat that was shown to the model."""

    id: int
    session_id: str
    similarity: float


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    session_id: str
    prompt: str | None = Field(None, description="The rendered prompt, with `return_prompt`")
    sources: list[Source] | None = Field(None, description="What a `-search` model was shown of past chats")
