"""Which workers live, as they say it themselves once a second. The truth behind `/health` and admission."""

import logging
import time

import msgspec

from server.core import topology
from server.core.amqp import AmqpLink, Delivery
from server.core.messages import Status, WorkerType, decode

logger = logging.getLogger(__name__)

STALE_S = 5.0
"""A worker not heard of for this long counts as gone: five beats missed."""


FORGOTTEN_S = 120.0
"""For how long a worker that fell silent is missed: long enough for a person to look."""


class Fleet:
    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, Status]] = {}

    async def consume(self, link: AmqpLink) -> None:
        await link.listen(topology.STATUS, self._on_status)

    def _on_status(self, delivery: Delivery) -> None:
        try:
            status = decode(Status, delivery.body)
        except msgspec.DecodeError:
            logger.warning("not a status", extra={"action": "decode"})  # a newer worker's, perhaps
            return
        if status.leaving:
            self._seen.pop(status.worker, None)
        else:
            self._seen[status.worker] = (time.monotonic(), status)

    def workers(self) -> list[Status]:
        """The workers heard of lately, by name."""
        return [status for silent_s, status in self._heard() if silent_s <= STALE_S]

    def problems(self) -> list[str]:
        """What is wrong with workers, each by its name."""
        told = []
        for silent_s, status in self._heard():
            named = f"{status.type} worker {status.worker}" + (f" ({status.model})" if status.model else "")
            if silent_s > STALE_S:
                told.append(f"{named}: not heard of for {silent_s:.0f} s")
            elif status.problem:
                told.append(f"{named}: {status.problem}")
        return told

    def _heard(self) -> list[tuple[float, Status]]:
        """How long ago each worker was heard of, by name; forgets those that nobody misses any more."""
        now = time.monotonic()
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen[0] <= FORGOTTEN_S}
        return [(now - self._seen[name][0], self._seen[name][1]) for name in sorted(self._seen)]

    def has(self, type_: WorkerType, model: str = "") -> bool:
        """Whether a live worker of this type (and model, if it has one) is ready."""
        return any(w.ready and w.type == type_ and w.model == model for w in self.workers())
