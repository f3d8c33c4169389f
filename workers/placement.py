"""Which cores the engine's processes keep to, and which the process that feeds them.

Each step of the engine begins when the last one's tokens are read, and while they are turned into text and sent, the
next is computed: on few cores, whoever runs beside the engine's threads holds up every stream at once.
"""

import contextlib
import os

import psutil


def keep_apart(front: set[int]) -> None:
    """This process's threads on the cores `front`, those of its children on all others."""
    process = psutil.Process()
    others = os.sched_getaffinity(0) - front
    for child in process.children(recursive=True):
        _keep_to(child, others)
    _keep_to(process, front)


def _keep_to(process: psutil.Process, cores: set[int]) -> None:
    """A thread that was bound to some of these already stays so."""
    for thread in process.threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, os.sched_getaffinity(thread.id) & cores or cores)
