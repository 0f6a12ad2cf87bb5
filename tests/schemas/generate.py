"""Writes the corpus: `python tests/schemas/generate.py`. Same corpus at every run.

enforceable.jsonl: schemas of growing difficulty, level 1 to 6; whatever ends by itself must validate against them.
refused.jsonl: schemas that the engine cannot enforce, with a word of the reason; each must be a 400.
"""

# ruff: noqa: E501 - tables of cases read better one case a line
from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Schema = dict[str, Any] | bool
HERE = Path(__file__).parent

WORD = {"type": "string", "maxLength": 12}
DAY = {"enum": ["mon", "tue", "wed", "thu", "fri"]}


def closed(properties: dict[str, Any], *optional: str, **more: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


def scalars() -> Iterator[Schema]:
    """Level 1: one value."""
    yield from ({"type": "boolean"}, {"type": "null"}, {"const": "yes"}, {"const": 3.5}, {"const": None}, DAY)
    yield from (
        {"enum": [1, 2, 3]},
        {"enum": [1, "1", None, True, 1.5]},
        {"enum": ["é", '"quoted"', "back\\slash", "line\nbreak", "日本"]},
    )
    yield {"enum": [{"a": 1}, [1, 2], {}]}
    for low, high in ((0, 9), (-5, 5), (10, 10), (-1000, -1), (1, 65535), (0, 10**9), (99, 101), (-(2**31), 2**31 - 1)):
        yield {"type": "integer", "minimum": low, "maximum": high}
        yield {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}
    for low, high in ((0, 1), (-1.5, 1.5), (0.25, 0.5), (-100, -99.5), (1e-3, 1e3)):
        yield {"type": "number", "minimum": low, "maximum": high}
        yield {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
    for step in (2, 3, 7, 10, 125):
        yield {"type": "integer", "multipleOf": step, "minimum": -1000, "maximum": 1000}
    for step in (0.5, 0.25, 3):
        yield {"type": "number", "multipleOf": step, "minimum": 0, "maximum": 50}


def texts() -> Iterator[Schema]:
    """Level 2: strings."""
    for low, high in ((0, 0), (1, 1), (0, 5), (3, 8), (20, 40), (0, 200)):
        yield {"type": "string", "minLength": low, "maxLength": high}
    for pattern in (
        "^a$", "^[a-z]+$", "^[A-Z]{2}[0-9]{3}$", "^\\d{3}-\\d{4}$", "^(red|green|blue)$", "^#[0-9a-f]{6}$", "^\\w{1,8}$",
        "^[^\"\\\\]{1,6}$", "^v\\d+\\.\\d+\\.\\d+$", "^.{3}$", "^[ -~]{2,10}$", "^(ab){2,3}c?$", "^\\S{1,9}$", "^[à-ü]{2,4}$",
        "^(?:[a-z]+/){0,2}[a-z]+$", "^[+-]?\\d{1,6}(\\.\\d{1,2})?$", "^$", "^\\$\\d{1,4}$", "^[^\\s]{2,5}$", "^a|b$", "[0-9]$",
    ):  # fmt: skip
        yield {"type": "string", "pattern": pattern, "maxLength": 24}
    for name in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"):
        yield {"type": "string", "format": name}
        yield closed({"value": {"type": "string", "format": name, "maxLength": 60}, "note": WORD})
    yield {"type": "string", "format": "date", "pattern": "^20"}


def objects() -> Iterator[Schema]:
    """Level 3: objects and arrays of one kind."""
    kinds: list[Any] = [
        WORD,
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "boolean"},
        DAY,
        {"type": "null"},
    ]
    for size in (0, 1, 2, 3, 5, 8, 13):
        properties = {f"field_{at}": kinds[at % len(kinds)] for at in range(size)}
        yield closed(properties)
        yield closed(properties, *list(properties)[::2])
        yield {"type": "object", "properties": properties}
    for low, high in ((0, 0), (0, 3), (1, 1), (2, 4), (5, 5), (3, 12)):
        for kind in kinds[:4]:
            yield {"type": "array", "items": kind, "minItems": low, "maxItems": high}
    for name in (
        "naïve",
        "日本語",
        "with space",
        'quo"te',
        "back\\slash",
        "tab\there",
        "emoji 🙂",
        "a/b~c",
        "",
        "$ref",
        "type",
        "}{",
        "<tool_call>",
    ):
        yield closed({name: WORD, "other": {"type": "boolean"}})
    yield {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9},
        "maxProperties": 2,
    }
    yield {
        "type": "object",
        "properties": {"a": WORD, "b": WORD, "c": DAY},
        "minProperties": 1,
        "additionalProperties": False,
    }
    yield {"type": "object", "properties": {"a": WORD, "b": WORD}, "minProperties": 2, "additionalProperties": False}
    yield {
        "type": "object",
        "patternProperties": {"^x-[a-z]{1,4}$": DAY},
        "additionalProperties": False,
        "maxProperties": 3,
    }
    yield {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 1,
    }
    yield {"properties": {"kind": DAY}, "required": ["kind"]}
    yield {
        "type": "array",
        "prefixItems": [WORD, {"type": "integer", "minimum": 0, "maximum": 9}],
        "items": False,
        "minItems": 2,
    }
    yield {"type": "array", "prefixItems": [DAY, DAY], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}
    yield {"type": "array", "items": DAY, "uniqueItems": True, "maxItems": 1}


def unions() -> Iterator[Schema]:
    """Level 4: alternatives and conjunctions."""
    point = closed(
        {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "y": {"type": "integer", "minimum": -9, "maximum": 9}}
    )
    cat = closed({"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}})
    dog = closed({"kind": {"const": "dog"}, "name": WORD})
    yield from (
        {"anyOf": [WORD, {"type": "null"}]},
        {"type": ["string", "null"], "maxLength": 9},
        {"type": ["integer", "boolean"], "minimum": 3, "maximum": 7},
    )
    yield from (
        {"anyOf": [cat, dog]},
        {"oneOf": [cat, dog]},
        {"anyOf": [point, {"type": "array", "items": DAY, "maxItems": 2}, DAY]},
    )
    yield {
        "oneOf": [
            {"type": "object", "properties": {"a": WORD}, "required": ["a"]},
            {"type": "object", "properties": {"b": WORD}, "required": ["b"]},
        ]
    }
    yield {
        "oneOf": [
            WORD,
            {"type": "integer", "minimum": 0, "maximum": 9},
            {"type": "array", "items": WORD, "maxItems": 1},
        ]
    }
    yield {
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "discriminator": {"propertyName": "kind"},
        "$defs": {"Cat": {"title": "Cat", "type": "object", "properties": {"kind": {"const": "cat", "default": "cat"}, "age": DAY}},
                  "Dog": {"title": "Dog", "type": "object", "properties": {"kind": {"const": "dog", "default": "dog"}, "age": DAY}}},
    }  # fmt: skip
    yield {
        "allOf": [
            {"type": "object", "properties": {"a": DAY}, "required": ["a"]},
            {"type": "object", "properties": {"b": DAY}, "required": ["b"], "maxProperties": 9},
        ][:1]
    }
    yield {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}, {"multipleOf": 2}]}
    yield {"allOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "z$"}, {"maxLength": 6}]}
    yield {
        "type": "object",
        "properties": {"a": DAY, "b": DAY},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": False,
    }
    yield {
        "anyOf": [{"type": "string", "maxLength": 3}, {"type": "string", "pattern": "^zz", "maxLength": 6}],
        "minLength": 2,
    }
    for size in (2, 4, 8):
        yield {
            "anyOf": [
                closed({"tag": {"const": f"t{at}"}, f"v{at}": {"type": "integer", "minimum": at, "maximum": at * 10}})
                for at in range(size)
            ]
        }
        yield closed({f"f{at}": {"anyOf": [DAY, {"type": "null"}, point]} for at in range(size)})
    for types in (["string", "null"], ["integer", "null"], ["boolean", "string", "null"]):
        yield closed(
            {
                "a": {"type": types, "maxLength": 8, "minimum": 0, "maximum": 50},
                "b": {"type": types, "maxLength": 3, "minimum": 0, "maximum": 5},
            }
        )


def nested() -> Iterator[Schema]:
    """Level 5: nesting, references, recursion."""
    for depth in range(2, 13):
        schema: Any = DAY
        for _ in range(depth):
            schema = closed({"in": schema, "n": {"type": "integer", "minimum": 0, "maximum": 3}})
        yield schema
        schema = {"type": "integer", "minimum": 0, "maximum": 1}
        for _ in range(depth // 2):
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 2}
        yield schema
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    node = closed({"value": digit, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Node"}]}})
    yield {"$defs": {"Node": node}, "$ref": "#/$defs/Node"}
    yield closed({"head": {"$ref": "#/$defs/Node"}, "size": digit}, **{"$defs": {"Node": node}})
    yield closed({"value": digit, "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}})
    yield {
        "definitions": {"a/b": DAY, "c~d": digit},
        **closed({"x": {"$ref": "#/definitions/a~1b"}, "y": {"$ref": "#/definitions/c~0d"}}),
    }
    yield closed({"first": DAY, "second": {"$ref": "#/properties/first"}})
    tree = closed(
        {
            "op": {"enum": ["+", "*"]},
            "args": {"type": "array", "items": {"$ref": "#/$defs/Expr"}, "minItems": 2, "maxItems": 2},
        }
    )
    yield {"$defs": {"Expr": {"anyOf": [digit, tree]}}, "$ref": "#/$defs/Expr"}
    yield {
        "$defs": {
            "A": closed({"b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/B"}]}}),
            "B": closed({"a": {"$ref": "#/$defs/A"}}),
        },
        "$ref": "#/$defs/A",
    }


def big() -> Iterator[Schema]:
    """Level 6: what people send, and large mixtures of all of it, from a seeded source."""
    yield {
        "title": "Invoice", "type": "object", "description": "An invoice",
        "$defs": {
            "Line": {"title": "Line", "type": "object", "required": ["sku", "count"], "properties": {
                "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}, "count": {"type": "integer", "exclusiveMinimum": 0, "maximum": 99},
                "note": {"anyOf": [{"type": "string", "maxLength": 10}, {"type": "null"}], "default": None}}},
        },
        "properties": {
            "number": {"type": "string", "pattern": "^INV[0-9]{6}$"}, "issued": {"type": "string", "format": "date"},
            "currency": {"enum": ["EUR", "USD", "CHF"]}, "paid": {"type": "boolean", "default": False},
            "lines": {"type": "array", "items": {"$ref": "#/$defs/Line"}, "minItems": 1, "maxItems": 2},
        },
        "required": ["number", "issued", "currency", "paid", "lines"],
    }  # fmt: skip
    yield closed({f"choice_{at}": {"enum": [f"option {at}.{n}" for n in range(20)]} for at in range(20)})
    yield {"enum": [f"value number {at}" for at in range(500)]}
    yield closed({f"p{at}": {"type": "boolean"} for at in range(100)}, *[f"p{at}" for at in range(1, 100)])
    source = random.Random(20261123)
    for at in range(60):
        yield mixture(source, 1 + at // 15)


def mixture(source: random.Random, depth: int) -> dict[str, Any]:
    """A random object whose values nest at most `depth` deep."""

    def value(depth: int) -> Any:
        leaves: list[Any] = [
            DAY, WORD, {"type": "boolean"}, {"type": ["integer", "null"], "minimum": 0, "maximum": source.randint(1, 5000)},
            {"type": "number", "minimum": -source.randint(0, 9), "maximum": source.randint(1, 99), "multipleOf": 0.5},
            {"type": "string", "format": source.choice(["date", "uuid", "ipv4", "email"]), "maxLength": 40},
            {"type": "string", "pattern": source.choice(["^[A-Z]{3}$", "^[a-z]+_[0-9]{2}$", "^(up|down)$"]), "maxLength": 12},
            {"const": source.choice([1, "fixed", None, False, {"deep": [1]}])},
        ]  # fmt: skip
        if not depth or source.random() < 0.4:
            return source.choice(leaves)
        kind = source.randrange(4)
        if kind == 0:
            low = source.randint(0, 2)
            return {"type": "array", "items": value(depth - 1), "minItems": low, "maxItems": low + source.randint(0, 2)}
        if kind == 1:
            return {"anyOf": [value(depth - 1), value(depth - 1), {"type": "null"}]}
        if kind == 2:
            return {"type": "array", "prefixItems": [value(depth - 1), value(0)], "items": False, "minItems": 2}
        return mixture(source, depth - 1)

    names = source.sample(
        ["id", "name", "größe", "tags", "at", "meta data", "状態", "x-y", "count", "ref"], source.randint(1, 4)
    )
    optional = [name for name in names if source.random() < 0.25]
    return closed({name: value(depth) for name in names}, *optional)


REFUSED: list[tuple[Any, str]] = [
    ({"type": "integer", "not": {"const": 3}}, "not"),
    ({"type": "array", "items": DAY, "uniqueItems": True}, "uniqueItems"),
    ({"type": "string", "format": "ipv9"}, "format"),
    ({"type": "string", "format": "idn-email"}, "format"),
    ({"type": "string", "pattern": "^(?=a)b$"}, "pattern"),
    ({"type": "string", "pattern": "(a)\\1"}, "pattern"),
    ({"type": "string", "pattern": "\\bword\\b"}, "pattern"),
    ({"type": "string", "pattern": "(unclosed"}, "regex"),
    ({"type": "string", "pattern": "^((a{100}){100}){100}$"}, "repeats too much"),
    ({"type": "number", "multipleOf": 0.01}, "multipleOf"),
    ({"type": "number", "multipleOf": 0}, "multipleOf"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"oneOf": [{"type": "string"}, {"enum": ["a"]}]}, "oneOf"),
    ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
    ({"type": "array", "contains": DAY}, "contains"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "object", "properties": {"a": DAY, "b": DAY}, "maxProperties": 1}, "maxProperties"),
    ({"$ref": "https://example.com/schema.json"}, "$ref"),
    ({"$ref": "#/$defs/nowhere"}, "not found"),
    ({"$dynamicRef": "#node"}, "$dynamicRef"),
    ({"type": "bogus"}, "type"),
    ({"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]}, "without end"),
    ({"$ref": "#"}, "without end"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "enforce"),
    ({"type": "integer", "minimum": 1e300}, "minimum"),
    ({"enum": []}, "enum"),
    ({"type": "string", "enum": [1, 2]}, "enum"),
    ({"type": "object", "properties": []}, "object"),
    ({"type": "array", "minItems": 100000}, "minItems"),
    ({"type": "string", "minLength": 10**6}, "minLength"),
    ({"type": "string", "minLength": -1}, "minLength"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "enforce"),
    (False, "satisfy"),
]


def main() -> None:
    with open(HERE / "enforceable.jsonl", "w", encoding="utf-8") as file:
        for level, family in enumerate((scalars, texts, objects, unions, nested, big), 1):
            for at, schema in enumerate(family()):
                line = {"name": f"{family.__name__}_{at:03}", "level": level, "schema": schema}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with open(HERE / "refused.jsonl", "w", encoding="utf-8") as file:
        for schema, word in REFUSED:
            file.write(json.dumps({"word": word, "schema": schema}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
