"""What is done to a broker: commands of its own, killing it, and a way to it that can be cut or go dumb."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from server.core import topology
from server.core.amqp import AmqpLink
from server.private import RABBITMQ_PATHS, PrivateRabbitMQ, free_port
from tests.processes import naming


async def ctl(rabbitmq: PrivateRabbitMQ, *argv: str) -> str:
    """Output of `rabbitmqctl ARGV` on this broker."""
    program = next(path for path in RABBITMQ_PATHS if os.access(path, os.X_OK))
    environment = {**os.environ, **rabbitmq.environment}
    environment.pop("RABBITMQ_DIST_PORT")  # rabbitmqctl would take a port 10,000 above it, which there may not be
    process = await asyncio.create_subprocess_exec(
        str(Path(program).with_name("rabbitmqctl")),
        *argv,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def jobs_waiting(amqp_url: str, model: str) -> int:
    """Jobs in the model's queue that nobody has."""
    asked: list[int] = []

    async def setup(link: AmqpLink) -> None:
        asked.append((await link.declare_queue(topology.jobs_queue(model, "interactive"), passive=True))[0])

    link = AmqpLink(amqp_url, "test", setup)
    await link.start()
    await link.close()
    return asked[-1]


@asynccontextmanager
async def killed(rabbitmq: PrivateRabbitMQ) -> AsyncIterator[None]:
    """By SIGKILL: from when it runs no longer until it is started again."""
    (beam,) = [process for process in naming(rabbitmq.folder) if "beam" in process.name()]
    beam.kill()
    await asyncio.wait_for(rabbitmq.ended(), 20)
    try:
        yield
    finally:
        await rabbitmq.start()


@asynccontextmanager
async def without_memory(rabbitmq: PrivateRabbitMQ) -> AsyncIterator[None]:
    """With its alarm."""
    await ctl(rabbitmq, "set_vm_memory_high_watermark", "0")
    try:
        yield
    finally:
        await ctl(rabbitmq, "set_vm_memory_high_watermark", "0.4")


class Proxy:
    """Passes on what it is sent, both ways, on a port of its own."""

    def __init__(self, amqp_url: str) -> None:
        parts = urlsplit(amqp_url)
        self._to = (str(parts.hostname), int(parts.port or 0))
        self._port = free_port()
        self.url = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{self._port}").geturl()
        self._passing = asyncio.Event()
        self._passing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)

    async def stop(self) -> None:
        self.heal()
        self.cut()
        assert self._server is not None
        self._server.close()

    def cut(self) -> int:
        """Reset every connection; returns how many ends there were."""
        for writer in (writers := list(self._writers)):
            writer.transport.abort()
        return len(writers)

    def refuse(self) -> None:
        """Reset every connection, and let no other be made until it is started again."""
        assert self._server is not None
        self._server.close()
        self.cut()

    def go_dumb(self) -> None:
        """Pass nothing on and close nothing, as a network does that swallows packets. New connections as well."""
        self._passing.clear()

    def heal(self) -> None:
        self._passing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            broker_reader, broker_writer = await asyncio.open_connection(*self._to)
            ends = {writer, broker_writer}
            self._writers |= ends
            pumps = [
                asyncio.create_task(self._pump(reader, broker_writer)),
                asyncio.create_task(self._pump(broker_reader, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                end.transport.abort()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._writers -= ends

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._passing.wait()
                writer.write(data)
                await writer.drain()
