"""Messages as every dialect has them: a role, and a content that is a text or a list of parts."""

from typing import Any

from server.core.registry import Modality

Message = dict[str, Any]

MEDIA: dict[str, Modality] = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
}
"""What a part of a content carries that is no text, by its type, in every dialect."""


def plain(content: Any) -> str:
    """The text of a message's content; of what is none, nothing."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return "\n".join(text for text in texts if text and isinstance(text, str))


def last_question(messages: list[Message]) -> str:
    """The text of the user's last message that has any: in a tool loop the latest ones carry results."""
    asked = (plain(message.get("content")) for message in reversed(messages) if message.get("role") == "user")
    return next(filter(None, asked), "")


def answer(messages: list[Message]) -> str:
    """The text of the assistant's message at the end."""
    last = messages[-1] if messages else {}
    return plain(last.get("content")) if last.get("role") == "assistant" else ""


def excerpt(messages: list[Message]) -> str:
    """A past chat in two lines: what was asked last, and the answer. Empty where nothing was answered."""
    answered = answer(messages).strip()
    return f"Question: {last_question(messages).strip()}\nAnswer: {answered}" if answered else ""


def recalled(excerpts: list[str]) -> str:
    """Past chats as they are put before a question."""
    return "\n\n".join(["From earlier chats with this user:", *excerpts, "The question now:"])
