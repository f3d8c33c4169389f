"""Every exchange and queue, by name and by argument. Nothing else declares or names one.

Each process declares what it uses each time it connects; declaring twice is harmless, declaring with
other arguments is refused by the broker, so a change of arguments here needs new names.
"""

from typing import Any

from server.core.messages import Lane

CONTROL = "control"
"""Fanout: `Cancel` to every worker."""
ASKS = "asks"
"""Fanout: `Ask` to every server."""
STATUS = "status"
"""Fanout: `Status` to every server."""
HISTORY = "history"
"""Finished requests wait here until Postgres has them. A classic queue: quorum queues of RabbitMQ 4
drop after 20 deliveries by default, and no record may be dropped."""
DEAD = "dead"
"""Jobs that were delivered too often, for a person to look at."""

TRIES = 3
"""How often a job is tried before it is taken for poison: twice is bad luck with machines."""


def jobs_queue(model: str, lane: Lane) -> str:
    return f"jobs.{model}.{lane}"


def replies_queue(server: str) -> str:
    return f"replies.{server}"


def jobs_arguments(max_length: int) -> dict[str, Any]:
    """Quorum: the one type of queue that counts deliveries (and survives a node). Full means refused."""
    return {
        "x-queue-type": "quorum",
        "x-max-length": max_length,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": DEAD,
        "x-delivery-limit": TRIES - 1,  # the broker counts what comes after the first
    }
