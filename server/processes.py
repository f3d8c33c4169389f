"""Several API server processes behind one port: `serve --workers N`.

Each has a listening socket of its own on that port (SO_REUSEPORT), so that the kernel spreads the connections; of one
shared socket a single process was seen to take all of a burst of 64. The sockets are opened here and inherited: when a
process dies, those who were about to be accepted wait for its successor, and none is reset. Limits are shared by what
keeps them, Postgres and the broker; metrics by files that each process writes and each `/metrics` adds up, and that
keep what a process that died had counted.
"""

import asyncio
import contextlib
import signal
import socket
import sys
import tempfile
import time

from prometheus_client import multiprocess

from server.core import watchdog
from server.core.settings import BadSettings, Settings
from server.core.signals import stop_event
from server.process import Child, start

BACKLOG = 2048
START_S = 60.0
"""A process that fails by itself within this time of the start has a reason that trying again would not remove."""
RESTART_MAX_S = 5.0
"""Its share of the connections waits for it."""
STABLE_S = 300.0
STOP_GRACE_S = 5.0
"""Beyond what running requests get to finish."""


class ServerProcesses:
    """`settings.server_workers` children that serve on one port; one that dies is started again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._children: dict[int, Child] = {}
        self._began = time.monotonic()

    async def run(self) -> int:
        """Until SIGTERM or SIGINT, then until all have drained; returns the exit status. Raises BadSettings."""
        stopping = stop_event()
        host, port = self._settings.host, self._settings.port
        listening_socket(host, port).close()  # reusing the port of another program might succeed
        with contextlib.ExitStack() as stack:
            metrics = stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen3-metrics-"))
            places = range(self._settings.server_workers)
            sockets = [stack.enter_context(listening_socket(host, port, reuse_port=True)) for _ in places]
            keeping = [asyncio.create_task(self._keep(place, sockets[place], metrics)) for place in places]
            stopped = asyncio.create_task(stopping.wait())
            beating = asyncio.create_task(watchdog.keep_beating())
            await asyncio.wait({stopped, *keeping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (stopped, *keeping):
                task.cancel()
            await asyncio.gather(stopped, *keeping, return_exceptions=True)
            timeout_s = self._settings.drain_timeout_s + STOP_GRACE_S
            # SIGINT says to each that no other will take the connections that come now.
            await asyncio.gather(*(child.stop(timeout_s, signal.SIGINT) for child in self._children.values()))
            beating.cancel()
            # One that was still starting had nothing to drain, and ends by the signal.
            well = all(child.process.returncode in (0, -signal.SIGINT) for child in self._children.values())
            return 0 if stopping.is_set() and well else 1

    async def _keep(self, place: int, listening: socket.socket, metrics: str) -> None:
        """Start a process again each time it ends, later each time it ends soon. Ends when it cannot start at all."""
        argv = [sys.executable, "-m", "server", "serve", "--fd", str(listening.fileno())]
        environment = {
            "MODELS_FILE": str(self._settings.models_file),
            "HOST": self._settings.host,
            "PORT": str(self._settings.port),
            "SERVER_WORKERS": "1",
            "PROMETHEUS_MULTIPROC_DIR": metrics,
        }
        delay_s = 1.0
        while True:
            began = time.monotonic()
            child = await start(
                f"server {place}", argv, environment, None, pass_fds=(listening.fileno(),), watched=True
            )
            self._children[place] = child
            status = await child.ended()
            child.deafen()
            multiprocess.mark_process_dead(child.process.pid, metrics)  # type: ignore[no-untyped-call]  # has no types
            if status > 0 and time.monotonic() - self._began < START_S:
                return
            delay_s = 1.0 if time.monotonic() - began > STABLE_S else delay_s
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RESTART_MAX_S)


def listening_socket(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Raises BadSettings where it cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=reuse_port)
    except OSError as exc:
        raise BadSettings(
            f"{host}:{port} cannot be listened on ({exc.strerror}). Name another port with --port."
        ) from exc
    made.setblocking(False)
    return made
