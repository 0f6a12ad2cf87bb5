"""Schemas become grammars: whatever a grammar admits validates, and what cannot be enforced is refused.

The walks are random and adversarial: at each byte any byte that the grammar admits may come.
"""

# ruff: noqa: E501 - tables of cases read better one case a line
from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tertulia.engines import schemas
from tertulia.errors import BadRequest
from walks import walk

CORPUS = Path(__file__).parents[2] / "schemas"
ENFORCEABLE = [json.loads(line) for line in (CORPUS / "enforceable.jsonl").read_text("utf-8").splitlines()]
REFUSED = [json.loads(line) for line in (CORPUS / "refused.jsonl").read_text("utf-8").splitlines()]


def complaints(schema: Any, text: bytes) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    return [error.message for error in validator.iter_errors(json.loads(text))]


def test_the_judge_is_the_release_inside_the_engine() -> None:
    """What another release of llguidance lets pass, the engine may silently drop."""

    def inside(package: str) -> set[bytes]:
        place = importlib.util.find_spec(package)
        assert place is not None and place.origin is not None
        found = [path.read_bytes() for path in Path(place.origin).parent.glob("*.so")]
        return {version for data in found for version in re.findall(rb"derivre-([0-9.]+[0-9])", data)}

    assert inside("llguidance") and inside("llguidance") == inside("xllamacpp")


def test_the_corpus_is_large() -> None:
    assert len(ENFORCEABLE) >= 200
    assert {line["level"] for line in ENFORCEABLE} == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5, 6])
def test_what_the_grammar_admits_validates(level: int) -> None:
    ended = 0
    for line in ENFORCEABLE:
        if line["level"] != level:
            continue
        source = random.Random(line["name"])
        grammar = "%llguidance {}\nstart: " + schemas.enforced(line["schema"])
        for _ in range(2):
            text = walk(grammar, source)
            if text is None:
                continue
            ended += 1
            assert complaints(line["schema"], text) == [], (line["name"], text)
    assert ended >= 40


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: json.dumps(line["schema"])[:60])
def test_what_cannot_be_enforced_is_refused(line: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        schemas.schema_grammar({"type": "json_schema", "json_schema": {"name": "n", "schema": line["schema"]}})
    assert caught.value.param == "response_format"
    assert caught.value.message.startswith("Invalid schema for response_format 'n': In context=(")
    assert line["word"] in caught.value.message


def test_functions_name_their_parameters() -> None:
    with pytest.raises(BadRequest) as caught:
        schemas.function_rule(
            "f", {"type": "object", "properties": {"a": {"not": {}}}}, False, "tools[2].function.parameters"
        )
    assert caught.value.param == "tools[2].function.parameters"
    assert caught.value.code == "invalid_function_parameters"
    assert "Invalid schema for function 'f': In context=('properties', 'a'), 'not'" in caught.value.message
    with pytest.raises(BadRequest, match='type: "object"'):
        schemas.function_rule("f", {"type": "array"}, False, "p")
    for nothing in (None, {}):
        assert walk("start: " + schemas.function_rule("f", nothing, False, "p"), random.Random(1)) == b"{}"


STRICT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({**STRICT, "additionalProperties": True}, "In context=(), 'additionalProperties' is required to be supplied and to be false."),
        ({**STRICT, "required": []}, "In context=(), 'required' is required to be supplied and to be an array including every key in properties. Missing 'a'."),
        ({**STRICT, "properties": {"a": {"type": "object", "properties": {}}}}, "In context=('properties', 'a'), 'additionalProperties' is required"),
        ({**STRICT, "$defs": {"x": {"type": "object", "properties": {}}}}, "In context=('$defs', 'x'), 'additionalProperties' is required"),
        ({"type": "array", "items": STRICT}, "schema must be a JSON Schema of 'type: \"object\"', got 'type: \"array\"'."),
        ({**STRICT, "bogus": 1}, "In context=(), 'bogus' is not permitted."),
    ],
)  # fmt: skip
def test_strict_asks_what_openai_asks(schema: dict[str, Any], message: str) -> None:
    spec = {"name": "n", "schema": schema, "strict": True}
    with pytest.raises(BadRequest) as caught:
        schemas.schema_grammar({"type": "json_schema", "json_schema": spec})
    assert message in caught.value.message


def test_strict_admits_what_pydantic_sends() -> None:
    schema = {
        "$defs": {"Step": {"properties": {"why": {"title": "Why", "type": "string", "maxLength": 9}}, "required": ["why"],
                           "title": "Step", "type": "object", "additionalProperties": False}},
        "properties": {"steps": {"items": {"$ref": "#/$defs/Step"}, "title": "Steps", "type": "array"},
                       "final": {"anyOf": [{"type": "string"}, {"type": "null"}], "title": "Final"}},
        "required": ["steps", "final"], "title": "Answer", "type": "object", "additionalProperties": False,
    }  # fmt: skip
    grammar = schemas.schema_grammar(
        {"type": "json_schema", "json_schema": {"name": "Answer", "schema": schema, "strict": True}}
    )
    assert grammar is not None
    for seed in range(20):
        text = walk(grammar, random.Random(seed))
        assert text is None or complaints(schema, text) == []


@pytest.mark.parametrize(
    ("response_format", "param", "code"),
    [
        ({"type": "yaml"}, "response_format.type", "invalid_value"),
        ({"type": "json_schema"}, "response_format.json_schema", "missing_required_parameter"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.name", "missing_required_parameter"),
        ({"type": "json_schema", "json_schema": {"name": "a b"}}, "response_format.json_schema.name", "invalid_value"),
        ({"type": "json_schema", "json_schema": {"name": "a" * 65}}, "response_format.json_schema.name", "invalid_value"),
    ],
)  # fmt: skip
def test_malformed_formats_are_named(response_format: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as caught:
        schemas.schema_grammar(response_format)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_text_and_json_object() -> None:
    assert schemas.schema_grammar({"type": "text"}) is None
    grammar = schemas.schema_grammar({"type": "json_object"})
    assert grammar is not None
    ended = [text for seed in range(20) if (text := walk(grammar, random.Random(seed))) is not None]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)


def test_too_large_or_too_deep_is_refused() -> None:
    deep: Any = {"type": "string"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(schemas.Unenforceable, match="too deeply"):
        schemas.enforced(deep)
    with pytest.raises(schemas.Unenforceable, match="larger than"):
        schemas.enforced({"enum": ["x" * schemas.MAX_BYTES]})
    for _ in range(2000):
        deep = {"items": deep}
    with pytest.raises(schemas.Unenforceable):
        schemas.enforced(deep)


def test_unknown_words_are_ignored_and_properties_keep_their_order() -> None:
    schema = {
        "type": "object",
        "properties": {"z": {"type": "null", "x-order": 1}, "a": {"type": "null"}},
        "required": ["z", "a"],
        "strange": 1,
    }
    assert walk("start: " + schemas.enforced(schema), random.Random(1)) == b'{"z":null,"a":null}'
