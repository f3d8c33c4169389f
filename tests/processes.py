"""Which processes belong to a test's stack: those that carry its mark in their environment."""

import os
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


def naming(folder: Path) -> list[psutil.Process]:
    """Every live process with `folder` on its command line. Postgres cleans its environment, so that no mark
    would find it; its data directory names it."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found
