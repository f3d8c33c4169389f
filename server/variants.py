"""Models by the names requests give them: an id, or an id with a suffix that switches something on.

qwen3-0.6b-thinking   thinks before it answers
qwen3-0.6b-search     is shown the caller's most similar past chats first
"""

from dataclasses import dataclass

from server.core.registry import ModelSpec, Registry

SUFFIXES = ("-thinking-search", "-thinking", "-search")
"""Longest first: each is also the end of a longer one."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A chat model as it was asked for. `asked` is the id without its suffix, None where none was given."""

    spec: ModelSpec
    asked: str | None = None
    thinking: bool = False
    search: bool = False


def resolve(registry: Registry, name: str | None) -> Variant:
    """The chat model, and what its name switches on. An id of models.yaml wins over a suffix.

    Raises UnknownModel, also for a suffix that there is not.
    """
    if name is not None and registry.get(name) is None:
        for suffix in SUFFIXES:
            base = name.removesuffix(suffix)
            if base != name and registry.get(base) is not None:
                spec = registry.resolve(base, "chat")
                return Variant(spec, base, "-thinking" in suffix, "-search" in suffix)
    return Variant(registry.resolve(name, "chat"), name)


def names(spec: ModelSpec, *, variants: bool) -> list[str]:
    """Every name a model answers to, its own first."""
    return [spec.id, *(spec.id + suffix for suffix in reversed(SUFFIXES) if variants and spec.type == "chat")]
