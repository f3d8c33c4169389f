"""Errors: the one table of statuses, what a caller is told about a wrong body, and what nobody is told."""

import logging
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.core import errors
from server.core.errors import ServiceError, from_status
from server.errors import MAX_SHOWN, add_error_handlers, describe, error_body
from server.middleware import Accounting
from server.schemas.common import MANY, ONE
from server.schemas.service import ErrorBody

STATUSES = {
    errors.InvalidRequest: 400,
    errors.UnknownModel: 400,
    errors.ContextExceeded: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.ClientTooSlow: 408,
    errors.PayloadTooLarge: 413,
    errors.Unprocessable: 422,
    errors.HeadersTooLarge: 431,
    errors.Cancelled: 499,
    errors.TooManyRequests: 429,
    errors.RateLimited: 429,
    errors.QueueFull: 429,
    errors.EngineFailed: 500,
    errors.RecordRefused: 500,
    errors.Unavailable: 503,
    errors.BrokerUnavailable: 503,
    errors.DatabaseUnavailable: 503,
    errors.DatabaseFull: 503,
    errors.NoWorker: 503,
    errors.AnswerLost: 503,
    errors.DeadlineExceeded: 504,
}


def subclasses(cls: type[Any]) -> set[type[Any]]:
    return {cls, *(deeper for sub in cls.__subclasses__() for deeper in subclasses(sub))}


@pytest.mark.parametrize(("cls", "status"), STATUSES.items(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_each_error_has_its_status(cls: type[ServiceError], status: int) -> None:
    assert cls.status == status
    assert cls("x").status == status


def test_the_table_knows_every_error_of_the_core() -> None:
    defined = {cls for cls in subclasses(ServiceError) if cls.__module__ == errors.__name__}
    assert defined - {ServiceError} == set(STATUSES)


@pytest.mark.parametrize("name", [cls.__name__ for cls in STATUSES])
def test_the_drawn_tree_shows_every_error_with_its_status(name: str) -> None:
    # Given the tree at the top of the module
    lines = [line for line in (errors.__doc__ or "").splitlines() if f"─ {name} " in f"{line} "]
    # Then the error stands in it once, under the status it has (its own, or that of the one above it)
    assert len(lines) == 1
    drawn = [word for word in lines[0].split() if word.isdigit()]
    cls = getattr(errors, name)
    assert drawn == [str(cls.status)] or (not drawn and cls.__mro__[1].status == cls.status)


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (400, errors.InvalidRequest),
        (401, errors.Unauthorized),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (405, errors.MethodNotAllowed),
        (408, errors.ClientTooSlow),
        (413, errors.PayloadTooLarge),
        (429, errors.TooManyRequests),
        (499, errors.Cancelled),
        (500, errors.EngineFailed),
        (503, errors.Unavailable),
        (504, errors.DeadlineExceeded),
        # Not in the table: the caller's fault below 500, the engine's from there on
        (418, errors.InvalidRequest),
        (422, errors.InvalidRequest),
        (498, errors.InvalidRequest),
        (501, errors.EngineFailed),
        (502, errors.EngineFailed),
        (599, errors.EngineFailed),
    ],
)
def test_a_status_from_the_wire_becomes_its_error(status: int, cls: type[ServiceError]) -> None:
    error = from_status(status, "what happened", "messages.0")
    assert type(error) is cls
    assert (error.message, error.param) == ("what happened", "messages.0")


class Inner(BaseModel):
    name: str


class Body(BaseModel):
    count: int = Field(0, ge=0)
    inner: list[Inner] = []
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    e: int = 0


def error(type_: str, *loc: str | int, msg: str = "Input should be good", **more: Any) -> dict[str, Any]:
    return {"type": type_, "loc": ("body", *loc), "msg": msg, **more}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([error("int_type", "count", input="many")], "count: Input should be good (got 'many')"),
        ([error("int_type", "inner", 3, "name", input=7)], "inner.3.name: Input should be good (got 7)"),
        ([error("missing", "count", msg="Field required", input={})], "count: Field required"),
        # The form in which a union was sent is an inner matter
        ([error("string_type", "input", MANY, 2, input=1)], "input.2: Input should be good (got 1)"),
        ([error("string_type", "input", ONE, input="")], "input: Input should be good (got '')"),
        ([error("dict_type", input=[1])], "Input should be good"),
        ([error("missing", msg="Field required", input=None)], "The body is missing: send a JSON object."),
        ([error("missing", msg="text: Field required", input={})], "text: Field required"),
        ([error("both", msg="text: give one", input={})], "text: give one"),
        (
            [error("json_invalid", 12, msg="JSON decode error", ctx={"error": "unexpected end"})],
            "The body is not valid JSON: unexpected end.",
        ),
        (
            [error("int_type", "count", input=None), error("int_type", "a", input=True)],
            "count: Input should be good (got None); a: Input should be good (got True)",
        ),
    ],
)
def test_a_wrong_field_is_named_with_the_reason(given: list[dict[str, Any]], told: str) -> None:
    assert describe(given) == told


def test_only_the_first_wrong_fields_are_named() -> None:
    told = describe([error("int_type", f"f{index}", input="x") for index in range(MAX_SHOWN + 3)])
    assert told.count("Input should be good") == MAX_SHOWN
    assert told.endswith("; and 3 more")
    assert "more" not in describe([error("int_type", f"f{index}", input="x") for index in range(MAX_SHOWN)])


def test_a_large_value_is_shortened() -> None:
    told = describe([error("int_type", "count", input="x" * 10_000)])
    assert told.startswith("count: Input should be good (got 'xxxx")
    assert "..." in told
    assert len(told) < 100


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert describe([error("int_type", "count", input="\x1b[2J\u202e\n")]) == (
        "count: Input should be good (got '\\x1b[2J\\u202e\\n')"
    )


@pytest.mark.parametrize("depth", [10, 500, 1000, 1024])
def test_a_deeply_nested_value_is_shortened_too(depth: int) -> None:
    # Given the deepest lists that the JSON parser lets through (1,024)
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    # When one stands where a number should, then it is told like any other
    assert describe([error("int_type", "count", input=value)]).startswith("count: Input should be good (got [[[[[[")


def test_an_error_body_has_the_documented_shape() -> None:
    body = error_body(errors.RateLimited("Slow down."), "native")
    assert set(body) == {"error", "status_code", "timestamp"}
    assert (body["error"], body["status_code"]) == ("Slow down.", 429)
    assert datetime.fromisoformat(body["timestamp"]).utcoffset() == timedelta(0)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """Of an application whose one route raises what the query names."""
    app = FastAPI()
    app.add_middleware(Accounting)
    add_error_handlers(app)
    raised: dict[str, Exception] = {
        "full": errors.QueueFull("The queue is full.", retry_after_s=3),
        "who": errors.Unauthorized("No key."),
        "late": errors.DeadlineExceeded("Too late."),
        "bug": RuntimeError("password=hunter2"),
        "gone": ClientDisconnect(),
        "teapot": HTTPException(418, "secret detail"),
        "unread": HTTPException(400, "secret detail"),
    }

    @app.get("/raise/{name}")
    async def raise_(name: str) -> None:
        raise raised[name]

    @app.post("/body")
    async def body(body: Body) -> Body:
        return body

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


def told(response: httpx.Response) -> str:
    """The message; checks the shape around it."""
    body = response.json()
    assert set(body) == {"error", "status_code", "timestamp"}
    assert body["status_code"] == response.status_code
    assert response.headers["content-type"] == "application/json"
    return ErrorBody.model_validate(body).error


async def test_a_service_error_is_told_with_its_status_and_when_to_retry(client: httpx.AsyncClient) -> None:
    response = await client.get("/raise/full")
    assert (response.status_code, told(response)) == (429, "The queue is full.")
    assert response.headers["retry-after"] == "3"
    response = await client.get("/raise/late")
    assert (response.status_code, told(response)) == (504, "Too late.")
    assert "retry-after" not in response.headers


async def test_who_has_no_key_is_told_the_scheme(client: httpx.AsyncClient) -> None:
    response = await client.get("/raise/who")
    assert (response.status_code, told(response)) == (401, "No key.")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_an_unexpected_error_is_logged_and_not_told(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    # When something breaks
    with caplog.at_level(logging.ERROR):
        response = await client.get("/raise/bug")
    # Then the caller hears that it did, and nothing of the exception
    assert response.status_code == 500
    assert told(response) == "Something went wrong here. The server's log has the details."
    assert "hunter2" not in response.text + str(response.headers)
    assert "RuntimeError" not in response.text
    # And the log has it
    (record,) = [r for r in caplog.records if r.name.startswith("server.")]
    assert record.exc_info is not None
    assert "hunter2" in str(record.exc_info[1])
    # And by the request's id the one is found by the other
    assert record.__dict__["request_id"] == response.headers["x-request-id"]


async def test_the_frameworks_own_errors_have_the_shape_too(client: httpx.AsyncClient) -> None:
    response = await client.get("/nowhere%1b")
    assert (response.status_code, told(response)) == (
        404,
        "There is no /nowhere\\x1b here. The API is listed at /docs.",
    )
    response = await client.post("/raise/full")
    assert (response.status_code, told(response)) == (405, "POST is not allowed on /raise/full.")
    assert response.headers["allow"] == "GET"
    response = await client.get("/raise/teapot")
    assert (response.status_code, told(response)) == (400, "I'm a Teapot")
    response = await client.get("/raise/unread")
    assert (response.status_code, told(response)) == (400, "The body could not be read as JSON in UTF-8.")


async def test_a_wrong_body_is_a_400_that_names_the_fields(client: httpx.AsyncClient) -> None:
    response = await client.post("/body", json={"count": -1, "inner": [{}]})
    assert response.status_code == 400
    assert told(response) == (
        "count: Input should be greater than or equal to 0 (got -1); inner.0.name: Field required"
    )
    response = await client.post("/body", json=dict.fromkeys(("count", "a", "b", "c", "d", "e"), "x"))
    assert told(response).endswith("; and 1 more")


async def test_a_body_that_is_no_json_is_a_400(client: httpx.AsyncClient) -> None:
    response = await client.post("/body", content=b'{"count": ', headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert told(response).startswith("The body is not valid JSON: ")


async def test_a_client_that_left_counts_as_499(client: httpx.AsyncClient) -> None:
    response = await client.get("/raise/gone")
    assert (response.status_code, response.content) == (499, b"")
