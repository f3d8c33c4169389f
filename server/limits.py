"""The bounds on what reaches the engine, each with its reason and the public advisory where there is one.

vLLM's serving layer is called without the HTTP layer around it, so what that would refuse must be refused here.
Owns the numbers, the names of refused parameters and the checks of small free-form fields; those of JSON Schemas
stand in json_schema.py. Knows no dialect, and not what the worker knows: a model's vocabulary and its context.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from server.core import tracing
from server.core.errors import InvalidRequest
from server.errors import short
from server.json_schema import check_schema as check_schema

MAX_N = 4
"""Answers to one prompt. Each is copied and scheduled by itself: CVE-2026-34756 (GHSA-3mwp-wvh9-7528)."""

MAX_PROMPTS = 128
"""Prompts of one plain completion; each becomes a request to the engine: CVE-2026-73559 (GHSA-87x5-vmc3-756j)."""

MAX_STOP = 4
"""Stop strings, as many as OpenAI and vLLM take: each is looked for after every token."""

MAX_STOP_LENGTH = 256
"""Characters of a stop string. That many are held back from a stream while it might begin."""

MAX_STOP_TOKEN_IDS = 16
"""The sampler's table has room for 128; one more raises inside the engine."""

MAX_TOP_LOGPROBS = 20
"""For a token, as many as OpenAI gives. Never -1: that is the whole vocabulary at every token."""

MIN_XTC_THRESHOLD = 0.001
"""Below it nearly the whole vocabulary is sorted at every token, and the whole batch waits for that."""

MAX_LOGIT_BIAS = 300
"""Entries. The sampler's table has room for 1,024; one more raises inside the engine."""

MAX_BIAS = 100
"""A bias is from -100 to 100, as OpenAI has it; an infinite one would leave nothing to sample."""

MAX_TOKEN_ID = 2**31 - 1
"""Token ids travel as 32-bit numbers."""

MAX_MESSAGES = 2048
"""Each is parsed and rendered by the chat template before the prompt's length is known."""

MAX_TOOLS = 128
"""As many as OpenAI takes: each is written into the prompt, and may be compiled into a grammar."""

MAX_TOOL_NAME = 64
"""Characters of a tool's name, as OpenAI and Anthropic have it."""

TOOL_NAME = rf"^[A-Za-z0-9_-]{{1,{MAX_TOOL_NAME}}}$"
"""A tool's name is written into prompts and grammars as it stands, so it has nothing to quote."""

MAX_HEADER_BYTES = 16 * 1024
"""Of all headers of a request together: CVE-2025-48956 (GHSA-rxc4-3w6r-4v47)."""

MAX_EMBEDDING_INPUTS = 2048
"""Texts in one request, as OpenAI has it."""

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""As W3C's Trace Context has it; what is otherwise is to be ignored."""

_TEMPLATE = "the chat template is the model's own"
_GRAMMAR = "give a JSON Schema in the field the dialect has for it"
_PROMPT = "the prompt is built from what is sent, by the model's own template"
_MEDIA = "no request chooses how media are loaded"
_CLUSTER = "where caches are kept is the server's affair"
_SAMPLING = "this way of searching for an answer is not offered"
_TOKENS = "tokens are not chosen one by one; use logit_bias"

REFUSED: dict[str, str] = {
    "chat_template": f"{_TEMPLATE}: a template is a program (CVE-2025-61620, CVE-2026-115911)",
    "documents": f"{_TEMPLATE}, and takes no documents; put them into a message",
    "continue_final_message": _TEMPLATE,
    "add_special_tokens": _TEMPLATE,
    "prompt_embeds": "a prompt is text; tensors from outside are not loaded (CVE-2025-62164)",
    "prompt_token_ids": f"{_PROMPT}; /v1/completions takes tokens in prompt",
    "previous_input_messages": _PROMPT,
    "truncate_prompt_tokens": "a prompt that does not fit is refused, not cut",
    "truncation_side": "a prompt that does not fit is refused, not cut",
    "suffix": "the models served here do not fill in a middle",
    "prompt_logprobs": "it takes the memory of a vocabulary for every token of the prompt",
    "logprob_token_ids": f"{_TOKENS} or top_logprobs",
    "bad_words": f"{_TOKENS} (CVE-2026-93989)",
    "allowed_token_ids": f"{_TOKENS} (CVE-2026-93840)",
    "structured_outputs": f"{_GRAMMAR} (CVE-2025-48942, CVE-2025-48943, CVE-2026-55574)",
    "guided_json": _GRAMMAR,
    "guided_regex": f"{_GRAMMAR} (CVE-2025-48943)",
    "guided_choice": _GRAMMAR,
    "guided_grammar": f"{_GRAMMAR} (CVE-2026-25048)",
    "guided_decoding_backend": "the server chooses what compiles grammars (CVE-2025-32381)",
    "guided_whitespace_pattern": _GRAMMAR,
    "structural_tag": _GRAMMAR,
    "regex": f"{_GRAMMAR} (CVE-2025-48943)",
    "grammar": f"{_GRAMMAR} (CVE-2026-25048)",
    "use_beam_search": _SAMPLING,
    "best_of": _SAMPLING,
    "length_penalty": _SAMPLING,
    "repetition_detection": _SAMPLING,
    "vllm_xargs": "the engine's own arguments are not for requests",
    "logits_processors": "the engine's own arguments are not for requests",
    "kv_transfer_params": f"{_CLUSTER} (CVE-2026-94626)",
    "ec_transfer_params": _CLUSTER,
    "cache_salt": f"{_CLUSTER} (CVE-2026-105756)",
    "mm_processor_kwargs": f"{_MEDIA} (CVE-2026-114052)",
    "media_io_kwargs": f"{_MEDIA} (CVE-2026-105760)",
    "mm_payload": _MEDIA,
    "return_mm_kwargs": _MEDIA,
    "priority": "requests do not choose their place in the queue",
    "request_id": "the server names its requests; X-Request-Id of the answer has the name",
    "return_token_ids": "answers are text",
    "return_tokens_as_token_ids": "answers are text",
    "return_token_offsets": "answers are text",
    "return_prompt_text": "send return_prompt",
    "enable_response_messages": "send return_prompt to /v1/chat/completions",
    "functions": "send tools",
    "function_call": "send tool_choice",
    "watermarking": "answers are not marked",
    "stream_interval": "how a stream is cut is the server's affair",
}
"""Parameters of the engine no request may set, and why: they would change the answer unseen, or endanger the engine.
What would only be without effect is not here; the dialects ignore that and say so."""

TEMPLATE_KWARGS = frozenset({"enable_thinking"})
"""What a request may tell the chat template. The rest reaches the renderer's own arguments, a template among them:
CVE-2025-62426 (GHSA-69j4-grxj-j64p), CVE-2026-115918 (GHSA-x567-49g5-p4cf)."""


def traceparent(headers: Mapping[str, str]) -> str:
    """What the request's jobs belong to: its own span, or its client's where none is made."""
    return tracing.current().traceparent or clients_traceparent(headers)


def clients_traceparent(headers: Mapping[str, str]) -> str:
    """The trace that a request is to be part of; empty if there is none or not a proper one."""
    given = headers.get("traceparent", "")
    return given if TRACEPARENT.fullmatch(given) else ""


def refuse(fields: Iterable[str] | Mapping[str, Any]) -> None:
    """Raises InvalidRequest for the first field in REFUSED; null, false and what is empty are as good as left out."""
    for name in fields:
        if name not in REFUSED:
            continue
        got = ""
        if isinstance(fields, Mapping):
            if not fields[name]:
                continue
            got = f" (got {short(fields[name])})"
        raise InvalidRequest(f"{name}: not accepted here: {REFUSED[name]}{got}", param=name)


def check_template_kwargs(kwargs: Any, where: str = "chat_template_kwargs") -> None:
    """Lets `enable_thinking`, true or false, pass and nothing else. Raises InvalidRequest."""
    if not isinstance(kwargs, dict):
        raise InvalidRequest(f"{where}: must be an object (got {short(kwargs)})", param=where)
    for key, value in kwargs.items():
        place = f"{where}.{_name(key)}"
        if key not in TEMPLATE_KWARGS:
            told = f"not accepted here: a template takes {', '.join(sorted(TEMPLATE_KWARGS))} and nothing else"
            raise InvalidRequest(f"{place}: {told} (got {short(value)})", param=place)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{place}: must be true or false (got {short(value)})", param=place)


def check_logit_bias(bias: Any, where: str = "logit_bias") -> None:
    """Token ids as decimal strings, each with a number from -100 to 100. Raises InvalidRequest.

    Whether the model has such a token only its worker knows.
    """
    if not isinstance(bias, dict):
        raise InvalidRequest(f"{where}: must be an object of token ids and biases (got {short(bias)})", param=where)
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"{where}: may have {MAX_LOGIT_BIAS} entries, not {len(bias)}", param=where)
    for token, value in bias.items():
        place = f"{where}.{_name(token)}"
        # The length comes first: int() of very long digits is slow, and of more than 4,300 raises.
        digits = isinstance(token, str) and len(token) <= 10 and token.isascii() and token.isdecimal()
        if not digits or int(token) > MAX_TOKEN_ID:
            told = f"a token id is a whole number from 0 to {MAX_TOKEN_ID}"
            raise InvalidRequest(f"{place}: {told} (got {short(token)})", param=where)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -MAX_BIAS <= value <= MAX_BIAS:
            told = f"must be a number from -{MAX_BIAS} to {MAX_BIAS}"
            raise InvalidRequest(f"{place}: {told} (got {short(value)})", param=where)


def _name(key: Any) -> str:
    text = str(key).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."
