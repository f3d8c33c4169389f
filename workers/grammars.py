"""The grammars that tool calls are held to: vLLM's own, with a bound on white space.

`disable_any_whitespace` reaches the JSON of `response_format` and not that of tool calls, where a small model can
fill up `max_tokens` with spaces as well. Knows vLLM's registry of these grammars and nothing else of it.
"""

from collections.abc import Callable
from typing import Any

MAX_WHITESPACE = 1
"""Characters in a row between two tokens of JSON: what models write after a colon and a comma."""


def bound_whitespace() -> None:
    """Replace each builder of vLLM's registry by one whose grammars have the bound. For once, before the engine."""
    from vllm.tool_parsers import structural_tag_registry as registry

    for model, build in list(registry._VLLM_STRUCTURAL_TAG_REGISTRY.items()):
        registry.register_vllm_structural_tag(model)(_bounded(build))


def _bounded(build: Callable[..., Any]) -> Callable[..., Any]:
    def built(*args: Any, **kwargs: Any) -> Any:
        tag = build(*args, **kwargs)
        if tag is not None:
            _bound(tag.format)
        return tag

    return built


def _bound(node: Any) -> None:
    """Every JSON in a format of xgrammar's and in the formats within."""
    if getattr(node, "type", None) == "json_schema":
        node.max_whitespace_cnt = MAX_WHITESPACE
    for name in ("content", "tags", "elements"):
        inner = getattr(node, name, None) or []
        for part in inner if isinstance(inner, list) else [inner]:
            _bound(part)
