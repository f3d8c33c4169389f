"""Which spans there are besides those of HTTP requests, and what is told of each.

Names and attributes are OpenTelemetry's semantic conventions of 2026, for messaging (RabbitMQ), databases and
generative AI; what those have no name for begins with `qwen3.`. Never what was said, nor a key: prompts, answers, stop
strings, tools and the messages of errors stay out, and no setting lets them in.
"""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from server.core import tracing
from server.core.messages import Api, Job, Record
from server.core.tracing import NOTHING, Span, Start

OPERATIONS: dict[Api, str] = {
    "chat": "chat",
    "messages": "chat",
    "responses": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    "count_tokens": "count_tokens",  # the conventions have no name for it
}
"""`gen_ai.operation.name` by API."""

PARAMETERS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",  # where both are given the engine takes this one
    "max_output_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
    "stream": "gen_ai.request.stream",
}
"""Fields of a job's body that are numbers or a switch, and their attributes."""


def _messaging(operation: str, type_: str, queue: str, message_id: str) -> dict[str, Any]:
    """A queue is reached by the default exchange, so that its name is the destination's and the routing key's."""
    return {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": operation,
        "messaging.operation.type": type_,
        "messaging.destination.name": queue,
        "messaging.rabbitmq.destination.routing_key": queue,
        "messaging.message.id": message_id,
    }


def publish(queue: str, message_id: str, parent: str) -> Span:
    """A message's way to the broker, until that has confirmed it."""
    if not tracing.on():
        return NOTHING
    attributes = _messaging("publish", "send", queue, message_id) | {"qwen3.request.id": message_id}
    return tracing.begin(Start(f"publish {queue}", "producer", parent, attributes))


def process(job: Job, queue: str, attempt: int, taken_ns: int) -> Span:
    """What a worker does for a job, from when it was delivered (Unix nanoseconds) to when it is settled."""
    if not tracing.on():
        return NOTHING
    attributes = _messaging("process", "process", queue, job.id)
    attributes |= {"qwen3.request.id": job.id, "qwen3.attempt": attempt, "gen_ai.request.model": job.model}
    return tracing.begin(Start(f"process {queue}", "consumer", job.traceparent, attributes, taken_ns))


def generate(job: Job, provider: str, parent: str) -> Span:
    """What the model does for a job, in the worker's own process as far as that can tell."""
    if not tracing.on():
        return NOTHING
    operation = OPERATIONS[job.api]
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": job.model,
        "qwen3.request.id": job.id,
    }
    if job.session_id:
        attributes["gen_ai.conversation.id"] = job.session_id
    for field, name in PARAMETERS.items():
        # Held to numbers, because whoever can write to the broker chooses what is in a body.
        if isinstance(value := job.body.get(field), bool | int | float):
            attributes[name] = value
    return tracing.begin(Start(f"{operation} {job.model}", "internal", parent, attributes))


def generated(span: Span, record: Record) -> None:
    """Tell a `generate` span what came of it."""
    if span is NOTHING:
        return
    attributes: dict[str, Any] = {
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
    }
    if record.type == "chat":
        attributes["gen_ai.usage.output_tokens"] = record.completion_tokens
        attributes["gen_ai.response.finish_reasons"] = [record.finish_reason]
    span.tell(attributes)


def first_token(elapsed_s: float) -> None:
    """Tell the span that whoever asks is part of."""
    span = tracing.current()
    span.event("first token")
    span.tell({"gen_ai.response.time_to_first_chunk": elapsed_s})


def written(records: Sequence[Record], queue: str, began_ns: int, error_type: str = "") -> None:
    """Tell, in the trace of each, that records of one transaction were written, or refused."""
    if not tracing.on():
        return
    for record in records:
        attributes = _messaging("process", "process", queue, record.request_id)
        attributes |= {"messaging.batch.message_count": len(records), "qwen3.request.id": record.request_id}
        span = tracing.begin(Start(f"process {queue}", "consumer", record.traceparent, attributes, began_ns))
        table = "chats" if record.type == "chat" else "usage_daily"
        with span, _insert(table, len(records), span.traceparent, began_ns) as inserting:
            if error_type:
                span.fail(error_type)
                inserting.fail(error_type)


def _insert(table: str, rows: int, parent: str, at_ns: int) -> Span:
    attributes: dict[str, Any] = {
        "db.system.name": "postgresql",
        "db.operation.name": "INSERT",
        "db.collection.name": table,
    }
    if rows > 1:
        attributes["db.operation.batch.size"] = rows
    return tracing.begin(Start(f"INSERT {table}", "client", parent, attributes, at_ns))


class Vectors:
    """The making of some chats' vectors: a span in the trace of each. What is done for all of them at once is told in
    the trace of the first, to which the others link."""

    def __init__(self, model: str, request_ids: Sequence[str], parents: Sequence[str]) -> None:
        self._spans: list[Span] = []
        self._rows = len(request_ids)
        self.traceparent = parents[0]
        if not tracing.on():
            return
        for request_id, parent in zip(request_ids, parents, strict=True):
            attributes: dict[str, Any] = {"gen_ai.request.model": model, "qwen3.request.id": request_id}
            links = [self._spans[0].traceparent] if self._spans else []
            self._spans.append(tracing.begin(Start("make vector", "internal", parent, attributes, links=links)))
        self.traceparent = self._spans[0].traceparent

    def insert(self) -> Span:
        """Their writing; begins now."""
        return _insert("chat_vectors", self._rows, self.traceparent, time.time_ns()) if self._spans else NOTHING

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        for span in self._spans:
            if kind is not None:
                span.fail(kind.__name__)
            span.end()
