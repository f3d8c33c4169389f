"""The embedding worker over a real broker, with a tiny model."""

import asyncio
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import workers.embedding
from server.core.errors import EngineFailed, InvalidRequest, Unavailable
from server.core.inbox import Inbox
from server.core.messages import EmbeddingResult, Job, Lane, decode_embeddings, vectors_of
from server.core.registry import ModelSpec
from server.core.settings import Settings
from tests.integration.test_amqp import until
from tests.models.tiny_embedding import build
from workers.batching import Text
from workers.embedding import EmbeddingWorker


class Bench:
    """A running worker, and who asks it."""

    def __init__(self, settings: Settings, source: Path) -> None:
        entry = {"id": f"tiny-{secrets.token_hex(4)}", "name": "Tiny", "type": "embedding", "source": str(source)}
        self.spec = ModelSpec.model_validate(entry | {"context_length": 64, "dtype": "float32"})
        self.worker = EmbeddingWorker(settings, self.spec)
        self.inbox = Inbox(settings.amqp_url, "test", [self.spec.id], settings.queue_max_jobs)

    async def ask(self, texts: list[Any], lane: Lane = "interactive", **fields: object) -> EmbeddingResult:
        now = time.time()
        job = Job(
            id=secrets.token_hex(8),
            model=self.spec.id,
            endpoint="/embeddings",
            body={"input": texts} | fields,
            key_id=1,
            reply_to=self.inbox.queue,
            created_at=now,
            deadline=now + 20,
            api="embeddings",
        )
        waiter = await self.inbox.submit(job, lane)
        return decode_embeddings((await waiter.next()).data)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def bench(settings: Settings, source: Path) -> AsyncIterator[Bench]:
    made = Bench(settings, source)
    await made.inbox.start()
    running = asyncio.create_task(made.worker.run())
    await until(lambda: made.worker.probe.ready or running.done())
    yield made
    if not running.done():
        os.kill(os.getpid(), signal.SIGTERM)
    await running
    await made.inbox.close()


async def test_many_requests_at_once_get_their_own_vectors(bench: Bench) -> None:
    # Given requests of several texts, in both lanes, all at once
    asked = [[f"text {n}", "word " * (n % 16 + 1)] for n in range(40)]
    lanes: list[Lane] = ["interactive", "batch"]
    results = await asyncio.gather(*(bench.ask(texts, lanes[n % 2]) for n, texts in enumerate(asked)))
    # Then each has the vectors, and the tokens, that it has by itself
    for texts, result in zip(asked[::7], results[::7], strict=True):
        alone = await bench.ask(texts)
        assert np.sum(vectors_of(result) * vectors_of(alone), axis=1) == pytest.approx([1, 1], abs=1e-4)
        assert result.prompt_tokens == alone.prompt_tokens > 0
        assert (result.model, result.dimensions) == (bench.spec.id, 128)


async def test_queries_are_embedded_with_their_prompt(bench: Bench) -> None:
    document, query = await bench.ask(["one"]), await bench.ask(["one"], input_type="query")
    assert query.prompt_tokens > document.prompt_tokens
    assert float(vectors_of(query)[0] @ vectors_of(document)[0]) < 0.999


async def test_texts_past_the_limit_are_refused_by_their_place(bench: Bench) -> None:
    # Given a job that is the second of its request, with a text that is too long
    long = "word " * 100
    with pytest.raises(InvalidRequest, match=r"^Text 257 has \d+ tokens; .* takes 64\.") as told:
        await bench.ask(["fine", long], first=256)
    assert told.value.param == "input.257"
    # Then one that may be cut is cut, and counted as cut
    cut = await bench.ask([long], truncate=True)
    assert cut.prompt_tokens == 64


async def test_ids_that_are_no_tokens_are_refused_by_their_place(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match=r"^input\.1: holds a token id that .* does not have") as told:
        await bench.ask(["fine", [5, 1_000_000]])
    assert told.value.param == "input.1"
    assert vectors_of(await bench.ask([[5, 6]])).shape == (1, 128)


async def test_a_worker_whose_batches_have_ended_ends(bench: Bench) -> None:
    # Given a batcher that is gone, for a reason that nobody foresaw
    assert bench.worker.alive()
    assert bench.worker._batching is not None
    bench.worker._batching.cancel()
    # Then the worker says so by its end, rather than take jobs that it never answers
    await until(lambda: not bench.worker.probe.ready)
    assert not bench.worker.alive()


async def test_a_model_that_fails_at_everything_ends_its_worker(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = bench.worker._embedder.encode

    def poisoned(texts: list[Text], alone: bool = False) -> NDArray[np.float32]:
        if broken or len(texts[0].fields["input_ids"]) > 10:
            raise RuntimeError("CUDA error")
        return encode(texts, alone)

    monkeypatch.setattr(bench.worker._embedder, "encode", poisoned)
    # Given a text that the model fails at: then that one is answered with an error, and the others as before
    broken = False
    with pytest.raises(EngineFailed):
        await bench.ask(["word " * 20])
    assert vectors_of(await bench.ask(["fine"])).shape == (1, 128)
    assert bench.worker.alive()
    # When it fails at whatever it is given; then the worker says so by its end
    broken = True
    with pytest.raises(EngineFailed):
        await bench.ask(["fine"])
    await until(lambda: not bench.worker.probe.ready)
    assert not bench.worker.alive()


async def test_a_batch_without_an_end_is_told_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.embedding, "LONGEST_S", 0.2)
    assert bench.worker.hung_s() == 0
    # Given a model that hangs
    let_go = threading.Event()
    monkeypatch.setattr(bench.worker._embedder, "encode", lambda *_: let_go.wait(10))
    asking = asyncio.create_task(bench.ask(["fine"]))
    # Then it is known for how long
    await until(lambda: bench.worker.hung_s() > 0.1)
    let_go.set()
    with pytest.raises(EngineFailed):  # what it gave are no vectors
        await asking
    assert bench.worker.hung_s() == 0


async def test_vectors_of_another_version_are_refused(bench: Bench) -> None:
    assert vectors_of(await bench.ask(["fine"], space=bench.spec.vector_space)).shape == (1, 128)
    with pytest.raises(Unavailable, match=r"Another version of tiny-.* is about to be served"):
        await bench.ask(["fine"], space="tiny:another")
