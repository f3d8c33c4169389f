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
HISTORY = "history.v2"
"""Finished requests wait here until Postgres has them."""
HISTORY_BEFORE = "history"
"""Where versions before this one left them: a classic queue, of which a cluster has one copy."""
DEAD = "dead.v2"
"""Jobs that were delivered too often, for a person to look at. Versions before this one had a classic queue `dead`."""
DEAD_LETTERS = "dead-letters"
"""Fanout: each job given up on, to `dead.v2` and to every server, one of which has a client that waits for it."""

WATCH = "watch"
"""Whoever runs a broker asks here whether it still takes something. It keeps the last."""

TRIES_TOGETHER = 2
"""How often a job is delivered from its lane. All that a worker has count one when it is lost, also what only waited
there, so that it says little of a job; and twice is bad luck with machines."""
TRIES_FEW = 1
"""How often it is then begun from the retries, of which a worker has few at once."""
TRIES_ALONE = 2
"""How often a suspect is tried, one at a time on each worker, before it is taken for poison."""
_LIMIT_TOGETHER = 2 * TRIES_TOGETHER + 2
"""Never reached while workers move such jobs on; the broker is to have a limit all the same."""

_NO_BOUND = 2**31 - 1

MAX_MESSAGE_BYTES = 12 * 2**20
"""RabbitMQ 4 takes 16 MiB, and closes the channel over more."""
MAX_JOB_BYTES = 8 * 2**20
"""A record is its job and the answer, and has to fit as well: nobody could be told that it does not."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    # Without a limit of its own, RabbitMQ 4 drops what was delivered 20 times; neither may be dropped.
    HISTORY: {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1},
    DEAD: {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1},
    WATCH: {"x-queue-type": "quorum", "x-max-length": 1, "x-delivery-limit": 1},
}
"""Of queues with one name."""


def jobs_queue(model: str, lane: Lane) -> str:
    """`v2`: these arguments are not those that queues named without it were declared with."""
    return f"jobs.{model}.{lane}.v2"


def retries_queue(model: str) -> str:
    return f"jobs.{model}.retries"


def suspects_queue(model: str) -> str:
    return f"jobs.{model}.suspects"


def replies_queue(server: str) -> str:
    return f"replies.{server}"


def jobs_queues(model: str, max_length: int) -> dict[str, dict[str, Any]]:
    """A model's queues of jobs and their arguments."""
    lanes: tuple[Lane, ...] = ("interactive", "batch")
    return {
        **{jobs_queue(model, lane): _arguments(max_length, _LIMIT_TOGETHER) for lane in lanes},
        # As many as a worker had may come at once, and all of them were accepted: it refuses none.
        retries_queue(model): _arguments(_NO_BOUND, _LIMIT_TOGETHER),
        suspects_queue(model): _arguments(max_length, TRIES_ALONE),
    }


def _arguments(max_length: int, tries: int) -> dict[str, Any]:
    """Quorum: the one type of queue that counts deliveries (and survives a node). Full means refused."""
    return {
        "x-queue-type": "quorum",
        "x-max-length": max_length,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": DEAD_LETTERS,
        "x-delivery-limit": tries - 1,  # the broker counts what comes after the first
    }
