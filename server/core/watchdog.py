"""A process's word that its loop still turns, once a second, to whoever started it.

It is systemd's protocol (sd_notify(3) with WATCHDOG=1), so that a unit with WatchdogSec watches a worker as `up` does:
a process that has begun to say this and falls silent hangs, and is ended and started again.
"""

import asyncio
import contextlib
import os
import secrets
import socket

VARIABLE = "NOTIFY_SOCKET"
BEAT = b"WATCHDOG=1"

SILENT_S = 20.0
"""A process that has said each second that its loop turns, and has not for this long, hangs. Blocked for shorter one
was seen while a library loads; the broker gives up on it after as long, and hands its jobs to others."""


def beat() -> None:
    """Say it, if anybody listens."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
        sending.setblocking(False)
        # "@" stands for the zero byte that an abstract name, which is no file, begins with.
        sending.sendto(BEAT, name.replace("@", "\0", 1) if name.startswith("@") else name)


async def keep_beating() -> None:
    """Say it once a second until cancelled."""
    while True:
        beat()
        await asyncio.sleep(1)


class Ear:
    """Hears one process. `name` is what its NOTIFY_SOCKET is to be."""

    def __init__(self) -> None:
        self.name = f"@qwen3-{secrets.token_hex(8)}"
        self._receiving = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiving.setblocking(False)
        self._receiving.bind(self.name.replace("@", "\0", 1))

    def heard(self) -> bool:
        """Whether anything was said since this was asked last."""
        heard = False
        with contextlib.suppress(BlockingIOError):
            while self._receiving.recv(64):
                heard = True
        return heard

    def close(self) -> None:
        self._receiving.close()
