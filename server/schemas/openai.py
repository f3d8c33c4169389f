"""Wire types of OpenAI's `/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`.

What stands here is honoured. Of other fields, `limits.REFUSED` names those that are refused; the rest is ignored
and named in `X-Ignored-Fields`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag

from server.limits import (
    MAX_EMBEDDING_INPUTS,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOP,
    MAX_STOP_LENGTH,
    MAX_STOP_TOKEN_IDS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
)
from server.schemas.chat import StreamOptions
from server.schemas.common import ID_LISTS, IDS, MANY, ONE, Many, by_type, one_or_many, texts_or_tokens
from server.schemas.embeddings import Text
from server.schemas.messages import ChatMessage, Strict, Tool, ToolChoice
from server.schemas.parameters import MAX_INT32, SamplingParameters, Switch

INT64 = 2**63

ModelName = Annotated[str | None, Field(max_length=128, examples=["qwen3-0.6b"])]
MaxTokens = Annotated[int | None, Field(ge=1, le=MAX_INT32)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = (
    Annotated[
        Annotated[StopString, Tag(ONE)] | Annotated[Many[StopString], Field(max_length=MAX_STOP), Tag(MANY)],
        one_or_many("a string or a list of strings"),
    ]
    | None
)
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
TokenIds = Annotated[Many[TokenId], Field(min_length=1)]


class TextFormat(Strict):
    type: Literal["text", "json_object"]


class JsonSchema(Strict):
    name: str = Field("answer", min_length=1, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[TextFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by_type("text", "json_object", "json_schema"),
]


class Generation(BaseModel):
    """What chats and plain completions have in common."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: ModelName = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    stop: Stop = None
    stop_token_ids: Many[TokenId] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: Annotated[dict[str, float], Field(fail_fast=True)] | None = Field(None, max_length=MAX_LOGIT_BIAS)
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT32)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    def shared_fields(self) -> dict[str, Any]:
        """By the engine's names, without what was not given."""
        names = set(Generation.model_fields) - {"model", "stream", "stream_options"}
        fields = self.model_dump(include=names, exclude_none=True, by_alias=True)
        fields["stream"] = bool(self.stream)
        if fields.get("top_p") == 0:
            fields["top_p"] = 1e-6  # the engine wants more than 0, and this little keeps one token all the same
        return fields


class ChatCompletionsRequest(SamplingParameters, Generation):
    model_config = ConfigDict(strict=True, extra="allow")

    messages: Many[ChatMessage] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    max_completion_tokens: MaxTokens = None
    max_tokens: MaxTokens = Field(None, description="The older name of `max_completion_tokens`")
    tools: Many[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: Switch | None = None
    thinking_budget: int | None = Field(None, ge=0, le=MAX_INT32, description="Most tokens to think with")
    thinking_token_budget: int | None = Field(None, ge=0, le=MAX_INT32, description="The same, by the engine's name")
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Only `enable_thinking`")


class CompletionsRequest(Generation):
    prompt: Annotated[
        Annotated[str, Tag(ONE)]
        | Annotated[Many[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag(MANY)]
        | Annotated[Many[TokenId], Field(min_length=1), Tag(IDS)]
        | Annotated[Many[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag(ID_LISTS)],
        texts_or_tokens(),
    ] = Field(examples=["The capital of France is"])
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT32, description="16 if left out")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT32)
    min_p: float | None = Field(None, ge=0, le=1)


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    input: Annotated[
        Annotated[Text, Tag(ONE)]
        | Annotated[Many[Text], Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS), Tag(MANY)]
        | Annotated[Many[TokenId], Field(min_length=1), Tag(IDS)]
        | Annotated[Many[TokenIds], Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS), Tag(ID_LISTS)],
        texts_or_tokens(),
    ] = Field(examples=["Sample text for embedding"])
    model: Annotated[str | None, Field(max_length=128, examples=["qwen3-embedding-0.6b"])] = None
    dimensions: int | None = Field(None, ge=1, le=65536, description="Keep only the first ones, renormalised")
    encoding_format: Literal["float", "base64"] | None = None
    input_type: Literal["document", "query"] | None = Field(None, description="Whose prompt to use (document)")

    @property
    def texts(self) -> list[Any]:
        """One or many, as many: strings or lists of token ids."""
        one = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if one else list(self.input)
