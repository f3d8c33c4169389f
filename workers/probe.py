"""A worker's own small HTTP port: `/metrics`, and `/health/startup`, `/health/live`, `/health/ready` for probes.

The three tell a worker that loads from one that hangs: it has started once its model is loaded and its loop turns; from
then on it is alive while the loop goes on turning and the model does not hang. It may be alive and not ready: while it
drains, or while its model owes an answer. A model that loads may block the loop, and then nothing answers here at all,
so that only the startup probe may ask before it has succeeded once.
"""

import asyncio
import time

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.core.http import HttpServer
from server.core.watchdog import SILENT_S

HUNG_S = 30.0
"""A model that hangs is ended by its worker long before (workers/base.py); one still there now did not end, as happens
to a process that waits for its device."""


class Probe:
    """Serves once started. `ready` and `hung_s` are the worker's to set, `beat` its beacon's to call once a second.
    `port` 0 becomes a free one."""

    def __init__(self, host: str, port: int) -> None:
        self.port = port
        self.ready = False
        self.hung_s = 0.0
        self._beaten_at: float | None = None
        app = Starlette(
            routes=[
                Route("/metrics", self._metrics),
                Route("/health/startup", self._startup),
                Route("/health/live", self._live),
                Route("/health/ready", self._readiness),
            ]
        )
        self._server = HttpServer(app, host, port)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Where the port is taken, uvicorn says so and ends the process."""
        self._task = asyncio.create_task(self._server.serve())
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task

    def beat(self) -> None:
        """The model is loaded, and the loop turns."""
        self._beaten_at = time.monotonic()

    async def _metrics(self, _request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def _startup(self, _request: Request) -> Response:
        started = self._beaten_at is not None
        return JSONResponse({"status": "started" if started else "loading"}, status_code=200 if started else 503)

    async def _live(self, _request: Request) -> Response:
        silent_s = 0.0 if self._beaten_at is None else time.monotonic() - self._beaten_at
        if silent_s >= SILENT_S:
            problem = f"nothing has been heard from its loop for {silent_s:.0f} s"
        elif self.hung_s >= HUNG_S:
            problem = f"its model has hung for {self.hung_s:.0f} s"
        else:
            return JSONResponse({"status": "live"})
        return JSONResponse({"status": "hung", "problem": problem}, status_code=503)

    async def _readiness(self, _request: Request) -> Response:
        return JSONResponse({"ready": self.ready}, status_code=200 if self.ready else 503)
