"""A worker's word on how it fares, once a second to all servers."""

import asyncio
import contextlib
import socket
import time
import uuid

from server.core import topology, watchdog
from server.core.amqp import AmqpLink
from server.core.errors import BrokerUnavailable
from server.core.messages import Status, WorkerType, encode
from workers.probe import Probe

FADING = 0.95
"""What is left after a second of the count of jobs begun for a server: it tells of the last 20 s or so."""


class Beacon:
    """Says once a second on the `status` fanout how a worker fares."""

    def __init__(self, link: AmqpLink, type_: WorkerType, model: str, probe: Probe) -> None:
        self._link = link
        self._probe = probe
        self.worker = f"{type_}-{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self.type, self.model = type_, model
        self.running = self.waiting = self.waiting_batch = self.backlog = self.slots = 0
        self.job_s = 0.0
        self.begun: dict[str, float] = {}
        self.lag_s = 0.0
        self.progress_at = 0.0
        self.problem = ""
        self._made = 0
        self._tokens_per_s = 0.0

    def progress(self, made: int = 1) -> None:
        """Count tokens, vectors or rows made."""
        self._made += made
        self.progress_at = time.time()

    def began(self, server: str) -> None:
        """A job of the server with this reply queue."""
        self.begun[server] = self.begun.get(server, 0.0) + 1

    def took(self, seconds: float) -> None:
        """A job has run for so long, well or badly."""
        self.job_s += (seconds - self.job_s) / 16 if self.job_s else seconds

    async def run(self) -> None:
        last, made = time.monotonic(), 0
        while True:
            await asyncio.sleep(1)
            watchdog.beat()
            self._probe.beat()
            if self._link.blocked:
                continue  # it would pile up, and nobody wants to know later how things were
            now = time.monotonic()
            self._tokens_per_s = round((self._made - made) / (now - last), 1)
            last, made = now, self._made
            faded = ((server, FADING * jobs) for server, jobs in self.begun.items())
            self.begun = {server: jobs for server, jobs in faded if jobs >= 0.1}
            self.say()

    def say(self, *, leaving: bool = False) -> None:
        """Once, now; `leaving` when this worker ends as it was asked to."""
        status = Status(
            worker=self.worker,
            type=self.type,
            model=self.model,
            ready=self._probe.ready,
            running=self.running,
            waiting=self.waiting,
            tokens_per_s=self._tokens_per_s,
            progress_at=self.progress_at,
            metrics_port=self._probe.port,
            backlog=self.backlog,
            lag_s=round(self.lag_s, 3),
            problem=self.problem,
            leaving=leaving,
            slots=self.slots,
            job_s=round(self.job_s, 3),
            waiting_batch=self.waiting_batch,
            begun={server: round(jobs, 2) for server, jobs in self.begun.items()},
        )
        # A broker that is away comes back by itself.
        with contextlib.suppress(BrokerUnavailable):
            self._link.broadcast(topology.STATUS, encode(status))
