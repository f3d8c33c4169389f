"""`/v1/requests/{id}`: where a request stands, and stopping it. The id is the `X-Request-Id` of its response.

What is finished Postgres knows, and what is not the process that took it: that one is asked (server/peers.py). Another
key's request is not found, in the same time and with the same words as one that never was.
"""

import asyncio
import re
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from server.core.errors import BrokerUnavailable, DatabaseUnavailable, NotFound
from server.core.messages import RequestState
from server.db.store import Row, Store
from server.dispatch import Dispatcher, ids_of
from server.kept import Keeper
from server.keyed import KeyedRoute
from server.routes import KEYED_OPENAI, RESUMED, streaming
from server.schemas.chat import Usage
from server.schemas.embeddings import MAX_TEXTS
from server.schemas.requests import RequestError, RequestInfo

router = APIRouter(tags=["requests"], route_class=KeyedRoute, responses=KEYED_OPENAI)

REQUEST_ID = re.compile(r"[0-9a-f]{32}")
STOPPED_S = 5.0
"""For a worker to hand over what it has made; far more than it takes."""
LOOK_EVERY_S = 0.05
WORKED_ON = ("queued", "running")


@router.get("/v1/requests/{request_id}")
async def find_request(request: Request, request_id: str) -> RequestInfo:
    """Where a request stands; of a finished chat the answer, too."""
    key_id = _key_of(request, request_id)
    try:
        row = await _recorded(request, request_id)
    except DatabaseUnavailable:
        # What is finished nobody knows now; what is not, its process does.
        if state := await _dispatcher(request).peers.ask("state", request_id, key_id):
            return _known(state)
        raise
    if row and not _may_go_on(row, request_id):
        return _finished(row, request_id)
    try:
        state = await _dispatcher(request).peers.ask("state", request_id, key_id)
    except BrokerUnavailable:
        if row:
            return _finished(row, request_id)
        raise
    if state and not (row and state.status == "completed"):
        return _known(state)
    if row := await _recorded(request, request_id):  # it was recorded while the processes were asked
        return _finished(row, request_id)
    raise _unknown(request_id)


EVENTS = streaming("An event of its dialect")
EVENTS[200]["content"]["application/json"] = {}  # of a request that is not streamed


@router.get("/v1/requests/{request_id}/events", response_class=Response, responses=EVENTS, dependencies=RESUMED)
async def resume_request(request: Request, request_id: str) -> Response:
    """The answer of a request that had an `Idempotency-Key`: all of it, or what comes after `Last-Event-ID`."""
    _key_of(request, request_id)
    keeper: Keeper = request.app.state.keeper
    return await keeper.resume(request, request_id)


@router.delete("/v1/requests/{request_id}")
async def cancel_request(request: Request, request_id: str) -> RequestInfo:
    """Stop a request, queued or running. It is billed for the tokens made so far; one that is over stays as it is."""
    key_id = _key_of(request, request_id)
    peers = _dispatcher(request).peers
    state = await peers.ask("cancel", request_id, key_id)
    until = asyncio.get_running_loop().time() + STOPPED_S
    while state is not None and state.status in WORKED_ON and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(LOOK_EVERY_S)
        state = await peers.ask("state", request_id, key_id)
    if state is not None and state.status not in WORKED_ON:
        return _known(state)
    if row := await _recorded(request, request_id):
        return _finished(row, request_id)
    if state is not None:
        return _known(state)
    raise _unknown(request_id)


def _dispatcher(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher


def _key_of(request: Request, request_id: str) -> int:
    """Raises NotFound for what can be no request's id."""
    if not REQUEST_ID.fullmatch(request_id):
        raise _unknown(request_id)
    key_id: int = request.state.principal.key_id
    return key_id


def _unknown(request_id: str) -> NotFound:
    return NotFound(f"There is no request {ascii(request_id[:64])[1:-1]} of this key.")


async def _recorded(request: Request, request_id: str) -> Row | None:
    store: Store = request.app.state.store
    return await store.find_request(request.state.principal.key_id, ids_of(request_id))


def _may_go_on(row: Row, request_id: str) -> bool:
    """Whether it may be of some of several jobs: the first of these has as many texts as fit, and may end after others
    have."""
    texts: int = row["texts"]
    return texts >= MAX_TEXTS or (texts > 0 and row["request_id"] != request_id)


def _finished(row: Row, request_id: str) -> RequestInfo:
    prompt, completion = row["prompt_tokens"], row["completion_tokens"]
    return RequestInfo(
        id=request_id,
        status="cancelled" if row["finish_reason"] == "cancelled" else "completed",
        model=row["model"],
        endpoint=row["endpoint"],
        created_at=row["created_at"],
        finish_reason=row["finish_reason"] or None,
        usage=Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion),
        message=row["messages"][-1] if row["messages"] else None,
    )


def _known(state: RequestState) -> RequestInfo:
    error = state.error
    return RequestInfo(
        id=state.request_id,
        status=state.status,
        model=state.model,
        endpoint=state.endpoint,
        created_at=datetime.fromtimestamp(state.created_at, UTC),
        queue_position=state.queue_position,
        estimated_wait_s=state.estimated_wait_s,
        error=None
        if error is None
        else RequestError(message=error.message, code=error.code or None, status_code=error.status),
    )
