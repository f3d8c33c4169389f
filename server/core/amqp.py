"""One AMQP connection with one channel that comes back by itself. Only this and connection.py know pika.

Owns connecting, confirms and redelivery bookkeeping; knows nothing of jobs or frames. A process keeps
two: one to publish on and one to consume on, so that a publisher held back by the broker's flow control
never delays the acks.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pika
from pika import spec
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker

from server.core import metrics, topology
from server.core.confirms import Confirms
from server.core.connection import JoinedConnection
from server.core.errors import BrokerUnavailable, PayloadTooLarge
from server.core.settings import BadSettings

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5
"""Either side sends one each half of it. A peer that went dumb without an end is noticed after one to two of them; a
process that is held up for two loses its connection."""
CONNECT_TIMEOUT_S = 5.0
RECONNECT_MAX_S = 3.0
PRECONDITION_FAILED = 406
LOST = "The message broker is not reachable. Try again shortly."
BLOCKED = "The message broker is out of memory or disk and takes no work. Try again shortly."


@dataclass(frozen=True, slots=True)
class Delivery:
    """A consumed message. `attempt` starts at 1; it counts only on queues of the quorum type."""

    body: bytes
    tag: int
    attempt: int
    channel: Channel


class AmqpLink:
    """A connection to the broker.

    `setup` runs after each (re)connection and declares and consumes what this link is for; `on_lost`
    runs whenever an open connection is gone, and `on_return` for each unroutable message sent with
    `mandatory`, with its routing key.
    """

    def __init__(
        self,
        url: str,
        name: str,
        setup: Callable[["AmqpLink"], Awaitable[None]],
        on_lost: Callable[[], None] = lambda: None,
        on_return: Callable[[str], None] = lambda routing_key: None,
    ) -> None:
        self._parameters = pika.URLParameters(url)
        self._parameters.heartbeat = HEARTBEAT_S
        self._parameters.client_properties = {"connection_name": name}
        self._setup = setup
        self._on_lost = on_lost
        self._on_return = on_return
        self._connection: JoinedConnection | None = None
        self._channel: Channel | None = None
        self._confirms = Confirms()
        self._returned: set[str] = set()
        """Ids of messages that came back and that somebody waits for."""
        self._gone = asyncio.Event()
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._blocked = ""
        self.unblocked_at = 0.0
        """When the broker, as far as it said so, last began to read again, in Unix seconds."""
        self._closing = False
        self._was_ready = False
        self._refusal: BadSettings | None = None

    @property
    def connected(self) -> bool:
        return self._ready.is_set()

    @property
    def blocked(self) -> str:
        """Why the broker reads nothing from this connection, such as `low on disk`, empty where it does; it tells at
        the first message that it does not read."""
        return self._blocked

    async def start(self, timeout_s: float = 30.0) -> None:
        """Connect, and stay connected from then on. Raises BrokerUnavailable after `timeout_s`."""
        self._task = asyncio.create_task(self._stay_connected())
        waiter = asyncio.create_task(self._ready.wait())
        await asyncio.wait({waiter, self._task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if self._task.done():
            self._task.result()
        if not self.connected:
            await self.close()
            raise BrokerUnavailable(LOST)

    async def close(self) -> None:
        """Disconnect for good; what is not confirmed yet fails."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        connection = self._connection
        if connection is not None and connection.is_open:
            connection.close()
            try:
                await asyncio.wait_for(self._gone.wait(), 5)
            except TimeoutError:
                logger.warning("broker did not confirm the close", extra={"action": "amqp_close"})
        self._confirms.fail(LOST)
        self._ready.clear()

    async def publish(self, queue: str, body: bytes, *, message_id: str = "", traceparent: str = "") -> None:
        """Send to a queue and wait until the broker has it. `traceparent` becomes a header: our own processes read the
        message's field, which outlives being queued anew, and others' tools look there.

        Raises QueueFull when the queue refuses it, BrokerUnavailable when the broker is lost, blocked or silent (it may
        have the message all the same), and PayloadTooLarge.
        """
        await self.publish_soon(queue, body, message_id=message_id, traceparent=traceparent)

    def publish_soon(
        self, queue: str, body: bytes, *, message_id: str = "", traceparent: str = ""
    ) -> asyncio.Future[None]:
        """`publish`, returning at once with what to wait for. What this link sends later arrives later."""
        if len(body) > topology.MAX_MESSAGE_BYTES:
            # The broker would close the channel over it, and cut off everybody else's.
            raise PayloadTooLarge(f"The request is larger than {topology.MAX_MESSAGE_BYTES} bytes.")
        properties = pika.BasicProperties(
            message_id=message_id,
            delivery_mode=2,
            content_type="application/json",
            headers={"traceparent": traceparent} if traceparent else None,
        )
        return self._confirmed(queue, body, properties, mandatory=False)

    def _confirmed(
        self, queue: str, body: bytes, properties: pika.BasicProperties, mandatory: bool
    ) -> asyncio.Future[None]:
        """Send; what is returned ends when the broker has it, or fails when it does not say so in time."""
        if self._blocked:
            raise BrokerUnavailable(BLOCKED)
        return self._confirms.expect(self._basic_publish("", queue, body, properties, mandatory))

    def send(self, queue: str, body: bytes) -> None:
        """Send to a queue that may be gone, without waiting; `on_return` hears of one that is."""
        self._basic_publish("", queue, body, pika.BasicProperties(delivery_mode=1), mandatory=True)

    async def settle(self, queue: str, body: bytes) -> bool:
        """`send`, and wait until the broker has dealt with it: whether the queue was there. `on_return` has heard by
        then if not. Raises BrokerUnavailable."""
        message_id = uuid.uuid4().hex
        properties = pika.BasicProperties(message_id=message_id, delivery_mode=1)
        try:
            await self._confirmed(queue, body, properties, mandatory=True)
            return message_id not in self._returned
        finally:
            self._returned.discard(message_id)

    def broadcast(self, exchange: str, body: bytes) -> None:
        self._basic_publish(exchange, "", body, pika.BasicProperties(delivery_mode=1), mandatory=False)

    def _basic_publish(
        self, exchange: str, routing_key: str, body: bytes, properties: pika.BasicProperties, mandatory: bool
    ) -> int:
        channel = self._channel
        if channel is None or not channel.is_open or not self.connected:
            raise BrokerUnavailable(LOST)
        channel.basic_publish(exchange, routing_key, body, properties, mandatory=mandatory)
        metrics.amqp_messages.inc()
        return self._confirms.sent()

    def ack(self, delivery: Delivery, *, through: bool = False) -> None:
        """Done with it, and with `through` with all that this link was delivered before it and has not settled.

        After a reconnection this does nothing: the broker delivers the message again.
        """
        if self.holds(delivery):
            delivery.channel.basic_ack(delivery.tag, multiple=through)

    def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        """Give it back (`requeue`), or to the dead letters."""
        if self.holds(delivery):
            delivery.channel.basic_reject(delivery.tag, requeue=requeue)

    def holds(self, delivery: Delivery) -> bool:
        """Whether it can still be settled: the connection that it came by is there."""
        return self._channel is not None and delivery.channel is self._channel and bool(self._channel.is_open)

    async def declare_jobs(self, model: str, max_length: int) -> None:
        await self.declare_dead_letters()
        for queue, arguments in topology.jobs_queues(model, max_length).items():
            await self.declare_queue(queue, arguments)

    async def declare_dead_letters(self) -> None:
        await self.declare_fanout(topology.DEAD_LETTERS)
        await self.declare_queue(topology.DEAD)
        await self.bind(topology.DEAD, topology.DEAD_LETTERS)

    async def declare_queue(
        self, name: str, arguments: dict[str, Any] | None = None, *, exclusive: bool = False, passive: bool = False
    ) -> tuple[int, int]:
        """Declare a durable (or exclusive) queue, with the topology's arguments for its name where none are given;
        returns (ready messages, consumers)."""
        frame = await self._call(
            lambda channel, done: channel.queue_declare(
                name,
                passive=passive,
                durable=not exclusive,
                exclusive=exclusive,
                auto_delete=exclusive,
                arguments=arguments or topology.ARGUMENTS.get(name),
                callback=done,
            )
        )
        return frame.method.message_count, frame.method.consumer_count

    async def declare_fanout(self, exchange: str) -> None:
        await self._call(
            lambda channel, done: channel.exchange_declare(exchange, "fanout", durable=True, callback=done)
        )

    async def bind(self, queue: str, exchange: str) -> None:
        await self._call(lambda channel, done: channel.queue_bind(queue, exchange, callback=done))

    async def listen(self, exchange: str, on_message: Callable[[Delivery], None]) -> None:
        """Hear all that is told on a fanout from now on, in a queue that goes with this connection."""
        # A new name for each connection: the broker may hold on to the old one's queue for a while.
        queue = f"{exchange}.{uuid.uuid4().hex[:12]}"
        await self.declare_fanout(exchange)
        await self.declare_queue(queue, exclusive=True)
        await self.bind(queue, exchange)
        await self.consume(queue, on_message)

    async def consume(
        self, queue: str, on_message: Callable[[Delivery], None], prefetch: int = 0, *, priority: int = 0
    ) -> str:
        """Deliver the queue's messages to `on_message`; `prefetch` 0 means no acks are expected.

        Consumers of a higher `priority` get them first, as long as their `prefetch` has room.
        """
        if prefetch:
            await self._call(lambda channel, done: channel.basic_qos(prefetch_count=prefetch, callback=done))

        def deliver(
            channel: Channel, method: spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes
        ) -> None:
            count = (properties.headers or {}).get("x-delivery-count", 0)
            try:
                on_message(Delivery(body, method.delivery_tag, int(count) + 1, channel))
            except Exception:
                # Raised into pika it would cut the connection, for one message that nobody understood.
                logger.exception("message not handled", extra={"action": "deliver", "queue": queue})
                if prefetch:
                    channel.basic_reject(method.delivery_tag, requeue=False)

        frame = await self._call(
            lambda channel, done: channel.basic_consume(
                queue, deliver, auto_ack=not prefetch, arguments={"x-priority": priority}, callback=done
            )
        )
        return str(frame.method.consumer_tag)

    async def cancel_consumer(self, consumer_tag: str) -> None:
        """Take nothing more from a queue; what was delivered can still be acked."""
        if self.connected:
            await self._call(lambda channel, done: channel.basic_cancel(consumer_tag, callback=done))

    async def _call(self, method: Callable[[Channel, Callable[[Any], None]], Any]) -> Any:
        """One synchronous AMQP method: resolves with the broker's answer, or fails with the channel."""
        channel = self._channel
        if channel is None or not channel.is_open:
            raise BrokerUnavailable(LOST)
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(frame: Any) -> None:
            if not answered.done():
                answered.set_result(frame)

        method(channel, done)
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({answered, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not answered.done():
            raise BrokerUnavailable(LOST)
        return answered.result()

    async def _stay_connected(self) -> None:
        delay_s = 0.1
        while True:
            try:
                await self._connect()
            except BrokerUnavailable as exc:
                if self._channel is not None:
                    self._lose()  # messages may have come by it already
                if self._refusal is not None and not self._was_ready:
                    raise self._refusal from exc  # trying again would change nothing
                logger.warning("broker not reachable", extra={"action": "amqp_connect", "retry_s": delay_s})
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RECONNECT_MAX_S)
                continue
            delay_s = 0.1
            self._was_ready = True
            self._ready.set()
            await self._gone.wait()
            self._lose()

    async def _connect(self) -> None:
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone = asyncio.Event()
        gone = self._gone

        def on_failed(_connection: object, reason: BaseException) -> None:
            if not self._closing:
                logger.warning("broker connection ended", extra={"action": "amqp_lost", "reason": repr(reason)})
            if not opened.done():
                opened.set_exception(BrokerUnavailable(LOST))
            gone.set()

        def on_channel(channel: Channel) -> None:
            if connection is not self._connection:  # given up on meanwhile
                channel.connection.close()
                return
            channel.add_on_close_callback(on_channel_closed)
            # The broker cancels a consumer whose queue is gone: connect anew, and declare it again.
            channel.add_on_cancel_callback(lambda _frame: channel.connection.close())
            channel.add_on_return_callback(on_returned)
            channel.confirm_delivery(self._on_confirm, callback=on_confirms)
            self._channel = channel

        def on_returned(
            _ch: Channel, method: spec.Basic.Return, properties: pika.BasicProperties, _body: bytes
        ) -> None:
            if properties.message_id:
                self._returned.add(properties.message_id)
            self._on_return(method.routing_key)

        def on_confirms(_frame: object) -> None:
            if not opened.done():
                opened.set_result(None)

        def on_channel_closed(_channel: Channel, reason: BaseException) -> None:
            # A channel the broker closed (bad arguments, an ack timeout) takes its connection with it:
            # one way back to a known state.
            if isinstance(reason, ChannelClosedByBroker) and reason.reply_code == PRECONDITION_FAILED:
                self._refusal = BadSettings(
                    f"The broker has a queue with other arguments: {reason.reply_text}. If QUEUE_MAX_JOBS was "
                    f"changed, set it back, or delete that queue once it is empty."
                )
            if connection.is_open:
                connection.close()
            on_failed(connection, reason)

        connection = JoinedConnection(
            self._parameters,
            on_open_callback=lambda c: c.channel(on_open_callback=on_channel),
            on_open_error_callback=on_failed,
            on_close_callback=on_failed,
        )
        connection.add_on_connection_blocked_callback(lambda _c, f: self._set_blocked(f.method.reason or "blocked"))
        connection.add_on_connection_unblocked_callback(lambda _c, _f: self._set_blocked(""))
        self._connection, self._blocked = connection, ""
        self._confirms.begin()
        self._returned.clear()
        try:
            # Not wait_for: it forgets a cancel that comes in the same turn as a refusal; `close` would wait for ever.
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.shield(opened)
            await self._setup(self)
        except TimeoutError as exc:
            raise BrokerUnavailable(LOST) from exc
        finally:
            if opened.cancel() or opened.exception() is not None:
                self._connection = None

    def _set_blocked(self, reason: str) -> None:
        self._blocked = reason
        if reason:
            self._confirms.fail(BLOCKED)
            logger.error(
                "RabbitMQ takes nothing: free some of what it is low on, and it goes on by itself",
                extra={"action": "amqp_blocked", "reason": reason},
            )
        else:
            self.unblocked_at = time.time()
            logger.warning("RabbitMQ takes messages again", extra={"action": "amqp_unblocked"})

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        taken = isinstance(method, spec.Basic.Ack)
        self._confirms.told(method.delivery_tag, multiple=method.multiple, taken=taken)

    def _lose(self) -> None:
        self._ready.clear()
        self._channel = None
        self._confirms.fail(LOST)
        self._on_lost()
