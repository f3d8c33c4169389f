"""How every process here is asked to stop."""

import asyncio
import signal


class StopEvent(asyncio.Event):
    """`number` is the signal's that set it, 0 before."""

    number = 0

    def hear(self, number: int) -> None:
        self.number = self.number or number
        self.set()


def stop_event() -> StopEvent:
    """Set at the first SIGTERM or SIGINT from now on; neither ends the process by itself any more."""
    stopping = StopEvent()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.hear, number)
    return stopping
