"""What several wire types share: fields that take one thing or a list of them."""

from typing import Any, Final

from pydantic import Discriminator

ONE: Final = "one"
MANY: Final = "many"
TAGS = frozenset({ONE, MANY})
"""These stand in an error's location where such a field is wrong; nobody sent them, so none are shown."""


def one_or_many(what: str) -> Discriminator:
    """Tells a string from a list, so that an error speaks of the form that was sent and of no other."""

    def tag(value: Any) -> str | None:
        return ONE if isinstance(value, str) else MANY if isinstance(value, list) else None

    return Discriminator(tag, custom_error_type="one_or_many", custom_error_message=f"Input should be {what}")
