"""About how many tokens a job's prompt has, told by its bytes: the server has no tokenizer.

Good for sums over many jobs, by which workers are scaled; nothing is refused or billed by it.
"""

from typing import Any

from server.core.conversation import MEDIA

BYTES_A_TOKEN = 4
"""Of UTF-8. With Qwen3's tokenizer a few sentences each of English, Chinese, Japanese, German, Russian and Arabic have
4.6, 5.5, 4.5, 3.6, 6.3 and 4.4, Python 4.3, Markdown 3.5, and JSON full of numbers 2.3."""

PROMPT = ("messages", "system", "tools", "prompt", "input", "instructions")
"""What of a body, in any dialect, the model reads."""


def estimate(body: dict[str, Any], context: str = "") -> int:
    """Tokens of the prompt, at least 1. Token ids count as what they are; pictures and sounds do not count."""
    size = _bytes(context)
    values = [body[name] for name in PROMPT if name in body]
    while values:  # a schema may be nested deeper than Python calls itself
        value = values.pop()
        if isinstance(value, str):
            size += _bytes(value)
        elif isinstance(value, list):
            if value and isinstance(value[0], int):  # token ids, perhaps a million
                size += BYTES_A_TOKEN * len(value)
            else:
                values += value
        elif isinstance(value, dict) and str(value.get("type")) not in MEDIA:
            values += [*value, *value.values()]
    return max(1, round(size / BYTES_A_TOKEN))


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))
