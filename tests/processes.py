"""Which processes belong to a test's stack: those that carry its mark in their environment. And where a test runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

MARK = "QWEN3_TEST_STACK"


def marked(value: str) -> list[psutil.Process]:
    """Every live process that was started, however indirectly, with `MARK=value`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in found if process.pid != os.getpid()]


def started(value: str, *argv: str) -> psutil.Process:
    """The one of them that is `python -m ARGV…`; others may have been started by it with the same arguments."""
    found = [process for process in marked(value) if _command(process)[1 : len(argv) + 2] == ["-m", *argv]]
    (first,) = [process for process in found if process.parent() not in found]
    return first


def naming(folder: Path) -> list[psutil.Process]:
    """Every live process with `folder` on its command line. Postgres cleans its environment, so that no mark
    would find it; its data directory names it."""
    found = [process for process in psutil.process_iter() if str(folder) in " ".join(_command(process))]
    return [process for process in found if process.pid != os.getpid()]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended meanwhile
        return []


@contextmanager
def kept_to(cores: set[int]) -> Iterator[set[int]]:
    """This process, and what it starts meanwhile, on these cores; gives those it had."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield before
    finally:
        os.sched_setaffinity(0, before)
