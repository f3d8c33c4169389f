"""When a connection to the broker is given up because nothing comes by it."""

from collections.abc import Callable
from typing import Any

import pytest

from server.core.connection import PromptHeartbeat


class FakeConnection:
    """Counts bytes; timers are kept by what they call."""

    def __init__(self) -> None:
        self.bytes_received = self.bytes_sent = 0
        self.timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self.ended: list[Exception] = []

    def _adapter_call_later(self, delay_s: float, callback: Callable[[], None]) -> str:
        name: str = callback.__name__
        self.timers[name] = (delay_s, callback)
        return name

    def _adapter_remove_timeout(self, name: str) -> None:
        del self.timers[name]

    def _terminate_stream(self, reason: Exception) -> None:
        self.ended.append(reason)


@pytest.mark.parametrize("timeout_s", [5, 10])
def test_a_broker_is_given_up_after_three_looks_in_vain(timeout_s: int) -> None:
    # Given a connection
    connection: Any = FakeConnection()
    PromptHeartbeat(connection, timeout_s)

    def look(received: int) -> None:
        connection.bytes_received += received
        delay_s, check = connection.timers["_check_heartbeat"]
        assert delay_s == timeout_s / 2
        check()

    # When heartbeats come as far apart as RabbitMQ may send them, and then once more so late that two looks miss them
    for received in (8, 0, 8, 0, 8, 0, 0, 8, 0, 0):
        look(received)
    # Then it is kept
    assert connection.ended == []
    # But not where nothing comes for longer
    look(0)
    assert len(connection.ended) == 1
