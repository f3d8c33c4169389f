"""Bodies and headers that mean nothing, or far too much: refused in shape on every path, and nobody else is harmed."""

import asyncio
import json
import time

import pytest

from tests.faults.dialects import STREAMING, body_of
from tests.faults.guarded import SILENT, Guarded
from tests.faults.raw import ask
from tests.faults.test_hostile_http import in_shape, post

pytestmark = pytest.mark.usefixtures("nobody_else_was_harmed")


@pytest.mark.parametrize(
    "body",
    [b"", b"x", b"null", b"[]", b"0", b'"x"', b"{}{}", b'{"a":NaN}', b'{"a":"\\ud800"}', b"\xff", b"\x00", b"[" * 5000],
    ids=lambda body: repr(body[:9]),
)
def test_what_is_no_object_in_json_is_refused_in_shape(guarded: Guarded, paths: list[str], body: bytes) -> None:
    for path in paths:
        answer = ask(guarded.port, post(path, guarded.key, body=body))
        in_shape(answer, path)
        assert answer is not None
        assert answer.status == 400, path


@pytest.mark.parametrize(
    "header",
    [
        (b"Idempotency-Key", b"\xf0\x9f\x98\x80"),
        (b"Idempotency-Key", b"x" * 256),
        (b"Idempotency-Key", b""),
        (b"X-Session-Id", b"two words"),
        (b"X-Session-Id", b"\xd7\xa9"),
        (b"X-Session-Id", b"x" * 129),
    ],
    ids=lambda header: b": ".join(header)[:30].decode("latin-1"),
)
def test_headers_that_name_something_are_held_to_their_form(guarded: Guarded, header: tuple[bytes, bytes]) -> None:
    name, value = header
    for path in STREAMING:
        body = json.dumps(body_of(path, "hi", 1)).encode()
        answer = ask(guarded.port, post(path, guarded.key, name + b": " + value, body=body))
        in_shape(answer, path)
        assert answer is not None
        assert (answer.status, name in answer.body) == (400, True), (path, answer)


@pytest.mark.parametrize("path", STREAMING)
def test_what_nests_deep_where_nobody_looks_fares_alike_with_a_key_of_its_own(guarded: Guarded, path: str) -> None:
    for depth in (200, 300, 1000):
        # Given a body with something that is ignored, as deep as JSON is read
        body = json.dumps(body_of(path, "hi", 1) | {"model": SILENT, "ignored": "DEEP"}).encode()
        body = body.replace(b'"DEEP"', b"[" * depth + b"]" * depth)
        # When it is sent, to be kept and not
        named = b"Idempotency-Key: %b %d" % (path.encode(), depth)
        answers = [ask(guarded.port, post(path, guarded.key, *header, body=body)) for header in ([], [named])]
        # Then both are told that nobody serves that model
        assert [answer and answer.status for answer in answers] == [529 if path == "/v1/messages" else 503] * 2


LISTS = {
    "/chat": ["messages", "messages.content"],
    "/v1/chat/completions": ["messages", "messages.content", "tools", "stop", "messages.tool_calls", "stop_token_ids"],
    "/v1/completions": ["prompt"],
    "/v1/responses": ["input", "input.content", "tools", "include"],
    "/v1/messages": ["messages", "messages.content", "system", "tools", "stop_sequences"],
    "/embeddings": ["input"],
    "/v1/embeddings": ["input"],
}


@pytest.mark.parametrize("path", LISTS)
async def test_two_million_wrong_values_cost_no_more_than_one(guarded: Guarded, path: str) -> None:
    """Each was once told of by an error of its own: 31 s and 3.6 GB for a body of 4 MiB."""
    async with guarded.parts.client(guarded.url, guarded.key) as client:
        for place in LISTS[path]:
            for wrong in (b"0", b"[]", b"{}", b'""', b"null", b"-1"):
                # Given a body that is one long list of values, none of which belongs there
                values = b"[" + b",".join([wrong] * (4_000_000 // (len(wrong) + 1))) + b"]"
                outer, _, inner = place.partition(".")
                if inner:
                    values = b'[{"role":"user","content":"a","%b":%b}]' % (inner.encode(), values)
                messages = b"" if outer == "messages" else b'"messages":[{"role":"user","content":"a"}],'
                body = b'{"model":"qwen3-silent","max_tokens":3,%b"%b":%b}' % (messages, outer.encode(), values)
                # When it is sent, then others are answered meanwhile
                asked = asyncio.create_task(client.post(path, content=body))
                began = time.monotonic()
                assert (await client.get("/health/live")).status_code == 200
                answer = await asked
                took_s = time.monotonic() - began
                assert answer.status_code in (400, 404, 503, 529), (place, wrong, answer.text[:300])
                assert took_s < 10, (place, wrong, took_s)
                assert len(answer.content) < 2000
