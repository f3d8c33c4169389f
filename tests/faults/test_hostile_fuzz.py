"""Whatever bytes come: never a 500, never a hang, never a process lost, and JSON in the dialect's shape."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import dialect_of
from tests.faults.guarded import SILENT, Guarded
from tests.faults.raw import ask
from tests.faults.rig import MODEL
from tests.faults.test_hostile_http import SHAPES

PATHS = [
    "/chat", "/embeddings", "/models", "/chat/history", "/chat/sessions", "/chat/stats", "/chat/similar", "/usage",
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models", "/v1/models/x",
    "/v1/messages", "/v1/messages/count_tokens", "/ai/v1/chat/completions", "/kawai/v1/chat/completions",
    "/health/live", "/docs", "/openapi.json", "/nope", "/",
]  # fmt: skip
TAILS = ["", "/", "/..", "/%2e%2e/chat", "%00", "%ff", "?", "?limit=1&limit=x", "?session_id=%00", "?offset=%ed%a0%80",
         "?model=" + "a" * 300, "?limit=" + "9" * 400, "#x", ";x=y", "?%", "%zz", "/\u00e9"]  # fmt: skip
LINES = st.binary(max_size=40)
WORDS = st.sampled_from([
    b"", b"x", b"-1", b"0", b"chunked", b"identity", b"close", b"keep-alive", b"100-continue", b"websocket", b"gzip",
    b"application/json", b"text/plain; charset=utf-7", b"multipart/form-data", b"null", b"*", b"a b", b"\xe9",
    b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", b"a\tb", b"a\x00b", b"https://chat.example.com",
    b"x" * 20_000, b"bytes=0-1", b"9" * 30, b"2023-06-01",
])  # fmt: skip
NAMES = st.sampled_from([
    b"Host", b"Connection", b"Upgrade", b"Expect", b"Content-Type", b"Content-Encoding", b"Transfer-Encoding",
    b"Content-Length", b"Origin", b"Access-Control-Request-Method", b"X-Session-Id", b"X-Request-Id", b"traceparent",
    b"X-Client-Request-Id", b"Idempotency-Key", b"Last-Event-ID", b"x-api-key", b"Authorization", b"Cookie", b"Accept",
    b"anthropic-version", b"Range", b"X-HTTP-Method-Override", b"X-Forwarded-For", b"Forwarded", b"TE", b"Trailer",
])  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["messages", "model", "prompt", "input", "max_tokens", "stream", "session_id", "query", "text", "tools", "n",
          "temperature", "response_format", "logit_bias", "stop", "system", "metadata", "thinking"]  # fmt: skip
RIGHT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
NESTED = [b"[" * 5000, b'{"a":' * 5000, b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}", b'{"max_tokens":1e400}']


@st.composite
def requests(draw: st.DrawFn, key: str) -> tuple[str, str, bytes]:
    """A method, a path and the bytes of a request: right in most places, and in some not."""
    path = draw(st.sampled_from(PATHS)) + draw(st.sampled_from([""] * 8 + TAILS))
    method = draw(
        st.sampled_from(
            ["POST"] * 6 + ["GET"] * 4 + ["HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "PATCH", "PROPFIND", "x"]
        )
    )
    # Only the chat of two dialects reaches a worker here: the others name a model that has none
    body: Any = RIGHT if "chat" in path else RIGHT | {"prompt": "x", "input": "x", "query": "x"}
    body = dict(body)
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        body[name] = draw(VALUES)
    if "chat" not in path:
        body["model"] = SILENT
    content = json.dumps(body).encode()
    content = draw(st.sampled_from([content] * 8 + NESTED) | st.binary(max_size=60))
    if draw(st.integers(0, 5)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(LINES) + content[at:]
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: x"]
    if draw(st.integers(0, 9)):
        lines.append(b"Authorization: Bearer " + key.encode())
    lines += [name + b": " + draw(WORDS) for name in draw(st.lists(NAMES, max_size=3))]
    framing = draw(st.integers(0, 9))
    if framing == 0:
        lines.append(b"Transfer-Encoding: chunked")
        content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    elif framing == 1:
        lines.append(b"Content-Length: %d" % draw(st.integers(0, len(content))))
    elif framing > 1:
        lines.append(b"Content-Length: %d" % len(content))
    head = b"\r\n".join(lines)
    if draw(st.integers(0, 7)) == 0:
        at = draw(st.integers(0, len(head)))
        head = head[:at] + draw(LINES) + head[at:]
    return method, path, head + b"\r\n\r\n" + content


@given(data=st.data())
@settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
def test_any_bytes_are_answered_in_shape_or_hung_up_on(guarded: Guarded, data: st.DataObject) -> None:
    method, path, content = data.draw(requests(guarded.key))
    # When it is sent, then the server says something or hangs up, and does not hang (TimeoutError)
    answer = ask(guarded.port, content, method)
    if answer is None or method == "HEAD" or answer.status < 400:
        return
    # And an error is one of the client's, or says what is not there, in the shape of the dialect
    assert answer.status < 500 or answer.status in (503, 529), answer
    assert answer.headers["content-type"] in ("application/json", "text/plain; charset=utf-8"), answer
    if answer.headers["content-type"] == "application/json":
        forms = {dialect_of(path, {}), dialect_of(path, {"anthropic-version": ""}), "native"}
        assert any(_fits(SHAPES[form], answer.told) for form in forms), answer


def _fits(shape: Any, told: Any) -> bool:
    try:
        shape.model_validate(told, extra="forbid")
    except ValueError:
        return False
    return True


async def test_the_service_is_as_well_as_before(guarded: Guarded) -> None:
    """After all of the above, in this module's order."""
    await guarded.is_well()
