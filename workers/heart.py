"""Whether an engine's processes still do anything: it is asked for a word again and again, and told apart from one that
is only slow. Knows no engine; what to ask, and what to do about one that hangs, others say.

A step of the engine may take long (a long prompt on a slow CPU: tens of seconds), and it answers between steps. One
that owes an answer and computes is therefore left alone, up to a step that nobody would wait for. One that owes an
answer and uses no processor is frozen, or waits for something that does not come.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import psutil

ASK_EVERY_S = 2.0
LONGEST_STEP_S = 300.0
"""An engine that computes on and on without an answer hangs too: a device that waits for another spins."""
IDLE_S = 0.02
"""Of processor time in a second: less is nothing, what a process's housekeeping takes."""


class Heart:
    """Of an engine in processes below `worker`, this one unless said. `hung_s`: for how long it has owed an answer and
    done nothing.

    Counted in looks a second apart, not by the clock: after this process was held up itself, the answer may be there.
    """

    def __init__(self, ask: Callable[[], Awaitable[object]], worker: psutil.Process | None = None) -> None:
        self._ask, self._worker = ask, worker or psutil.Process()
        self.hung_s = 0.0

    async def run(self) -> None:
        """Ask, until cancelled."""
        while True:
            asking = asyncio.ensure_future(self._ask())
            looks, used_s = 0, 0.0  # the first look, which takes milliseconds, comes only if the answer does not
            try:
                while not (await asyncio.wait({asking}, timeout=1))[0]:
                    before_s, used_s = used_s, processor_s(self._worker)
                    looks += 1
                    computes = looks == 1 or (used_s - before_s >= IDLE_S and looks < LONGEST_STEP_S)
                    self.hung_s = 0.0 if computes else self.hung_s + 1
                asking.result()
            finally:
                asking.cancel()
            self.hung_s = 0.0
            await asyncio.sleep(ASK_EVERY_S)


def processor_s(worker: psutil.Process) -> float:
    """Seconds of processor time that the processes below `worker` have used."""
    total = 0.0
    for process in worker.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def kill_below(worker: psutil.Process | None = None) -> None:
    """End every process below `worker`, this one unless said, at once, by its id."""
    for process in (worker or psutil.Process()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
