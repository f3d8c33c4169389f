"""What embeds in the benchmark: the bare model, this service, Infinity. Each embeds texts and says how long it took."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
import yaml

from benchmarks.stack import cpu_seconds, other_server, service
from server.private import free_port

MODEL = "embedding"
LEAST_COSINE = 0.999


@dataclass(slots=True)
class Turn:
    """`latency_s` of each request. `cpu_s` by process, of all requests together."""

    texts: int
    seconds: float
    latency_s: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)


class Bare:
    """The model itself, in this process."""

    def __init__(self, source: str, context_length: int, dtype: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(source, model_kwargs={"dtype": getattr(torch, dtype)})
        self.model.max_seq_length = min(context_length, self.model.max_seq_length or context_length)

    def words(self) -> list[str]:
        """Words that the model knows whole."""
        vocabulary = self.model.tokenizer.get_vocab()
        return sorted(word for word in vocabulary if word.isascii() and word.isalpha() and 3 <= len(word) <= 8)[:8000]

    def tokens(self, texts: list[str]) -> int:
        return sum(len(ids) for ids in self.model.tokenizer(texts, truncation=True)["input_ids"])

    def one_big(self, texts: list[str], _parallel: int) -> Turn:
        started = time.perf_counter()
        self.model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return Turn(len(texts), time.perf_counter() - started)

    def each(self, texts: list[str], _parallel: int) -> Turn:
        turn = Turn(len(texts), 0)
        for text in texts:
            started = time.perf_counter()
            self.model.encode(text, normalize_embeddings=True, show_progress_bar=False)
            turn.latency_s.append(time.perf_counter() - started)
        turn.seconds = sum(turn.latency_s)
        return turn


class OverHttp:
    """A server with OpenAI's `/embeddings`, asked for one text a request."""

    def __init__(self, url: str, headers: dict[str, str], processes: Callable[[], dict[str, list[Any]]]) -> None:
        self._url = url
        self._headers = headers
        self._processes = processes

    async def __call__(self, texts: list[str], parallel: int) -> Turn:
        processes = {"client": [psutil.Process()], **self._processes()}
        before = {kind: cpu_seconds(of) for kind, of in processes.items()}
        turn = Turn(len(texts), 0)
        left = iter(texts)
        async with self._session(parallel) as client:
            started = time.perf_counter()
            await asyncio.gather(*(self._ask(client, left, turn.latency_s) for _ in range(parallel)))
            turn.seconds = time.perf_counter() - started
        turn.cpu_s = {kind: cpu_seconds(of) - before[kind] for kind, of in processes.items()}
        return turn

    async def check(self, bare: Bare, texts: list[str]) -> None:
        """Raise RuntimeError where a vector is not the model's."""
        async with self._session(1) as client:
            for text in texts:
                theirs = await self._vector(client, text)
                ours = bare.model.encode(text, normalize_embeddings=True, show_progress_bar=False)
                cosine = sum(float(a) * b for a, b in zip(ours, theirs, strict=True))
                if cosine < LEAST_COSINE:
                    raise RuntimeError(f"{self._url}: a vector has a cosine of {cosine:.5f} to the model's own")

    def _session(self, parallel: int) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(headers=self._headers, connector=aiohttp.TCPConnector(limit=parallel))

    async def _ask(self, client: aiohttp.ClientSession, left: Iterator[str], latency_s: list[float]) -> None:
        for text in left:
            started = time.perf_counter()
            await self._vector(client, text)
            latency_s.append(time.perf_counter() - started)

    async def _vector(self, client: aiohttp.ClientSession, text: str) -> list[float]:
        async with client.post(self._url, json={"model": MODEL, "input": text}) as response:
            body = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{self._url}: {response.status} {body[:300]!r}")
        vector: list[float] = orjson.loads(body)["data"][0]["embedding"]
        return vector


@contextlib.asynccontextmanager
async def infinity(python: Path, source: str) -> AsyncIterator[OverHttp]:
    """Infinity, in float32, which it is asked for by name: its own choice is half precision."""
    port = free_port()
    argv = ["v2", "--model-id", source, "--served-model-name", MODEL, "--engine", "torch", "--port", str(port)]
    argv += ["--dtype", "float32", "--no-bettertransformer", "--host", "127.0.0.1", "--log-level", "error"]
    private = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    command = [str(python.absolute().parent / "infinity_emb"), *argv]
    url = f"http://127.0.0.1:{port}"
    async with other_server(command, f"{url}/health", **private) as process:
        yield OverHttp(f"{url}/embeddings", {}, lambda: {"infinity": [process]})


@contextlib.asynccontextmanager
async def this_service(source: str, context_length: int, dtype: str) -> AsyncIterator[OverHttp]:
    """This service with nothing but the embedding model."""
    entry = {"id": MODEL, "name": "Embedding", "type": "embedding", "source": source, "dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        models_file = Path(folder) / "models.yaml"
        models_file.write_text(yaml.safe_dump({"models": [entry | {"context_length": context_length}]}))
        async with service(models_file) as running:
            yield OverHttp(f"{running.url}/v1/embeddings", running.headers, running.processes)
