"""Errors and rates by dialect: the same end of a request, told as its client knows it."""

import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any, get_args

import httpx
import pytest
from fastapi import FastAPI

from server.auth import hash_key
from server.core import errors
from server.core.errors import ServiceError
from server.core.settings import Settings
from server.db.outage import Outage
from server.errors import Dialect, add_error_handlers, dialect_of, error_body, status_of
from server.keyed import direct_routes
from server.keys import KeyCache
from server.limits import MAX_HEADER_BYTES
from server.middleware import Accounting
from server.rate import RateLimiter
from server.routes import anthropic, inference, openai
from server.schemas.dialects import AnthropicError, OpenAIError
from server.schemas.service import ErrorBody
from tests.unit.fake_requests import REGISTRY, FakeDispatcher
from tests.unit.test_auth import ADA, FakeStore

SHAPES: dict[Dialect, Any] = {"native": ErrorBody, "openai": OpenAIError, "anthropic": AnthropicError}
INVALID, SERVER = "invalid_request_error", "server_error"

# Of each error: its status, OpenAI's and Anthropic's word for it, and OpenAI's code
TOLD: list[tuple[type[ServiceError], int, str, str, str | None]] = [
    (errors.InvalidRequest, 400, INVALID, INVALID, None),
    (errors.UnknownModel, 404, INVALID, "not_found_error", "model_not_found"),
    (errors.ContextExceeded, 400, INVALID, INVALID, "context_length_exceeded"),
    (errors.Unauthorized, 401, INVALID, "authentication_error", "invalid_api_key"),
    (errors.Forbidden, 403, INVALID, "permission_error", None),
    (errors.NotFound, 404, INVALID, "not_found_error", None),
    (errors.MethodNotAllowed, 405, INVALID, INVALID, None),
    (errors.ClientTooSlow, 408, INVALID, INVALID, None),
    (errors.PayloadTooLarge, 413, INVALID, "request_too_large", None),
    (errors.Unprocessable, 422, INVALID, INVALID, None),
    (errors.HeadersTooLarge, 431, INVALID, INVALID, None),
    (errors.Cancelled, 499, INVALID, INVALID, "cancelled"),
    (errors.TooManyRequests, 429, "rate_limit_error", "rate_limit_error", None),
    (errors.RateLimited, 429, "rate_limit_error", "rate_limit_error", "rate_limit_exceeded"),
    (errors.QueueFull, 429, "rate_limit_error", "rate_limit_error", "queue_full"),
    (errors.EngineFailed, 500, SERVER, "api_error", None),
    (errors.RecordRefused, 500, SERVER, "api_error", None),
    (errors.Unavailable, 503, SERVER, "overloaded_error", None),
    (errors.BrokerUnavailable, 503, SERVER, "overloaded_error", None),
    (errors.DatabaseUnavailable, 503, SERVER, "overloaded_error", None),
    (errors.DatabaseFull, 503, SERVER, "overloaded_error", None),
    (errors.NoWorker, 503, SERVER, "overloaded_error", None),
    (errors.AnswerLost, 503, SERVER, "overloaded_error", None),
    (errors.DeadlineExceeded, 504, SERVER, "timeout_error", None),
]
MAY_HAVE_RUN = {errors.EngineFailed, errors.AnswerLost, errors.DeadlineExceeded}


def test_the_table_is_whole() -> None:
    def below(cls: type[ServiceError]) -> set[type[ServiceError]]:
        return {cls}.union(*(below(sub) for sub in cls.__subclasses__()))

    assert {cls for cls in below(ServiceError) if cls.__module__ == errors.__name__} - {ServiceError} == {
        row[0] for row in TOLD
    }


def statuses(cls: type[ServiceError], status: int) -> dict[Dialect, int]:
    """Of an error in each dialect, by its status in OpenAI's."""
    return {"native": cls.status, "openai": status, "anthropic": 529 if status == 503 else status}


@pytest.mark.parametrize(("cls", "status", "openais", "anthropics", "code"), TOLD)
def test_an_error_in_each_dialect(
    cls: type[ServiceError], status: int, openais: str, anthropics: str, code: str | None
) -> None:
    error = cls("What happened.", param="messages.0")
    assert {dialect: status_of(error, dialect) for dialect in get_args(Dialect)} == statuses(cls, status)
    told = {"message": "What happened.", "type": openais, "param": "messages.0", "code": code}
    assert error_body(error, "openai", "r1") == {"error": told}
    told = {"type": anthropics, "message": "What happened."}
    assert error_body(error, "anthropic", "r1") == {"type": "error", "error": told, "request_id": "r1"}
    body = error_body(error, "native", "r1")
    assert (body["error"], body["status_code"]) == ("What happened.", cls.status)


@pytest.mark.parametrize("prefix", ["", "/qwen3"])
@pytest.mark.parametrize(
    ("path", "headers", "dialect"),
    [
        ("/chat", {}, "native"),
        ("/chat", {"anthropic-version": "2023-06-01"}, "native"),
        ("/v1", {}, "native"),
        ("/nowhere", {}, "native"),
        ("/v1/chat/completions", {}, "openai"),
        ("/v1/chat/completions", {"anthropic-version": "2023-06-01"}, "openai"),
        ("/v1/nowhere", {}, "openai"),
        ("/v1/models", {}, "openai"),
        ("/v1/models/talker", {}, "openai"),
        ("/v1/models", {"anthropic-version": "2023-06-01"}, "anthropic"),
        ("/v1/models/talker", {"anthropic-version": "2023-06-01"}, "anthropic"),
        ("/ai/v1/chat/completions", {}, "openai"),
        ("/kawai/v1/chat/completions", {}, "openai"),
        ("/v1/messages", {}, "anthropic"),
        ("/v1/messages/count_tokens", {}, "anthropic"),
    ],
)
def test_the_dialect_is_known_by_the_path(prefix: str, path: str, headers: Mapping[str, str], dialect: Dialect) -> None:
    assert dialect_of(prefix + path, headers) == dialect


@pytest.fixture(scope="module")
def routed() -> FastAPI:
    """The server's routes without what stands behind them."""
    app = FastAPI(redirect_slashes=False)
    add_error_handlers(app)
    for prefix in ("", "/qwen3"):
        for routes in (inference, openai, anthropic):
            app.include_router(routes.router, prefix=prefix)
    app.add_middleware(Accounting, direct=direct_routes(app.routes))
    return app


@pytest.fixture
def app(routed: FastAPI) -> FastAPI:
    """The same, where `qk-ada` may ask three times and nobody has asked yet."""
    routed.state.settings = Settings()
    routed.state.registry, routed.state.store = REGISTRY, FakeStore()
    outage = Outage(routed.state.store.ping)
    routed.state.keys = KeyCache(routed.state.store, outage)
    routed.state.rates = RateLimiter(routed.state.store, 3, outage)
    routed.state.started_at = 1
    return routed


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    await app.state.store.create_key("ada", hash_key("qk-ada"))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=ADA) as made:
        yield made


PATHS: list[tuple[str, Dialect]] = [
    ("/chat", "native"),
    ("/qwen3/chat", "native"),
    ("/v1/chat/completions", "openai"),
    ("/qwen3/v1/chat/completions", "openai"),
    ("/v1/completions", "openai"),
    ("/v1/responses", "openai"),
    ("/v1/embeddings", "openai"),
    ("/ai/v1/chat/completions", "openai"),
    ("/kawai/v1/chat/completions", "openai"),
    ("/v1/messages", "anthropic"),
    ("/qwen3/v1/messages", "anthropic"),
    ("/v1/messages/count_tokens", "anthropic"),
]


def told(response: httpx.Response, dialect: Dialect) -> str:
    """The message; checks the shape around it, and the request's id."""
    assert response.headers["content-type"] == "application/json"
    body = SHAPES[dialect].model_validate(response.json(), extra="forbid")
    if dialect == "native":
        return str(body.error)
    if dialect == "anthropic":
        assert body.request_id == response.headers["request-id"] == response.headers["x-request-id"]
    return str(body.error.message)


@pytest.mark.parametrize(("path", "dialect"), PATHS)
async def test_a_refusal_has_the_dialects_shape(client: httpx.AsyncClient, path: str, dialect: Dialect) -> None:
    # When there is no key, no JSON, no such value, or no such method
    answers = [
        (401, await client.post(path, json={}, headers={"Authorization": ""})),
        (400, await client.post(path, content=b"{")),
        (400, await client.post(path, json={"model": 5, "temperature": 9})),
        (405, await client.delete(path)),
    ]
    # Then it is told as the dialect does
    assert [response.status_code for _, response in answers] == [status for status, _ in answers]
    messages = [told(response, dialect) for _, response in answers]
    assert messages[0].startswith("No API key.")
    assert messages[1].startswith("The body is not valid JSON: ")
    assert "model: Input should be a valid string (got 5)" in messages[2]
    assert messages[3] == f"DELETE is not allowed on {path}."
    if dialect == "openai":
        assert answers[0][1].json()["error"]["code"] == "invalid_api_key"
        assert answers[2][1].json()["error"]["param"]


@pytest.mark.parametrize(
    ("path", "headers", "dialect", "status"),
    [
        ("/nowhere", {}, "native", 404),
        ("/v1/nowhere", {}, "openai", 404),
        ("/qwen3/v1/nowhere", {}, "openai", 404),
        ("/v1/messages/nowhere", {}, "anthropic", 404),
        ("/v1/models/nobody", {}, "openai", 404),
        ("/v1/models/nobody", {"anthropic-version": "2023-06-01"}, "anthropic", 404),
    ],
)
async def test_what_there_is_not(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], dialect: Dialect, status: int
) -> None:
    response = await client.get(path, headers=headers)
    assert response.status_code == status
    assert told(response, dialect)


BODY = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}


@pytest.mark.parametrize(
    ("path", "dialect"), [("/chat", "native"), ("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic")]
)
@pytest.mark.parametrize(("cls", "status", "_openais", "_anthropics", "_code"), TOLD)
async def test_what_a_worker_ends_with_is_told_with_when_to_retry(
    app: FastAPI, client: httpx.AsyncClient, path: str, dialect: Dialect,
    cls: type[ServiceError], status: int, _openais: str, _anthropics: str, _code: str | None,
) -> None:  # fmt: skip
    # Given a worker whose first word is an error
    app.state.dispatcher = FakeDispatcher(cls("What happened.", retry_after_s=7))
    response = await client.post(path, json=BODY)
    # Then it is the answer, and who would pay twice is told not to ask again
    assert (response.status_code, told(response, dialect)) == (statuses(cls, status)[dialect], "What happened.")
    assert response.headers["retry-after"] == "7"
    assert response.headers.get("x-should-retry") == ("false" if cls in MAY_HAVE_RUN else None)
    assert response.headers.get("www-authenticate") == ("Bearer" if cls.status == 401 else None)
    assert app.state.dispatcher.tickets[0].closed


@pytest.mark.parametrize(("path", "dialect"), PATHS[2:])
async def test_headers_that_are_too_large_are_not_read(client: httpx.AsyncClient, path: str, dialect: Dialect) -> None:
    response = await client.post(path, json=BODY, headers={"X-Large": "x" * MAX_HEADER_BYTES})
    assert response.status_code == 431
    assert told(response, dialect).endswith(f"bytes; at most {MAX_HEADER_BYTES} are read.")


async def test_headers_are_counted_together(client: httpx.AsyncClient) -> None:
    large = {f"x-{index:03}": "x" * (MAX_HEADER_BYTES // 64 - 5) for index in range(64)}
    assert (await client.get("/v1/models", headers=dict(list(large.items())[:-2]))).status_code == 200
    assert (await client.get("/v1/models", headers=large)).status_code == 431


async def test_the_rate_by_the_names_of_each_dialect(app: FastAPI, client: httpx.AsyncClient) -> None:
    # When a key asks in each dialect, and once more than it may
    paths = ["/models", "/v1/models", "/v1/models", "/v1/messages"]
    versions = [{}, {}, {"anthropic-version": "2023-06-01"}, {}]
    native, openais, anthropics, past = [
        (await client.get(path, headers=version) if "models" in path else await client.post(path, json={}))
        for path, version in zip(paths, versions, strict=True)
    ]
    reset_at = app.state.store.reset_at
    # Then each tells it by our names
    for remaining, response in zip((2, 1, 0, 0), (native, openais, anthropics, past), strict=True):
        rate = [response.headers[f"x-ratelimit-{name}"] for name in ("limit", "remaining", "reset")]
        assert rate == ["3", str(remaining), str(reset_at)]
    # And by the dialect's own, and by no other's
    assert openais.headers["x-ratelimit-limit-requests"] == "3"
    assert openais.headers["x-ratelimit-remaining-requests"] == "1"
    assert 0 <= int(openais.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= reset_at - time.time() + 5
    assert int(openais.headers["openai-processing-ms"]) >= 0
    for response in (anthropics, past):
        named = {
            name: response.headers[f"anthropic-ratelimit-requests-{name}"] for name in ("limit", "remaining", "reset")
        }
        assert named == {"limit": "3", "remaining": "0", "reset": datetime.fromtimestamp(reset_at, UTC).isoformat()}
    assert not any(name.startswith("anthropic-") for r in (native, openais) for name in r.headers)
    assert not any("-requests" in name or name.startswith("openai-") for name in native.headers)
    # And who is past it is told when to come back
    assert (past.status_code, past.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(past.headers["retry-after"]) > 0


async def test_the_models_in_a_list(app: FastAPI, client: httpx.AsyncClient) -> None:
    assert len((await client.get("/v1/models")).json()["data"]) == 9
    app.state.settings = Settings(rate_limit_per_minute=3, simple_model_map=True)
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["talker", "seer", "vectors"]
    assert (await client.get("/v1/models/talker-search")).json()["upstream_id"] == "talker"
