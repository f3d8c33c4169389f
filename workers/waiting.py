"""Makes vLLM's processes sleep while they wait for one another, where they share few cores with others.

Its scheduler and its computing process hand each step over in shared memory, and spin for a second after each before
they sleep. With cores to spare that is quicker; on few it takes them from the process that serves the tokens, and from
one another. vLLM has no option for it, but imports classes that its options name: `scheduler_cls` in the one process,
`worker_extension_cls` in the other. Importing this module there is what does it; the classes add nothing.
"""

import time

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.core.sched.scheduler import Scheduler

NAP_MS = 1
"""The longest sleep while messages are frequent: of two that follow closely, the second's notice may be dropped."""

_sleep = SpinCondition.wait


def _record_read(condition: SpinCondition) -> None:
    """Leaves `last_read` as it is: no read is ever so recent that vLLM would spin."""
    condition.busy_at = time.monotonic()


def _wait(condition: SpinCondition, timeout_ms: int | None = None) -> None:
    """Sleep until there is notice of a message; not for long while messages are frequent."""
    busy = time.monotonic() < getattr(condition, "busy_at", 0.0) + condition.busy_loop_s
    _sleep(condition, NAP_MS if busy else timeout_ms)


SpinCondition.record_read = _record_read
SpinCondition.wait = _wait


class SleepingScheduler(Scheduler):  # type: ignore[misc]  # vLLM is Any to the type checker
    """vLLM's own."""


class SleepingWorker:
    """Mixed into vLLM's own."""
