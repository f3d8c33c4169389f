"""pika's connection, and what it does otherwise than pika alone."""

import asyncio

from pika.adapters.asyncio_connection import AsyncioConnection
from pika.heartbeat import HeartbeatChecker


class PromptHeartbeat(HeartbeatChecker):  # type: ignore[misc]  # pika is Any to the type checker
    """Looks each HEARTBEAT_S whether the broker was heard of; pika alone gives it 5 s more, each time."""

    def _start_check_timer(self) -> None:
        self._check_interval = self._timeout
        super()._start_check_timer()


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
