"""The embedding worker: sentence-transformers behind a batcher. The only module that knows the library."""

import asyncio
import copy
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.core import metrics
from server.core.errors import InvalidRequest
from server.core.messages import EmbeddingResult, Job, Record, WorkerType, encode_embeddings
from server.core.registry import ModelSpec
from server.core.settings import BadSettings, Settings
from workers.base import Answer, Worker
from workers.batching import Batcher
from workers.replies import Reply

PREFETCH = 64
MAX_DIMENSIONS = 4000
"""Of pgvector's halfvec stored in line: a row must fit a page of 8 KiB."""


class Embedder:
    """A loaded sentence-transformers model."""

    def __init__(self, spec: ModelSpec) -> None:
        from sentence_transformers import SentenceTransformer

        options: dict[str, Any] = {"revision": spec.revision, "truncate_dim": spec.dimensions}
        if spec.pooling is None:
            self._model = SentenceTransformer(spec.source, **options)
        else:
            from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

            at = {"revision": spec.revision}
            transformer = Transformer(spec.source, model_kwargs=at, config_kwargs=at, processor_kwargs=at)
            pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=spec.pooling)
            self._model = SentenceTransformer(modules=[transformer, pooling], **options)
        own_limit = self._model.max_seq_length
        self.max_tokens = min(spec.context_length, own_limit or spec.context_length)
        self._model.max_seq_length = self.max_tokens
        query_prompt = spec.query_prompt
        if query_prompt is None:
            query_prompt = self._model.prompts.get("query") or ""
        # Counting must not share a tokenizer with encoding, which runs in another thread: each sets its
        # own padding and truncation on it.
        self._counter = copy.deepcopy(self._model.tokenizer)
        self._prompts = {"query": query_prompt, "document": self._model.prompts.get("document") or ""}

    def prepare(self, given: list[str | list[int]], input_type: str) -> tuple[list[str], list[int]]:
        """The texts as the model wants them for `query` or `document`, and their lengths in tokens.

        What is given as token ids is read as the model's own tokenizer reads them. Raises IndexError with the
        position of a list that has an id which is no token.
        """
        texts = [self._prompts[input_type] + self._text(index, one) for index, one in enumerate(given)]
        ids = self._counter(texts, truncation=False, add_special_tokens=True)["input_ids"]
        return texts, [len(row) for row in ids]

    def _text(self, index: int, given: str | list[int]) -> str:
        if isinstance(given, str):
            return given
        if max(given) >= len(self._counter):
            raise IndexError(index)
        return str(self._counter.decode(given, skip_special_tokens=True))

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """float32 (n_texts, dimensions), L2-normalised, also where `dimensions` cuts the model's own."""
        vectors: NDArray[np.float32] = self._model.encode(
            texts, batch_size=len(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return vectors.astype("<f4", copy=False)


class EmbeddingWorker(Worker):
    type: WorkerType = "embedding"

    def __init__(self, settings: Settings, spec: ModelSpec) -> None:
        super().__init__(settings, spec.id)
        self._spec = spec
        self._embedder: Embedder
        self._batcher: Batcher
        self._counting = ThreadPoolExecutor(1)
        self._batching: asyncio.Task[None] | None = None

    async def start(self) -> int:
        self._embedder = await asyncio.to_thread(Embedder, self._spec)
        # The first call pays for lazy initialisation; let it not be a client's.
        (vector,) = await asyncio.to_thread(self._embedder.encode, ["ready"])
        if len(vector) > MAX_DIMENSIONS:
            raise BadSettings(
                f"model {self.model!r} has {len(vector)} dimensions; set `dimensions` to {MAX_DIMENSIONS} or fewer."
            )
        self._batcher = Batcher(self._embedder.encode)
        self._batching = asyncio.create_task(self._batcher.run())
        return PREFETCH

    async def stop(self) -> None:
        if self._batching is not None:
            self._batching.cancel()

    async def handle(self, job: Job, _reply: Reply) -> Answer:
        given: list[str | list[int]] = job.body["input"]
        first: int = job.body.get("first", 0)  # of a request that is several jobs
        input_type = job.body.get("input_type", "document")
        loop = asyncio.get_running_loop()
        try:
            texts, lengths = await loop.run_in_executor(self._counting, self._embedder.prepare, given, input_type)
        except IndexError as exc:
            param = f"input.{first + exc.args[0]}"
            raise InvalidRequest(f"{param}: holds a token id that {self.model} does not have.", param=param) from exc
        limit = self._embedder.max_tokens
        for index, length in enumerate(lengths):
            if length > limit and not job.body.get("truncate"):
                raise InvalidRequest(
                    f"Text {first + index} has {length} tokens; {self.model} takes {limit}. Shorten it or split it.",
                    param=f"input.{first + index}",
                )
        prompt_tokens = sum(min(length, limit) for length in lengths)
        vectors = await self._batcher.submit(texts, [min(length, limit) for length in lengths])
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
