"""Routes that let nobody in without a key, and the bounded JSON they read.

The framework's way to a handler solves dependencies and nests half a dozen wrappers for each request. A handler that
takes nothing but a body, and answers with a response of its own, is called directly: same model, same errors. The
framework still documents it. Every other keyed route goes the framework's way, past the key.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from server.auth import authenticate
from server.core.errors import ClientTooSlow, PayloadTooLarge, ServiceError
from server.errors import answer_to

JSON_HEADER = (b"content-type", b"application/json")


class JsonRequest(Request):
    """A request whose body is bounded before it is read, and is strict JSON whatever its Content-Type says."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            limit: int = self.app.state.settings.max_body_bytes
            too_large = PayloadTooLarge(f"The body is larger than {limit} bytes.")
            declared = self.headers.get("content-length", "")
            if declared.isdigit() and int(declared) > limit:
                raise too_large
            chunks: list[bytes] = []
            size = 0
            timeout_s: float = self.app.state.settings.receive_timeout_s
            try:
                async with asyncio.timeout(timeout_s):
                    async for chunk in self.stream():
                        size += len(chunk)
                        if size > limit:
                            raise too_large
                        chunks.append(chunk)
            except TimeoutError as exc:
                raise ClientTooSlow(f"The body did not arrive within {timeout_s:g} s.") from exc
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        """orjson refuses NaN, lone surrogates, invalid UTF-8 and bottomless nesting; json.loads would not."""
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class KeyedRoute(APIRoute):
    """A route that lets nobody in without a key, and reads no body before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.direct = self._takes_only_a_body()
        if self.direct:
            self._request_name = str(self.dependant.request_param_name)
            self._body_name = self.dependant.body_params[0].name
            self.app = self._answer

    def _takes_only_a_body(self) -> bool:
        takes = self.dependant
        others = takes.path_params or takes.query_params or takes.header_params or takes.cookie_params
        whole = len(takes.body_params) == 1 and not self._embed_body_fields
        answers = self.endpoint.__annotations__.get("return") is Response
        return whole and not others and answers and takes.request_param_name is not None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = JsonRequest(scope, receive)
        try:
            await authenticate(request)
            body = self._validated(await request.body())
            if "idempotency-key" not in request.headers:
                response = await self.endpoint(**{self._request_name: request, self._body_name: body})
            else:
                make = partial(self._make, scope, body)
                response = await request.app.state.keeper.answer(request, await request.body(), make)
        except (ServiceError, RequestValidationError, ClientDisconnect) as exc:
            response = answer_to(request, exc)
        await response(scope, receive, send)

    async def _make(self, scope: Scope, body: Any, receive: Receive) -> Response:
        """The handler's response, for whoever `receive` hears."""
        given = {self._request_name: JsonRequest(scope, receive), self._body_name: body}
        response: Response = await self.endpoint(**given)
        return response

    def _validated(self, content: bytes) -> Any:
        """The body as the handler's model. Raises RequestValidationError, in the framework's own terms."""
        try:
            value = orjson.loads(content) if content else None
        except orjson.JSONDecodeError as exc:
            told = {"type": "json_invalid", "loc": ("body", exc.pos), "msg": "JSON decode error", "input": {}}
            raise RequestValidationError([{**told, "ctx": {"error": exc.msg}}]) from exc
        if value is None:
            raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required"}])
        assert self.body_field is not None
        body, errors = self.body_field.validate(value, {}, loc=("body",))
        if errors:
            raise RequestValidationError(errors)
        return body

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def keyed(request: Request) -> Response:
            await authenticate(request)
            # Clients that forget the header mean JSON: nothing else is taken here.
            headers = [pair for pair in request.scope["headers"] if pair[0] != JSON_HEADER[0]]
            request.scope["headers"] = [*headers, JSON_HEADER]
            bounded = JsonRequest(request.scope, request.receive)
            await bounded.body()  # here, because the framework turns what it raises into its own 400
            return await handle(bounded)

        return keyed


def direct_routes(routes: Iterable[BaseRoute]) -> dict[tuple[str, str], KeyedRoute]:
    """The routes that are called directly, by method and path: nobody has to look for them."""
    direct = [route for route in routes if isinstance(route, KeyedRoute) and route.direct]
    return {(method, route.path): route for route in direct for method in route.methods or ()}
