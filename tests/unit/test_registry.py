"""models.yaml: what loads, what is refused with which line, and which model answers for a name."""

import re
from pathlib import Path

import pytest

from server.core.errors import InvalidRequest, UnknownModel
from server.core.registry import ModelSpec, Registry, line_of_option, load_registry
from server.core.settings import BadSettings
from tests.unit.conftest import WriteModels

PROJECT = Path(__file__).parents[2]

TWO_MODELS = """\
models:
  - id: talker
    name: Talker
    type: chat
    source: someone/talker
    context_length: 4096
    default: true

  - id: vectors
    name: Vectors
    type: embedding
    source: someone/vectors
    context_length: 512
    default: true
"""
"""Line 2 starts the first entry, line 9 the second."""


def chat(id_: str, **given: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {"id": id_, "name": id_, "type": "chat", "source": f"someone/{id_}", "context_length": 100, **given}
    )


def embedding(id_: str, **given: object) -> ModelSpec:
    return chat(id_, **{"type": "embedding", **given})


def test_the_projects_own_file_loads() -> None:
    # When the models.yaml that is delivered is loaded
    registry = load_registry(PROJECT / "models.yaml")
    # Then the enabled models are there in the file's order, and the disabled one is not
    assert [(m.id, m.type) for m in registry.models] == [
        ("qwen3-0.6b", "chat"),
        ("qwen3-embedding-0.6b", "embedding"),
    ]
    # And each type has its default
    assert registry.resolve(None, "chat").source == "Qwen/Qwen3-0.6B"
    assert registry.resolve(None, "embedding").source == "Qwen/Qwen3-Embedding-0.6B"
    assert registry.resolve(None, "embedding").dimensions == 1024
    # And the chat model's reasoning and tool calls are parsed, on a part of a GPU
    assert registry.models[0].engine == {
        "gpu_memory_utilization": 0.7,
        "max_num_seqs": 64,
        "reasoning_parser": "qwen3",
        "tool_call_parser": "hermes",
        "enable_auto_tool_choice": True,
    }
    with pytest.raises(UnknownModel):
        registry.resolve("qwen3-1.5b", "chat")


def test_enabling_a_disabled_model_is_all_it_takes(write_models: WriteModels) -> None:
    # Given the project's own file with its disabled model switched on
    text = (PROJECT / "models.yaml").read_text().replace("enabled: false", "enabled: true")
    # When it is loaded
    registry = load_registry(write_models(text))
    # Then the model answers for its id, and is no default
    assert registry.resolve("qwen3-1.5b", "chat").source == "Qwen/Qwen3-1.7B"
    assert registry.resolve(None, "chat").id == "qwen3-0.6b"


BAD_FILES = {
    "unknown key": (
        TWO_MODELS.replace("name: Vectors", "name: Vectors\n    sauce: someone/vectors"),
        11,
        "models.1.sauce: unknown key",
    ),
    "unknown key beside models": (TWO_MODELS + "\nmodel: x\n", 16, "model: unknown key"),
    "missing field": (TWO_MODELS.replace("    type: embedding\n", ""), 9, "models.1.type: Field required"),
    "duplicate id": (TWO_MODELS.replace("id: vectors", "id: talker"), 9, "id 'talker' is taken already by line 2"),
    "two defaults of one type": (
        TWO_MODELS.replace("type: embedding", "type: chat"),
        14,
        "a second default of type 'chat'; the first is on line 7",
    ),
    "wrong type": (
        TWO_MODELS.replace("context_length: 512", "context_length: long"),
        13,
        "models.1.context_length: should be a valid integer",
    ),
    "out of range": (
        TWO_MODELS.replace("context_length: 4096", "context_length: 0"),
        6,
        "models.0.context_length: should be greater than 0",
    ),
    "no such type": (
        TWO_MODELS.replace("type: chat", "type: vision"),
        4,
        "models.0.type: should be 'chat' or 'embedding'",
    ),
    "bad id": (TWO_MODELS.replace("id: vectors", "id: my vectors"), 9, "models.1.id: String should match pattern"),
    "engine on an embedding model": (
        TWO_MODELS + "    engine:\n      dtype: half\n",
        15,
        "engine: is not for embedding models, as 'vectors' is",
    ),
    "pooling on a chat model": (
        TWO_MODELS.replace("    type: chat\n", "    type: chat\n    pooling: mean\n"),
        5,
        "pooling: is not for chat models, as 'talker' is",
    ),
    "dtype on a chat model": (
        TWO_MODELS.replace("    type: chat\n", "    type: chat\n    dtype: auto\n"),
        5,
        "dtype: is not for chat models, as 'talker' is",
    ),
    "no such dtype": (
        TWO_MODELS + "    dtype: float8\n",
        15,
        "models.1.dtype: should be 'auto', 'float32' or 'bfloat16'",
    ),
    "no such pooling": (TWO_MODELS + "    pooling: most\n", 15, "models.1.pooling: should be 'mean'"),
    "entry that is no mapping": (TWO_MODELS + "  - talker\n", 15, "models.2: should be a valid dictionary"),
    "no models": ("# none yet\nmodels: []\n", 2, "models: List should have at least 1 item"),
    "no key models": ("# nothing\n{}\n", 1, "models: Field required"),
    "a mistyped key that is missing as well": ("# nothing\nmodel: []\n", 2, "model: unknown key"),
    "empty": ("", 1, "should be a valid dictionary"),
    "not YAML": (TWO_MODELS.replace("type: embedding", "type: [embedding"), 12, "not valid YAML: "),
    "tabs": (TWO_MODELS.replace("    name: Vectors", "\tname: Vectors"), 10, "not valid YAML: "),
    "two documents": (TWO_MODELS + "---\nmodels: []\n", 15, "not valid YAML: "),
    "a tag that would run code": ("models: !!python/object/apply:os.getpid []\n", 1, "not valid YAML: "),
}


@pytest.mark.parametrize(("text", "line", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_mistake_is_told_with_its_line(write_models: WriteModels, text: str, line: int, message: str) -> None:
    # Given a models.yaml with one mistake
    path = write_models(text)
    # When it is loaded, then the message starts with the place and says what is wrong there
    with pytest.raises(BadSettings, match=f"^{re.escape(str(path))}:{line}: .*{re.escape(message)}"):
        load_registry(path)


def test_a_missing_file_is_told_with_how_to_name_another(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(BadSettings, match=f"^{re.escape(str(path))}: cannot be read .*--models or MODELS_FILE"):
        load_registry(path)


@pytest.mark.parametrize(
    "content",
    [TWO_MODELS.replace("Talker", "Caf\xe9").encode("latin-1"), TWO_MODELS.replace("Talker", '"\x01"').encode()],
    ids=["not UTF-8", "a control character"],
)
def test_a_file_that_is_no_text_is_told_as_such(tmp_path: Path, content: bytes) -> None:
    # Given a file whose bytes no YAML has
    path = tmp_path / "models.yaml"
    path.write_bytes(content)
    # When it is loaded, then the person is told the file, and sees no traceback
    with pytest.raises(BadSettings, match=f"^{re.escape(str(path))}:"):
        load_registry(path)


def test_a_disabled_default_leaves_the_place_to_another(write_models: WriteModels) -> None:
    # Given two defaults of one type, one of them disabled
    text = TWO_MODELS.replace("type: embedding", "type: chat") + "    enabled: false\n"
    # When the file is loaded
    registry = load_registry(write_models(text))
    # Then the enabled one is the default
    assert registry.resolve(None, "chat").id == "talker"


def test_a_disabled_models_id_stays_taken(write_models: WriteModels) -> None:
    # Given two entries of one id, of which one is disabled: enabling it must not come as a surprise
    text = TWO_MODELS.replace("id: vectors", "id: talker") + "    enabled: false\n"
    with pytest.raises(BadSettings, match=r":9: id 'talker' is taken already by line 2"):
        load_registry(write_models(text))


@pytest.mark.parametrize("source", ["./weights/talker", "../talker", "weights/../../talker"])
def test_only_what_looks_like_a_folder_is_anchored(write_models: WriteModels, tmp_path: Path, source: str) -> None:
    # Given a source in models.yaml
    path = write_models(TWO_MODELS.replace("someone/talker", source))
    # When it is loaded
    loaded = load_registry(path).models[0].source
    # Then a relative folder starts at the file's folder, wherever the process was started
    if source.startswith("."):
        assert loaded == str((tmp_path / source).resolve())
    else:
        assert loaded == source


def test_full_paths_and_home_are_kept(write_models: WriteModels, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a full path, and one in the person's home
    monkeypatch.setenv("HOME", "/home/ada")
    text = TWO_MODELS.replace("someone/talker", "/models/talker").replace("someone/vectors", "~/vectors")
    # When the file is loaded
    registry = load_registry(write_models(text))
    # Then both are full paths
    assert [m.source for m in registry.models] == ["/models/talker", "/home/ada/vectors"]


def test_a_home_that_nobody_has_is_told_with_its_line(write_models: WriteModels) -> None:
    # Given a good folder in the person's home, and a slip of the pen: ~models instead of ~/models
    text = TWO_MODELS.replace("someone/talker", "~/talker").replace("someone/vectors", "~no-such-user/vectors")
    path = write_models(text)
    # When it is loaded, then the slip's line is told, and nobody sees a traceback
    with pytest.raises(BadSettings, match=f"^{re.escape(str(path))}:12: source: "):
        load_registry(path)


def test_an_engine_option_is_found_again_by_its_line(write_models: WriteModels) -> None:
    # Given an option that only the engine can judge
    path = write_models(
        TWO_MODELS.replace("    default: true\n\n", "    engine:\n      dtype: half\n      speed: 9\n\n")
    )
    # Then whoever finds it wrong can say where it stands
    assert line_of_option(path, "talker", "dtype") == 8
    assert line_of_option(path, "talker", "speed") == 9
    # And for one that stands nowhere, where the options begin
    assert line_of_option(path, "talker", "warp") == 7


@pytest.mark.parametrize(
    "change", [{"source": "other/model"}, {"revision": "v2"}, {"dimensions": 64}, {"pooling": "cls"}, {"id": "other"}]
)
def test_vectors_made_otherwise_are_of_another_space(change: dict[str, object]) -> None:
    # Given a model, then any change of what makes its vectors makes them incomparable to those before
    assert embedding("vectors", **change).vector_space != embedding("vectors").vector_space


@pytest.mark.parametrize(
    "change", [{"name": "New"}, {"description": "New"}, {"default": True}, {"query_prompt": "q"}, {"dtype": "bfloat16"}]
)
def test_what_makes_no_vectors_keeps_their_space(change: dict[str, object]) -> None:
    # What is put before a query is no part of the chats' own vectors
    assert embedding("vectors", **change).vector_space == embedding("vectors").vector_space


def test_a_type_without_a_default_falls_to_its_first_model() -> None:
    registry = Registry((chat("first"), chat("second"), embedding("third")))
    assert registry.resolve(None, "chat").id == "first"
    assert registry.resolve(None, "embedding").id == "third"


def test_a_default_wins_over_the_first() -> None:
    registry = Registry((chat("first"), chat("second", default=True)))
    assert registry.resolve(None, "chat").id == "second"


def test_no_model_of_a_type_means_no_default() -> None:
    registry = Registry((chat("first"),))
    assert registry.default("embedding") is None
    with pytest.raises(UnknownModel, match="No embedding model is served here"):
        registry.resolve(None, "embedding")


def test_a_stand_in_answers_for_the_missing_and_for_itself() -> None:
    # Given a stand-in for two models
    registry = Registry((chat("smoke", stand_in_for=("big", "bigger"), default=True), chat("real")))
    # When each name is asked for, then the stand-in answers
    assert [registry.resolve(name, "chat").id for name in ("big", "bigger", "smoke")] == ["smoke"] * 3
    # And whoever has weights answers for himself
    assert registry.resolve("real", "chat").id == "real"


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    registry = Registry((chat("beta"), chat("alpha"), embedding("vectors")))
    with pytest.raises(UnknownModel) as refused:
        registry.resolve("gpt-9", "chat")
    assert refused.value.message == "Invalid model specified: 'gpt-9' is not served. Known: alpha, beta."
    assert refused.value.param == "model"
    assert isinstance(refused.value, InvalidRequest)


@pytest.mark.parametrize("name", ["vectors", "lost"])
def test_a_model_of_the_other_type_is_refused(name: str) -> None:
    # Given an embedding model that also stands in for another
    registry = Registry((chat("talker"), embedding("vectors", stand_in_for=("lost",))))
    # When either name is asked to chat, then the answer says what it is for
    with pytest.raises(UnknownModel, match=f"'{name}' is for embedding, not for chat. Known: talker"):
        registry.resolve(name, "chat")


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("trust_remote_code: true", "it runs what comes with the weights"),
        ("trust-remote-code: true", "it runs what comes with the weights"),
        ("load_format: auto", "others may be pickles"),
        ("load_format: pt", "others may be pickles"),
        ("load_format: [pt]", "others may be pickles"),
        ("load-format: npcache", "others may be pickles"),
    ],
)
def test_no_entry_lets_weights_be_programs(write_models: WriteModels, option: str, why: str) -> None:
    path = write_models(
        "models:\n- {id: a, name: A, type: chat, source: a/b, context_length: 9,\n   engine: {" + option + "}}\n"
    )
    with pytest.raises(BadSettings, match=f"models.yaml:3: models.0.engine: .*{why}"):
        load_registry(path)
