"""Weights are data. A pickle is a program, and none that comes with a model is run."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from server.core.registry import ModelSpec
from tests.models.tiny_embedding import build


class Program:
    """What a hostile checkpoint holds: unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """There once a program of a checkpoint has run."""
    path = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Program(path)))
    assert path.exists()  # so it would be seen
    path.unlink()
    return path


@pytest.fixture
def folder(tmp_path: Path, mark: Path) -> Path:
    """A model whose only weights are a pickle, under all of the names that libraries look for."""
    made = build(tmp_path / "model")
    (made / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.bin", "model.pt", "consolidated.00.pth"):
        (made / name).write_bytes(pickle.dumps(Program(mark), protocol=2))
    return made


@pytest.mark.parametrize("pooling", [None, "lasttoken"])
def test_an_embedding_model_with_pickled_weights_is_not_loaded(folder: Path, mark: Path, pooling: str | None) -> None:
    from workers.embedder import Embedder

    entry = {"id": "m", "name": "M", "type": "embedding", "source": str(folder), "context_length": 256}
    spec = ModelSpec.model_validate(entry | {"pooling": pooling})
    with pytest.raises(OSError, match="safetensors"):
        Embedder(spec)
    assert not mark.exists()


def test_nor_is_a_layer_of_one(tmp_path: Path, mark: Path) -> None:
    # Given a model with good weights, and a further layer whose weights are a pickle
    folder = build(tmp_path / "model")
    modules = (folder / "modules.json").read_text().replace("models.Normalize", "models.Dense")
    (folder / "modules.json").write_text(modules)
    (folder / "2_Normalize").mkdir()
    config = {"in_features": 128, "out_features": 8, "activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "2_Normalize" / "config.json").write_text(json.dumps(config))
    (folder / "2_Normalize" / "pytorch_model.bin").write_bytes(pickle.dumps(Program(mark), protocol=2))
    from workers.embedder import Embedder

    entry = {"id": "m", "name": "M", "type": "embedding", "source": str(folder), "context_length": 256}
    with pytest.raises(pickle.UnpicklingError):
        Embedder(ModelSpec.model_validate(entry))
    assert not mark.exists()


def test_nor_is_code_that_comes_with_one(tmp_path: Path, mark: Path) -> None:
    # Given a model that names a module of its own
    folder = build(tmp_path / "model")
    modules = (folder / "modules.json").read_text().replace("sentence_transformers.models.Normalize", "theirs.Layer")
    (folder / "modules.json").write_text(modules)
    (folder / "theirs.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Layer: ...\n")
    shutil.copy(folder / "theirs.py", folder / "modeling.py")
    from workers.embedder import Embedder

    entry = {"id": "m", "name": "M", "type": "embedding", "source": str(folder), "context_length": 256}
    with pytest.raises(ValueError, match="third-party code"):
        Embedder(ModelSpec.model_validate(entry))
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on the way to vLLM
def test_the_engine_looks_for_no_pickle(folder: Path, mark: Path) -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from workers.engine import DEFAULTS

    loader = DefaultModelLoader(LoadConfig(load_format=DEFAULTS["load_format"]))
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        loader._prepare_weights(str(folder), None, None, True, None)
    assert not mark.exists()
