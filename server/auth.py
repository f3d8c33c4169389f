"""Keys: making them, and letting a request in by one, within the key's rate."""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass

from fastapi import Request

from server.core.errors import DatabaseUnavailable, RateLimited, Unauthorized
from server.core.settings import Settings
from server.db.store import KeyRow, Store
from server.rate import RateState

PREFIX = "qk-"
REVOKED = "This API key has been revoked."


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    key_id: int
    name: str
    is_admin: bool
    weight: int = 1


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

    The key is a Bearer token or stands in `x-api-key`, whatever the dialect. Raises Unauthorized, RateLimited, and
    DatabaseUnavailable where it takes Postgres to know the key.
    """
    keys = _keys_of(request)
    if not keys:
        raise Unauthorized("No API key. Send the header 'Authorization: Bearer YOUR_API_KEY', or 'x-api-key'.")
    state = request.app.state
    row: KeyRow | None = None
    unsure: DatabaseUnavailable | None = None
    for key in keys:
        digest = hash_key(key)
        try:
            row = await state.keys.find(digest)
        except DatabaseUnavailable as exc:
            unsure = exc  # the other one may be known all the same
        if row is not None and hmac.compare_digest(row.hash, digest):
            break
        row = None
    if row is None:
        raise unsure or Unauthorized("This API key is not known here.")
    if row.revoked_at is not None:
        raise Unauthorized(REVOKED)
    principal = Principal(row.id, row.name, row.is_admin, row.weight)
    request.state.principal = principal
    if state.rates.limit:
        await _count(request, principal)
    return principal


async def _count(request: Request, principal: Principal) -> None:
    rate: RateState | None = await request.app.state.rates.count(principal.key_id)
    if rate is None:
        raise Unauthorized(REVOKED)
    request.state.rate = rate
    if rate.requests > rate.limit:
        wait_s = max(1, rate.reset_at - int(time.time()))
        raise RateLimited(
            f"Rate limit of {rate.limit} requests per minute exceeded. Try again in {wait_s} s.", retry_after_s=wait_s
        )


def _keys_of(request: Request) -> list[str]:
    """The keys a request shows. SDKs send a Bearer token even where the key that counts is in `x-api-key`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    shown = [token if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", "")]
    return [key.strip() for key in shown if key.strip()]
