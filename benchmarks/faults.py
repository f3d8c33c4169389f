"""What the soak with faults (fault_soak.py) does to a running service, one function a kind, one line a fault."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.asking import Asked, Clients
from benchmarks.stack import Service
from server.private import RABBITMQ_PATHS

BURST = 200
HOSTILE = (b"", b"{", b"[]", b"\xff", b'{"messages": "hello"}', b'{"messages": [{"role": 1}]}', b"[" * 100_000)
ALARM_S = 10.0

Inflict = Callable[[Service, Clients], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """`inflict` returns when it is done, not when it is healed."""

    name: str
    inflict: Inflict


def struck(kind: str, blow: signal.Signals) -> Inflict:
    """A process of this kind gets a signal that ends it."""

    async def inflict(ours: Service, _clients: Clients) -> None:
        _signal(_victim(ours, kind), blow)

    return inflict


def frozen(kind: str, for_s: float) -> Inflict:
    async def inflict(ours: Service, _clients: Clients) -> None:
        victim = _victim(ours, kind)
        _signal(victim, signal.SIGSTOP)
        await asyncio.sleep(for_s)
        _signal(victim, signal.SIGCONT)

    return inflict


def _victim(ours: Service, kind: str) -> psutil.Process | None:
    """The one that works, of those that are there: the first, since others are its children; the broker's Erlang VM."""
    found = ours.processes().get(kind, [])
    if kind == "rabbitmq":
        found = [each for each in found if "beam" in each.name()]
    return found[0] if found else None


def _signal(victim: psutil.Process | None, number: signal.Signals) -> None:
    try:
        if victim is not None:
            victim.send_signal(number)
    except psutil.NoSuchProcess:
        return  # the last fault has ended it


async def cut_broker(ours: Service, _clients: Clients) -> None:
    await _rabbitmqctl(ours, "close_all_connections", "fault soak")


async def starve_broker(ours: Service, _clients: Clients) -> None:
    """Its memory alarm blocks whoever publishes."""
    await _rabbitmqctl(ours, "set_vm_memory_high_watermark", "0")
    await asyncio.sleep(ALARM_S)
    await _rabbitmqctl(ours, "set_vm_memory_high_watermark", "0.4")


async def _rabbitmqctl(ours: Service, *argv: str) -> None:
    """Raises RuntimeError."""
    broker = _victim(ours, "rabbitmq")
    assert broker is not None
    program = next(path for path in RABBITMQ_PATHS if os.access(path, os.X_OK))
    told = {k: v for k, v in broker.environ().items() if k.startswith(("RABBITMQ_", "ERL_")) or k == "HOME"}
    told.pop("RABBITMQ_DIST_PORT", None)  # it would take a port 10,000 above it, which there may not be
    process = await asyncio.create_subprocess_exec(
        str(Path(program).with_name("rabbitmqctl")),
        *argv,
        env={**os.environ, **told},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(output.decode())


async def many_at_once(_ours: Service, clients: Clients) -> None:
    await clients.many_at_once(BURST)


async def stalled_reader(_ours: Service, clients: Clients) -> None:
    await clients.stalled_reader()


async def hostile_bodies(_ours: Service, clients: Clients) -> None:
    for body in HOSTILE:
        one = Asked("hostile", "hostile", outcome="refused")
        clients.asked.append(one)
        headers = {"Content-Type": "application/json"}
        async with clients.session.post("/v1/chat/completions", data=body, headers=headers) as answer:
            if not 400 <= answer.status < 500:
                one.outcome = f"{answer.status} for {body[:20]!r}"
        one.ended_at = time.monotonic()


FAULTS = (
    Fault("chat worker killed", struck("chat", signal.SIGKILL)),
    Fault("engine killed", struck("engine", signal.SIGKILL)),
    Fault("embedding worker killed", struck("embedding", signal.SIGKILL)),
    Fault("archivist killed", struck("archive", signal.SIGKILL)),
    Fault("API server killed", struck("server", signal.SIGKILL)),
    Fault("broker killed", struck("rabbitmq", signal.SIGKILL)),
    Fault("database killed", struck("postgres", signal.SIGKILL)),
    Fault("chat worker stopped", struck("chat", signal.SIGTERM)),
    Fault("embedding worker stopped", struck("embedding", signal.SIGTERM)),
    Fault("archivist stopped", struck("archive", signal.SIGTERM)),
    Fault("API server stopped", struck("server", signal.SIGTERM)),
    Fault("chat worker frozen", frozen("chat", 20)),
    Fault("engine frozen", frozen("engine", 20)),
    Fault("embedding worker frozen", frozen("embedding", 20)),
    Fault("archivist frozen", frozen("archive", 20)),
    Fault("API server frozen", frozen("server", 10)),
    Fault("broker frozen", frozen("rabbitmq", 10)),
    Fault("database frozen", frozen("postgres", 10)),
    Fault("broker's connections closed", cut_broker),
    Fault("broker out of memory", starve_broker),
    Fault("many at once", many_at_once),
    Fault("a reader stops reading", stalled_reader),
    Fault("hostile bodies", hostile_bodies),
)
