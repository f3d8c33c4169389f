"""What several wire types share: fields that take one thing or a list of them."""

from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, Discriminator, Field

T = TypeVar("T")

Many = Annotated[list[T], Field(fail_fast=True)]
"""A list of which only the first wrong entry is told. Every list that a request holds is one: told of each of the two
million that a body has room for, an error takes half a minute and 4 GB to make."""

ONE: Final = "<one>"
MANY: Final = "<many>"
OBJECT: Final = "<object>"
IDS: Final = "<ids>"
ID_LISTS: Final = "<lists of ids>"


def is_tag(step: Any) -> bool:
    """Whether a step of an error's location names a form a field may have; nobody sent it, so it is not shown."""
    return isinstance(step, str) and step.startswith("<") and step.endswith(">")


def one_or_many(what: str) -> Discriminator:
    """Tells a string from a list, so that an error speaks of the form that was sent and of no other."""

    def tag(value: Any) -> str | None:
        return ONE if isinstance(value, str) else MANY if isinstance(value, list) else None

    return Discriminator(tag, custom_error_type="one_or_many", custom_error_message=f"Input should be {what}")


def texts_or_tokens() -> Discriminator:
    """Tells a text, texts, a list of token ids and a list of such lists from each other by the first entry."""

    def tag(value: Any) -> str | None:
        if isinstance(value, list):
            first = value[0] if value else ""
            return MANY if isinstance(first, str) else IDS if isinstance(first, int) else ID_LISTS
        return ONE if isinstance(value, str) else None

    message = "Input should be a string, or a list of strings, of token ids, or of lists of token ids"
    return Discriminator(tag, custom_error_type="texts_or_tokens", custom_error_message=message)


def word_or_object(what: str) -> Discriminator:
    """Tells a word from an object."""

    def tag(value: Any) -> str | None:
        return ONE if isinstance(value, str) else OBJECT if isinstance(value, dict | BaseModel) else None

    return Discriminator(tag, custom_error_type="word_or_object", custom_error_message=f"Input should be {what}")


def by_type(*types: str, default: str | None = None) -> Discriminator:
    """Tells the forms of an object from its `type`; tags are `<type>`, and other types are refused by name."""
    tags = {name: f"<{name}>" for name in types}

    def tag(value: Any) -> str | None:
        given = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", None)
        return tags.get(given) if isinstance(given, str) else None

    message = f"Input should be an object whose type is one of {', '.join(types)}"
    return Discriminator(tag, custom_error_type="by_type", custom_error_message=message)
