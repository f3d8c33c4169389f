"""Requests without a server around them: fake dispatchers, whose workers answer with the frames a test gives."""

import asyncio
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import msgspec
import orjson
import pytest
from fastapi import Request, Response
from hypothesis import strategies as st

from server.auth import Principal
from server.core.errors import InvalidRequest, ServiceError
from server.core.messages import Frame, FrameKind
from server.core.registry import ModelSpec, Registry
from server.core.settings import Settings
from server.dialects.relay import Turn
from server.dispatch import Call
from server.sse import SseResponse


def spec(id_: str, **given: Any) -> ModelSpec:
    fields = {"id": id_, "name": id_.title(), "type": "chat", "source": f"someone/{id_}", "context_length": 100}
    return ModelSpec.model_validate(fields | given)


TALKER = spec("talker", default=True)
SEER = spec("seer", modalities=("text", "image", "audio", "video"))
VECTORS = spec("vectors", type="embedding")
REGISTRY = Registry((TALKER, SEER, VECTORS))
DATA_URI = "data:image/png;base64,AAAA"
SOURCES = [{"id": 7, "session_id": "s1", "similarity": 0.9}]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abtype_", max_size=6), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
"""Any JSON value, as the body's parser gives it."""


def frame(kind: FrameKind, content: Any = b"", elapsed_s: float = 0.0) -> Frame:
    """A frame; `content` that is not bytes is told in JSON."""
    data = content if isinstance(content, bytes) else orjson.dumps(content)
    return Frame("r1", "run", 0, kind, data, elapsed_s)


class FakeTicket:
    """Gives its frames in order; raises where one is an error."""

    def __init__(self, *frames: Frame | ServiceError) -> None:
        self.request_id = "r1"
        self.api = "chat"
        self.closed = False
        self._frames = list(frames)

    async def next(self) -> Frame:
        found = self._frames.pop(0)
        if isinstance(found, ServiceError):
            raise found
        return found

    def close(self) -> None:
        self.closed = True


class FakeDispatcher:
    """Answers every call with the same frames, and keeps the calls."""

    def __init__(self, *frames: Frame | ServiceError) -> None:
        self._frames = frames or (frame("result", {}),)
        self.calls: list[Call] = []
        self.tickets: list[FakeTicket] = []

    async def submit(self, call: Call) -> FakeTicket:
        msgspec.json.encode(call.body)  # as it travels
        self.calls.append(call)
        self.tickets.append(FakeTicket(*self._frames))
        return self.tickets[-1]


async def _still_there() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def request_of(dispatcher: FakeDispatcher | None = None, headers: dict[str, str] | None = None) -> Request:
    """A request that was let in; its client stays. Media may be fetched from media.example."""
    settings = Settings(allowed_media_domains="media.example")
    state = SimpleNamespace(registry=REGISTRY, settings=settings, dispatcher=dispatcher or FakeDispatcher())
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/x",
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        "app": SimpleNamespace(state=state),
        "route": SimpleNamespace(path="/v1/x"),
        "state": {"started": time.monotonic(), "request_id": "r1", "principal": Principal(1, "ada", False)},
    }
    return Request(scope, _still_there)


def turn_of(*frames: Frame | ServiceError, sources: list[dict[str, Any]] | None = None) -> Turn:
    """A turn whose first frame has come."""
    first, *rest = frames
    assert isinstance(first, Frame)
    return Turn(request_of(), FakeTicket(*rest), first, "talker", "s1", {}, sources or [])  # type: ignore[arg-type]


async def collect(events: AsyncGenerator[bytes, None]) -> list[bytes]:
    return [event async for event in events]


async def body_of(response: Response) -> bytes:
    """All that a response says, streamed or not."""
    if not isinstance(response, SseResponse):
        return bytes(response.body)
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    await response({"type": "http"}, _still_there, send)
    return b"".join(sent)


def data_of(event: bytes) -> Any:
    """The JSON of an event."""
    return orjson.loads(event[event.index(b"data: ") + 6 :])


def refused(message: str, param: str | None) -> Any:
    """Expects InvalidRequest with this beginning, about this field."""

    def about(exc: InvalidRequest) -> bool:
        return exc.message.startswith(message) and exc.param == param

    return pytest.raises(InvalidRequest, check=about)
