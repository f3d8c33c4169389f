"""An OTLP receiver over HTTP, as a collector is: it keeps every span that it is sent, by trace."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True)
class Span:
    """As it was sent; ids in hex, times in Unix nanoseconds, `error` whether its status is one."""

    name: str
    kind: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: list[str]
    links: list[str]
    error: bool
    began: int
    ended: int


@dataclass
class Receiver:
    """`bodies` are the exports as they came, `headers` those of each."""

    port: int
    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to send here, soon."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}

    def take(self, headers: dict[str, str], body: bytes) -> None:
        self.headers.append(headers)
        self.bodies.append(body)
        export = ExportTraceServiceRequest.FromString(body)
        for resource in export.resource_spans:
            service = str(_attributes(resource.resource.attributes).get("service.name"))
            for scope in resource.scope_spans:
                self.spans += [_span(one, service) for one in scope.spans]

    def of(self, trace_id: str) -> list[Span]:
        return sorted((span for span in list(self.spans) if span.trace_id == trace_id), key=lambda span: span.began)

    def named(self, trace_id: str, *names: str) -> list[Span] | None:
        """The trace once it has spans of all these names, some as often as they are named."""
        spans = self.of(trace_id)
        found = [span.name for span in spans]
        return spans if all(found.count(name) >= names.count(name) for name in names) else None


def _span(span: WireSpan, service: str) -> Span:
    return Span(
        name=span.name,
        kind=WireSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        service=service,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        events=[event.name for event in span.events],
        links=[link.span_id.hex() for link in span.links],
        error=span.status.code == Status.STATUS_CODE_ERROR,
        began=span.start_time_unix_nano,
        ended=span.end_time_unix_nano,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    def value(given: AnyValue) -> Any:
        kind = given.WhichOneof("value")
        if kind == "array_value":
            return [value(one) for one in given.array_value.values]
        return getattr(given, kind) if kind else None

    some: list[KeyValue] = list(pairs)
    return {pair.key: value(pair.value) for pair in some}


def _handler(take: Callable[[dict[str, str], bytes], None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf":
                take({name.lower(): value for name, value in self.headers.items()}, body)
                self.send_response(200)
            else:
                self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_args: Any) -> None: ...

    return Handler


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver(0)
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(receiver.take)) as server:
        receiver.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
