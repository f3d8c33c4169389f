"""HTTP that is broken, endless, ambiguous or very slow: refused in shape, cut, and nobody else is harmed."""

import json
import re
import socket
import time
from contextlib import ExitStack

import pytest

from server.errors import Dialect, dialect_of
from server.schemas.dialects import AnthropicError, OpenAIError
from server.schemas.service import ErrorBody
from tests.faults.guarded import MAX_CONNECTIONS, RECEIVE_TIMEOUT_S, Guarded
from tests.faults.raw import Answer, ask, connect, everything, read_answer, until_closed
from tests.faults.rig import MODEL

SHAPES: dict[Dialect, type[ErrorBody | OpenAIError | AnthropicError]] = {
    "native": ErrorBody,
    "openai": OpenAIError,
    "anthropic": AnthropicError,
}
CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
PATIENCE_S = 4 * RECEIVE_TIMEOUT_S + 4


def in_shape(answer: Answer | None, path: str) -> None:
    """A refusal as the path's dialect has it."""
    assert answer is not None
    assert 400 <= answer.status < 500
    assert answer.headers["content-type"] == "application/json"
    SHAPES[dialect_of(path, {})].model_validate(answer.told, extra="forbid")


def post(path: str, key: str, *headers: bytes, body: bytes = CHAT, framed: bool = True) -> bytes:
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Host: x", b"Authorization: Bearer " + key.encode(), *headers]
    if framed:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


pytestmark = pytest.mark.usefixtures("nobody_else_was_harmed")


@pytest.mark.parametrize(
    "headers",
    [
        # Each of two proxies would see another end of this request
        (b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding: chunked", b"Content-Length: 5"),
        (b"Content-Length: 5", b"Content-Length: 6"),
        (b"Content-Length: 5", b"Content-Length: 5"),
        (b"Content-Length: 5, 6",),
        (b"Content-Length: +5",),
        (b"Content-Length: 0x5",),
        (b"Content-Length: -1",),
        (b"Content-Length: 99999999999999999999999",),
        (b"Content-Length : 5",),
        (b"Transfer-Encoding: chunked, identity",),
        (b"Transfer-Encoding: xchunked",),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
        (b"Transfer-Encoding : chunked",),
        (b" Transfer-Encoding: chunked",),
        (b"X: y\nTransfer-Encoding: chunked",),
        # What a header may not hold
        (b"X-Session-Id: a\x00b", b"Content-Length: 5"),
        (b"traceparent: a\x01b", b"Content-Length: 5"),
        (b"X-Request-Id: a\x7fb", b"Content-Length: 5"),
        (b"x-api-key: a\rb", b"Content-Length: 5"),
        (b"X Y: z", b"Content-Length: 5"),
        (b": z", b"Content-Length: 5"),
    ],
    ids=lambda headers: b"; ".join(headers).decode("latin-1"),
)
def test_an_ambiguous_request_is_refused_and_nothing_after_it_answered(
    guarded: Guarded, paths: list[str], headers: tuple[bytes, ...]
) -> None:
    # Given a request whose end or headers are read differently by different programs, and one hidden behind it
    hidden = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\nX: "
    for path in paths:
        data = post(path, guarded.key, *headers, body=hidden, framed=False)
        # When it is sent
        said = everything(guarded.port, data)
        # Then it is refused in shape, and the hidden one was never seen
        assert said.count(b"HTTP/1.1 ") == 1, path
        assert b"smuggled" not in said
        in_shape(ask(guarded.port, data), path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /chat HTTP/9.9\r\n\r\n",
        b"GET  /chat HTTP/1.1\r\n\r\n",
        b"GET /chat\x00 HTTP/1.1\r\n\r\n",
        b"G\x00T /chat HTTP/1.1\r\n\r\n",
        b"FETCH /chat HTTP/1.1\r\n\r\n",
        b"GET chat HTTP/1.1\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /chat\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 100 + b"\r\n\r\n",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_http_is_told_so(guarded: Guarded, data: bytes) -> None:
    in_shape(ask(guarded.port, data), "")


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nab\r\n0\r\n\r\n",
        b"-1\r\nab\r\n0\r\n\r\n",
        b"ffffffffffffffffff\r\nab\r\n",
        b"2\r\nabcd\r\n0\r\n\r\n",
        b"2;\x00=1\r\nab\r\n0\r\n\r\n",
        b"2\nab\n0\n\n",
        b"0\r\nX Y: z\r\n\r\n",
    ],
    ids=repr,
)
def test_chunks_that_are_none_are_refused_in_shape(guarded: Guarded, paths: list[str], body: bytes) -> None:
    for path in paths:
        data = post(path, guarded.key, b"Transfer-Encoding: chunked", body=body, framed=False)
        in_shape(ask(guarded.port, data), path)


@pytest.mark.parametrize(
    "path", ["/%00", "/chat/%2e%2e/models", "//chat", "/v1/models/%ed%a0%80", "/v1/models/" + "a" * 9000]
)
def test_a_strange_path_is_not_found(guarded: Guarded, path: str) -> None:
    answer = ask(guarded.port, post(path, guarded.key).replace(b"POST", b"GET", 1), "GET")
    in_shape(answer, path)
    assert answer is not None
    assert answer.status in (404, 405)


def test_headers_after_the_body_are_no_headers(guarded: Guarded) -> None:
    # Given a request in chunks whose key, or whose session, comes after the body
    chunks = b"%x\r\n%b\r\n0\r\n" % (len(CHAT), CHAT)
    keyless = b"POST /chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    late_key = keyless + b"Authorization: Bearer " + guarded.key.encode() + b"\r\n\r\n"
    late_session = post("/v1/chat/completions", guarded.key, b"Transfer-Encoding: chunked", body=b"", framed=False)
    # Then neither counts
    answer = ask(guarded.port, late_key)
    assert answer is not None
    assert answer.status == 401
    answer = ask(guarded.port, late_session + chunks + b"X-Session-Id: late\r\n\r\n")
    assert answer is not None
    assert (answer.status, answer.headers["x-session-id"] == "late") == (200, False)


@pytest.mark.parametrize(
    "start",
    [
        b"GET /models HTTP/1.1\r\nX-Endless: ",
        b"GET /",
        b"POST /chat HTTP/1.1\r\nAuthorization: Bearer KEY\r\nTransfer-Encoding: chunked\r\n\r\n2;",
        b"POST /chat HTTP/1.1\r\nAuthorization: Bearer KEY\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ",
    ],
    ids=["header", "path", "chunk extension", "trailer"],
)
def test_what_never_ends_is_cut_by_its_size(guarded: Guarded, start: bytes) -> None:
    def send_on() -> None:
        for _ in range(8192):
            connection.sendall(b"a" * 4096)

    with connect(guarded.port) as connection:
        connection.sendall(start.replace(b"KEY", guarded.key.encode()))
        with pytest.raises(ConnectionError):
            send_on()


@pytest.mark.parametrize(
    "start",
    [b"", b"GET /models HTT", b"POST /chat HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"\r\n"],
    ids=["nothing", "first line", "headers", "line breaks"],
)
def test_a_head_that_does_not_end_is_cut_by_a_timeout(guarded: Guarded, start: bytes) -> None:
    # Given a client that sends a byte now and then, for ever
    with connect(guarded.port, timeout_s=0.3) as connection:
        connection.sendall(start)
        began = time.monotonic()
        # Then it is hung up on, however steadily the bytes come
        while True:
            try:
                if not connection.recv(1):
                    break
            except TimeoutError:
                assert time.monotonic() - began < PATIENCE_S
                connection.sendall(b"\r\n" if start in (b"", b"\r\n") else b"a")
            except ConnectionError:
                break


def test_line_breaks_do_not_keep_a_connection_open(guarded: Guarded) -> None:
    # Given a client that was answered, and then sends what begins nothing
    with connect(guarded.port, timeout_s=0.5) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(connection, "GET")
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE_S + 5:
            try:
                connection.sendall(b"\r\n")
                if not connection.recv(1):
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
        pytest.fail("still connected")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_does_not_come_is_told_so_and_cut(guarded: Guarded, paths: list[str], chunked: bool) -> None:
    # Given clients with a key that never finish their bodies
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1000"
    with ExitStack() as stack:
        waiting = [(path, stack.enter_context(connect(guarded.port))) for path in paths]
        for path, connection in waiting:
            body = b"5\r\nabc" if chunked else b"abc"
            connection.sendall(post(path, guarded.key, framing, body=body, framed=False))
        began = time.monotonic()
        # Then each is told so in its dialect, in time, and hung up on
        for path, connection in waiting:
            answer = read_answer(connection)
            in_shape(answer, path)
            assert answer is not None
            assert answer.status == 408
            assert until_closed(connection) == b""
        assert time.monotonic() - began < PATIENCE_S


def send_slowly(connection: socket.socket) -> None:
    """Until the server hangs up."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_S:
        connection.sendall(b"a" * 100)
        time.sleep(0.1)


def test_a_body_that_nobody_reads_is_not_taken_for_ever(guarded: Guarded) -> None:
    # Given a client without a key, which is refused before its body is read, and that sends it all the same
    with connect(guarded.port, timeout_s=0.2) as connection:
        connection.sendall(b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        connection.settimeout(5)
        answer = read_answer(connection)
        assert answer is not None
        assert answer.status == 401
        # Then that comes to an end
        with pytest.raises(ConnectionError):
            send_slowly(connection)


def test_silent_connections_leave_room_for_others(guarded: Guarded) -> None:
    # Given far more connections than are kept, none of which ever asks anything
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(guarded.port)) for _ in range(3 * MAX_CONNECTIONS)]
        for connection in silent:
            try:
                connection.sendall(b"POST /chat HTTP/1.1\r\nHost: x\r\n")
            except ConnectionError:
                continue
        # When somebody comes with a question, then it is answered at once
        began = time.monotonic()
        answer = ask(guarded.port, post("/chat", guarded.key))
        assert answer is not None
        assert answer.status == 200
        assert time.monotonic() - began < RECEIVE_TIMEOUT_S
        # And no more than the bound are kept
        kept = 0
        for connection in silent:
            connection.settimeout(0.001)
            try:
                kept += bool(connection.recv(1))
            except TimeoutError:
                kept += 1
            except ConnectionError:
                continue
        assert kept <= MAX_CONNECTIONS


def test_connections_in_use_are_not_cut_and_one_more_is_told_so(guarded: Guarded) -> None:
    # Given as many requests under way as there may be connections, all with keys
    with ExitStack() as stack:
        start = post("/v1/chat/completions", guarded.key, b"Content-Length: 1000", body=b"{", framed=False)
        busy: list[socket.socket] = []
        for _ in range(MAX_CONNECTIONS):
            busy.append(stack.enter_context(connect(guarded.port)))
            busy[-1].sendall(start)
        time.sleep(0.5)
        # When one more comes
        answer = ask(guarded.port, b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n", "GET")
        # Then it is told to come again, and each of the others gets its answer
        assert answer is not None
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        ErrorBody.model_validate(answer.told)
        assert [found.status for each in busy if (found := read_answer(each))] == [408] * MAX_CONNECTIONS


def test_requests_sent_ahead_are_answered_in_order_and_bounded(guarded: Guarded) -> None:
    # Given a few requests sent at once, then each is answered, in order
    paths = ["/health/live", "/nope", "/models"]
    one = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"
    last = one.format("/health/live").replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
    said = everything(guarded.port, ("".join(one.format(path) for path in paths) + last).encode())
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"404", b"401", b"200"]
    # But nobody keeps thousands of them
    said = everything(guarded.port, one.format("/health/live").encode() * 20_000)
    assert said.count(b"HTTP/1.1 200") < 100


def test_a_stream_is_not_broken_into_by_what_its_client_sends(guarded: Guarded) -> None:
    # Given a stream under way, when its client sends what is no request
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    said = everything(guarded.port, post("/chat", guarded.key, body=body) + b"\x00\x01\x02\r\n\r\n")
    # Then no second answer stands in the middle of it
    assert said.count(b"HTTP/1.1 ") <= 1


def test_an_upgrade_is_not_made(guarded: Guarded) -> None:
    for protocol in (b"websocket", b"h2c"):
        data = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n"
        answer = ask(guarded.port, data, "GET")
        assert answer is not None
        assert answer.status == 200
