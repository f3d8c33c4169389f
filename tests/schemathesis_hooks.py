"""Loaded by schemathesis (SCHEMATHESIS_HOOKS): answers of a few tokens, or each would fill the model's context."""

from typing import Any

import schemathesis

BOUND = {"max_tokens": 8, "max_completion_tokens": 8, "max_output_tokens": 8}


@schemathesis.hook
def map_body(_context: Any, body: Any) -> Any:
    """A body with a bound on what is generated, where it has none of its own."""
    if isinstance(body, dict) and not BOUND.keys() & body.keys():
        if "messages" in body:
            return body | {"max_tokens": BOUND["max_tokens"]}
        if "input" in body:
            return body | {"max_output_tokens": BOUND["max_output_tokens"]}
    return body
