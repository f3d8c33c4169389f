"""Server-sent events: order, keep-alives, and that nothing goes on for a reader who left.

The ASGI callable is driven directly, so that a test decides when the client leaves.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from server import sse
from server.sse import DONE, SseResponse, event, unless_disconnected

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/chat", "headers": []}


class FakeClient:
    """The other end of an ASGI call: keeps what it is sent, and leaves when it is told to."""

    def __init__(self, *, broken: bool = False) -> None:
        self.messages: list[dict[str, Any]] = []
        self.broken = broken
        self._left = asyncio.Event()
        self._arrived = asyncio.Event()
        self._asked = False

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.broken and message["type"] == "http.response.body":
            raise OSError("broken pipe")
        self.messages.append(message)
        self._arrived.set()

    @property
    def bodies(self) -> list[bytes]:
        return [m["body"] for m in self.messages if m["type"] == "http.response.body"]

    async def until(self, body: bytes) -> None:
        async with asyncio.timeout(5):
            while body not in self.bodies:
                self._arrived.clear()
                await self._arrived.wait()


class Source:
    """A generator of events that tells when it ended. It waits for ever at a None.

    `released` counts the calls of the response's `on_close`.
    """

    def __init__(self, *items: bytes | float | Exception | None) -> None:
        self._items = items
        self.closed = False
        self.released = 0

    def release(self) -> None:
        self.released += 1

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            for item in self._items:
                if item is None:
                    await asyncio.Event().wait()
                elif isinstance(item, float):
                    await asyncio.sleep(item)
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            await asyncio.sleep(0)  # closing may take a step, as cancelling a job does
            self.closed = True


async def respond(source: Source, client: FakeClient, headers: dict[str, str] | None = None) -> None:
    """Answer the client with the source's events, as the framework does."""
    async with asyncio.timeout(5):
        response = SseResponse(source.events(), headers or {}, source.release)
        await response(SCOPE, client.receive, client.send)


async def do(work: Coroutine[Any, Any, str | None], client: FakeClient) -> str | None:
    """Have work done for the client, as a handler does."""
    async with asyncio.timeout(5):
        return await unless_disconnected(Request(SCOPE, client.receive), work)


def others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


def test_the_wire_format() -> None:
    assert event(b'{"a": 1}') == b'data: {"a": 1}\n\n'
    assert DONE == b"data: [DONE]\n\n"


async def test_events_arrive_in_order_each_by_itself() -> None:
    # Given a stream of three events with a pause between them
    client, source = FakeClient(), Source(event(b"1"), event(b"2"), 0.01, DONE)
    before = others()
    # When it is sent
    await respond(source, client, {"X-Session-Id": "s1"})
    # Then the head comes first, as a stream that no proxy should hold back
    start = client.messages[0]
    headers = dict(start["headers"])
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-accel-buffering"] == b"no"
    assert headers[b"x-session-id"] == b"s1"
    assert b"content-length" not in headers
    # And each event is a piece of the body, in order, and the end is told
    assert client.bodies == [b"data: 1\n\n", b"data: 2\n\n", DONE, b""]
    assert [m["more_body"] for m in client.messages[1:]] == [True, True, True, False]
    # And nothing is left running, and what was held for the stream is released
    assert source.closed
    assert source.released == 1
    assert others() == before


async def test_the_head_is_sent_before_the_first_event() -> None:
    # Given a stream whose first event does not come
    client, source = FakeClient(), Source(None)
    task = asyncio.create_task(respond(source, client))
    # Then the client has the head nevertheless
    async with asyncio.timeout(5):
        while not client.messages:
            await asyncio.sleep(0)
    assert client.messages[0]["type"] == "http.response.start"
    client.leave()
    await task


async def test_the_generator_is_closed_when_the_client_leaves() -> None:
    # Given a stream that has sent one event and waits for the next
    client, source = FakeClient(), Source(event(b"1"), None, event(b"2"))
    before = others()
    task = asyncio.create_task(respond(source, client))
    await client.until(event(b"1"))
    assert not source.closed
    # When the client leaves
    client.leave()
    async with asyncio.timeout(5):
        await task
    # Then the generator is closed, the job behind it is released, and nothing more is sent
    assert source.closed
    assert source.released == 1
    assert client.bodies == [event(b"1")]
    assert others() == before


async def test_the_generator_is_closed_when_the_server_stops() -> None:
    # Given a stream under way
    client, source = FakeClient(), Source(event(b"1"), None)
    task = asyncio.create_task(respond(source, client))
    await client.until(event(b"1"))
    # When the server cancels the request
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    # Then the generator is closed as well, and the job released
    assert task.cancelled()
    assert source.closed
    assert source.released == 1


async def test_a_client_that_left_before_the_first_event_releases_the_job_too() -> None:
    # Given a client that is gone before anything is sent: a generator never begun runs no `finally`
    client, source = FakeClient(), Source(event(b"1"))
    client.leave()
    task = asyncio.create_task(respond(source, client))
    # When the server ends the request at that very moment
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    # Then the job is released all the same
    assert source.released == 1


async def test_a_generator_that_fails_to_close_releases_the_job_too() -> None:
    # Given a stream under way whose clean-up breaks
    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield event(b"1")
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("clean-up broke")

    client, source = FakeClient(), Source()
    response = SseResponse(events(), {}, source.release)
    task = asyncio.create_task(response(SCOPE, client.receive, client.send))
    await client.until(event(b"1"))
    # When the client leaves
    client.leave()
    await asyncio.wait({task}, timeout=5)
    # Then the job is released, whether or not the error is told
    assert task.done()
    assert source.released == 1


async def test_a_broken_connection_counts_as_a_client_that_left() -> None:
    client, source = FakeClient(broken=True), Source(event(b"1"), event(b"2"))
    with pytest.raises(ClientDisconnect):
        await respond(source, client)
    assert source.closed
    assert source.released == 1


async def test_what_the_generator_raises_ends_the_stream_without_its_end() -> None:
    # Given a stream that breaks after an event
    client, source = FakeClient(), Source(event(b"1"), RuntimeError("bug"))
    # When it is sent, then the error reaches the outermost handler, which logs it
    with pytest.raises(RuntimeError, match="bug"):
        await respond(source, client)
    # And the job is released, and the reader is not told that this was all
    assert source.released == 1
    assert client.bodies == [event(b"1")]
    assert all(m["more_body"] for m in client.messages[1:])


async def test_a_comment_keeps_a_silent_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given events further apart than the keep-alive
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.1)
    client, source = FakeClient(), Source(event(b"1"), 0.75, event(b"2"))
    # When they are sent
    await respond(source, client)
    # Then comments fill the silence, and no event is lost or moved
    assert [body for body in client.bodies if not body.startswith(b":")] == [event(b"1"), event(b"2"), b""]
    comments = [body for body in client.bodies if body.startswith(b":")]
    assert len(comments) >= 2
    assert set(comments) == {b": keep-alive\n\n"}
    assert client.bodies[0] == event(b"1")
    assert client.bodies[-2:] == [event(b"2"), b""]


async def test_a_lively_stream_needs_no_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 5.0)
    client, source = FakeClient(), Source(event(b"1"), 0.05, event(b"2"))
    await respond(source, client)
    assert client.bodies == [event(b"1"), event(b"2"), b""]


def test_keep_alives_come_before_proxies_lose_patience() -> None:
    assert 0 < sse.KEEP_ALIVE_S < 60


class Work:
    """Work that is done when it is let go, and knows whether it was cancelled."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.started = asyncio.Event()
        self.cancelled = False

    async def run(self) -> str:
        self.started.set()
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return "result"


async def test_work_is_done_while_the_client_stays() -> None:
    client, work = FakeClient(), Work()
    before = others()
    work.let_go.set()
    assert await do(work.run(), client) == "result"
    assert not work.cancelled
    assert others() == before


async def test_work_is_cancelled_when_the_client_leaves() -> None:
    # Given work under way
    client, work = FakeClient(), Work()
    before = others()
    task = asyncio.create_task(do(work.run(), client))
    await work.started.wait()
    assert not task.done()
    # When the client leaves
    client.leave()
    # Then the work is cancelled, and the handler hears why
    with pytest.raises(ClientDisconnect):
        await task
    assert work.cancelled
    assert others() == before


async def test_work_that_is_done_counts_though_the_client_left() -> None:
    # Given a client that leaves at the very moment the work is done
    client, work = FakeClient(), Work()
    client.leave()
    work.let_go.set()
    assert await do(work.run(), client) == "result"


async def test_works_own_error_comes_through() -> None:
    async def failing() -> None:
        raise ValueError("the work's own")

    with pytest.raises(ValueError, match="the work's own"):
        await do(failing(), FakeClient())


async def test_work_is_cancelled_with_the_one_who_waits() -> None:
    client, work = FakeClient(), Work()
    task = asyncio.create_task(do(work.run(), client))
    await work.started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert work.cancelled
