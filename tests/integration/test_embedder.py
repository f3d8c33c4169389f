"""The embedding worker's model, with real weights and with the form that Qwen3-Embedding has."""

from pathlib import Path

import numpy as np
import pytest

from server.core.registry import ModelSpec
from tests.models.tiny_embedding import build
from workers.embedding import Embedder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


def spec(source: Path, **fields: object) -> ModelSpec:
    entry = {"id": "tiny", "name": "Tiny", "type": "embedding", "source": str(source), "context_length": 64}
    return ModelSpec.model_validate(entry | fields)


def test_last_token_pooling_with_the_models_own_prompt(tiny: Path) -> None:
    # Given the tiny model in Qwen3-Embedding's form: last-token pooling, a prompt for queries
    embedder = Embedder(spec(tiny))
    # When texts of different lengths are embedded together and alone
    texts, lengths = embedder.prepare(["one", "two words", "three whole words"], "document")
    together = embedder.encode(texts)
    # Then padding changes nothing, the vectors have length 1, and each token is counted
    alone = np.concatenate([embedder.encode([text]) for text in texts])
    assert together.dtype == np.float32
    assert together.shape == (3, 128)
    assert np.allclose(np.sum(together * alone, axis=1), 1, atol=1e-5)
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[2]
    # And a query is embedded after the model's prompt
    asked, longer = embedder.prepare(["one"], "query")
    assert asked == ["Instruct: find it\nQuery:one"]
    assert longer[0] > lengths[0]


def test_models_yaml_overrides_prompt_dimensions_and_pooling(tiny: Path) -> None:
    full = Embedder(spec(tiny))
    cut = Embedder(spec(tiny, dimensions=32, query_prompt="Q: "))
    assert cut.prepare(["one"], "query")[0] == ["Q: one"]
    # Fewer dimensions are the first ones, made length 1 again
    vector, short = full.encode(["one"])[0], cut.encode(["one"])[0]
    assert short.shape == (32,)
    assert np.allclose(short, vector[:32] / np.linalg.norm(vector[:32]), atol=1e-5)
    # Mean pooling gives another vector than the last token's
    mean = Embedder(spec(tiny, pooling="mean")).encode(["three whole words"])[0]
    assert np.isclose(np.linalg.norm(mean), 1, atol=1e-5)
    assert abs(float(mean @ full.encode(["three whole words"])[0])) < 0.999
