"""Keys, who is let in by one, and the bounds of a body: all that stands before a handler."""

import hashlib
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from server.auth import PREFIX, ensure_keys, hash_key, new_key
from server.core.errors import PayloadTooLarge
from server.core.settings import Settings
from server.db.outage import Outage
from server.db.store import KeyRow
from server.errors import add_error_handlers
from server.keyed import JsonRequest, KeyedRoute, direct_routes
from server.keys import KeyCache
from server.rate import RateLimiter

LIMIT = 1024


def test_a_key_has_the_prefix_and_256_bits() -> None:
    key = new_key()
    assert key.startswith(PREFIX)
    assert PREFIX == "qk-"
    assert len(key) == len(PREFIX) + 43  # 32 bytes in base64 without padding
    # And it travels in a header and in API_KEY
    assert key.isascii()
    assert key.isprintable()
    assert not set(key) & set(" ,")


def test_no_two_keys_are_alike() -> None:
    assert len({new_key() for _ in range(1000)}) == 1000


def test_a_hash_is_the_keys_sha256() -> None:
    assert hash_key("qk-abc") == hashlib.sha256(b"qk-abc").digest()
    assert hash_key("qk-abc") != hash_key("qk-abd")
    assert len(hash_key(new_key())) == 32


class FakeStore:
    """Keys by hash, counted as Postgres would."""

    def __init__(self) -> None:
        self.keys: dict[bytes, KeyRow] = {}
        self.counts: dict[int, int] = {}
        self.reset_at = int(time.time()) + 30

    async def create_key(self, name: str, hash_: bytes, *, is_admin: bool = False, weight: int = 1) -> int | None:
        if hash_ in self.keys:
            return None
        self.keys[hash_] = KeyRow(len(self.keys) + 1, name, hash_, is_admin, None)
        return len(self.keys)

    async def ping(self) -> None:
        """It always answers."""

    async def find_key(self, hash_: bytes) -> KeyRow | None:
        return self.keys.get(hash_)

    async def count_requests(self, requests: dict[int, int]) -> list[dict[str, int]]:
        for key_id, more in requests.items():
            self.counts[key_id] = self.counts.get(key_id, 0) + more
        valid = {row.id for row in self.keys.values() if row.revoked_at is None} & set(requests)
        return [{"key_id": id_, "requests": self.counts[id_], "reset_at": self.reset_at} for id_ in valid]

    def revoke(self, key: str) -> None:
        row = self.keys[hash_key(key)]
        self.keys[row.hash] = KeyRow(row.id, row.name, row.hash, row.is_admin, datetime.now(UTC))


async def test_the_keys_of_api_key_are_let_in_the_first_as_admin() -> None:
    # Given three keys in the settings, one of them twice
    store = FakeStore()
    settings = Settings(api_key="one, two, three, one")
    # When the server starts, and starts again
    await ensure_keys(store, settings)  # type: ignore[arg-type]
    await ensure_keys(store, settings)  # type: ignore[arg-type]
    # Then each is there once, and only its hash
    assert list(store.keys) == [hash_key("one"), hash_key("two"), hash_key("three")]
    assert [(row.name, row.is_admin) for row in store.keys.values()] == [
        ("admin", True),
        ("API_KEY 2", False),
        ("API_KEY 3", False),
    ]


class FakeBody:
    """A request's body in pieces; counts how many were asked for."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self.received = 0

    async def receive(self) -> dict[str, Any]:
        piece = self._pieces[self.received]
        self.received += 1
        return {"type": "http.request", "body": piece, "more_body": self.received < len(self._pieces)}


def request_of(body: FakeBody, headers: dict[str, str] | None = None) -> JsonRequest:
    app = SimpleNamespace(state=SimpleNamespace(settings=Settings(max_body_bytes=LIMIT)))
    raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    return JsonRequest({"type": "http", "method": "POST", "path": "/", "headers": raw, "app": app}, body.receive)


async def test_a_body_within_the_limit_is_joined() -> None:
    request = request_of(FakeBody(b"a" * (LIMIT - 2), b"b", b"c"), {"content-length": str(LIMIT)})
    assert await request.body() == b"a" * (LIMIT - 2) + b"bc"
    # And it can be had again
    assert len(await request.body()) == LIMIT


async def test_a_body_that_declares_too_much_is_not_read() -> None:
    # Given a body that says it is a byte too large
    body = FakeBody(b"x" * (LIMIT + 1))
    # When it is asked for, then it is refused before anything of it is read
    with pytest.raises(PayloadTooLarge, match=f"larger than {LIMIT} bytes"):
        await request_of(body, {"content-length": str(LIMIT + 1)}).body()
    assert body.received == 0


@pytest.mark.parametrize("headers", [{}, {"content-length": "10"}, {"content-length": "-1"}, {"content-length": "x"}])
async def test_a_body_that_streams_too_much_is_cut_off(headers: dict[str, str]) -> None:
    # Given pieces that pass the limit together, and a header that does not tell
    body = FakeBody(b"x" * LIMIT, b"x", b"x" * LIMIT)
    # When it is asked for, then it is refused at the byte that is too many
    with pytest.raises(PayloadTooLarge, match=f"larger than {LIMIT} bytes"):
        await request_of(body, headers).body()
    # And the rest is not read
    assert body.received == 2


async def test_json_is_read_once() -> None:
    request = request_of(FakeBody('{"a": [1, 2.5, "ü🦀\\u0000"]}'.encode()))
    assert await request.json() == {"a": [1, 2.5, "ü🦀\x00"]}
    assert await request.json() is await request.json()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b'{"a": 1} x',
        b"NaN",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 2_000 + b"1" + b"}" * 2_000,
    ],
    ids=lambda content: repr(content[:24]),
)
async def test_what_is_no_strict_json_is_refused(content: bytes) -> None:
    request = request_of(FakeBody(content))
    request.app.state.settings.max_body_bytes = 10**6
    with pytest.raises(json.JSONDecodeError):
        await request.json()


class Echo(BaseModel):
    text: str = ""


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture(params=["direct", "the framework's"])
async def client(store: FakeStore, request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    """Of an application with one keyed route, which is called in either way, and the key `qk-ada`."""
    app = FastAPI()
    add_error_handlers(app)
    app.state.settings = Settings(max_body_bytes=LIMIT * 8)
    outage = Outage(store.ping)
    app.state.keys = KeyCache(store, outage)  # type: ignore[arg-type]
    app.state.rates = RateLimiter(store, 3, outage)  # type: ignore[arg-type]
    await store.create_key("ada", hash_key("qk-ada"))
    router = APIRouter(route_class=KeyedRoute)

    def said(request: Request, body: Echo) -> dict[str, Any]:
        return {"text": body.text, "name": request.state.principal.name, "remaining": request.state.rate.remaining}

    if request.param == "direct":

        @router.post("/echo")
        async def echo_response(request: Request, body: Echo) -> Response:
            return JSONResponse(said(request, body))
    else:

        @router.post("/echo")
        async def echo(request: Request, body: Echo) -> dict[str, Any]:
            return said(request, body)

    app.include_router(router)
    direct = direct_routes(app.routes)
    assert list(direct) == ([("POST", "/echo")] if request.param == "direct" else [])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


ADA = {"Authorization": "Bearer qk-ada"}


async def test_a_known_key_is_let_in(client: httpx.AsyncClient) -> None:
    response = await client.post("/echo", json={"text": "hi"}, headers=ADA)
    assert (response.status_code, response.json()) == (200, {"text": "hi", "name": "ada", "remaining": 2})


async def test_the_scheme_may_be_written_any_way(client: httpx.AsyncClient) -> None:
    response = await client.post("/echo", json={}, headers={"Authorization": "bEARER  qk-ada "})
    assert response.status_code == 200


@pytest.mark.parametrize("authorization", [None, "Basic cWs6", "Bearer", "Bearer ", "Bearer unused"])
async def test_a_key_may_stand_in_x_api_key(client: httpx.AsyncClient, authorization: str | None) -> None:
    # Given a client that sends its key as Anthropic's do, and maybe another scheme beside it
    headers = {"X-API-Key": " qk-ada "} | ({"Authorization": authorization} if authorization else {})
    # Then that is its key
    response = await client.post("/echo", json={"text": "hi"}, headers=headers)
    assert (response.status_code, response.json()["name"]) == (200, "ada")


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({}, "No API key. Send the header 'Authorization: Bearer YOUR_API_KEY', or 'x-api-key'."),
        ({"Authorization": "Bearer "}, "No API key."),
        ({"Authorization": "Bearer"}, "No API key."),
        ({"Authorization": "qk-ada"}, "No API key."),
        ({"Authorization": "Basic qk-ada"}, "No API key."),
        ({"Authorization": "Bearer qk-bob"}, "This API key is not known here."),
        ({"Authorization": "Bearer qk-ada qk-ada"}, "This API key is not known here."),
        ({"Authorization": b"Bearer qk-\xe4"}, "This API key is not known here."),
        ({"x-api-key": " "}, "No API key."),
        ({"x-api-key": "qk-bob"}, "This API key is not known here."),
        ({"Authorization": "Bearer qk-bob", "x-api-key": "qk-eve"}, "This API key is not known here."),
    ],
)
async def test_nobody_else_is(client: httpx.AsyncClient, headers: dict[str, Any], told: str) -> None:
    # When a wrong body comes with no good key
    response = await client.post("/echo", content=b"{", headers=headers)
    # Then the key is what is told about, and not the body
    assert response.status_code == 401
    assert response.json()["error"].startswith(told)
    assert response.headers["www-authenticate"] == "Bearer"


async def test_a_revoked_key_is_told_so(client: httpx.AsyncClient, store: FakeStore) -> None:
    store.revoke("qk-ada")
    response = await client.post("/echo", json={}, headers=ADA)
    assert (response.status_code, response.json()["error"]) == (401, "This API key has been revoked.")


async def test_a_row_of_another_hash_lets_nobody_in(client: httpx.AsyncClient, store: FakeStore) -> None:
    # Given a database that answers with a row it should not have found
    store.keys[hash_key("qk-eve")] = store.keys[hash_key("qk-ada")]
    response = await client.post("/echo", json={}, headers={"Authorization": "Bearer qk-eve"})
    assert response.status_code == 401


async def test_past_the_rate_a_key_is_told_when_to_come_back(client: httpx.AsyncClient, store: FakeStore) -> None:
    # Given a key that has used up its minute
    remaining = [(await client.post("/echo", json={}, headers=ADA)).json()["remaining"] for _ in range(3)]
    assert remaining == [2, 1, 0]
    # When it asks once more
    response = await client.post("/echo", json={}, headers=ADA)
    # Then it is told how long to wait
    assert response.status_code == 429
    wait_s = int(response.headers["retry-after"])
    assert 25 <= wait_s <= 30
    assert response.json()["error"] == f"Rate limit of 3 requests per minute exceeded. Try again in {wait_s} s."
    # And never less than a second
    store.reset_at = int(time.time()) - 5
    assert (await client.post("/echo", json={}, headers=ADA)).headers["retry-after"] == "1"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "text/json; x"])
async def test_a_body_is_json_whatever_the_header_says(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = ADA if content_type is None else {**ADA, "Content-Type": content_type}
    response = await client.post("/echo", content=b'{"text": "hi"}', headers=headers)
    assert (response.status_code, response.json()["text"]) == (200, "hi")


async def test_a_body_too_large_is_a_413(client: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(9):
            yield b" " * LIMIT

    for content in (b" " * (LIMIT * 8 + 1), pieces()):
        response = await client.post("/echo", content=content, headers=ADA)
        assert (response.status_code, response.json()["error"]) == (413, f"The body is larger than {LIMIT * 8} bytes.")


@pytest.mark.parametrize("content", [b"NaN", b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[" * 4000, b"{"])
async def test_what_is_no_json_is_a_400(client: httpx.AsyncClient, content: bytes) -> None:
    response = await client.post("/echo", content=content, headers=ADA)
    assert response.status_code == 400
    assert response.json()["error"].startswith("The body is not valid JSON: ")


@pytest.mark.parametrize("depth", [50, 900, 1000, 1020])
async def test_nesting_that_the_parser_lets_through_is_a_400(client: httpx.AsyncClient, depth: int) -> None:
    # Given valid JSON with lists as deep as the parser lets through, where a string should be
    content = b'{"text": ' + b"[" * depth + b"]" * depth + b"}"
    # When it is sent, then the field is told, and nothing breaks
    response = await client.post("/echo", content=content, headers=ADA)
    assert response.status_code == 400
    assert response.json()["error"].startswith("text: Input should be a valid string (got [[[[")
