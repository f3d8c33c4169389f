"""The broker link against a real RabbitMQ."""

import asyncio
import secrets
import socket

import pytest

from server.core import confirms, topology
from server.core.amqp import AmqpLink, Delivery
from server.core.errors import BrokerUnavailable, PayloadTooLarge, QueueFull
from tests.faults.broker import Proxy


async def nothing(link: AmqpLink) -> None:
    """A set-up that declares nothing."""


async def publish_many(link: AmqpLink, queue: str, count: int) -> None:
    for _ in range(count):
        await link.publish(queue, b"x")


async def until(check: object, timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not check():  # type: ignore[operator]
            await asyncio.sleep(0.02)


async def test_a_full_queue_refuses_and_takes_again(amqp_url: str) -> None:
    # Given a queue for two jobs
    model = secrets.token_hex(4)
    link = AmqpLink(amqp_url, "test", lambda own: own.declare_jobs(model, 2))
    await link.start()
    queue = topology.jobs_queue(model, "interactive")
    # When more come than it holds, then it refuses: quorum queues tell so a little late, so that a few
    # more than two may get in
    with pytest.raises(QueueFull):
        await publish_many(link, queue, 20)
    # And takes new ones once it was emptied
    await link.consume(queue, lambda delivery: link.ack(delivery), prefetch=50)
    await asyncio.sleep(0.5)
    await link.publish(queue, b"y")
    await link.close()


async def test_an_unacked_job_is_delivered_again_until_it_is_dead(amqp_url: str) -> None:
    # Given a job, and a consumer that gives it back each time
    model = secrets.token_hex(4)
    attempts: list[int] = []
    dead: list[bytes] = []

    def give_back(delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        link.reject(delivery, requeue=True)

    async def setup(own: AmqpLink) -> None:
        await own.declare_jobs(model, 10)

    link = AmqpLink(amqp_url, "test", setup)
    await link.start()
    body = secrets.token_bytes(8)
    await link.publish(topology.suspects_queue(model), body)
    # When it is consumed
    await link.consume(topology.suspects_queue(model), give_back, prefetch=1)
    await link.consume(topology.DEAD, lambda delivery: dead.append(delivery.body))
    # Then it comes again with its number of attempts, and at last goes to the dead letters
    await until(lambda: body in dead)
    assert attempts == list(range(1, topology.TRIES_ALONE + 1))
    await link.close()


async def test_a_lost_connection_comes_back_with_its_consumers(amqp_url: str) -> None:
    # Given a link that consumes a durable queue
    name = f"test-{secrets.token_hex(4)}"
    got: list[Delivery] = []
    lost: list[bool] = []

    async def setup(own: AmqpLink) -> None:
        await own.declare_queue(name)
        await own.consume(name, got.append, prefetch=10)

    link = AmqpLink(amqp_url, "test", setup, on_lost=lambda: lost.append(True))
    await link.start()
    await link.publish(name, b"first")
    await until(lambda: got)
    # When its connection is cut under it
    link._connection._transport._sock.shutdown(socket.SHUT_RDWR)  # as a network would
    in_flight = link.publish_soon(name, b"in flight")
    await until(lambda: lost)
    # Then what the broker has not confirmed has failed
    with pytest.raises(BrokerUnavailable):
        await in_flight
    # And the link is back, what was not acked comes again, and an ack for the old channel does nothing
    await until(lambda: link.connected and len(got) == 2)
    link.ack(got[0])
    link.ack(got[1])
    await link.publish(name, b"second")
    await until(lambda: len(got) == 3)
    assert [delivery.body for delivery in got] == [b"first", b"first", b"second"]
    await link.close()


async def test_what_cannot_be_routed_is_told(amqp_url: str) -> None:
    gone: list[str] = []
    link = AmqpLink(amqp_url, "test", nothing, on_return=gone.append)
    await link.start()
    link.send("replies.nobody", b"x")
    await until(lambda: gone == ["replies.nobody"])
    # And who waits for it knows which of its messages that was
    await link.declare_queue(name := f"test-{secrets.token_hex(4)}", exclusive=True)
    there = await asyncio.gather(*(link.settle(queue, b"x") for queue in ("replies.nobody", name) * 3))
    assert there == [False, True] * 3
    await link.close()


async def test_a_message_that_no_broker_takes_is_refused_here(amqp_url: str) -> None:
    # Given a link that waits for a confirm
    name = f"test-{secrets.token_hex(4)}"
    link = AmqpLink(amqp_url, "test", lambda own: declared(own, name))
    await link.start()
    before = link.publish_soon(name, b"before")
    # When it is given more than RabbitMQ takes
    with pytest.raises(PayloadTooLarge):
        await link.publish(name, b"x" * (topology.MAX_MESSAGE_BYTES + 1))
    # Then that is refused and nothing else; and the most it takes, any broker takes
    await before
    await link.publish(name, b"x" * topology.MAX_MESSAGE_BYTES)
    assert topology.MAX_MESSAGE_BYTES < 16 * 2**20
    await link.close()


async def declared(link: AmqpLink, name: str) -> None:
    await link.declare_queue(name)


async def test_a_silent_broker_is_an_error_in_time(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a broker that confirms nothing, and lives
    monkeypatch.setattr(confirms, "CONFIRM_TIMEOUT_S", 0.3)
    name = f"test-{secrets.token_hex(4)}"
    proxy = Proxy(amqp_url)
    await proxy.start()
    link = AmqpLink(proxy.url, "test", lambda own: declared(own, name))
    await link.start()
    proxy.go_dumb()
    # When something is published, then it is given up; and what the broker says of it later does no harm
    with pytest.raises(BrokerUnavailable, match="in time"):
        await link.publish(name, b"first")
    proxy.heal()
    await until(lambda: not link._confirms)
    await link.publish(name, b"second")
    await link.close()
    await proxy.stop()


async def test_no_broker_is_an_error_in_time() -> None:
    link = AmqpLink("amqp://guest:guest@127.0.0.1:1/", "test", nothing)
    with pytest.raises(BrokerUnavailable):
        await link.start(timeout_s=0.5)


async def test_it_can_be_closed_at_any_moment_of_being_refused() -> None:
    # Given nobody who listens; when a link is closed so many turns of the loop after it was started
    for turns in range(60):
        link = AmqpLink("amqp://guest:guest@127.0.0.1:1/", "test", nothing)
        starting = asyncio.create_task(link.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        # Then it ends, and does not go on trying
        async with asyncio.timeout(5):
            await link.close()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
