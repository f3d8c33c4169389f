"""From a validated request to its frames: admit, queue, match, cancel. Knows no HTTP and no dialect."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from server.core import topology
from server.core.amqp import AmqpLink
from server.core.errors import BrokerUnavailable, NoWorker
from server.core.inbox import Inbox, Waiter
from server.core.messages import Api, Cancel, Frame, Job, encode
from server.core.registry import ModelSpec, Registry
from server.core.settings import Settings
from server.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Call:
    """What a dialect wants done. `body` has the shape of `api` and is complete: the worker adds no defaults."""

    request_id: str
    spec: ModelSpec
    endpoint: str
    api: Api
    body: dict[str, Any]
    key_id: int
    session_id: str = ""
    recorded: bool = True
    traceparent: str = ""
    context: str = ""


class Ticket:
    """A submitted call. Close it once its client is done or gone: an unfinished job is then cancelled."""

    def __init__(self, inbox: Inbox, waiter: Waiter) -> None:
        self._inbox = inbox
        self._waiter = waiter
        self._over = False
        self.request_id = waiter.job.id
        self.api: Api = waiter.job.api

    async def next(self) -> Frame:
        """The next chunk, usage, result or done frame. Raises the ServiceError the request ended with."""
        frame = await self._waiter.next()
        self._over = frame.kind in ("result", "done")
        return frame

    def close(self) -> None:
        self._inbox.release(self.request_id)
        if not self._over:
            try:
                self._inbox.publisher.broadcast(topology.CONTROL, encode(Cancel(self.request_id)))
            except BrokerUnavailable:
                return  # the reply queue is gone too, and the worker stops by that


async def _declare_nothing(_link: AmqpLink) -> None:
    """A connection that only asks."""


class Dispatcher:
    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._timeout_s = settings.request_timeout_s
        self.fleet = Fleet()
        self.inbox = Inbox(
            settings.amqp_url,
            "server",
            [model.id for model in registry.models],
            settings.queue_max_jobs,
            also_consume=self.fleet.consume,
            max_unread_bytes=settings.stream_buffer_bytes,
        )
        # Its own connection: asking for a queue that is gone closes the channel it is asked on.
        self.scraper = AmqpLink(settings.amqp_url, "server metrics", _declare_nothing)

    async def start(self) -> None:
        """Raises BrokerUnavailable."""
        await asyncio.gather(self.inbox.start(), self.scraper.start())

    async def close(self) -> None:
        await asyncio.gather(self.inbox.close(), self.scraper.close())

    @property
    def connected(self) -> bool:
        return self.inbox.publisher.connected and self.inbox.consumer.connected

    async def submit(self, call: Call) -> Ticket:
        """Queue the call. Raises NoWorker, QueueFull or BrokerUnavailable."""
        if self.connected and not self.fleet.has(call.spec.type, call.spec.id):
            raise NoWorker(
                f"No worker for {call.spec.id} is ready. It may still be starting: see /health.", retry_after_s=5
            )
        now = time.time()
        job = Job(
            id=call.request_id,
            model=call.spec.id,
            endpoint=call.endpoint,
            body=call.body,
            key_id=call.key_id,
            reply_to=self.inbox.queue,
            created_at=now,
            deadline=now + self._timeout_s,
            session_id=call.session_id,
            recorded=call.recorded,
            traceparent=call.traceparent,
            api=call.api,
            context=call.context,
        )
        return Ticket(self.inbox, await self.inbox.submit(job, "interactive"))

    def queued(self) -> list[tuple[str, float]]:
        """(model, created_at) of each request of this server that no worker has taken yet."""
        return [(w.job.model, w.job.created_at) for w in self.inbox.waiting.values() if not w.started]
