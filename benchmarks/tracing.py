"""What traces cost a chat: microseconds of processor time for all of its spans, in all processes together.

Off, as it is without OTEL_EXPORTER_OTLP_ENDPOINT; on, but not sampled; on, made and encoded for OTLP (what sending them
takes is left out, as it depends on who takes them). Nothing else of a chat is done, and no process or broker is needed.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from benchmarks import report
from server.core import spans, tracing
from server.core.messages import Job, Record
from server.core.otel import spans_of
from server.core.tracing import NOTHING
from server.middleware import request_span, tell_answer

CHATS = 2000
QUEUE, HISTORY = "jobs.m.interactive.v2", "history.v2"
BODY = {"messages": [], "stream": True, "max_tokens": 128, "temperature": 0.7, "top_p": 0.9}
RECORD = Record("id", "chat", 1, "m", "/v1/chat/completions", 20, 128, 1.0, 2.0, "session", [], "stop")


class Encoding(SpanExporter):
    """Encodes, and drops what it has encoded."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        encode_spans(spans).SerializeToString()
        return SpanExportResult.SUCCESS


def chat(flags: str) -> None:
    """All that a chat's processes do for its trace, in order."""
    header = [(b"traceparent", f"00-{'a' * 32}-{'b' * 16}-{flags}".encode())]
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "scheme": "http",
        "headers": header,
    }
    scope["state"] = {"request_id": "id", "model": "m"}
    with request_span(scope) as request:
        with spans.publish(QUEUE, "id", request.traceparent) as sent:
            job = Job("id", "m", "/chat", BODY, 1, "replies.x", 1.0, 2.0, traceparent=sent.traceparent)
        with spans.process(job, QUEUE, 1, time.time_ns()) as taken:
            taken.event("begun")
            with spans.generate(job, "vllm", tracing.current().traceparent) as generated:
                spans.first_token(0.1)
                spans.generated(generated, RECORD)
            with spans.publish(HISTORY, "id", tracing.current().traceparent):
                pass
            taken.tell({"qwen3.outcome": "done"})
        spans.written([RECORD], HISTORY, time.time_ns())
        with spans.Vectors("m", ["id"], [sent.traceparent]) as together, together.insert():
            pass
        if request is not NOTHING:
            tell_answer(request, scope, "/v1/chat/completions", 200)


def cost_us(flags: str, after: Callable[[], object] = lambda: None) -> float:
    """Of a chat, with what `after` does for all of them."""
    began = time.process_time()
    for _ in range(CHATS):
        chat(flags)
    after()
    return (time.process_time() - began) / CHATS * 1e6


def main() -> int:
    top = report.parser(__doc__)
    top.add_argument("--rounds", type=int, default=9, metavar="N", help="times each is measured (9)")
    args = top.parse_args()
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Encoding(), max_queue_size=20 * CHATS))
    costs: dict[str, list[float]] = {"off": [], "not sampled": [], "sampled": []}
    for _ in range(args.rounds):
        tracing.trace_with(None)
        costs["off"].append(cost_us("01"))
        tracing.trace_with(spans_of(provider))
        costs["not sampled"].append(cost_us("00"))
        costs["sampled"].append(cost_us("01", provider.force_flush))
    result = {name: {"us_a_chat": round(statistics.median(each), 1)} for name, each in costs.items()}
    told = ", ".join(f"{name} {each['us_a_chat']} µs" for name, each in result.items())
    report.save(args, "tracing", result, f"processor time a chat: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
