"""uvicorn as one part of a process that decides itself when and how it ends."""

import contextlib
import math
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp


class HttpServer(uvicorn.Server):
    """Leaves the signals to its process, which drains first and exits 0. Stop it with `should_exit`."""

    def __init__(self, app: ASGIApp, host: str, port: int, drain_timeout_s: float = 0) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(drain_timeout_s),
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
