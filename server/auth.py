"""Keys: making them, and letting a request in by one. Owns the rate limit, which is the key's."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute

from server.core.errors import PayloadTooLarge, RateLimited, Unauthorized
from server.core.settings import Settings
from server.db.store import Store

PREFIX = "qk-"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    key_id: int
    name: str
    is_admin: bool


@dataclass(frozen=True, slots=True)
class RateState:
    """Of the key's running minute. `reset_at` in Unix seconds."""

    limit: int
    remaining: int
    reset_at: int


def new_key() -> str:
    """A key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> bytes:
    """SHA-256. Keys are random and long, so that a slow hash would add nothing."""
    return hashlib.sha256(key.encode()).digest()


async def ensure_keys(store: Store, settings: Settings) -> None:
    """Let the keys of `API_KEY` in, the first one as admin."""
    for index, key in enumerate(settings.api_keys):
        name = "admin" if index == 0 else f"API_KEY {index + 1}"
        await store.create_key(name, hash_key(key), is_admin=index == 0)


async def authenticate(request: Request) -> Principal:
    """The principal of the request's key; leaves it and the rate in `request.state`.

    The key is a Bearer token or stands in `x-api-key`, whatever the dialect. Raises Unauthorized or RateLimited.
    """
    keys = _keys_of(request)
    if not keys:
        raise Unauthorized("No API key. Send the header 'Authorization: Bearer YOUR_API_KEY', or 'x-api-key'.")
    limit: int = request.app.state.settings.rate_limit_per_minute
    row = None
    for key in keys:
        digest = hash_key(key)
        row = await request.app.state.store.authenticate(digest, limit)
        if row is not None and hmac.compare_digest(row.hash, digest):
            break
        row = None
    if row is None:
        raise Unauthorized("This API key is not known here.")
    if row.revoked_at is not None:
        raise Unauthorized("This API key has been revoked.")
    principal = Principal(row.id, row.name, row.is_admin)
    request.state.principal = principal
    if limit and row.requests is not None and row.reset_at is not None:
        request.state.rate = RateState(limit, max(limit - row.requests, 0), row.reset_at)
        if row.requests > limit:
            wait_s = max(1, row.reset_at - int(time.time()))
            raise RateLimited(
                f"Rate limit of {limit} requests per minute exceeded. Try again in {wait_s} s.", retry_after_s=wait_s
            )
    return principal


def _keys_of(request: Request) -> list[str]:
    """The keys a request shows. SDKs send a Bearer token even where the key that counts is in `x-api-key`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    shown = [token if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", "")]
    return [key.strip() for key in shown if key.strip()]


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
            async for chunk in self.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        """orjson refuses NaN, lone surrogates, invalid UTF-8 and bottomless nesting; json.loads would not."""
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class KeyedRoute(APIRoute):
    """A route that lets nobody in without a key, and reads no body before."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def keyed(request: Request) -> Response:
            await authenticate(request)
            # Clients that forget the header mean JSON: nothing else is taken here.
            headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
            request.scope["headers"] = [*headers, (b"content-type", b"application/json")]
            bounded = JsonRequest(request.scope, request.receive)
            await bounded.body()  # here, because the framework turns what it raises into its own 400
            return await handle(bounded)

        return keyed
