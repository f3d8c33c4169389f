"""Spans: what is told of each and what never is, and that nothing is made of them where nobody asked for any."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.core import spans, tracing
from server.core.logging import configure
from server.core.messages import Api, Job, Record
from server.core.otel import exporting, spans_of
from server.core.settings import Settings, load_settings
from server.core.tracing import NOTHING, Start
from server.limits import clients_traceparent
from tests.stack import PROJECT

TRACE, SPAN = "a" * 32, "b" * 16
PARENT = f"00-{TRACE}-{SPAN}-01"
SAMPLED = 1
SECRET = "the-secret-recipe"

UNTRACED = """
import asyncio, sys
import server.__main__, server.app, workers.__main__, workers.archive, workers.chat, workers.embedding, benchmarks.echo
from server.core import spans, tracing
from server.core.messages import Job
from server.core.settings import load_settings
tracing.start(load_settings(), "server")
job = Job("id", "m", "/chat", {}, 1, "replies.x", 1.0, 2.0, traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
made = [
    tracing.begin(tracing.Start("x", "internal", "", {})), spans.publish("q", "id", ""), spans.process(job, "q", 1, 1),
    spans.generate(job, "vllm", ""), spans.Vectors("m", ["id"], [""]).insert(), tracing.current(),
]
spans.written([], "q", 1)
spans.first_token(1.0)
assert all(span is tracing.NOTHING for span in made), made
print([name for name in sys.modules if name.split(".")[0] == "opentelemetry"])
"""


class Made:
    """The spans that have ended."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (found,) = self.named(name)
        return found

    def __str__(self) -> str:
        return "".join(span.to_json() for span in self._exporter.get_finished_spans())


@pytest.fixture
def made() -> Iterator[Made]:
    """Spans are made, and kept here."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.trace_with(spans_of(provider))
    yield Made(exporter)
    tracing.trace_with(None)


def job(**fields: Any) -> Job:
    given = {"body": {}, "endpoint": "/chat", "session_id": "s", "traceparent": PARENT} | fields
    return Job(id="r1", model="m", key_id=1, reply_to="replies.x", created_at=1.0, deadline=2.0, **given)


def record(**fields: Any) -> Record:
    given = {"type": "chat", "finish_reason": "stop", "created_at": 1.0, "finished_at": 2.0} | fields
    return Record("r1", key_id=1, model="m", endpoint="/chat", prompt_tokens=5, completion_tokens=3, **given)


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_untraced_processes_never_import_opentelemetry() -> None:
    # Given everything that a server, an archivist and the workers import before they have loaded a model, and no
    # endpoint (vLLM itself imports OpenTelemetry, traced or not)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    # When each kind of span is begun
    done = subprocess.run(
        [sys.executable, "-c", UNTRACED], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200
    )
    # Then none is, and nobody has asked for OpenTelemetry
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_where_nothing_is_traced_a_span_costs_next_to_nothing() -> None:
    # Given no endpoint, and a chat's job
    assert not tracing.on()
    one = job(body={"messages": [], "stream": True, "temperature": 0.5})

    # When all spans of a chat are begun and ended
    def chat() -> None:
        with spans.publish("q", "id", ""), spans.process(one, "q", 1, 1) as span:
            span.event("begun")
            with spans.generate(one, "vllm", tracing.current().traceparent):
                spans.first_token(1.0)
            span.tell({"qwen3.outcome": "done"})
        with spans.publish("q", "id", ""):
            spans.written([], "q", 1)

    began = time.perf_counter()
    for _ in range(1000):
        chat()
    # Then that takes microseconds: fifty leave a busy machine ten times what it needs
    assert (time.perf_counter() - began) / 1000 < 50e-6


def test_what_is_generated_is_told_by_numbers_alone(made: Made) -> None:
    # Given a job with words in every place that has some
    body = {
        "messages": [{"role": "user", "content": SECRET}],
        "prompt": SECRET,
        "input": SECRET,
        "stop": [SECRET],
        "tools": [{"function": {"name": SECRET}}],
        "user": SECRET,
        "temperature": 0.5,
        "top_p": SECRET,  # not from our server
        "seed": [SECRET],
        "max_tokens": 9,
        "max_completion_tokens": 8,
        "stream": True,
    }
    # When it is done
    with spans.generate(job(body=body, context=SECRET), "vllm", PARENT) as span:
        spans.generated(span, record(messages=[{"role": "assistant", "content": SECRET}]))
    # Then no word of it is told
    done = made.one("chat m")
    assert SECRET not in str(made)
    assert told(done) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "m",
        "gen_ai.conversation.id": "s",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "qwen3.request.id": "r1",
    }
    assert done.parent is not None
    assert (f"{done.parent.trace_id:032x}", f"{done.parent.span_id:016x}") == (TRACE, SPAN)


def test_every_api_is_an_operation() -> None:
    assert set(spans.OPERATIONS) == set(get_args(Api))


def test_an_error_is_told_by_its_name_alone(made: Made) -> None:
    with pytest.raises(ValueError, match=SECRET), spans.publish("jobs", "r1", PARENT):
        raise ValueError(SECRET)
    span = made.one("publish jobs")
    assert not span.status.is_ok
    assert told(span)["error.type"] == "ValueError"
    assert span.events == ()
    assert SECRET not in str(made)


def test_a_job_is_in_hand_from_its_delivery(made: Made) -> None:
    with spans.process(job(), "jobs", 3, 1_000_000_000):
        pass
    span = made.one("process jobs")
    assert span.start_time == 1_000_000_000
    assert told(span)["qwen3.attempt"] == 3


@pytest.mark.parametrize("error_type", ["", "RecordRefused"])
def test_records_of_one_transaction_are_told_of_in_the_trace_of_each(made: Made, error_type: str) -> None:
    # Given two records of different traces, written at once
    other = f"00-{'c' * 32}-{SPAN}-01"
    spans.written([record(traceparent=PARENT), record(type="embedding", traceparent=other)], "history", 5, error_type)
    # Then each trace has both spans, that say how many there were and whether they are written
    chats, usage = made.one("INSERT chats"), made.one("INSERT usage_daily")
    assert (chats.context.trace_id, usage.context.trace_id) == (int(TRACE, 16), int("c" * 32, 16))
    assert told(chats)["db.operation.batch.size"] == 2
    for span in (*made.named("process history"), chats, usage):
        assert span.status.is_ok is not bool(error_type)
        assert told(span).get("error.type", "") == error_type


def test_vectors_made_at_once_link_to_where_that_is_told(made: Made) -> None:
    # Given two chats of different traces and one of none, whose vectors are made by one job
    other = f"00-{'c' * 32}-{SPAN}-01"
    with spans.Vectors("m", ["r1", "r2", "r3"], [PARENT, other, ""]) as together:
        job_of = together.traceparent
        with together.insert():
            pass
    first, second, third = made.named("make vector")
    # Then the job and the rows are told of in the first one's trace, and the others link there
    assert job_of.split("-")[1:3] == [f"{first.context.trace_id:032x}", f"{first.context.span_id:016x}"]
    assert (first.context.trace_id, second.context.trace_id) == (int(TRACE, 16), int("c" * 32, 16))
    assert third.parent is None
    assert [[link.context.span_id for link in span.links] for span in (first, second, third)] == [
        [],
        [first.context.span_id],
        [first.context.span_id],
    ]
    rows = made.one("INSERT chat_vectors")
    assert rows.parent is not None
    assert rows.parent.span_id == first.context.span_id


def test_a_trace_is_handed_on_where_this_process_makes_none() -> None:
    assert spans.Vectors("m", ["r1"], [PARENT]).traceparent == PARENT


def test_what_is_not_sampled_is_not_told_and_says_so_to_the_next(made: Made) -> None:
    with tracing.begin(Start("x", "internal", f"00-{TRACE}-{SPAN}-00", {})) as span:
        assert span.traceparent.startswith(f"00-{TRACE}-")
        assert span.traceparent.endswith("-00")
        assert span.ids == {}
    assert str(made) == ""


def test_a_span_that_is_over_takes_nothing_more_and_does_not_complain(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a request whose client left, while its answer is still made
    with tracing.begin(Start("x", "server", "", {})) as span:
        pass
    # When something is told of it, then it is not, nor is that logged
    span.tell({"a": 1})
    span.event("e")
    span.fail("E")
    assert told(made.one("x")) == {}
    assert caplog.text == ""
    assert span.ids == {}


def test_the_current_span_is_that_of_the_innermost_block(made: Made) -> None:
    assert tracing.current() is NOTHING
    with tracing.begin(Start("outer", "server", "", {})) as outer:
        with tracing.begin(Start("inner", "internal", outer.traceparent, {})) as inner:
            assert tracing.current() is inner
        assert tracing.current() is outer
    assert tracing.current() is NOTHING


@pytest.mark.usefixtures("made", "logging_as_it_was")
def test_a_log_line_names_the_span_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", "test")
    with tracing.begin(Start("x", "server", PARENT, {})) as span:
        logging.getLogger("x").info("within", extra={"action": "a"})
    logging.getLogger("x").info("without")
    within, without = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (within["trace_id"], within["span_id"], within["action"]) == (TRACE, span.traceparent.split("-")[2], "a")
    assert not {"trace_id", "span_id"} & set(without)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (PARENT, True),
        (f"00-{TRACE}-{SPAN}-00", True),
        ("", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}-01-more", False),
    ],
)
def test_only_a_proper_traceparent_of_a_client_is_taken(given: str, taken: bool) -> None:
    assert clients_traceparent({"traceparent": given}) == (given if taken else "")


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, ""),
        ({"ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        ({"ENDPOINT": "http://c:4318/otlp/"}, "http://c:4318/otlp/v1/traces"),
        ({"ENDPOINT": "http://c:4317", "PROTOCOL": "grpc"}, "http://c:4317"),
        ({"ENDPOINT": "http://c:4317", "TRACES_PROTOCOL": "grpc"}, "http://c:4317"),
        ({"TRACES_ENDPOINT": "http://t/x"}, "http://t/x"),
        ({"ENDPOINT": "http://c:4318", "TRACES_ENDPOINT": "http://t/x"}, "http://t/x"),
    ],
)
def test_where_traces_go_is_by_opentelemetrys_own_variables(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], endpoint: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    assert load_settings().traces_endpoint == endpoint


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_traces_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318")
    monkeypatch.setenv(name, value)
    tracing.start(load_settings(), "test")
    assert not tracing.on()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_both_protocols_have_their_exporter(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    # Given each, and sampling by OpenTelemetry's own variable, so that nothing is sent
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    settings = Settings(otel_exporter_otlp_endpoint="http://127.0.0.1:1", otel_exporter_otlp_protocol=protocol)
    # When spans are made by it, then the variable is heeded
    with exporting(settings, "test")(Start("x", "internal", "", {})) as span:
        assert int(span.traceparent[-2:], 16) & SAMPLED == 0
