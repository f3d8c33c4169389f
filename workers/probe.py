"""A worker's own small HTTP port: `/metrics`, `/health/live`, `/health/ready`."""

import asyncio

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.core.http import HttpServer


class Probe:
    """Serves once started; `ready` is the worker's to set. `port` 0 becomes a free one."""

    def __init__(self, host: str, port: int) -> None:
        self.port = port
        self.ready = False
        app = Starlette(
            routes=[
                Route("/metrics", self._metrics),
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

    async def _metrics(self, _request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def _live(self, _request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def _readiness(self, _request: Request) -> Response:
        return JSONResponse({"ready": self.ready}, status_code=200 if self.ready else 503)
