"""How every process here is asked to stop."""

import asyncio
import signal


def stop_event() -> asyncio.Event:
    """Set at the first SIGTERM or SIGINT from now on; neither ends the process by itself any more."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping
