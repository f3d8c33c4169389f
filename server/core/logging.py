"""JSON logs: a constant message plus fields (`action`, `request_id`, `model`). Never a prompt, never a secret."""

import logging
import re
import sys
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from server.core import tracing

SECRETS = re.compile(r"\bqk-[\w-]{8,}|(?<=://)[^/\s\"@]*(?=@)|(?<=bearer )[^\s\",']+", re.IGNORECASE)
"""Keys of ours, and the user and password of a URL, which a library's exception may quote."""


class Discreet(JsonFormatter):
    """Whatever ends up in a line, what looks like a secret does not; and it says which trace it is of."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        return super().process_log_record(log_data | tracing.current().ids)

    def format(self, record: logging.LogRecord) -> str:
        return SECRETS.sub("[hidden]", super().format(record))


def configure(level: str, process: str) -> None:
    """Send every log line of this process to stderr as one JSON object."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        Discreet(
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
