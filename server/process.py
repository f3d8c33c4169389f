"""Child processes that never outlive their parent, each with its log."""

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from server.core import watchdog
from server.core.watchdog import SILENT_S

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal a process gets when its parent dies."""


@dataclass(slots=True)
class Child:
    """A running child; it leads a process group of its own."""

    name: str
    argv: list[str]
    process: asyncio.subprocess.Process
    log: Path | None
    ear: watchdog.Ear | None = None

    @property
    def exited(self) -> bool:
        return self.process.returncode is not None

    async def stop(self, timeout_s: float, first: signal.Signals = signal.SIGTERM) -> None:
        """Send the `first` signal, then after `timeout_s` SIGKILL; what it started goes with it."""
        if not self.exited:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(first)
            try:
                await asyncio.wait_for(self.process.wait(), timeout_s)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        self.deafen()

    async def ended(self) -> int:
        """Its status, once it has ended; where it is watched, ends it when it hangs, with what it started."""
        ending = asyncio.ensure_future(self.process.wait())
        heard_at: float | None = None
        try:
            while not ending.done():
                await asyncio.wait({ending}, timeout=1)
                now = time.monotonic()
                if self.ear is not None and self.ear.heard():
                    heard_at = now
                elif heard_at is not None and now - heard_at > SILENT_S and not ending.done():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.process.pid, signal.SIGKILL)
            return ending.result()
        finally:
            ending.cancel()

    def deafen(self) -> None:
        """It is watched no more."""
        if self.ear is not None:
            self.ear.close()

    def tail(self, lines: int = 15) -> str:
        if self.log is None:
            return ""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 16384))
                return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"


async def start(
    name: str,
    argv: list[str],
    environment: dict[str, str],
    log: Path | None,
    cores: set[int] | None = None,
    pass_fds: tuple[int, ...] = (),
    *,
    watched: bool = False,
) -> Child:
    """Start a child with `environment` added to this process's, its output appended to `log` (None: as ours).

    `cores` confines it to these; None leaves it free. It inherits `pass_fds`. Who is `watched` is to
    say each second that it does not hang (core/watchdog.py).
    """

    ear = watchdog.Ear() if watched else None
    libc = ctypes.CDLL(None)  # not after the fork, where another thread's lock may stay taken for ever

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if cores is not None:
            os.sched_setaffinity(0, cores)

    with contextlib.ExitStack() as stack:
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(log.open("ab"))
        process = await asyncio.create_subprocess_exec(
            *argv,
            env={**os.environ, **environment, **({watchdog.VARIABLE: ear.name} if ear else {})},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else asyncio.subprocess.STDOUT,
            # Its own group keeps the terminal's Ctrl-C from it: the parent decides the order of stopping.
            start_new_session=True,
            preexec_fn=before_exec,
            pass_fds=pass_fds,
        )
    return Child(name, argv, process, log, ear)
