"""What reaches the engine is bounded: each bound at its edge, and no JSON value does more than be refused."""

import re
import time
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field, JsonValue

from server import limits
from server.core.errors import InvalidRequest
from server.json_schema import (
    COUNTS,
    FLAGS,
    FORMAT_WEIGHT,
    MANY,
    MAX_COUNTED_PROPERTIES,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_COUNT,
    MAX_SCHEMA_DEPTH,
    MAX_SCHEMA_NODES,
    MAX_SCHEMA_PATTERN,
    MAX_SCHEMA_PROPERTIES,
    MAX_SCHEMA_WEIGHT,
    NAMED,
    NUMBERS,
    ONE,
    REFS,
    STRINGS,
)

WHERE = "tools.0.parameters"
STRING = {"type": "string"}


def refusal(check: Callable[..., None], *args: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        check(*args)
    return refused.value


def outcome(check: Callable[..., None], *args: Any) -> InvalidRequest | None:
    """How it is refused, if it is; any other error is the test's."""
    try:
        check(*args)
    except InvalidRequest as refused:
        return refused
    return None


def told(schema: Any) -> str:
    """What the caller of a schema that is refused is told."""
    refused = refusal(limits.check_schema, schema, WHERE)
    assert refused.param == WHERE
    assert refused.message.startswith(WHERE)
    assert refused.message.isascii()
    assert len(refused.message) < 500
    return refused.message


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def pattern(text: str) -> dict[str, Any]:
    return {"type": "string", "pattern": text}


def properties(count: int, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": True for index in range(count)}, **more}


EDGES: list[tuple[Any, Any, str]] = [
    (nested(MAX_SCHEMA_DEPTH), nested(MAX_SCHEMA_DEPTH + 1), "may nest 32 deep"),
    ({"enum": [1] * (MAX_SCHEMA_NODES - 2)}, {"enum": [1] * (MAX_SCHEMA_NODES - 1)}, "may hold 2000 values"),
    (
        {"const": "x" * (MAX_SCHEMA_BYTES - 12)},
        {"const": "x" * (MAX_SCHEMA_BYTES - 11)},
        "may have 65536 bytes, not 65537",
    ),
    (
        properties(MAX_SCHEMA_PROPERTIES),
        properties(MAX_SCHEMA_PROPERTIES + 1),
        ".properties: may have 256 entries, not 257",
    ),
    (
        properties(MAX_COUNTED_PROPERTIES, minProperties=1),
        properties(MAX_COUNTED_PROPERTIES + 1, minProperties=1),
        "an object may have 32 properties, not 33",
    ),
    (
        pattern("a" * MAX_SCHEMA_PATTERN),
        pattern("a" * (MAX_SCHEMA_PATTERN + 1)),
        ".pattern: a pattern may have 256 char",
    ),
    (
        pattern("[a-z]{1,4096}"),
        pattern("[a-z]{1,4097}"),
        ".pattern: patterns, lengths, formats and minProperties may weigh",
    ),
    (pattern(r"\d{2048}\]{2048}"), pattern(r"\d{2048}\]{2049}"), r"come to 4097 here (got '\\d{2048}\\]{2049}')"),
    (pattern("x{96}(b|c{9}){20}"), pattern("x{97}(b|c{9}){20}"), "come to 4097 here"),
    (pattern("(?:[a-f]{16}y?){15}"), pattern("(?:[a-f]{16}y?){16}"), "come to 4608 here"),
    (pattern("((a{4}){8}){4}"), pattern("((a{4}){8}){5}"), "come to 6400 here"),
    (
        {"prefixItems": [pattern("()" * 128)] * 16},
        {"prefixItems": [pattern("()" * 128)] * 17},
        "come to 4352 here",
    ),
    (pattern(".{256}"), pattern(".{257}"), "come to 4112 here"),
    (pattern('[^"]{,256}'), pattern('[^"]{,257}'), "come to 4112 here"),
    (pattern(r"\S{128}\W{128}"), pattern(r"\S{128}\D{129}"), "come to 4112 here"),
    (pattern(".*" * 22), pattern(".*" * 23), "come to 4416 here"),
    (pattern("((.)x)*" * 21), pattern("((.)x)*" * 22), "come to 4301 here"),
    (pattern(".?" * 22), pattern(".?" * 23), "come to 4416 here"),
    (pattern("(.?){16}"), pattern("(.?){17}"), "come to 4624 here"),
    (pattern(".{0,80}.{0,80}"), pattern(".{0,90}.{0,90}"), "come to 4320 here"),
    (pattern("(.x)+" * 21), pattern("(.x){2,}" * 21), "come to 7854 here"),
    (
        {"patternProperties": {"^a{2000}$": True, "^b{2092}$": True}},
        {"patternProperties": {"^a{2000}$": True, "^b{2093}$": True}},
        ".patternProperties.^",
    ),
    (
        {"prefixItems": [{"maxLength": length} for length in (200, 201, 202, 203)]},
        {"prefixItems": [{"maxLength": length} for length in (200, 201, 202, 203, 204)]},
        "and come to 5120 here",
    ),
    (
        {"prefixItems": [{"format": "uri"}] * (MAX_SCHEMA_WEIGHT // FORMAT_WEIGHT)},
        {"prefixItems": [{"format": "uri"}] * (MAX_SCHEMA_WEIGHT // FORMAT_WEIGHT + 1)},
        ".format: patterns, lengths, formats and minProperties may weigh 4096",
    ),
    (
        {"prefixItems": [properties(32, minProperties=1)] * 8},
        {"prefixItems": [properties(32, minProperties=1)] * 9},
        "and come to 4608 here",
    ),
    *(
        ({name: MAX_SCHEMA_COUNT}, {name: MAX_SCHEMA_COUNT + 1}, f".{name}: may be 65536, not more (got 65537)")
        for name in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
    ),
]


@pytest.mark.parametrize(("most", "more", "why"), EDGES)
def test_a_schema_is_let_pass_up_to_its_bounds(most: Any, more: Any, why: str) -> None:
    limits.check_schema(most, WHERE)
    assert why in told(more)


def test_strings_of_one_length_are_counted_once() -> None:
    limits.check_schema({"prefixItems": [{"maxLength": 2000}] * 100}, WHERE)


WRONG: list[tuple[Any, str]] = [
    ([], "tools.0.parameters: a JSON Schema is an object (got [])"),
    (True, "tools.0.parameters: a JSON Schema is an object (got True)"),
    (None, "tools.0.parameters: a JSON Schema is an object (got None)"),
    ("{}", "tools.0.parameters: a JSON Schema is an object (got '{}')"),
    ({"properties": {"a": 5}}, "tools.0.parameters.properties.a: a JSON Schema is an object, true or false (got 5)"),
    ({"items": [STRING]}, "tools.0.parameters.items: a JSON Schema is an object, true or false"),
    ({"not": None}, ".not: a JSON Schema is"),
    ({"properties": []}, ".properties: must be an object of schemas (got [])"),
    ({"anyOf": []}, ".anyOf: must be a list of schemas, not empty (got [])"),
    ({"allOf": {}}, ".allOf: must be a list of schemas, not empty (got {})"),
    ({"oneOf": [STRING, 1]}, ".oneOf.1: a JSON Schema is an object, true or false (got 1)"),
    ({"type": "text"}, ".type: must be one of array, boolean, integer, null, number, object, string, or a list"),
    ({"type": []}, ".type: must be one of"),
    ({"type": 5}, ".type: must be one of"),
    ({"type": ["string", "string"]}, ".type: must be one of"),
    ({"type": ["string", ["null"]]}, ".type: must be one of"),
    ({"maxLength": -1}, ".maxLength: must be a whole number from 0 on (got -1)"),
    ({"maxLength": 1.5}, ".maxLength: must be a whole number"),
    ({"maxLength": True}, ".maxLength: must be a whole number"),
    ({"maxLength": "5"}, ".maxLength: must be a whole number from 0 on (got '5')"),
    ({"maximum": "5"}, ".maximum: must be a number (got '5')"),
    ({"minimum": float("nan")}, ".minimum: must be a number (got nan)"),
    ({"exclusiveMinimum": True}, ".exclusiveMinimum: must be a number (got True)"),
    ({"multipleOf": 0}, ".multipleOf: must be a number above 0 (got 0)"),
    ({"uniqueItems": 1}, ".uniqueItems: must be true or false (got 1)"),
    ({"enum": "a"}, ".enum: must be a list (got 'a')"),
    ({"required": ["a", 1]}, ".required: must be a list of different names"),
    ({"required": ["a", "a"]}, ".required: must be a list of different names"),
    ({"required": True}, ".required: must be a list of different names (got True)"),
    ({"dependentRequired": []}, ".dependentRequired: must be an object of lists of names"),
    ({"dependentRequired": {"a": "b"}}, ".dependentRequired.a: must be a list of different names"),
    ({"format": 5}, ".format: must be a string (got 5)"),
    ({"description": ["x"]}, ".description: must be a string"),
    ({"pattern": 5}, ".pattern: must be a string (got 5)"),
    (pattern("(("), ".pattern: must be a regular expression (got '((')"),
    (pattern("[z-a]"), ".pattern: must be a regular expression"),
    (pattern("a{5,2}"), ".pattern: must be a regular expression"),
    (pattern(r"\p{L}+"), ".pattern: must be a regular expression"),
    (pattern("a{" + "9" * 30 + "}"), ".pattern: must be a regular expression"),
    (pattern("(((a{0,10}){0,10}){0,10}){0,10}"), ".pattern: patterns, lengths, formats and minProperties may weigh"),
    (pattern("[](a{1,1000})]"), ".pattern: must be a regular expression"),
    (pattern("[^](a{1,1000})]"), ".pattern: must be a regular expression"),
    (pattern("(?x)a #["), ".pattern: must be a regular expression"),
    ({"patternProperties": {"(": True}}, ".patternProperties.(: must be a regular expression"),
    ({"$ref": 5}, ".$ref: must be a string (got 5)"),
    ({"$ref": "#/$defs/gone"}, ".$ref: must be # or #/"),
    ({"$ref": "https://example.org/schema.json"}, ".$ref: must be # or #/"),
    ({"$ref": "other.json#/$defs/a"}, ".$ref: must be # or #/"),
    ({"$ref": "#name", "$defs": {"a": {"$anchor": "name"}}}, ".$ref: must be # or #/"),
    ({"$dynamicRef": "#name"}, ".$dynamicRef: must be # or #/"),
    # What stands in no place of a schema was not looked at, so nothing may lead there.
    ({"$ref": "#/default", "default": pattern("((")}, ".$ref: must be # or #/"),
    ({"$ref": "#/mine/x", "mine": {"x": pattern("((")}}, ".$ref: must be # or #/"),
    ({"$ref": "#/%24defs/a", "$defs": {"a": {}}, "%24defs": {"a": pattern("((")}}, ".$ref: must be # or #/"),
    ({"$ref": "#"}, "tools.0.parameters: leads back to itself without describing anything"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, ".$defs.a: leads back"),
    ({"anyOf": [STRING, {"oneOf": [{"$ref": "#"}]}]}, "tools.0.parameters: leads back to itself"),
    ({"items": {"allOf": [{"$ref": "#/items"}]}}, ".items: leads back to itself"),
    ({"if": {"not": {"$ref": "#"}}}, "tools.0.parameters: leads back to itself"),
    ({"enum": [2**64]}, "text must be Unicode and whole numbers fit 64 bits"),
    ({"const": "\ud800"}, "text must be Unicode and whole numbers fit 64 bits"),
    ({"properties": {"\ud800" * 100: 5}}, "text must be Unicode"),
    ({"properties": {"é" * 100: 5}}, ".properties." + "\\xe9" * 37 + "...: a JSON Schema is"),
]


@pytest.mark.parametrize(("schema", "why"), WRONG)
def test_what_is_no_schema_is_refused_by_its_place(schema: Any, why: str) -> None:
    assert why in told(schema)


@pytest.mark.parametrize("schema", [schema for schema, _ in WRONG if isinstance(schema, dict)])
def test_the_same_is_let_be_where_it_is_data(schema: dict[str, Any]) -> None:
    # Given one wrong keyword, and the same in a place that is only data
    found = {"enum": [schema], "default": schema, "examples": [schema], "mine": schema}
    # Then only what cannot be written as JSON is refused there
    refused = outcome(limits.check_schema, found, WHERE)
    if refused:
        assert "Unicode" in refused.message
    else:
        Draft202012Validator.check_schema(found)


GOOD: list[dict[str, Any]] = [
    {},
    {"properties": {"a": True, "b": False}, "additionalProperties": False, "required": []},
    {"type": ["string", "null"], "enum": []},
    {"$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "$ref": "#/$defs/node"},
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
    {"type": "object", "additionalProperties": {"$ref": "#"}},
    {"properties": {"$ref": STRING, "type": STRING, "pattern": STRING}},
    {"maxLength": 4.0, "minimum": -1.5, "x-mine": ["((", {"type": 5}]},
    {"properties": {"a": STRING, "b": {"$ref": "#/properties/a"}}},
    {"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": STRING}},
    pattern(r"^(?:\+\d{1,3})?[ a-z\]{}-]{1,20}(x|y)*z?$"),
    pattern("a{b}{,3}[{9}{99}]"),
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "x", "if": {}, "then": {}, "not": {}},
]


@pytest.mark.parametrize("schema", GOOD)
def test_an_ordinary_schema_passes(schema: dict[str, Any]) -> None:
    limits.check_schema(schema, WHERE)
    Draft202012Validator.check_schema(schema)


class Unit(Enum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


class Place(BaseModel):
    name: str = Field(min_length=1, max_length=200)
    code: str = Field("TYO", pattern=r"^[A-Z]{3}$")
    position: tuple[float, float] | None = None


class Node(BaseModel):
    places: list[Place] = Field(max_length=50)
    unit: Unit = Unit.CELSIUS
    kind: Literal["a", "b", 3] = "a"
    day: datetime | None = None
    cost: Decimal = Decimal(1)
    notes: dict[str, Annotated[int, Field(gt=0, le=10**9)]] = {}
    more: JsonValue = None
    anything: Any = None
    tags: set[str] = set()
    children: list["Node"] = []


@pytest.mark.parametrize("model", [Place, Node])
def test_schemas_of_models_pass(model: type[BaseModel]) -> None:
    limits.check_schema(model.model_json_schema(), WHERE)
    limits.check_schema(model.model_json_schema(mode="serialization"), WHERE)


def deep(kind: type, depth: int = 10_000) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = [value] if kind is list else {"items": value}
    return value


HOSTILE: dict[str, Any] = {
    "deep dicts": deep(dict),
    "deep lists": {"enum": deep(list)},
    "wide list": {"enum": [[]] * 1_000_000},
    "wide dict": {"properties": dict.fromkeys(map(str, range(500_000)), True)},
    "long string": {"const": "x" * 20_000_000},
    "long key": {"properties": {"k" * 1_000_000: {"properties": {str(i): {} for i in range(900)}}}},
    "long pattern": pattern("(" * 1_000_000),
    "deep pattern": pattern("(" * 128 + ")" * 128),
    "many patterns": {"prefixItems": [pattern("(a|b)*" * 10 + str(i)) for i in range(600)]},
    "many long patterns": {"prefixItems": [pattern(f"{i}" + "|" * 250) for i in range(230)]},
    "many refs": {"anyOf": [{"$ref": "#/$defs/a"}] * 900, "$defs": {"a": {}}},
    "long chain": {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(255)} | {"d255": {}}},
    "whole number": {"maximum": 10**4000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_value_is_dealt_with_at_once(name: str) -> None:
    started = time.perf_counter()
    for check in (limits.check_schema, limits.check_template_kwargs, limits.check_logit_bias):
        refused = outcome(check, HOSTILE[name], WHERE)
        assert refused is None or len(refused.message) < 500
    assert time.perf_counter() - started < 1


OTHERS = {"12", "a", "const", "dependentRequired", "enable_thinking", "enum", "pattern", "required", "type"}
KEYWORDS = st.sampled_from(sorted(ONE | MANY | NAMED | REFS | COUNTS | NUMBERS | STRINGS | FLAGS | OTHERS))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["#", "#/items", "#/$defs/a", "string", "a{3,}", "(?:[x]{2}|y)+", "[]a]"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYWORDS | st.text(max_size=4), inner, max_size=5),
    max_leaves=30,
)


@settings(max_examples=100, deadline=1000)
@given(VALUES | st.dictionaries(KEYWORDS, VALUES, max_size=6))
def test_any_value_passes_or_is_refused(value: Any) -> None:
    for check in (limits.check_schema, limits.check_template_kwargs, limits.check_logit_bias):
        if refused := outcome(check, value, WHERE):
            assert refused.param is not None
            assert refused.message.startswith(WHERE)
            assert refused.message.isascii()


@settings(max_examples=100, deadline=1000)
@given(st.dictionaries(KEYWORDS, VALUES, max_size=4))
def test_what_passes_is_a_schema_to_the_package_too(value: dict[str, Any]) -> None:
    if outcome(limits.check_schema, value, WHERE) is None:
        Draft202012Validator.check_schema(value)


def test_template_kwargs_may_switch_thinking() -> None:
    limits.check_template_kwargs({})
    limits.check_template_kwargs({"enable_thinking": True})
    limits.check_template_kwargs({"enable_thinking": False})


@pytest.mark.parametrize(
    ("kwargs", "param", "why"),
    [
        ([], "chat_template_kwargs", "must be an object (got [])"),
        (None, "chat_template_kwargs", "must be an object (got None)"),
        ({"enable_thinking": 1}, "chat_template_kwargs.enable_thinking", "must be true or false (got 1)"),
        ({"enable_thinking": None}, "chat_template_kwargs.enable_thinking", "must be true or false (got None)"),
        ({"chat_template": "{{ x }}"}, "chat_template_kwargs.chat_template", "takes enable_thinking and nothing else"),
        ({"enable_thinking": True, "tokenize": True}, "chat_template_kwargs.tokenize", "nothing else (got True)"),
        ({"ü" * 99: 1}, "chat_template_kwargs." + "\\xfc" * 14 + "\\...", "not accepted here"),
    ],
)
def test_template_kwargs_may_do_nothing_else(kwargs: Any, param: str, why: str) -> None:
    refused = refusal(limits.check_template_kwargs, kwargs)
    assert refused.param == param
    assert refused.message.startswith(f"{param}: ")
    assert why in refused.message


@pytest.mark.parametrize(
    "bias",
    [
        {},
        {"0": -100, "151935": 100, "2147483647": 0.5},
        {str(token): 1 for token in range(limits.MAX_LOGIT_BIAS)},
    ],
)
def test_a_bias_is_let_pass_up_to_its_bounds(bias: dict[str, float]) -> None:
    limits.check_logit_bias(bias)


@pytest.mark.parametrize(
    ("bias", "why"),
    [
        ([], "logit_bias: must be an object of token ids and biases (got [])"),
        ({str(token): 1 for token in range(301)}, "logit_bias: may have 300 entries, not 301"),
        ({"5": 100.1}, "logit_bias.5: must be a number from -100 to 100 (got 100.1)"),
        ({"5": -101}, "logit_bias.5: must be a number from -100 to 100 (got -101)"),
        ({"5": float("nan")}, "logit_bias.5: must be a number from -100 to 100 (got nan)"),
        ({"5": True}, "logit_bias.5: must be a number from -100 to 100 (got True)"),
        ({"5": "1"}, "logit_bias.5: must be a number from -100 to 100 (got '1')"),
        ({"5": 10**400}, "logit_bias.5: must be a number from -100 to 100"),
        ({"-1": 1}, "logit_bias.-1: a token id is a whole number from 0 to 2147483647 (got '-1')"),
        ({"2147483648": 1}, "logit_bias.2147483648: a token id is a whole number"),
        ({"x": 1}, "logit_bias.x: a token id is a whole number"),
        ({"": 1}, "logit_bias.: a token id is a whole number"),
        ({"1.0": 1}, "logit_bias.1.0: a token id is a whole number"),
        ({"1_0": 1}, "logit_bias.1_0: a token id is a whole number"),
        ({"٣": 1}, "logit_bias.\\u0663: a token id is a whole number"),
        ({"²": 1}, "logit_bias.\\xb2: a token id is a whole number"),
        ({5: 1}, "logit_bias.5: a token id is a whole number"),
        ({"9" * 100_000: 1}, "a token id is a whole number"),
    ],
)
def test_a_wrong_bias_is_refused(bias: Any, why: str) -> None:
    refused = refusal(limits.check_logit_bias, bias)
    assert refused.param == "logit_bias"
    assert why in refused.message
    assert len(refused.message) < 300


@pytest.mark.parametrize("name", limits.REFUSED)
def test_parameters_of_the_engine_are_refused_by_name(name: str) -> None:
    refused = refusal(limits.refuse, {"user": "ada", name: "välue" * 100})
    assert refused.param == name
    assert refused.message.startswith(f"{name}: not accepted here: {limits.REFUSED[name]} (got 'v\\xe4lu")
    assert refusal(limits.refuse, ["user", name]).param == name
    limits.refuse({name: None})


def test_what_is_only_without_effect_is_not_refused() -> None:
    limits.refuse({})
    limits.refuse(
        dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"), "x")
    )
    # Benchmarks send these, and they are honoured.
    for name in ("ignore_eos", "min_tokens", "skip_special_tokens", "include_stop_str_in_output", "echo"):
        assert name not in limits.REFUSED


def test_reasons_name_advisories_as_they_are_written() -> None:
    for reason in limits.REFUSED.values():
        for advisory in re.findall(r"CVE\S*|GHSA\S*", reason):
            assert re.fullmatch(r"(CVE-\d{4}-\d{4,6}|GHSA(-[a-z0-9]{4}){3})[),]*", advisory)


def test_a_tool_is_named_by_up_to_64_plain_characters() -> None:
    assert re.fullmatch(limits.TOOL_NAME, "get_weather-2")
    assert re.fullmatch(limits.TOOL_NAME, "x" * limits.MAX_TOOL_NAME)
    for name in ("", "x" * (limits.MAX_TOOL_NAME + 1), "a b", "a.b", 'a"', "ü"):
        assert not re.fullmatch(limits.TOOL_NAME, name)
