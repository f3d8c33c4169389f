"""Names of models: what a suffix switches on, and which names there are not."""

import pytest

from server.core.errors import UnknownModel
from server.core.registry import Registry
from server.variants import SUFFIXES, Variant, names, resolve
from tests.unit.fake_requests import REGISTRY, SEER, TALKER, VECTORS, spec


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        (None, Variant(TALKER)),
        ("talker", Variant(TALKER, "talker")),
        ("seer", Variant(SEER, "seer")),
        ("talker-thinking", Variant(TALKER, "talker", thinking=True)),
        ("talker-search", Variant(TALKER, "talker", search=True)),
        ("talker-thinking-search", Variant(TALKER, "talker", thinking=True, search=True)),
        ("seer-thinking", Variant(SEER, "seer", thinking=True)),
    ],
)
def test_a_name_says_which_model_and_what_is_switched_on(name: str | None, variant: Variant) -> None:
    assert resolve(REGISTRY, name) == variant


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nobody",
        "nobody-thinking",
        "-thinking",
        "talker-",
        "talker-image",
        "talker-thinking-image",
        # Suffixes have one order, and none comes twice
        "talker-search-thinking",
        "talker-thinking-thinking",
        "talker-thinking-search-search",
        "talkerthinking",
        "talker-Thinking",
        "talker-thinking ",
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(UnknownModel, match=f"{name!r} is not served. Known: seer, talker.") as refused:
        resolve(REGISTRY, name)
    assert refused.value.param == "model"


@pytest.mark.parametrize("name", ["vectors", "vectors-thinking", "vectors-search", "vectors-thinking-search"])
def test_an_embedding_model_does_not_chat_in_any_variant(name: str) -> None:
    with pytest.raises(UnknownModel, match="is for embedding, not for chat"):
        resolve(REGISTRY, name)


def test_an_id_wins_over_a_suffix() -> None:
    # Given a model whose own id ends like a variant of another
    own = spec("talker-thinking")
    registry = Registry((TALKER, own))
    # Then its name is its own, and its variants are its own
    assert resolve(registry, "talker-thinking") == Variant(own, "talker-thinking")
    assert resolve(registry, "talker-thinking-search") == Variant(TALKER, "talker", thinking=True, search=True)
    assert resolve(registry, "talker-thinking-thinking") == Variant(own, "talker-thinking", thinking=True)


def test_the_longest_suffix_is_taken() -> None:
    # Given suffixes that end alike, then none stands before one that it is the end of
    for index, suffix in enumerate(SUFFIXES):
        assert not any(later.endswith(suffix) for later in SUFFIXES[index + 1 :])


@pytest.mark.parametrize(("suffix", "thinking"), [("", False), ("-thinking", True)])
def test_a_stand_in_has_the_variants_of_the_model_it_stands_in_for(suffix: str, thinking: bool) -> None:
    # Given a model that answers in place of another
    tiny = spec("tiny", stand_in_for=("large",))
    variant = resolve(Registry((tiny,)), "large" + suffix)
    # Then it can be asked for by that one's variants, and what was asked for is not forgotten
    assert variant == Variant(tiny, "large", thinking=thinking)


def test_an_unknown_model_where_there_is_no_chat() -> None:
    with pytest.raises(UnknownModel, match="No chat model is served here"):
        resolve(Registry((VECTORS,)), None)


def test_all_names_of_a_model_its_own_first() -> None:
    assert names(TALKER, variants=True) == ["talker", "talker-search", "talker-thinking", "talker-thinking-search"]
    assert names(TALKER, variants=False) == ["talker"]
    # And each can be asked for
    assert {resolve(REGISTRY, name).spec.id for name in names(TALKER, variants=True)} == {"talker"}


@pytest.mark.parametrize("variants", [True, False])
def test_an_embedding_model_has_one_name(variants: bool) -> None:
    assert names(VECTORS, variants=variants) == ["vectors"]
