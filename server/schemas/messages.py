"""Wire types of OpenAI's chat messages and tools, shared by the dialects that have them."""

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.limits import MAX_TOOL_NAME, TOOL_NAME
from server.schemas.common import MANY, OBJECT, ONE, Many, by_type, one_or_many, word_or_object


class Strict(BaseModel):
    """Unknown fields of nested objects are let through in silence: clients decorate them freely."""

    model_config = ConfigDict(strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Url(Strict):
    url: str = Field(min_length=1)


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: Url


class Audio(Strict):
    data: str = Field(min_length=1, description="Base64")
    format: Literal["wav", "mp3", "flac", "ogg", "m4a", "aac", "opus", "webm"]


class AudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: Audio


class AudioUrlPart(Strict):
    type: Literal["audio_url"]
    audio_url: Url


class VideoPart(Strict):
    """`video_url` is the engine's name; `input_video` and `video` are accepted for it."""

    type: Literal["video_url", "input_video", "video"]
    video_url: Url

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(name := data.get("type"), str) and name in data:
            return {**data, "video_url": data[name] if isinstance(data[name], dict) else {"url": data[name]}}
        return data


class RefusalPart(Strict):
    """Of an assistant's earlier message."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[AudioPart, Tag("<input_audio>")]
    | Annotated[AudioUrlPart, Tag("<audio_url>")]
    | Annotated[VideoPart, Tag("<video_url>")]
    | Annotated[VideoPart, Tag("<input_video>")]
    | Annotated[VideoPart, Tag("<video>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    by_type("text", "image_url", "input_audio", "audio_url", "video_url", "input_video", "video", "refusal"),
]


MAX_DEPTH = 100
"""Objects and lists in each other. What reads and writes them later recurses, and gives up near 1,000."""


def not_too_deep(value: dict[str, Any]) -> dict[str, Any]:
    """The value, if it does not nest too deep. Raises ValueError."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return value
    raise PydanticCustomError("too_deep", "Objects and arrays may nest {most} deep, not more", {"most": MAX_DEPTH})


def object_in(text: str) -> str:
    """The text, if it is a JSON object or nothing at all. Raises ValueError."""
    if not text.strip():
        return text
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise PydanticCustomError("json_object", "Input should be a JSON object in a string")
    not_too_deep(value)
    return text


class CalledFunction(Strict):
    name: str = Field(min_length=1, max_length=MAX_TOOL_NAME)
    arguments: str

    _arguments = field_validator("arguments")(object_in)


class ToolCall(Strict):
    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag(ONE)] | Annotated[Many[Part], Tag(MANY)],
            one_or_many("a string or a list of parts"),
        ]
        | None
    ) = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = Field(None, description="Another name for `reasoning`")

    @model_validator(mode="after")
    def _complete(self) -> "ChatMessage":
        if self.role == "assistant":
            if self.content is None and not self.tool_calls and not self.thought and self.refusal is None:
                raise PydanticCustomError("incomplete", "content: Field required, as there are no tool_calls")
        elif self.content is None:
            raise PydanticCustomError("incomplete", "content: Field required")
        if self.role == "tool" and not self.tool_call_id:
            raise PydanticCustomError("incomplete", "tool_call_id: Field required for the role tool")
        return self

    @property
    def thought(self) -> str | None:
        return self.reasoning if self.reasoning is not None else self.reasoning_content

    def for_engine(self) -> dict[str, Any]:
        """As the chat template knows it."""
        # No template of Qwen3's knows developers; OpenAI's own servers take the one for the other.
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {
            "role": role,
            "content": _content(self.refusal if self.content is None else self.content),
        }
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls and role == "assistant":
            message["tool_calls"] = [_call(call) for call in self.tool_calls]
        if self.tool_call_id is not None and role == "tool":
            message["tool_call_id"] = self.tool_call_id
        if self.thought is not None and role == "assistant":
            message["reasoning"] = self.thought
        return message


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, RefusalPart):
            parts.append({"type": "text", "text": part.refusal})
        elif isinstance(part, VideoPart):
            parts.append({"type": "video_url", "video_url": part.video_url.model_dump()})
        else:
            parts.append(part.model_dump())
    return parts


def _call(call: ToolCall) -> dict[str, Any]:
    dumped = call.model_dump()
    dumped["function"]["arguments"] = call.function.arguments.strip() or "{}"
    return dumped


class Function(Strict):
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema")
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    name: str = Field(min_length=1)


class ChosenTool(Strict):
    type: Literal["function"] = "function"
    function: ChosenFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(ONE)] | Annotated[ChosenTool, Tag(OBJECT)],
    word_or_object('"none", "auto", "required", or an object that names a function'),
]
