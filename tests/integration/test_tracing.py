"""One chat's trace, from its client's through server, broker and workers to Postgres, over real processes."""

import json
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.core import topology
from server.process import Child
from tests.faults.rig import MODEL, Rig, rig, until
from tests.models.tiny_embedding import build
from tests.otlp import Receiver, Span, receiving

VECTORS = "tiny-vectors"
JOBS = topology.jobs_queue(MODEL, "interactive")
VECTOR_JOBS = topology.jobs_queue(VECTORS, "batch")
HISTORY = topology.HISTORY
ROUTE = "/v1/chat/completions"
SAID = "the secret recipe of the house"
WORD = "abc"
ANSWERED = WORD * 3  # by the echoing worker, and longer than what ids have in common with it by chance
BEGINNING = (f"POST {ROUTE}", f"publish {JOBS}", f"process {JOBS}", f"chat {MODEL}")
KEPT = (f"publish {HISTORY}", f"process {HISTORY}", "INSERT chats")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture(scope="module")
async def traced(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> AsyncIterator[Rig]:
    """Broker and database; the models are served by who is started over them."""
    folder: Path = tmp_path_factory.mktemp("traced")
    async with rig(folder) as made:
        source = str(build(folder / "tiny"))
        entry = {"type": "embedding", "source": source, "context_length": 64, "dtype": "float32"}
        made.serve(**{MODEL: {"default": True}, VECTORS: entry})
        yield made


@pytest.fixture(scope="module")
async def server(traced: Rig, receiver: Receiver) -> tuple[str, Child]:
    """Its URL, and the process."""
    headers = "x-tenant=ours"
    return await traced.server(
        **receiver.environment, OTEL_EXPORTER_OTLP_HEADERS=headers, OTEL_SERVICE_NAME="front", LOG_LEVEL="DEBUG"
    )


@pytest.fixture(scope="module")
async def archive(traced: Rig, receiver: Receiver) -> Child:
    return await traced.archive(**receiver.environment)


@pytest.fixture(scope="module")
async def client(traced: Rig, server: tuple[str, Child]) -> AsyncIterator[httpx.AsyncClient]:
    async with traced.client(server[0]) as made:
        yield made


@pytest.fixture(scope="module")
async def echo(traced: Rig, receiver: Receiver, client: httpx.AsyncClient) -> Child:
    child = await traced.echo("echo", "--words", "3", **receiver.environment)
    await until(lambda: answered(client))
    return child


async def answered(client: httpx.AsyncClient) -> bool:
    """Whether a worker is there for chats; one that is not told of yet is refused."""
    return (await client.post(ROUTE, json=chat())).status_code == 200


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": SAID}], "max_tokens": 9, **fields}


def trace() -> tuple[str, str, dict[str, str]]:
    """A client's trace and span, and the header that names them."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, {"traceparent": f"00-{trace_id}-{span_id}-01"}


def one(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


async def test_a_chat_is_one_trace_from_http_to_its_vector(
    traced: Rig, receiver: Receiver, client: httpx.AsyncClient, archive: Child, echo: Child
) -> None:
    # Given an embedding worker besides the others, and a client with a trace of its own
    await traced.run("embedding", "workers", "embedding", "--model", VECTORS, **receiver.environment)
    trace_id, client_span, header = trace()
    # When it has a chat streamed
    body = chat(stream=True, temperature=0.5, seed=7, stop=["recipe"], user="nobody-knows-this-user")
    answer = await client.post(ROUTE, json=body, headers=header | {"X-Session-Id": "a-session"})
    assert ANSWERED in "".join(re.findall(r'"content":"(\w*)"', answer.text))
    request_id = answer.headers["x-request-id"]
    # Then every step of it is in that trace, each under the step that it came from
    vector = ("make vector", f"publish {VECTOR_JOBS}", f"process {VECTOR_JOBS}", f"embeddings {VECTORS}")
    names = (*BEGINNING, *KEPT, *vector, "INSERT chat_vectors")
    spans = await until(lambda: receiver.named(trace_id, *names), 120)
    assert sorted(span.name for span in spans) == sorted(names)
    by_id = {span.span_id: span.name for span in spans}
    parents = {span.name: by_id.get(span.parent_id, span.parent_id) for span in spans}
    assert parents == {
        f"POST {ROUTE}": client_span,
        f"publish {JOBS}": f"POST {ROUTE}",
        f"process {JOBS}": f"publish {JOBS}",
        f"chat {MODEL}": f"process {JOBS}",
        f"publish {HISTORY}": f"process {JOBS}",
        f"process {HISTORY}": f"publish {HISTORY}",
        "INSERT chats": f"process {HISTORY}",
        "make vector": f"publish {HISTORY}",
        f"publish {VECTOR_JOBS}": "make vector",
        f"process {VECTOR_JOBS}": f"publish {VECTOR_JOBS}",
        f"embeddings {VECTORS}": f"process {VECTOR_JOBS}",
        "INSERT chat_vectors": "make vector",
    }
    # And each has its process's name and its kind, and none is an error
    assert {span.name: (span.service, span.kind) for span in spans} == {
        f"POST {ROUTE}": ("front", "server"),
        f"publish {JOBS}": ("front", "producer"),
        f"process {JOBS}": ("qwen3-echo", "consumer"),
        f"chat {MODEL}": ("qwen3-echo", "internal"),
        f"publish {HISTORY}": ("qwen3-echo", "producer"),
        f"process {HISTORY}": ("qwen3-worker-archive", "consumer"),
        "INSERT chats": ("qwen3-worker-archive", "client"),
        "make vector": ("qwen3-worker-archive", "internal"),
        f"publish {VECTOR_JOBS}": ("qwen3-worker-archive", "producer"),
        f"process {VECTOR_JOBS}": ("qwen3-worker-embedding", "consumer"),
        f"embeddings {VECTORS}": ("qwen3-worker-embedding", "internal"),
        "INSERT chat_vectors": ("qwen3-worker-archive", "client"),
    }
    assert not [span for span in spans if span.error or span.links]
    assert all(span.began <= span.ended for span in spans)
    # And what is told of each is by the conventions
    assert one(spans, f"POST {ROUTE}").attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": ROUTE,
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "gen_ai.request.model": MODEL,
        "qwen3.request.id": request_id,
        "qwen3.outcome": "completed",
    }
    assert one(spans, f"process {JOBS}").attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": JOBS,
        "messaging.rabbitmq.destination.routing_key": JOBS,
        "messaging.message.id": request_id,
        "gen_ai.request.model": MODEL,
        "qwen3.request.id": request_id,
        "qwen3.attempt": 1,
        "qwen3.outcome": "done",
    }
    assert one(spans, f"process {JOBS}").events == ["begun"]
    generated = one(spans, f"chat {MODEL}")
    assert 0 < generated.attributes.pop("gen_ai.response.time_to_first_chunk") < 10
    assert generated.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "echo",
        "gen_ai.request.model": MODEL,
        "gen_ai.conversation.id": "a-session",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": True,
        "gen_ai.response.model": MODEL,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.output_tokens": 3,
        "qwen3.request.id": request_id,
    }
    assert generated.events == ["first token"]
    assert one(spans, "INSERT chats").attributes == {
        "db.system.name": "postgresql",
        "db.operation.name": "INSERT",
        "db.collection.name": "chats",
    }
    # And what was said, who said it with which key, and what came of it is nowhere
    sent = b"".join(receiver.bodies)
    for secret in (SAID, "recipe", ANSWERED, traced.key, traced.key[3:], "nobody-knows-this-user"):
        assert secret.encode() not in sent
    # And the headers for the collector were sent by the process that was told them
    assert "ours" in [headers.get("x-tenant") for headers in receiver.headers]


async def test_log_lines_say_which_trace_they_are_of(
    receiver: Receiver, server: tuple[str, Child], client: httpx.AsyncClient, echo: Child
) -> None:
    trace_id, _, header = trace()
    answer = await client.post(ROUTE, json=chat(), headers=header)
    spans = await until(lambda: receiver.named(trace_id, *BEGINNING))
    assert server[1].log is not None
    lines = [json.loads(line) for line in server[1].log.read_text().splitlines() if line.startswith("{")]
    (told,) = [
        line
        for line in lines
        if line.get("request_id") == answer.headers["x-request-id"] and line["message"] == "request answered"
    ]
    assert (told["trace_id"], told["span_id"]) == (trace_id, one(spans, f"POST {ROUTE}").span_id)
    assert "trace_id" not in next(line for line in lines if line["message"] != "request answered")


@pytest.mark.parametrize("given", ["nonsense", "00-" + "0" * 32 + "-" + "a" * 16 + "-01", "ff-" + "a" * 32 + "-b-01"])
async def test_a_wrong_traceparent_is_ignored(
    receiver: Receiver, client: httpx.AsyncClient, archive: Child, echo: Child, given: str
) -> None:
    # When a request comes with what is no trace
    answer = await client.post(ROUTE, json=chat(), headers={"traceparent": given})
    assert answer.status_code == 200

    # Then it has a trace of its own
    def root() -> list[Span]:
        asked = answer.headers["x-request-id"]
        return [span for span in receiver.spans if span.attributes.get("qwen3.request.id") == asked]

    spans = await until(lambda: receiver.named(root()[0].trace_id, *BEGINNING, *KEPT) if root() else None)
    assert one(spans, f"POST {ROUTE}").parent_id == ""
    assert len({span.trace_id for span in spans}) == 1


async def test_a_client_that_samples_not_is_heeded(
    receiver: Receiver, client: httpx.AsyncClient, archive: Child, echo: Child
) -> None:
    # Given a trace that its client does not keep
    trace_id, span_id, _ = trace()
    # When a request of it is answered, and then one of another, which is kept
    await client.post(ROUTE, json=chat(), headers={"traceparent": f"00-{trace_id}-{span_id}-00"})
    later, _, header = trace()
    await client.post(ROUTE, json=chat(), headers=header)
    await until(lambda: receiver.named(later, *BEGINNING, *KEPT))
    # Then no process has told of the first
    assert receiver.of(trace_id) == []


async def test_a_job_whose_worker_was_lost_goes_on_in_its_trace(
    traced: Rig, receiver: Receiver, client: httpx.AsyncClient, archive: Child, echo: Child
) -> None:
    # Given a worker that takes its time, and no other
    await echo.stop(10)
    slow = ("--words", "12", "--pause", "0.1")
    first = await traced.echo("first", *slow, **receiver.environment)
    await until(lambda: answered(client))
    trace_id, _, header = trace()
    # When it is killed in the middle of a stream, and another one comes
    async with client.stream("POST", ROUTE, json=chat(stream=True, temperature=0), headers=header) as answer:
        lines = answer.aiter_lines()
        async for line in lines:
            if WORD in line:
                break
        first.process.kill()
        second = await traced.echo("second", *slow, **receiver.environment)
        rest = [line async for line in lines]
    assert "data: [DONE]" in rest
    spans = await until(lambda: receiver.named(trace_id, *BEGINNING, *KEPT))
    # Then the second try is part of the trace, where the first was, and says which it is
    again = one(spans, f"process {JOBS}")
    assert again.parent_id == one(spans, f"publish {JOBS}").span_id
    assert again.attributes["qwen3.attempt"] == 2
    assert one(spans, f"chat {MODEL}").parent_id == again.span_id
    # And the request says that it went on
    assert one(spans, f"POST {ROUTE}").events == ["another worker goes on"]
    await second.stop(10)


async def test_what_fails_is_an_error_without_its_words(
    traced: Rig, receiver: Receiver, client: httpx.AsyncClient
) -> None:
    # Given no worker for chats any more: one that was killed is missed after a while
    await until(lambda: unready(client))
    trace_id, _, header = trace()
    # When one is asked for
    answer = await client.post(ROUTE, json=chat(), headers=header)
    assert answer.status_code == 503
    # Then its span is an error, by its status
    (span,) = await until(lambda: receiver.named(trace_id, f"POST {ROUTE}"))
    assert span.error
    assert span.attributes["error.type"] == "503"
    # And what the client did wrong is none, nor is what it sent told, a key among it
    trace_id, _, header = trace()
    path = f"/nowhere/{traced.key}"
    assert (await client.get(path, headers=header)).status_code == 404
    (span,) = await until(lambda: receiver.named(trace_id, "GET"))
    assert not span.error
    assert traced.key.encode() not in b"".join(receiver.bodies)


async def unready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/health/ready")).status_code == 503


async def test_probes_are_not_traced(receiver: Receiver, client: httpx.AsyncClient) -> None:
    trace_id, _, header = trace()
    later, _, after = trace()
    for path in ("/health", "/health/live", "/metrics", "/qwen3/metrics"):
        assert (await client.get(path, headers=header)).status_code in (200, 503)
    await client.get("/v1/models", headers=after)
    await until(lambda: receiver.named(later, "GET /v1/models"))
    assert receiver.of(trace_id) == []
