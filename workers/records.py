"""Finished requests on their way to history. Knows nothing of jobs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from server.core import spans, topology
from server.core.amqp import AmqpLink
from server.core.errors import BrokerUnavailable, ServiceError
from server.core.messages import Record, encode
from server.core.tracing import Span

logger = logging.getLogger(__name__)

RETRY_S = 1.0


def send_record(link: AmqpLink, record: Record, parent: str, counts: Callable[[], Awaitable[bool]]) -> Awaitable[bool]:
    """Send the record now; what is returned ends when the broker has it, however long that takes, and says whether it
    was sent again.

    `parent` is the span it belongs to. `counts` is asked before it is sent again: meanwhile another worker may have
    been given the job, whose record is then the one that counts, or nobody may want it any more.
    """
    span = spans.publish(topology.HISTORY, record.request_id, parent)
    if trace := span.traceparent or parent:
        record = replace(record, traceparent=trace)
    try:
        first = link.publish_soon(
            topology.HISTORY, encode(record), message_id=record.request_id, traceparent=record.traceparent
        )
    except BrokerUnavailable as exc:
        first = asyncio.get_running_loop().create_future()
        first.set_exception(exc)
    return _until_recorded(link, record, first, counts, span)


async def _until_recorded(
    link: AmqpLink, record: Record, confirmed: Awaitable[None], counts: Callable[[], Awaitable[bool]], span: Span
) -> bool:
    again = False
    with span:
        while True:
            try:
                await confirmed
            except ServiceError as exc:
                # Not answered again: the answer is out. A second copy is told by its request id.
                extra = {"action": "record", "request_id": record.request_id, "error": type(exc).__name__}
                logger.warning("record not published yet", extra=extra)
                await asyncio.sleep(RETRY_S)
                if not await counts():
                    return again
                again = True
                confirmed = link.publish(
                    topology.HISTORY, encode(record), message_id=record.request_id, traceparent=record.traceparent
                )
            else:
                return again
