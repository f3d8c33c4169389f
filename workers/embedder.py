"""A loaded embedding model: texts to tokens, tokens to vectors. The only module that knows sentence-transformers.

Tokenising and computing are apart, so that a text is tokenised once, and while another batch computes.
"""

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.core.registry import ModelSpec
from workers.batching import Budget, Text
from workers.precision import faster

MAX_STREAMS = 4
"""Batches computed at once on a CPU, a share of the cores each: they never wait for each other, as threads do."""
TOKENS_PER_THREAD = 8
"""Fewer than so many for each are not worth another thread."""
TRIAL = (8, 32)
"""Texts, and words of each, that number formats are compared on."""


class Embedder:
    """Raises whatever the library does where the model cannot be loaded."""

    def __init__(self, spec: ModelSpec) -> None:
        self._model = _load(spec)
        own_limit = self._model.max_seq_length
        self.max_tokens = min(spec.context_length, own_limit or spec.context_length)
        self._model.max_seq_length = self.max_tokens
        query_prompt = spec.query_prompt
        if query_prompt is None:
            query_prompt = self._model.prompts.get("query") or ""
        self._prompts = {"query": query_prompt, "document": self._model.prompts.get("document") or ""}
        tokenizer = self._model.tokenizer
        self._pad_left = tokenizer.padding_side == "left"
        self._pads = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
        # Pooling that leaves the prompt out takes one length of it for a whole batch.
        self._pools_prompt = all(getattr(module, "include_prompt", True) for module in self._model)
        self._cores = len(os.sched_getaffinity(0))
        on_cpu = self._model.device.type == "cpu"
        self.streams = min(MAX_STREAMS, self._cores) if on_cpu else 2  # one is padded and sent while one computes
        if spec.dtype == "bfloat16":
            self._model = self._model.to(torch.bfloat16)
        elif spec.dtype == "auto":
            trial = self.tokenise([" ".join(["word"] * TRIAL[1])] * TRIAL[0], "document", truncate=True)
            self._model = faster(self._model, lambda model: self._forward(model, trial))
        self.dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")

    @property
    def budget(self) -> Budget:
        """What goes into a batch: on a CPU little, since it gains nothing from more and others wait meanwhile."""
        if self._model.device.type == "cpu":
            return Budget(most=2048, least=512, padding=64, streams=self.streams)
        return Budget(most=16384, least=16384, padding=1024, streams=self.streams)

    def tokenise(self, given: list[str | list[int]], input_type: str, *, truncate: bool) -> list[Text]:
        """The texts as the model takes them for `query` or `document`; with `truncate` none is over `max_tokens`.

        What is given as token ids is read as the model's own tokenizer reads them. Raises IndexError with the
        position of a list that has an id which is no token. Not to be called twice at once.
        """
        texts = [self._text(index, one) for index, one in enumerate(given)]
        prompt = self._prompts[input_type]
        tokenised = self._tokenise(texts, prompt, truncation=False)
        if truncate:
            for index, text in enumerate(tokenised):
                if text.length > self.max_tokens:
                    tokenised[index] = self._tokenise([texts[index]], prompt, truncation=True)[0]
        return tokenised

    def _text(self, index: int, given: str | list[int]) -> str:
        if isinstance(given, str):
            return given
        if max(given) >= len(self._model.tokenizer):
            raise IndexError(index)
        return str(self._model.tokenizer.decode(given, skip_special_tokens=True))

    def _tokenise(self, texts: list[str], prompt: str, *, truncation: bool) -> list[Text]:
        features = self._model.preprocess(
            texts,
            prompt=prompt,
            processing_kwargs={
                "text": {"padding": False, "truncation": truncation},
                "common": {"return_tensors": None},
            },
        )
        prompt_length = features.pop("prompt_length", "")
        kind = "" if self._pools_prompt else str(prompt_length)
        modality = features.pop("modality", "text")
        names = list(features)
        return [
            Text(dict(zip(names, rows, strict=True)), len(rows[0]), f"{modality}:{kind}")
            for rows in zip(*features.values(), strict=True)
        ]

    def encode(self, texts: list[Text], alone: bool = True) -> NDArray[np.float32]:
        """float32 (n_texts, dimensions), L2-normalised, also where `dimensions` cuts the model's own.

        `alone` may take all cores, otherwise it takes its stream's share. To be called from several threads at once.
        """
        tokens = len(texts) * max(text.length for text in texts)
        share = self._cores if alone else self._cores // self.streams
        # Threads wait for the slowest of them after each of some hundred steps; short work is over before it pays.
        torch.set_num_threads(max(1, min(share, tokens // TOKENS_PER_THREAD)))  # of the calling thread
        return self._forward(self._model, texts)

    def _forward(self, model: Any, texts: list[Text]) -> NDArray[np.float32]:
        modality, _, prompt_length = texts[0].kind.partition(":")
        features: dict[str, Any] = self._pad(texts)
        features = {name: torch.from_numpy(rows).to(model.device) for name, rows in features.items()}
        features["modality"] = modality
        if prompt_length:
            features["prompt_length"] = int(prompt_length)
        with torch.inference_mode():
            vectors = model(features)["sentence_embedding"].float()
            if model.truncate_dim is not None:
                vectors = vectors[:, : model.truncate_dim]
            normalised = torch.nn.functional.normalize(vectors, p=2, dim=1)
        result: NDArray[np.float32] = normalised.cpu().numpy().astype("<f4", copy=False)
        return result

    def _pad(self, texts: list[Text]) -> dict[str, NDArray[np.int64]]:
        """Each of the model's inputs, int64 (n_texts, tokens of the longest)."""
        longest = max(text.length for text in texts)
        padded = {}
        for name in texts[0].fields:
            rows = np.full((len(texts), longest), self._pads.get(name, 0), dtype=np.int64)
            for row, text in zip(rows, texts, strict=True):
                row[slice(longest - text.length, None) if self._pad_left else slice(text.length)] = text.fields[name]
            padded[name] = rows
        return padded


def _load(spec: ModelSpec) -> Any:
    """The model in float32, whatever format its files have."""
    # Pickled weights are programs: the model's are refused, and what its other parts bring is read as data.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    from sentence_transformers import SentenceTransformer

    options: dict[str, Any] = {"revision": spec.revision, "truncate_dim": spec.dimensions}
    dtype = {"dtype": torch.float32, "use_safetensors": True}
    if spec.pooling is None:
        return SentenceTransformer(spec.source, model_kwargs=dtype, **options).eval()
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    at = {"revision": spec.revision}
    transformer = Transformer(spec.source, model_kwargs=at | dtype, config_kwargs=at, processor_kwargs=at)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=spec.pooling)
    return SentenceTransformer(modules=[transformer, pooling], **options).eval()
