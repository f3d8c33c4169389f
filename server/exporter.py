"""The server's `/metrics`, and the state that is read at the scrape: queues, workers, history."""

import asyncio
from collections import Counter

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, values
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from server.core import metrics as core_metrics
from server.core import queued, topology
from server.core.errors import BrokerUnavailable
from server.core.messages import Lane, Status
from server.core.registry import Registry
from server.dispatch import Dispatcher

router = APIRouter(tags=["service"])

LANES: tuple[Lane, ...] = ("interactive", "batch")
SCRAPE_TIMEOUT_S = 3.0
SEVERAL = bool(getattr(values.ValueClass, "_multiprocess", False))
"""Whether this is one of several processes, whose counts stand in files (server/processes.py)."""


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    registry: Registry = request.app.state.registry
    models = [model.id for model in registry.models]
    queues, busy, database = await asyncio.gather(
        _queues(dispatcher, models), _busy(dispatcher, models), request.app.state.store.answers()
    )
    families = [*queues, *_workers(dispatcher, registry), *busy]
    families += _connected(dispatcher.connected, database)
    _tell_queued(dispatcher, models)
    return Response(_counted() + generate_latest(_Once(families)), media_type=CONTENT_TYPE_LATEST)


class _Once:
    """A registry of what was just read."""

    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> list[GaugeMetricFamily]:
        return self._families


async def _queues(dispatcher: Dispatcher, models: list[str]) -> list[GaugeMetricFamily]:
    """Depth and consumers, asked of the broker. Nothing, while the broker is not there."""
    depth = GaugeMetricFamily("qwen3_queue_messages", "Jobs sent that no worker has begun", labels=["model", "lane"])
    consumers = GaugeMetricFamily("qwen3_queue_consumers", "Workers on a queue", labels=["model", "lane"])
    history = GaugeMetricFamily("qwen3_history_queue_messages", "Finished requests waiting for Postgres")
    dead = GaugeMetricFamily("qwen3_dead_letters", "Messages given up on")
    link = dispatcher.scraper
    try:
        async with asyncio.timeout(SCRAPE_TIMEOUT_S):
            for model in models:
                queues: dict[str, str] = {lane: topology.jobs_queue(model, lane) for lane in LANES}
                queues |= {"retries": topology.retries_queue(model), "suspects": topology.suspects_queue(model)}
                for lane, queue in queues.items():
                    ready, count = await link.declare_queue(queue, passive=True)
                    # The broker counts what is ready; what workers hold and have not begun waits as well.
                    held = sum(_waiting(worker, lane) for worker in dispatcher.fleet.workers() if worker.model == model)
                    depth.add_metric([model, lane], ready + held)
                    consumers.add_metric([model, lane], count)
            held = sum(worker.backlog for worker in dispatcher.fleet.workers() if worker.type == "archive")
            history.add_metric([], (await link.declare_queue(topology.HISTORY, passive=True))[0] + held)
            dead.add_metric([], (await link.declare_queue(topology.DEAD, passive=True))[0])
    except (BrokerUnavailable, TimeoutError):
        return []
    return [depth, consumers, history, dead]


def _waiting(worker: Status, lane: str) -> int:
    """Jobs that a worker has taken and not begun."""
    by_lane = {"interactive": worker.waiting - worker.waiting_batch, "batch": worker.waiting_batch}
    return by_lane.get(lane, 0)


def _counted() -> bytes:
    """What this process has counted; with several of them, the sum over all, those that have ended included."""
    if not SEVERAL:
        return generate_latest()
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # has no types
    return generate_latest(registry)


async def keep_telling(dispatcher: Dispatcher, models: list[str]) -> None:
    """Where a scrape may reach another process: leave there what this one would say, a second old at the most."""
    while SEVERAL:
        _tell_queued(dispatcher, models)
        await asyncio.sleep(queued.TELL_EVERY_S)


def _tell_queued(dispatcher: Dispatcher, models: list[str]) -> None:
    waiting = dispatcher.queued()
    queued.tell(waiting, models, "interactive")
    counts = Counter(waiter.job.model for waiter in waiting)
    for model in models:
        core_metrics.requests_waiting.labels(model).set(counts[model])


async def _busy(dispatcher: Dispatcher, models: list[str]) -> list[GaugeMetricFamily]:
    """Said of every model, of those without a worker too: whoever scales by it must tell nothing from no answer.

    Not said while the broker is not there, or takes nothing for want of memory or disk: workers are not heard then, and
    a 0 would send them home.
    """
    if not dispatcher.connected or not await dispatcher.heard():
        return []
    busy = GaugeMetricFamily("qwen3_workers_busy", "Jobs in the ready workers' hands, in workers", labels=["model"])
    ready = [worker for worker in dispatcher.fleet.workers() if worker.ready and worker.slots]
    for model in models:
        busy.add_metric([model], sum(worker.running / worker.slots for worker in ready if worker.model == model))
    return [busy]


def _connected(broker: bool, database: bool) -> list[GaugeMetricFamily]:
    return [
        GaugeMetricFamily("qwen3_broker_connected", "1: this server is connected to RabbitMQ", broker),
        GaugeMetricFamily("qwen3_database_connected", "1: Postgres answers this server", database),
    ]


def _workers(dispatcher: Dispatcher, registry: Registry) -> list[GaugeMetricFamily]:
    ready = GaugeMetricFamily("qwen3_workers_ready", "Live workers that are ready", labels=["type", "model"])
    running = GaugeMetricFamily("qwen3_worker_running", "Jobs in the workers' hands", labels=["type", "model"])
    lag = GaugeMetricFamily("qwen3_history_last_lag_seconds", "From the end of the last request written to its row")
    # At 0 where nobody tells of itself: of what is not there, nobody could be warned.
    totals: dict[tuple[str, str], tuple[int, int]] = {(model.type, model.id): (0, 0) for model in registry.models}
    totals["archive", ""] = (0, 0)
    for worker in dispatcher.fleet.workers():
        key = (worker.type, worker.model)
        count, jobs = totals.get(key, (0, 0))
        totals[key] = (count + worker.ready, jobs + worker.running)
    if lags := [worker.lag_s for worker in dispatcher.fleet.workers() if worker.type == "archive"]:
        lag.add_metric([], max(lags))
    for (type_, model), (count, jobs) in totals.items():
        ready.add_metric([type_, model], count)
        running.add_metric([type_, model], jobs)
    return [ready, running, lag] if lag.samples else [ready, running]
