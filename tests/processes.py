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


def postgres_of(folder: Path) -> list[psutil.Process]:
    """Postgres cleans its environment; its data directory names it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() == "postgres" and str(folder) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found
