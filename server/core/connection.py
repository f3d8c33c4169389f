"""pika's connection, and what it does otherwise than pika alone."""

import asyncio

from pika.adapters.asyncio_connection import AsyncioConnection
from pika.heartbeat import HeartbeatChecker

SILENT_LOOKS = 3
"""RabbitMQ looks twice in the heartbeat's time whether it has sent anything, and sends a heartbeat where it has not, so
that there may be two looks in vain while all is well."""


class PromptHeartbeat(HeartbeatChecker):  # type: ignore[misc]  # pika is Any to the type checker
    """Looks twice in the heartbeat's time whether the broker was heard of, and gives it up after 1.5 to 2 times that
    time; pika alone gives it 5 s more, each time.

    A single look at the whole of it would cut connections on a busy machine: heartbeats may come as far apart as that.
    """

    def _start_check_timer(self) -> None:
        self._check_interval = self._timeout / 2
        super()._start_check_timer()

    @property
    def connection_is_idle(self) -> bool:
        return bool(self._idle_byte_intervals >= SILENT_LOOKS)


class JoinedConnection(AsyncioConnection):  # type: ignore[misc]  # pika is Any to the type checker
    """Writes what is sent in one turn of the loop at once: pika alone makes a system call of each frame, of which a
    message has three, and the broker wakes for each."""

    _joined: list[bytes] | None = None

    def _create_heartbeat_checker(self) -> HeartbeatChecker:
        return PromptHeartbeat(self, self.params.heartbeat)

    def _adapter_emit_data(self, data: bytes) -> None:
        if self._joined is not None:
            self._joined.append(data)
            return
        self._joined = [data]
        asyncio.get_running_loop().call_soon(self._write_joined)

    def _write_joined(self) -> None:
        joined, self._joined = self._joined, None
        if joined and self._transport is not None:
            super()._adapter_emit_data(b"".join(joined))
