"""Wire types of Anthropic's `/v1/messages` and `/v1/messages/count_tokens`.

What stands here is honoured; other fields are ignored and named in `X-Ignored-Fields`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.limits import MAX_MESSAGES, MAX_STOP, MAX_STOP_LENGTH, MAX_TOOL_NAME, MAX_TOOLS, TOOL_NAME
from server.schemas.common import MANY, ONE, Many, by_type, one_or_many
from server.schemas.messages import Strict, not_too_deep
from server.schemas.parameters import MAX_INT32


class TextBlock(Strict):
    type: Literal["text"]
    text: str


class Base64Source(Strict):
    type: Literal["base64"]
    media_type: str = Field(pattern=r"^image/[a-z0-9.+-]{1,32}$")
    data: str = Field(min_length=1)


class UrlSource(Strict):
    type: Literal["url"]
    url: str = Field(min_length=1)


class ImageBlock(Strict):
    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("<base64>")] | Annotated[UrlSource, Tag("<url>")], by_type("base64", "url")
    ]


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=MAX_TOOL_NAME)
    input: dict[str, Any] = Field(default_factory=dict)

    _input = field_validator("input")(not_too_deep)


ResultPart = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")], by_type("text", "image")
]


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=256)
    content: (
        Annotated[
            Annotated[str, Tag(ONE)] | Annotated[Many[ResultPart], Tag(MANY)],
            one_or_many("a string or a list of blocks"),
        ]
        | None
    ) = None
    is_error: bool | None = None


class ThinkingBlock(Strict):
    """Of an earlier answer. The signature is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Strict):
    type: Literal["redacted_thinking"]
    data: str


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")],
    by_type("text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking"),
]
TextOrBlocks = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[Many[Block], Tag(MANY)], one_or_many("a string or a list of blocks")
]


class MessageParam(Strict):
    role: Literal["user", "assistant", "system"]
    content: TextOrBlocks


class ToolParam(Strict):
    """A tool of the client's own; those that Anthropic's servers run (`web_search_…`) do not exist here."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoiceParam(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> "ToolChoiceParam":
        if self.type == "tool" and not self.name:
            raise PydanticCustomError("incomplete", "name: Field required for the type tool")
        return self


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1024, le=MAX_INT32)

    @model_validator(mode="after")
    def _bounded(self) -> "Thinking":
        if self.type == "enabled" and self.budget_tokens is None:
            raise PydanticCustomError("incomplete", "budget_tokens: Field required for the type enabled")
        return self


class OutputFormat(Strict):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountTokensRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: Annotated[str | None, Field(max_length=128, examples=["qwen3-0.6b"])] = None
    messages: Many[MessageParam] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    system: (
        Annotated[
            Annotated[str, Tag(ONE)] | Annotated[Many[TextBlock], Tag(MANY)],
            one_or_many("a string or a list of text blocks"),
        ]
        | None
    ) = None
    tools: Many[ToolParam] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoiceParam | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1, le=MAX_INT32, examples=[64])
    stop_sequences: Many[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]] | None = Field(
        None, max_length=MAX_STOP
    )
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT32)
    output_config: OutputConfig | None = None
