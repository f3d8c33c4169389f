"""Wire types of OpenAI's `/v1/responses`.

What stands here is honoured; of other fields `responses.REFUSED` names those that are refused, the rest is ignored
and named in `X-Ignored-Fields`. Nothing is stored for later: the whole conversation comes in `input`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag, field_validator

from server.limits import MAX_MESSAGES, MAX_TOOL_NAME, MAX_TOOLS, MAX_TOP_LOGPROBS, TOOL_NAME
from server.schemas.common import MANY, OBJECT, ONE, Many, by_type, one_or_many, word_or_object
from server.schemas.messages import Strict, object_in
from server.schemas.openai import INT64, ModelName, TextFormat
from server.schemas.parameters import MAX_INT32


class InputText(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputImage(Strict):
    type: Literal["input_image"]
    image_url: str = Field(min_length=1)
    detail: Literal["low", "high", "auto", "original"] = "auto"


class Refusal(Strict):
    type: Literal["refusal"]
    refusal: str


ContentPart = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[InputText, Tag("<output_text>")]
    | Annotated[InputText, Tag("<text>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[Refusal, Tag("<refusal>")],
    by_type("input_text", "output_text", "text", "input_image", "refusal"),
]


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[
        Annotated[str, Tag(ONE)] | Annotated[Many[ContentPart], Tag(MANY)],
        one_or_many("a string or a list of parts"),
    ]


class FunctionCall(Strict):
    type: Literal["function_call"]
    id: str | None = None
    call_id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=MAX_TOOL_NAME)
    arguments: str

    _arguments = field_validator("arguments")(object_in)


class FunctionCallOutput(Strict):
    type: Literal["function_call_output"]
    id: str | None = None
    call_id: str = Field(min_length=1, max_length=256)
    output: Annotated[
        Annotated[str, Tag(ONE)] | Annotated[Many[InputText], Tag(MANY)],
        one_or_many("a string or a list of texts"),
    ]

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class ReasoningText(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    id: str | None = None
    summary: Many[ReasoningText] = Field(default_factory=list)
    content: Many[ReasoningText] | None = None


Item = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[FunctionCall, Tag("<function_call>")]
    | Annotated[FunctionCallOutput, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    by_type("message", "function_call", "function_call_output", "reasoning", default="message"),
]


class FunctionTool(Strict):
    type: Literal["function"]
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunctionTool(Strict):
    type: Literal["function"]
    name: str = Field(min_length=1)


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    name: str = Field("answer", min_length=1, max_length=64)
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Strict):
    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[TextFormat, Tag("<json_object>")]
            | Annotated[SchemaFormat, Tag("<json_schema>")],
            by_type("text", "json_object", "json_schema"),
        ]
        | None
    ) = None


class Reasoning(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponsesRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    input: Annotated[
        Annotated[str, Tag(ONE)] | Annotated[Many[Item], Field(min_length=1, max_length=MAX_MESSAGES), Tag(MANY)],
        one_or_many("a string or a list of items"),
    ] = Field(examples=["What is the capital of France?"])
    model: ModelName = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT32)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool | None = None
    tools: Many[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag(ONE)] | Annotated[ChosenFunctionTool, Tag(OBJECT)],
            word_or_object('"none", "auto", "required", or an object that names a function'),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Many[str] | None = Field(None, max_length=16, description="`message.output_text.logprobs`; others ignored")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    metadata: Annotated[dict[str, str], Field(fail_fast=True)] | None = Field(None, max_length=16)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
