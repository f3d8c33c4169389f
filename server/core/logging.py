"""JSON logs: a constant message plus fields (`action`, `request_id`, `model`). Never a prompt."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter


def configure(level: str, process: str) -> None:
    """Send every log line of this process to stderr as one JSON object."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"process": process},
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # pika tells of each step of a connection at INFO; what matters is logged by our own code.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
