"""Makes vLLM's processes sleep while they wait for one another, where they share a core.

Its scheduler and its computing process hand each step over in shared memory, and spin for a second after each before
they sleep. With cores to spare that is quicker; on few it takes them from the process that serves the tokens, and from
one another. vLLM has no option for it, but imports classes that its options name: `scheduler_cls` in the one process,
`worker_extension_cls` in the other. Importing this module there is what does it; the classes add nothing.
"""

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.core.sched.scheduler import Scheduler

OPTIONS = {"scheduler_cls": f"{__name__}.SleepingScheduler", "worker_extension_cls": f"{__name__}.SleepingWorker"}


def sleep_at_once(_self: SpinCondition) -> None:
    """In the place of `record_read`: no read is ever recent, which is what the spinning hangs on."""


SpinCondition.record_read = sleep_at_once


class SleepingScheduler(Scheduler):  # type: ignore[misc]  # vLLM is Any to the type checker
    """vLLM's own."""


class SleepingWorker:
    """Mixed into vLLM's own."""
