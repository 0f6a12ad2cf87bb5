"""The smallest instance of a JSON schema, always the same one: what the mock engine says when it must speak JSON.

It knows the part of JSON Schema that structured outputs use: types, enum, const, required properties, items and
prefixItems, bounds, multipleOf, pattern, format, local $ref with recursion, allOf, anyOf, oneOf (taken as anyOf). It
ignores not, if and dependent schemas, and validates nothing: a schema that contradicts itself raises NoInstance or gets
an instance of the part understood here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

DEEPEST = 24  # levels of nesting beyond which a schema is taken to have no finite instance
MOST_STEPS = 50_000  # subschemas looked at before the search is given up
LONGEST = 10_000  # characters or items

FORMATS = {
    "date-time": "2000-01-01T00:00:00Z",
    "date": "2000-01-01",
    "time": "00:00:00Z",
    "duration": "P1D",
    "email": "a@example.com",
    "idn-email": "a@example.com",
    "hostname": "example.com",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "uri": "https://example.com",
    "uri-reference": "/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "regex": "a",
    "json-pointer": "/a",
}


class NoInstance(ValueError):
    """No instance of the schema was found."""


def smallest(schema: Any) -> Any:
    """An instance of the schema (a mapping, or true) of least depth: optional parts left out, first alternatives taken.

    Raises NoInstance.
    """
    search = _Search(schema)
    for depth in range(1, DEEPEST + 1):  # deepening step by step ends recursion at its shallowest exit
        try:
            return search.instance(schema, depth)
        except _TooDeep:
            continue
    raise NoInstance("the schema is nested too deeply to have a small instance")


class _TooDeep(NoInstance):
    pass


class _Search:
    def __init__(self, root: Any) -> None:
        self.root = root
        self.steps = 0

    def instance(self, schema: Any, depth: int, nth: int = 0) -> Any:
        """nth asks for another value than the ones for smaller numbers, for items that must differ."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise NoInstance("the schema is too large to search")
        if depth <= 0:
            raise _TooDeep
        if schema is True:
            return None
        if not isinstance(schema, Mapping):
            raise NoInstance("the schema allows nothing" if schema is False else "a schema must be an object")
        schema = self.resolved(schema)
        for word in ("anyOf", "oneOf"):
            if schema.get(word):
                return self.first_of(schema, word, depth, nth)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][nth % len(schema["enum"])]
        make: Callable[[Mapping[str, Any], int, int], Any] = getattr(self, "make_" + _type_of(schema), self.unknown)
        return make(schema, depth, nth)

    def unknown(self, schema: Mapping[str, Any], depth: int, nth: int) -> Any:
        raise NoInstance(f"there is no type {schema.get('type')!r}")

    def resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """The schema with its $ref and allOf folded into it."""
        for _ in range(100):
            if "$ref" in schema:
                rest = {key: value for key, value in schema.items() if key != "$ref"}
                schema = _merged(self.pointed_at(schema["$ref"]), rest)
            elif "allOf" in schema:
                rest = {key: value for key, value in schema.items() if key != "allOf"}
                for part in schema["allOf"]:
                    rest = _merged(rest, self.resolved(part) if isinstance(part, Mapping) else {})
                schema = rest
            else:
                return schema
        raise NoInstance("a $ref leads back to itself")

    def pointed_at(self, reference: Any) -> Mapping[str, Any]:
        at = self.root
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise NoInstance(f"$ref {reference!r} does not point into the schema")
        for part in reference[1:].split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            at = at.get(name) if isinstance(at, Mapping) else None
        if not isinstance(at, Mapping):
            raise NoInstance(f"$ref {reference!r} points at nothing")
        return at

    def first_of(self, schema: Mapping[str, Any], word: str, depth: int, nth: int) -> Any:
        base = {key: value for key, value in schema.items() if key != word}
        problem: NoInstance | None = None
        for choice in schema[word]:
            try:
                found = self.resolved(choice) if isinstance(choice, Mapping) else {}
                return self.instance(_merged(base, found), depth, nth)
            except _TooDeep as error:
                problem = error  # a deeper search may find one here: worth more than a plain failure elsewhere
            except NoInstance as error:
                problem = problem or error
        raise problem or NoInstance(f"{word} offers nothing")

    # one method a type
    def make_null(self, schema: Mapping[str, Any], depth: int, nth: int) -> None:
        return None

    def make_boolean(self, schema: Mapping[str, Any], depth: int, nth: int) -> bool:
        return bool(nth % 2)

    def make_integer(self, schema: Mapping[str, Any], depth: int, nth: int) -> int:
        value = _number(schema, nth, whole=True)
        if value != int(value):
            raise NoInstance("no integer lies between the bounds")
        return int(value)

    def make_number(self, schema: Mapping[str, Any], depth: int, nth: int) -> float:
        value = _number(schema, nth, whole=False)
        return int(value) if value == int(value) else value

    def make_string(self, schema: Mapping[str, Any], depth: int, nth: int) -> str:
        least, most = int(schema.get("minLength") or 0), schema.get("maxLength")
        if (most is not None and least > most) or least > LONGEST:
            raise NoInstance("minLength is too large")
        if schema.get("pattern"):
            return _matching(schema["pattern"], least, LONGEST if most is None else most)
        text = FORMATS.get(schema.get("format", ""), "")
        if nth:
            text += chr(97 + nth % 26) * (1 + nth // 26)
        return text + "a" * (least - len(text))

    def make_array(self, schema: Mapping[str, Any], depth: int, nth: int) -> list[Any]:
        least, first = int(schema.get("minItems") or 0), list(schema.get("prefixItems") or ())
        if least > LONGEST:
            raise NoInstance("minItems is too large")
        items: list[Any] = []
        for index in range(least):
            one = first[index] if index < len(first) else schema.get("items", True)
            items.append(self.instance(one, depth - 1, index if schema.get("uniqueItems") else nth))
        if schema.get("uniqueItems") and any(item in items[:index] for index, item in enumerate(items)):
            raise NoInstance("there are not enough different items")
        return items

    def make_object(self, schema: Mapping[str, Any], depth: int, nth: int) -> dict[str, Any]:
        properties = schema.get("properties") or {}
        more = schema.get("additionalProperties", True)
        names = [name for name in properties if name in set(schema.get("required") or ())]
        names += [name for name in schema.get("required") or () if name not in properties]
        least = int(schema.get("minProperties") or 0)
        if least > LONGEST:
            raise NoInstance("minProperties is too large")
        names += [name for name in properties if name not in names][: max(0, least - len(names))]
        names += [f"key{index}" for index in range(least - len(names))]
        return {name: self.instance(properties.get(name, more), depth - 1, nth) for name in names}


def _type_of(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")  # a value says more than null
    if isinstance(kind, str):
        return kind
    for kind, words in (
        ("object", ("properties", "required", "additionalProperties")),
        ("array", ("items", "prefixItems", "minItems")),
        ("string", ("pattern", "format", "minLength", "maxLength")),
        ("number", ("minimum", "maximum", "multipleOf", "exclusiveMinimum", "exclusiveMaximum")),
    ):
        if any(word in schema for word in words):
            return kind
    return "null"


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both schemas at once, as far as that can be written as one."""
    both = dict(one)
    for key, value in other.items():
        if key not in both:
            both[key] = value
        elif key == "properties":
            both[key] = {**both[key], **value}
        elif key == "required":
            both[key] = [*both[key], *(name for name in value if name not in both[key])]
        elif key == "enum":
            both[key] = [item for item in both[key] if item in value]
        elif key in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
            both[key] = max(both[key], value)
        elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
            both[key] = min(both[key], value)
        else:
            both[key] = value
    return both


def _number(schema: Mapping[str, Any], nth: int, whole: bool) -> float:
    """The number nearest to zero within the bounds, and the nth after it."""
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    bottom, top = max(low, above), min(high, below)
    step = schema.get("multipleOf") or 1
    start, direction = 0, 1
    if bottom > 0:
        start = math.ceil(bottom / step) * step
    elif top < 0:
        start, direction = math.floor(top / step) * step, -1
    candidates = [round(start + direction * step * move, 12) for move in range(nth + 3)]
    if not start:
        candidates += [-value for value in candidates]
    if not whole and not schema.get("multipleOf") and math.isfinite(bottom) and math.isfinite(top):
        candidates += [low, high, *(bottom + (top - bottom) * (part + 1) / (nth + 4) for part in range(nth + 3))]
    good = list(dict.fromkeys(value for value in candidates if low <= value <= high and above < value < below))
    if len(good) <= nth:
        raise NoInstance("no number lies between the bounds")
    return good[nth]


def _matching(pattern: str, least: int, most: int) -> str:
    """A short text in which the pattern is found, of `least` to `most` characters."""
    import re._parser as parser  # type: ignore[import-untyped, unused-ignore]  # only for schemas with a pattern

    try:
        tree = parser.parse(pattern)
        finder = re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise NoInstance(f"pattern {pattern!r} is not understood: {error}") from None
    for extra in range(65):
        text = _written(tree, extra, {})
        padded = text + "a" * (least - len(text))
        for candidate in (text, padded):
            if least <= len(candidate) <= most and finder.search(candidate):
                return candidate
    raise NoInstance(f"no text was found for pattern {pattern!r}")


def _written(tree: Any, extra: int, groups: dict[int, str]) -> str:
    """The text of a parsed pattern, each open repetition taken `extra` times more than it must be."""
    text = ""
    for code, argument in tree:
        match str(code):
            case "LITERAL":
                text += chr(argument)
            case "NOT_LITERAL":
                text += "a" if argument != ord("a") else "b"
            case "ANY":
                text += "a"
            case "IN":
                text += _one_of(argument)
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                least, most, inner = argument
                text += "".join(_written(inner, extra, groups) for _ in range(min(most, least + extra, least + 64)))
            case "SUBPATTERN":
                groups[argument[0]] = _written(argument[-1], extra, groups)
                text += groups[argument[0]]
            case "BRANCH":
                text += _written(argument[1][0], extra, groups)
            case "ATOMIC_GROUP":
                text += _written(argument, extra, groups)
            case "GROUPREF":
                text += groups.get(argument, "")
            case _:
                pass  # anchors and look-arounds add no text; the caller checks that the whole matches
    return text


CATEGORIES = {"CATEGORY_DIGIT": "0", "CATEGORY_WORD": "a", "CATEGORY_SPACE": " "}
CATEGORIES |= {"CATEGORY_NOT_DIGIT": "a", "CATEGORY_NOT_WORD": " ", "CATEGORY_NOT_SPACE": "a"}


def _one_of(members: Any) -> str:
    if str(members[0][0]) == "NEGATE":
        for letter in "a0 _-.ZéΩ":
            if not any(_holds(member, letter) for member in members[1:]):
                return letter
        return "\u2603"
    code, argument = members[0]
    match str(code):
        case "LITERAL":
            return chr(argument)
        case "RANGE":
            return chr(argument[0])
        case _:
            return CATEGORIES.get(str(argument), "a")


def _holds(member: tuple[Any, Any], letter: str) -> bool:
    code, argument = member
    match str(code):
        case "LITERAL":
            return bool(ord(letter) == argument)
        case "RANGE":
            return bool(argument[0] <= ord(letter) <= argument[1])
        case _:
            kind = {"DIGIT": letter.isdigit(), "WORD": letter.isalnum() or letter == "_", "SPACE": letter.isspace()}
            name = str(argument).removeprefix("CATEGORY_")
            return not kind[name[4:]] if name.startswith("NOT_") else kind.get(name, False)
