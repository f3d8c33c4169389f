"""Where weights are looked for, and the smoke profile where there are none. No hub is asked: fakes answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from server import sources
from server.core.errors import UnknownModel
from server.core.registry import ModelSpec, Registry, load_registry
from server.core.settings import BadSettings
from server.sources import Sources, explain, locate, locate_all, write_smoke_profile
from tests.unit.conftest import WriteModels


def chat(id_: str, **given: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {"id": id_, "name": id_, "type": "chat", "source": f"someone/{id_}", "context_length": 100, **given}
    )


def embedding(id_: str, **given: object) -> ModelSpec:
    return chat(id_, **{"type": "embedding", **given})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A local folder with a model in it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub may not be asked for anything, nor its cache."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(sources, "snapshot_download", asked)
    monkeypatch.setattr(sources, "HfApi", asked)


@pytest.mark.usefixtures("no_hub")
def test_a_local_folder_with_a_model_is_local(weights: Path) -> None:
    assert locate(chat("mine", source=str(weights))) == "local"


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_model_is_told(tmp_path: Path, exists: bool) -> None:
    # Given a folder that is empty, or not there
    folder = tmp_path / "empty"
    if exists:
        folder.mkdir()
    # When the model is looked for, then the message names model, folder and what is missing
    with pytest.raises(BadSettings) as wrong:
        locate(chat("mine", source=str(folder)))
    assert wrong.value.message == f"model 'mine': source: no model in {folder} (no config.json there)"


@pytest.mark.usefixtures("no_hub")
def test_a_folder_named_in_models_yaml_is_found_from_anywhere(
    weights: Path, write_models: WriteModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a models.yaml that names a folder next to it
    text = yaml.safe_dump({"models": [chat("mine", source=f"./{weights.name}").model_dump(exclude_defaults=True)]})
    path = write_models(text)
    # When the service is started somewhere else
    monkeypatch.chdir("/")
    # Then the folder is found
    assert locate(load_registry(path).models[0]) == "local"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], list[tuple[str, Any]]]:
    """Makes a hub that answers with this error, or has every model (None); nothing is cached. Returns what is asked."""

    def make(answer: Exception | None) -> list[tuple[str, Any]]:
        asked: list[tuple[str, Any]] = []

        class FakeHub:
            def model_info(self, source: str, *, revision: str | None, timeout: float) -> None:
                assert timeout > 0
                asked.append((source, revision))
                if answer is not None:
                    raise answer

        def not_cached(source: str, *, revision: str | None, local_files_only: bool) -> str:
            assert local_files_only
            raise LocalEntryNotFoundError("not cached")

        monkeypatch.setattr(sources, "HfApi", FakeHub)
        monkeypatch.setattr(sources, "snapshot_download", not_cached)
        return asked

    return make


def status(code: int) -> HfHubHTTPError:
    return HfHubHTTPError("no", response=httpx2.Response(code, request=httpx2.Request("GET", "https://hub.test")))


Hub = Callable[[Exception | None], list[tuple[str, Any]]]


def test_what_only_the_hub_has_is_there(hub: Hub) -> None:
    asked = hub(None)
    assert locate(chat("big", revision="v2")) == "hub"
    assert asked == [("someone/big", "v2")]


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.ConnectError("no route"),
        httpx2.ReadTimeout("slow"),
        OfflineModeIsEnabled("offline"),
        OSError("dns"),
        status(500),
        status(503),
        status(429),
    ],
    ids=repr,
)
def test_a_hub_that_does_not_answer_means_missing(hub: Hub, answer: Exception) -> None:
    hub(answer)
    assert locate(chat("big")) == "missing"


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_hub_that_says_no_is_a_wrong_setting(hub: Hub, code: int) -> None:
    # Given a hub that answers that there is no such model, then a stand-in would hide a typing error
    hub(status(code))
    with pytest.raises(BadSettings, match=r"model 'big': source: the hub gives no 'someone/big': .*HF_TOKEN"):
        locate(chat("big"))


@pytest.mark.parametrize(
    ("files", "where"),
    [
        (["config.json", "model.safetensors"], "cached"),
        (["config.json", "model-00001-of-00002.safetensors"], "cached"),
        # A download that was cut short, or that an earlier program made for the tokenizer alone
        (["config.json", "tokenizer.json"], "missing"),
        (["model.safetensors"], "missing"),
    ],
)
def test_a_cache_counts_when_it_has_weights(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], where: str
) -> None:
    # Given a cached folder, and a hub that cannot be reached
    asked = hub(OSError("dns"))
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: str(tmp_path))
    # Then it counts if config and weights are in it, and then nobody is asked
    assert locate(chat("big")) == where
    assert bool(asked) == (where == "missing")


def test_each_model_is_located(hub: Hub, weights: Path) -> None:
    hub(OSError("dns"))
    located = locate_all(Registry((chat("mine", source=str(weights)), chat("big"), embedding("vectors"))))
    assert located == Sources({"mine": "local", "big": "missing", "vectors": "missing"})
    assert located.missing == ["big", "vectors"]


def test_the_explanation_says_what_is_missing_and_what_to_do() -> None:
    text = explain(["big", "vectors"])
    assert text.startswith("The weights of big and vectors are neither on this machine")
    assert "models.yaml" in text
    assert "HF_HOME" in text
    assert constants.HF_HOME in text
    assert max(map(len, text.splitlines())) <= 120


def profile(registry: Registry, missing: list[str], tmp_path: Path) -> tuple[Registry, Registry]:
    """The registry with its stand-ins, as it is returned and as the workers read it."""
    out = tmp_path / "data" / "models.smoke.yaml"
    smoke = out.parent / "smoke" / "abc"
    smoke.mkdir(parents=True)
    (smoke / "config.json").write_text('{"max_position_embeddings": 1234}')
    made = write_smoke_profile(registry, missing, smoke, out)
    return made, load_registry(out)


def test_the_profile_the_workers_read_is_the_one_up_uses(tmp_path: Path) -> None:
    # Given all kinds of models, with texts that YAML could take for something else
    registry = Registry(
        (
            chat("big", default=True, description="ünïcödé: yes, 日本 #1"),
            chat("mine", source="/weights/mine", engine={"dtype": "half", "max_num_seqs": 4}, revision="1.0"),
            embedding("vectors", default=True, dimensions=64, query_prompt="query: ", pooling="lasttoken", name="123"),
        )
    )
    # When the profile is written for one that is missing
    made, read = profile(registry, ["big"], tmp_path)
    # Then both are the same, and what is not missing is as it was
    assert read == made
    assert [m.id for m in read.models] == ["mine", "vectors", "qwen3-smoke"]
    assert read.models[:2] == registry.models[1:]


def test_stand_ins_answer_for_what_is_missing(tmp_path: Path) -> None:
    # Given two chat models and an embedding model without weights
    registry = Registry((chat("big", default=True), chat("bigger"), embedding("vectors", default=True)))
    # When the profile is made
    _, read = profile(registry, ["big", "bigger", "vectors"], tmp_path)
    # Then one stand-in a type answers for each of them, and by default
    for name in ("big", "bigger", "qwen3-smoke", None):
        assert read.resolve(name, "chat").id == "qwen3-smoke"
    for name in ("vectors", "minilm-smoke", None):
        assert read.resolve(name, "embedding").id == "minilm-smoke"
    with pytest.raises(UnknownModel):
        read.resolve("big", "embedding")
    # And each says so to whoever reads its description
    assert read.resolve("big", "chat").description.startswith("Stand-in for big, bigger, whose weights are missing: ")
    assert read.resolve("vectors", "embedding").stand_in_for == ("vectors",)
    # And they have weights, and room for as much as these can
    assert read.resolve("big", "chat").source == str(tmp_path / "data" / "smoke" / "abc")
    assert read.resolve("big", "chat").context_length == 1234
    assert locate(read.resolve("vectors", "embedding")) == "local"


def test_the_chat_stand_in_thinks_and_calls_tools(tmp_path: Path) -> None:
    _, read = profile(Registry((chat("big"),)), ["big"], tmp_path)
    engine = read.models[0].engine
    assert (engine["reasoning_parser"], engine["tool_call_parser"]) == ("qwen3", "hermes")
    assert engine["enable_auto_tool_choice"] is True


def test_what_has_weights_stays_the_default(tmp_path: Path) -> None:
    # Given a default that has weights, and another model that has none
    registry = Registry((chat("mine", default=True, source="/weights/mine"), chat("big")))
    _, read = profile(registry, ["big"], tmp_path)
    assert read.resolve(None, "chat").id == "mine"
    assert read.resolve("big", "chat").id == "qwen3-smoke"


def test_a_missing_default_is_stood_in_for_though_others_have_weights(tmp_path: Path) -> None:
    registry = Registry((chat("big", default=True), chat("mine", source="/weights/mine")))
    _, read = profile(registry, ["big"], tmp_path)
    assert read.resolve(None, "chat").id == "qwen3-smoke"
    assert read.resolve("mine", "chat").id == "mine"


def test_no_stand_in_is_made_where_none_is_needed(tmp_path: Path) -> None:
    registry = Registry((chat("mine", source="/weights/mine"), embedding("vectors")))
    _, read = profile(registry, ["vectors"], tmp_path)
    assert [m.id for m in read.models] == ["mine", "minilm-smoke"]
