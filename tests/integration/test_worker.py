"""What every worker does with a job, over a real broker, with a model that only echoes."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from server.core import topology
from server.core.amqp import AmqpLink, Delivery
from server.core.errors import DeadlineExceeded, EngineFailed, InvalidRequest
from server.core.inbox import Inbox, Waiter
from server.core.messages import Cancel, Job, Record, WorkerType, decode, encode
from server.core.settings import Settings
from tests.integration.test_amqp import until
from workers.base import Answer, Worker
from workers.replies import Reply


class EchoWorker(Worker):
    """Says what the body says, after `wait_s`."""

    type: WorkerType = "chat"

    def __init__(self, settings: Settings, model: str) -> None:
        super().__init__(settings, model)
        self.seen: list[str] = []
        self.cancelled: list[str] = []
        self.lanes: dict[str, str] = {}

    async def start(self) -> int:
        return 8

    async def stop(self) -> None:
        pass

    async def handle(self, job: Job, reply: Reply) -> Answer:
        self.seen.append(job.id)
        self.lanes[job.id] = job.lane
        if job.body.get("break"):
            raise RuntimeError("secret detail")
        if job.body.get("refuse"):
            raise InvalidRequest("no", param="x")
        try:
            await asyncio.sleep(job.body.get("wait_s", 0))
        except asyncio.CancelledError:
            self.cancelled.append(job.id)
            raise
        now = time.time()
        record = Record(job.id, "chat", job.key_id, job.model, job.endpoint, 1, 1, now, now, finish_reason="stop")
        return Answer("result", str(job.body["say"]).encode(), record)


@dataclass
class Bench:
    worker: EchoWorker
    inbox: Inbox
    running: asyncio.Task[int]
    records: list[Record]

    def job(self, **body: object) -> Job:
        now = time.time()
        return Job(
            id=secrets.token_hex(8),
            model=self.worker.model,
            endpoint="/chat",
            body=body,
            key_id=1,
            reply_to=self.inbox.queue,
            created_at=now,
            deadline=now + 20,
        )


@pytest.fixture
async def bench(settings: Settings) -> AsyncIterator[Bench]:
    """A running worker, who asks it, and who reads its history."""
    model = f"echo-{secrets.token_hex(4)}"
    worker = EchoWorker(settings, model)
    inbox = Inbox(settings.amqp_url, "test", [model], settings.queue_max_jobs)
    records: list[Record] = []

    def keep(delivery: Delivery) -> None:
        record = decode(Record, delivery.body)
        if record.model == model:
            records.append(record)

    async def read_history(link: AmqpLink) -> None:
        await link.declare_queue(topology.HISTORY)
        await link.consume(topology.HISTORY, keep)

    history = AmqpLink(settings.amqp_url, "history", read_history)
    await history.start()
    await inbox.start()
    running = asyncio.create_task(worker.run())
    await until(lambda: worker.probe.ready or running.done())
    yield Bench(worker, inbox, running, records)
    if not running.done():
        os.kill(os.getpid(), signal.SIGTERM)
        await running
    await inbox.close()
    await history.close()


async def test_a_job_is_answered_recorded_and_acked(bench: Bench) -> None:
    job = bench.job(say="hello")
    waiter = await bench.inbox.submit(job, "interactive")
    frame = await waiter.next()
    assert (frame.kind, frame.data) == ("result", b"hello")
    await until(lambda: [record.request_id for record in bench.records] == [job.id])
    depth, consumers = await bench.inbox.publisher.declare_queue(
        topology.jobs_queue(bench.worker.model, "interactive"), passive=True
    )
    assert (depth, consumers) == (0, 2)  # for its slots, and for what it looks ahead at


async def test_a_job_knows_by_which_lane_it_came(bench: Bench) -> None:
    # Given jobs that do not say it themselves
    soon, some_time = bench.job(say="soon"), bench.job(say="some time")
    waiters = [await bench.inbox.submit(soon, "interactive"), await bench.inbox.submit(some_time, "batch")]
    for waiter in waiters:
        await waiter.next()
    assert bench.worker.lanes == {soon.id: "interactive", some_time.id: "batch"}


async def test_an_expired_job_is_never_generated(bench: Bench) -> None:
    now = time.time()
    job = Job(
        id="late",
        model=bench.worker.model,
        endpoint="/chat",
        body={"say": "x"},
        key_id=1,
        reply_to=bench.inbox.queue,
        created_at=now - 20,
        deadline=now - 0.1,
    )
    waiter = bench.inbox.waiting[job.id] = Waiter(job)
    queue = topology.jobs_queue(bench.worker.model, "interactive")
    await bench.inbox.publisher.publish(queue, encode(job))
    with pytest.raises(DeadlineExceeded, match="past its deadline"):
        await waiter.next()
    assert bench.worker.seen == []


async def test_a_job_that_takes_too_long_is_stopped(bench: Bench) -> None:
    job = bench.job(say="x", wait_s=30)
    job = replace(job, deadline=time.time() + 0.3)
    waiter = await bench.inbox.submit(job, "interactive")
    with pytest.raises(DeadlineExceeded):
        await waiter.next()
    await until(lambda: bench.worker.cancelled == [job.id])


async def test_errors_come_back_without_their_inside(bench: Bench) -> None:
    waiter = await bench.inbox.submit(bench.job(say="x", refuse=True), "interactive")
    with pytest.raises(InvalidRequest) as refused:
        await waiter.next()
    assert (refused.value.message, refused.value.param) == ("no", "x")
    waiter = await bench.inbox.submit(bench.job(**{"say": "x", "break": True}), "interactive")
    with pytest.raises(EngineFailed) as failed:
        await waiter.next()
    assert "secret" not in failed.value.message
    # Neither is history, and both are done with
    await asyncio.sleep(0.3)
    assert bench.records == []
    assert bench.worker.beacon.running == 0


async def test_a_cancelled_job_stops_and_is_not_tried_again(bench: Bench) -> None:
    job = bench.job(say="x", wait_s=30)
    await bench.inbox.submit(job, "interactive")
    await until(lambda: job.id in bench.worker.seen)
    bench.inbox.publisher.broadcast(topology.CONTROL, encode(Cancel(job.id)))
    await until(lambda: bench.worker.cancelled == [job.id])
    await asyncio.sleep(0.5)
    assert bench.worker.seen == [job.id]


async def test_a_job_cancelled_in_the_queue_is_never_generated(bench: Bench) -> None:
    # Given a cancel that arrives before its job does
    job = bench.job(say="x")
    bench.inbox.publisher.broadcast(topology.CONTROL, encode(Cancel(job.id)))
    await asyncio.sleep(0.3)
    await bench.inbox.submit(job, "interactive")
    # Then the job is taken from the queue and dropped
    queue = topology.jobs_queue(bench.worker.model, "interactive")
    await asyncio.sleep(0.3)
    assert (await bench.inbox.publisher.declare_queue(queue, passive=True))[0] == 0
    assert bench.worker.seen == []
    assert bench.worker.beacon.running == 0


async def test_a_cancel_in_the_same_breath_leaks_nothing(bench: Bench) -> None:
    # Given jobs whose cancels follow at once
    jobs = [bench.job(say="x", wait_s=30) for _ in range(8)]
    for job in jobs:
        await bench.inbox.submit(job, "interactive")
        bench.inbox.publisher.broadcast(topology.CONTROL, encode(Cancel(job.id)))
    # Then all the slots are free again
    await until(lambda: bench.worker.beacon.running == 0)
    waiter = await bench.inbox.submit(bench.job(say="next"), "interactive")
    assert (await waiter.next()).data == b"next"


async def test_a_job_delivered_again_while_it_runs_is_run_once(bench: Bench) -> None:
    # Given a running job
    job = bench.job(say="once", wait_s=1)
    waiter = await bench.inbox.submit(job, "interactive")
    await until(lambda: job.id in bench.worker.seen)
    # When the worker's consuming connection is cut, so that the broker delivers the job again
    bench.worker._consumer._connection._transport._sock.shutdown(socket.SHUT_RDWR)
    # Then it is answered once, and done with
    assert (await waiter.next()).data == b"once"
    queue = topology.jobs_queue(bench.worker.model, "interactive")
    await until(lambda: bench.worker.beacon.running == 0)
    await asyncio.sleep(0.3)
    assert bench.worker.seen == [job.id]
    assert await bench.inbox.publisher.declare_queue(queue, passive=True) == (0, 2)


async def test_an_answer_survives_the_publishing_connection(bench: Bench) -> None:
    # Given a running job whose worker loses the connection it answers on
    job = bench.job(say="whole", wait_s=0.5)
    waiter = await bench.inbox.submit(job, "interactive")
    await until(lambda: job.id in bench.worker.seen)
    bench.worker._publisher._connection._transport._sock.shutdown(socket.SHUT_RDWR)
    # Then the answer and the record arrive all the same, once
    assert (await waiter.next()).data == b"whole"
    await until(lambda: [record.request_id for record in bench.records] == [job.id])


async def test_a_server_that_is_gone_has_its_jobs_stopped(bench: Bench, settings: Settings) -> None:
    # Given a job of a server whose reply queue is gone
    job = bench.job(say="x", wait_s=30)
    job = replace(job, reply_to="replies.gone")
    # When the worker says that it has started it
    await bench.inbox.submit(job, "interactive")
    # Then the broker returns the frame, and the worker stops
    await until(lambda: bench.worker.cancelled == [job.id])


async def test_rubbish_goes_to_the_dead_letters_and_harms_nobody(bench: Bench, settings: Settings) -> None:
    dead: list[bytes] = []
    reader = AmqpLink(settings.amqp_url, "dead", lambda own: own.declare_queue(topology.DEAD))  # type: ignore[arg-type,return-value]
    await reader.start()
    await reader.consume(topology.DEAD, lambda delivery: dead.append(delivery.body))
    rubbish = b"{" + secrets.token_hex(4).encode()
    await bench.inbox.publisher.publish(topology.jobs_queue(bench.worker.model, "interactive"), rubbish)
    await until(lambda: rubbish in dead)
    waiter = await bench.inbox.submit(bench.job(say="still here"), "interactive")
    assert (await waiter.next()).data == b"still here"
    await reader.close()


async def test_sigterm_finishes_what_runs_and_takes_nothing_new(bench: Bench) -> None:
    # Given a job in hand
    job = bench.job(say="done", wait_s=1)
    waiter = await bench.inbox.submit(job, "interactive")
    await until(lambda: job.id in bench.worker.seen)
    # When the worker is told to stop, and another job comes
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: not bench.worker.probe.ready)
    late = bench.job(say="late")
    await bench.inbox.submit(late, "interactive")
    # Then the first is answered, the worker exits 0, and the other waits for another worker
    assert (await waiter.next()).data == b"done"
    assert await bench.running == 0
    assert late.id not in bench.worker.seen
    await until(lambda: [record.request_id for record in bench.records] == [job.id])
    with contextlib.suppress(TimeoutError):
        depth, _ = await bench.inbox.publisher.declare_queue(
            topology.jobs_queue(bench.worker.model, "interactive"), passive=True
        )
        assert depth == 1
