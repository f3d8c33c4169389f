"""Whether a JSON Schema may reach the engine, which compiles it into a grammar with a native library.

Owns the schema's bounds and the walk that checks them: no recursion, no network, and nothing done twice. Keywords are
checked here and not by the jsonschema package, whose check of 2,000 values holds the event loop for half a second.
Knows neither the dialects nor the compiler. It may let pass what the compiler still declines (`\\b` in a pattern, a
minimum above the maximum): the engine answers those with a 400. Seconds named below are one core's, for xgrammar
0.2.8 and Qwen3's 151,936 tokens.
"""

import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import orjson

from server.core.errors import InvalidRequest
from server.errors import short

MAX_SCHEMA_BYTES = 64 * 1024
"""The compiler keeps what it compiled, so size is memory too: CVE-2025-32381 (GHSA-389x-67px-mjg3)."""

MAX_SCHEMA_DEPTH = 32
"""Objects and arrays in one another. Both vLLM (which allows 64) and xgrammar recurse: GHSA-7rgv-gqhr-fxg3."""

MAX_SCHEMA_NODES = 2000
"""Values in the schema, those of enums included: bounds the walk here and the grammar there."""

MAX_SCHEMA_PROPERTIES = 256
"""Of one object. The grammar of optional properties grows with their square: 256 take 0.5 s, 990 take 8 s."""

MAX_COUNTED_PROPERTIES = 32
"""Of an object with `minProperties`, whose grammar grows faster: 60 take 1 s, 100 take 5 s, 150 over 20 s."""

MAX_SCHEMA_COUNT = 65_536
"""Of `maxLength`, `minItems` and the like; large ones cost no more than 129, and this stays far from overflows."""

MAX_SCHEMA_PATTERN = 256
"""Characters of a pattern. A bad pattern was enough to end a worker: CVE-2025-48944 (GHSA-vrq3-r879-7m65)."""

MAX_SCHEMA_WEIGHT = 4096
"""What a schema's patterns, string lengths and formats weigh together, in positions of a string: `_weight` counts
them. The compiler tries the whole vocabulary at each, 2 ms where few characters fit and 30 ms where any does. What
passes takes up to some 20 s, beside the engine's loop; a `maxLength` of 1000 alone takes 3 to 10, so less would
refuse ordinary schemas. Without the bound, `(.{0,12}){0,12}` takes minutes. Of patterns: GHSA-rwxx-mrjm-wc2m."""

WIDE = 16
"""The weight of a position where nearly any character fits (`.`, `[^"]`)."""

LENGTH_WEIGHT = 8
"""Of each character of `minLength` or `maxLength`. Four different lengths fit in a schema, or more short ones."""

FLAT_LENGTH = 128
"""Beyond it, xgrammar counts instead of writing a string's characters out: the cost grows no more."""

FORMAT_WEIGHT = 64
"""Of a `format`: the grammar of a `uri-template` takes 0.2 s, that of a date next to none."""

COUNTED_WEIGHT = 16
"""Of each property of an object with `minProperties`."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TYPES = _words("array boolean integer null number object string")
ONE = _words(
    "additionalItems additionalProperties contains contentSchema else if "
    "items not propertyNames then unevaluatedItems unevaluatedProperties"
)
MANY = _words("allOf anyOf oneOf prefixItems")
NAMED = _words("$defs definitions dependentSchemas patternProperties properties")
REFS = _words("$dynamicRef $recursiveRef $ref")
COUNTS = _words("maxContains maxItems maxLength maxProperties minContains minItems minLength minProperties")
NUMBERS = _words("exclusiveMaximum exclusiveMinimum maximum minimum multipleOf")
STRINGS = _words(
    "$anchor $comment $dynamicAnchor $id $schema contentEncoding contentMediaType description format title"
)
FLAGS = _words("deprecated readOnly uniqueItems writeOnly")
SAME_VALUE = _words("allOf anyOf else if not oneOf then")
"""Keywords whose subschemas are about the same value: a circle of these and `$ref` alone describes nothing."""

QUANTIFIER = re.compile(r"\{(?=,?\d)(\d*)(?:,(\d*))?\}|[*+?]")
UNREADABLE = (re.error, OverflowError, RecursionError, IndexError)
"""What `re`, and the weighing of a pattern, raise where they cannot read it."""

Path = tuple[Any, ...]
"""`()` is the schema itself, `(parent, step)` what stands in it: children share their parents, however long."""


def check_schema(schema: Any, where: str) -> None:
    """Refuses what is no JSON Schema (draft 2020-12), or would cost the engine more than a request may.

    `where` names the field the schema came in, as a dotted path. Raises InvalidRequest.
    """
    _Check(where).check(schema)


def _steps(path: Path) -> tuple[str, ...]:
    steps = []
    while path:
        path, step = path
        steps.append(str(step))
    return tuple(reversed(steps))


class _Check:
    def __init__(self, where: str) -> None:
        self.where = where
        self.weight = 0
        self.lengths: set[tuple[Any, Any]] = set()
        self.places: dict[tuple[str, ...], Any] = {}
        self.refs: list[tuple[Path, str]] = []
        self.same: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def check(self, schema: Any) -> None:
        if not isinstance(schema, dict):
            raise self.refusal((), "a JSON Schema is an object", schema)
        self._check_size(schema)
        stack: list[tuple[Path, Any]] = [((), schema)]
        while stack:
            path, found = stack.pop()
            self.places[_steps(path)] = found
            if isinstance(found, bool):
                continue
            if not isinstance(found, dict):
                raise self.refusal(path, "a JSON Schema is an object, true or false", found)
            for keyword, value in found.items():
                stack.extend(self._keyword((path, keyword), keyword, value))
            self._check_together(path, found)
        self._check_refs()

    def refusal(self, path: Path, why: str, value: Any) -> InvalidRequest:
        steps = [step if len(step) <= 40 else step[:37] + "..." for step in _steps(path)]
        place = ".".join([self.where, *steps]).encode("ascii", "backslashreplace").decode()
        return InvalidRequest(f"{place}: {why} (got {short(value)})", param=self.where)

    def _check_size(self, schema: dict[str, Any]) -> None:
        nodes = 1
        stack: list[tuple[Path, dict[str, Any] | list[Any], int]] = [((), schema, 1)]
        while stack:
            path, value, depth = stack.pop()
            if depth > MAX_SCHEMA_DEPTH:
                raise self.refusal(path, f"objects and arrays may nest {MAX_SCHEMA_DEPTH} deep, not more", value)
            nodes += len(value)
            # Asked before the children are put on the stack: there may be millions.
            if nodes > MAX_SCHEMA_NODES:
                raise self.refusal(path, f"a schema may hold {MAX_SCHEMA_NODES} values, not more", value)
            children = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [((path, key), child, depth + 1) for key, child in children if isinstance(child, dict | list)]
        try:
            size = len(orjson.dumps(schema))
        except TypeError as exc:
            raise self.refusal((), "text must be Unicode and whole numbers fit 64 bits", schema) from exc
        if size > MAX_SCHEMA_BYTES:
            raise self.refusal((), f"a schema may have {MAX_SCHEMA_BYTES} bytes, not {size}", schema)

    def _keyword(self, path: Path, keyword: str, value: Any) -> Iterator[tuple[Path, Any]]:
        """The subschemas in one keyword, after a look at its form. An unknown keyword means nothing, and is let be."""
        if keyword in ONE:
            yield path, value
        elif keyword in MANY:
            if not isinstance(value, list) or not value:
                raise self.refusal(path, "must be a list of schemas, not empty", value)
            yield from (((path, index), child) for index, child in enumerate(value))
        elif keyword in NAMED:
            if not isinstance(value, dict):
                raise self.refusal(path, "must be an object of schemas", value)
            if len(value) > MAX_SCHEMA_PROPERTIES:
                raise self.refusal(path, f"may have {MAX_SCHEMA_PROPERTIES} entries, not {len(value)}", value)
            for name in value if keyword == "patternProperties" else ():
                self._check_pattern((path, name), name)
            yield from (((path, name), child) for name, child in value.items())
        elif keyword in REFS:
            self._check_text(path, value)
            self.refs.append((path, value))
        elif keyword == "pattern":
            self._check_text(path, value)
            self._check_pattern(path, value)
        elif keyword in STRINGS:
            self._check_text(path, value)
            self._spend(path, FORMAT_WEIGHT if keyword == "format" else 0, value)
        else:
            self._check_plain(path, keyword, value)

    def _check_plain(self, path: Path, keyword: str, value: Any) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if keyword == "type":
            names = value if isinstance(value, list) and value else [value]
            if not all(isinstance(name, str) and name in TYPES for name in names) or len(set(names)) < len(names):
                raise self.refusal(path, f"must be one of {', '.join(sorted(TYPES))}, or a list of them", value)
        elif keyword in COUNTS:
            if not number or value < 0 or value != int(value):
                raise self.refusal(path, "must be a whole number from 0 on", value)
            if value > MAX_SCHEMA_COUNT:
                raise self.refusal(path, f"may be {MAX_SCHEMA_COUNT}, not more", value)
        elif keyword in NUMBERS and (not number or (keyword == "multipleOf" and value <= 0)):
            raise self.refusal(path, "must be a number" + (" above 0" if keyword == "multipleOf" else ""), value)
        elif keyword in FLAGS and not isinstance(value, bool):
            raise self.refusal(path, "must be true or false", value)
        elif keyword in ("enum", "examples") and not isinstance(value, list):
            raise self.refusal(path, "must be a list", value)
        elif keyword == "required":
            self._check_names(path, value)
        elif keyword == "dependentRequired":
            if not isinstance(value, dict):
                raise self.refusal(path, "must be an object of lists of names", value)
            for name, names in value.items():
                self._check_names((path, name), names)

    def _check_text(self, path: Path, value: Any) -> None:
        if not isinstance(value, str):
            raise self.refusal(path, "must be a string", value)

    def _check_names(self, path: Path, value: Any) -> None:
        if (
            not isinstance(value, list)
            or not all(isinstance(name, str) for name in value)
            or len(set(value)) < len(value)
        ):
            raise self.refusal(path, "must be a list of different names", value)

    def _check_together(self, path: Path, schema: dict[str, Any]) -> None:
        """What two keywords cost together."""
        lengths = schema.get("minLength"), schema.get("maxLength")
        if lengths not in self.lengths:
            # Strings of the same length share their part of the grammar.
            self.lengths.add(lengths)
            longest = max(min(int(length or 0), FLAT_LENGTH) for length in lengths)
            self._spend(path, LENGTH_WEIGHT * longest, lengths)
        properties = schema.get("properties") or ()
        if not schema.get("minProperties"):
            return
        self._spend(path, COUNTED_WEIGHT * len(properties), properties)
        if len(properties) > MAX_COUNTED_PROPERTIES:
            why = f"with minProperties, an object may have {MAX_COUNTED_PROPERTIES} properties, not {len(properties)}"
            raise self.refusal(path, why, schema["minProperties"])

    def _check_pattern(self, path: Path, pattern: str) -> None:
        if len(pattern) > MAX_SCHEMA_PATTERN:
            raise self.refusal(path, f"a pattern may have {MAX_SCHEMA_PATTERN} characters, not {len(pattern)}", pattern)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(pattern)
            # Its length too, whatever it says: `re` takes milliseconds for a page of brackets.
            weight = max(_weight(pattern), len(pattern))
        except UNREADABLE as exc:
            raise self.refusal(path, "must be a regular expression", pattern) from exc
        self._spend(path, weight, pattern)

    def _spend(self, path: Path, weight: int, value: Any) -> None:
        self.weight += weight
        if self.weight > MAX_SCHEMA_WEIGHT:
            what = f"patterns, lengths, formats and minProperties may weigh {MAX_SCHEMA_WEIGHT} in a schema"
            raise self.refusal(path, f"{what}, and come to {self.weight} here", value)

    def _check_refs(self) -> None:
        for place, found in self.places.items():
            if isinstance(found, dict):
                inside = [(keyword, found[keyword]) for keyword in SAME_VALUE & found.keys()]
                self.same[place] = [
                    (*place, keyword, *at)
                    for keyword, value in inside
                    for at in ([(str(index),) for index in range(len(value))] if isinstance(value, list) else [()])
                ]
        for path, ref in self.refs:
            # The compiler takes a pointer's steps as they stand, so what % and ~ would spell is refused with the rest.
            target = tuple(ref.split("/")[1:])
            if (ref != "#" and not ref.startswith("#/")) or target not in self.places:
                raise self.refusal(path, "must be # or #/... and lead to a schema in here", ref)
            self.same[_steps(path)[:-1]].append(target)
        self._check_circles()

    def _check_circles(self) -> None:
        """Endless recursion ended xgrammar once: CVE-2025-57809 (GHSA-5cmr-4px5-23pc)."""
        done: set[tuple[str, ...]] = set()
        for start in self.same:
            way = {start: iter(self.same[start])}
            while way:
                place = next(reversed(way))
                target = next(way[place], None)
                if target is None:
                    done.add(place)
                    del way[place]
                elif target in way:
                    path: Path = ()
                    for step in target:
                        path = (path, step)
                    raise self.refusal(path, "leads back to itself without describing anything", self.places[target])
                elif target not in done:
                    way[target] = iter(self.same.get(target, ()))


def _weight(pattern: str) -> int:
    """How many positions a pattern has with its quantifiers written out, wide ones many times over.

    Two shapes cost more than that and weigh more: a repeated group with another repetition in it, as the square of
    its count; and the n-th wide part of no certain length, n times, since what one takes the next may take too.
    `re` has read the pattern before. Raises re.error where it reads a bracket otherwise than the compiler does.
    """
    index = total = open_ended = 0
    atom, wide, repeated = 0, False, False
    outer: list[tuple[int, bool, bool]] = []
    wide_inside = repeated_inside = False
    while index < len(pattern):
        char, step = pattern[index], 1
        if char == "(":
            outer.append((total, wide_inside, repeated_inside))
            total, wide_inside, repeated_inside = 0, False, False
        elif char == ")":
            atom, wide, repeated = total, wide_inside, repeated_inside
            before, wide_before, repeated_before = outer.pop()
            total, wide_inside, repeated_inside = before + atom, wide or wide_before, repeated or repeated_before
        elif found := QUANTIFIER.match(pattern, index):
            step = len(found[0])
            most = max(int(found[1] or 0), int(found[2] or 0), 1)
            grown = atom * most * (most if repeated else 1)
            total, atom = total + grown - atom, grown
            repeated = repeated_inside = True
            if wide and (char != "{" or found[2] not in (None, found[1])):
                total += grown * open_ended
                open_ended += 1
        elif char != "|":
            step = _bracket(pattern, index) if char == "[" else 2 if char == "\\" else 1
            wide = char == "." or pattern[index : index + 2] in ("[^", r"\D", r"\S", r"\W")
            atom, repeated = WIDE if wide else 1, False
            total += atom
            wide_inside = wide_inside or wide
        index += step
    return total


def _bracket(pattern: str, start: int) -> int:
    index = start + 1 + pattern.startswith("^", start + 1)
    if pattern.startswith("]", index):
        # An empty class to ECMAScript, and so to the compiler; the first of its members to Python.
        raise re.error("write \\] for a bracket in brackets")
    while pattern[index] != "]":
        index += 2 if pattern[index] == "\\" else 1
    return index + 1 - start
