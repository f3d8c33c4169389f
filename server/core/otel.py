"""OpenTelemetry: how spans are made and exported. The only module that knows it, and imported only to trace.

The SDK reads OpenTelemetry's own variables by itself: sampler, limits, headers, certificates, resource, batches.
"""

import os
from collections.abc import Callable
from contextvars import Token
from types import TracebackType
from typing import Self

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.core import tracing
from server.core.settings import Settings
from server.core.tracing import Attributes, Start

KINDS: dict[tracing.Kind, trace.SpanKind] = {
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
    "producer": trace.SpanKind.PRODUCER,
    "consumer": trace.SpanKind.CONSUMER,
    "internal": trace.SpanKind.INTERNAL,
}

TIMEOUT_S = 2
"""For a batch to be taken. Python's default is 10, and a process whose collector is away ends later by as much, or by
twice that where an engine in it has spans of its own."""

_propagator = TraceContextTextMapPropagator()


class OtelSpan(tracing.Span):
    __slots__ = ("_span", "_token")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._token: Token[tracing.Span] | None = None

    @property
    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return carrier["traceparent"]

    @property
    def ids(self) -> dict[str, str]:
        if not self._span.is_recording():
            return {}  # not sampled; or over, and what still runs in its name is no part of it
        context = self._span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    # A request may go on after its client has left, and its span ended with that; the SDK would log each try.

    def tell(self, attributes: Attributes) -> None:
        if self._span.is_recording():
            self._span.set_attributes(attributes)

    def event(self, name: str) -> None:
        if self._span.is_recording():
            self._span.add_event(name)

    def fail(self, error_type: str) -> None:
        if self._span.is_recording():
            self._span.set_attribute("error.type", error_type)
            self._span.set_status(trace.StatusCode.ERROR)

    def end(self) -> None:
        self._span.end()

    def __enter__(self) -> Self:
        self._token = tracing.enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        assert self._token is not None
        tracing.leave(self._token)
        self.end()


def spans_of(provider: TracerProvider) -> Callable[[Start], tracing.Span]:
    """Begins the spans of a provider."""
    tracer = provider.get_tracer("qwen3-inference-service")

    def begin(start: Start) -> tracing.Span:
        span = tracer.start_span(
            start.name,
            _context_of(start.parent),
            KINDS[start.kind],
            start.attributes,
            [trace.Link(context) for link in start.links if (context := _span_context(link)).is_valid],
            start.at_ns or None,
        )
        return OtelSpan(span)

    return begin


def _context_of(traceparent: str) -> Context:
    """With the parent; one that is empty or wrong is none."""
    return _propagator.extract({"traceparent": traceparent}, Context())


def _span_context(traceparent: str) -> trace.SpanContext:
    return trace.get_current_span(_context_of(traceparent)).get_span_context()


def exporting(settings: Settings, process: str) -> Callable[[Start], tracing.Span]:
    """Spans that go to where settings say, in batches, from a thread; the last ones when the process ends."""
    # In the environment, because that is where an engine looks that traces itself.
    os.environ.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", str(TIMEOUT_S))
    if "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        os.environ.setdefault("OTEL_SERVICE_NAME", f"qwen3-{process}")
    provider = TracerProvider(resource=Resource.create())
    provider.add_span_processor(BatchSpanProcessor(_exporter(settings)))
    return spans_of(provider)


def _exporter(settings: Settings) -> SpanExporter:
    if settings.traces_protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=settings.traces_endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=settings.traces_endpoint)
