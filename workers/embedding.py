"""The embedding worker: jobs to texts, texts through a batcher to the model, vectors back."""

import asyncio
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from server.core import metrics
from server.core.errors import InvalidRequest, Unavailable
from server.core.messages import EmbeddingResult, Job, Record, WorkerType, encode_embeddings
from server.core.registry import ModelSpec
from server.core.settings import BadSettings, Settings
from workers.base import Answer, Worker
from workers.batching import Batcher, Text
from workers.embedder import Embedder
from workers.replies import Reply

PREFETCH = 128
"""Jobs in hand: more than the batches that run hold, so that the next ones are tokenised meanwhile."""
MAX_DIMENSIONS = 4000
"""Of pgvector's halfvec stored in line: a row must fit a page of 8 KiB."""

LONGEST_S = 300.0
"""More than a batch takes on the slowest machine: nobody waits for longer than half of it."""


class EmbeddingWorker(Worker):
    type: WorkerType = "embedding"
    provider = "sentence_transformers"

    def __init__(self, settings: Settings, spec: ModelSpec) -> None:
        super().__init__(settings, spec.id)
        self._spec = spec
        self._embedder: Embedder
        self._batcher: Batcher
        self._tokenising = ThreadPoolExecutor(1, "tokenise")
        self._machine = ThreadPoolExecutor(1, "machine")
        self._batching: asyncio.Task[None] | None = None
        self._broken = False
        self._begun: dict[int, float] = {}
        """When each batch that is encoded now was begun, by thread."""

    async def start(self) -> int:
        loop = asyncio.get_running_loop()
        # In the one thread that computes on all cores: where several have done so, OpenMP on a CPU lets the threads of
        # all sleep between two steps of a text, which doubles its time.
        self._embedder = await loop.run_in_executor(self._machine, Embedder, self._spec)
        # The first call pays for lazy initialisation; let it not be a client's.
        (vector,) = await loop.run_in_executor(self._machine, self._try_out)
        if len(vector) > MAX_DIMENSIONS:
            raise BadSettings(
                f"model {self.model!r} has {len(vector)} dimensions; set `dimensions` to {MAX_DIMENSIONS} or fewer."
            )
        self._batcher = Batcher(self._encode, self._embedder.budget, self._machine)
        self._batching = asyncio.create_task(self._batcher.run())
        return PREFETCH

    def _try_out(self) -> NDArray[np.float32]:
        return self._embedder.encode(self._embedder.tokenise(["ready"], "document", truncate=True))

    def _encode(self, texts: list[Text], alone: bool) -> NDArray[np.float32]:
        """Called in a thread. Raises what the model raises; `alive` no more if it does so whatever it is given."""
        thread = threading.get_ident()
        self._begun[thread] = time.monotonic()
        try:
            return self._embedder.encode(texts, alone)
        except Exception:
            try:
                self._try_out()
            except Exception:
                self._broken = True
            raise
        finally:
            del self._begun[thread]

    def alive(self) -> bool:
        return self._batching is not None and not self._batching.done() and not self._broken

    def hung_s(self) -> float:
        return max(0.0, time.monotonic() - min(self._begun.copy().values(), default=math.inf) - LONGEST_S)

    def kill(self) -> None:
        os._exit(1)  # a thread that hangs in the model keeps the process from ending otherwise

    async def stop(self) -> None:
        if self._batching is not None:
            self._batching.cancel()

    async def handle(self, job: Job, _reply: Reply) -> Answer:
        if job.body.get("space", self._spec.vector_space) != self._spec.vector_space:
            raise Unavailable(f"Another version of {self.model} is about to be served. Try again shortly.")
        texts = await self._tokenise(job)
        prompt_tokens = sum(text.length for text in texts)
        vectors = await self._batcher.submit(texts, job.lane)
        self.beacon.progress(prompt_tokens)
        result = EmbeddingResult(self.model, vectors.shape[1], prompt_tokens, vectors.tobytes())
        metrics.embedding_requests.labels(self.model).inc()
        metrics.embedding_texts.labels(self.model).inc(len(texts))
        metrics.prompt_tokens.labels(self.model).inc(prompt_tokens)
        record = Record(
            request_id=job.id,
            type="embedding",
            key_id=job.key_id,
            model=self.model,
            endpoint=job.endpoint,
            prompt_tokens=prompt_tokens,
            completion_tokens=0,
            created_at=job.created_at,
            finished_at=time.time(),
            texts=len(texts),
        )
        return Answer("result", encode_embeddings(result), record)

    async def _tokenise(self, job: Job) -> list[Text]:
        """The job's texts as the model takes them. Raises InvalidRequest."""
        given: list[str | list[int]] = job.body["input"]
        first: int = job.body.get("first", 0)  # of a request that is several jobs
        input_type: str = job.body.get("input_type", "document")
        tokenise = partial(self._embedder.tokenise, given, input_type, truncate=bool(job.body.get("truncate")))
        try:
            texts = await asyncio.get_running_loop().run_in_executor(self._tokenising, tokenise)
        except IndexError as exc:
            param = f"input.{first + exc.args[0]}"
            raise InvalidRequest(f"{param}: holds a token id that {self.model} does not have.", param=param) from exc
        limit = self._embedder.max_tokens
        for index, text in enumerate(texts, first):
            if text.length > limit:
                raise InvalidRequest(
                    f"Text {index} has {text.length} tokens; {self.model} takes {limit}. Shorten it or split it.",
                    param=f"input.{index}",
                )
        return texts
