"""What is wrong with a body, said in OpenAI's words: every kind of rule, and bodies that are no JSON."""

# ruff: noqa: E501  (tables of messages as they are sent)
from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from msgspec import Meta

from tertulia.api.decode import NOT_JSON, decode
from tertulia.errors import BadRequest


class Inner(msgspec.Struct):
    kind: Literal["a", "b", "c"]
    name: Annotated[str, Meta(min_length=1, max_length=3)] = "x"


class Shape(msgspec.Struct):
    must: str
    whole: Annotated[int, Meta(ge=1, le=5)] | None = None
    real: Annotated[float, Meta(gt=0, lt=1)] | None = None
    yes: bool | None = None
    some: Annotated[list[int], Meta(min_length=2, max_length=3)] | None = None
    text: str | list[str] | None = None
    inner: Inner | None = None
    inners: list[Inner] | None = None
    two: Literal["in", "out"] | None = None
    one: Literal["only"] | None = None
    pairs: dict[Annotated[str, Meta(max_length=4)], Annotated[str, Meta(max_length=5)]] | None = None
    weights: Annotated[dict[str, Annotated[float, Meta(le=100)]], Meta(max_length=2)] | None = None
    nested: dict[str, Inner] | None = None


DECODER = msgspec.json.Decoder(Shape)


def wrong(body: bytes | dict[str, Any]) -> BadRequest:
    with pytest.raises(BadRequest) as error:
        decode(DECODER, body if isinstance(body, bytes) else msgspec.json.encode({"must": "", **body}))
    return error.value


def of(body: bytes | dict[str, Any]) -> tuple[str, str | None, str | None]:
    error = wrong(body)
    return error.message, error.param, error.code


def kind(param: str, expected: str, got: str) -> tuple[str, str, str]:
    return f"Invalid type for '{param}': expected {expected}, but got {got} instead.", param, "invalid_type"


def bound(param: str, noun: str, side: str, sign: str, limit: str, got: str) -> tuple[str, str, str]:
    text = f"Invalid '{param}': {noun} {side} value. Expected a value {sign} {limit}, but got {got} instead."
    return text, param, f"{noun}_{'below_min' if 'below' in side else 'above_max'}_value"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"whole": "1"}, kind("whole", "an integer", "a string")),
        ({"whole": 1.5}, kind("whole", "an integer", "a decimal")),
        ({"whole": True}, kind("whole", "an integer", "a boolean")),
        ({"real": "1"}, kind("real", "a decimal", "a string")),
        ({"real": {}}, kind("real", "a decimal", "an object")),
        ({"yes": 1}, kind("yes", "a boolean", "an integer")),
        ({"must": None}, kind("must", "a string", "null")),
        ({"some": 1}, kind("some", "an array", "an integer")),
        ({"some": [1, "2"]}, kind("some[1]", "an integer", "a string")),
        ({"inner": []}, kind("inner", "an object", "an array")),
        ({"inners": [{"kind": "a"}, 3]}, kind("inners[1]", "an object", "an integer")),
        ({"text": 3}, kind("text", "one of a string or an array", "an integer")),
        ({"text": ["a", 3]}, kind("text[1]", "a string", "an integer")),
        ({"two": 3}, kind("two", "a string", "an integer")),
        ({"whole": 0}, bound("whole", "integer", "below minimum", ">=", "1", "0")),
        ({"whole": 6}, bound("whole", "integer", "above maximum", "<=", "5", "6")),
        ({"whole": 2**80}, bound("whole", "integer", "above maximum", "<=", "5", str(2**80))),
        ({"real": 0}, bound("real", "decimal", "below minimum", ">", "0", "0")),
        ({"real": 1.0}, bound("real", "decimal", "above maximum", "<", "1", "1.0")),
    ],
)
def test_types_and_bounds(body: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert of(body) == expected


@pytest.mark.parametrize(
    ("body", "text", "param", "code"),
    [
        ({"inner": {"kind": "a", "name": ""}}, "'inner.name': empty string. Expected a non-empty string, but got a string "
         "with length 0 instead.", "inner.name", "empty_string"),
        ({"inner": {"kind": "a", "name": "four"}}, "'inner.name': string too long. Expected a string with maximum length "
         "3, but got a string with length 4 instead.", "inner.name", "string_above_max_length"),
        ({"some": []}, "'some': empty array. Expected an array with minimum length 2, but got an empty array instead.",
         "some", "empty_array"),
        ({"some": [1]}, "'some': array too short. Expected an array with minimum length 2, but got an array with length 1 "
         "instead.", "some", "array_below_min_length"),
        ({"some": [1] * 4}, "'some': array too long. Expected an array with maximum length 3, but got an array with "
         "length 4 instead.", "some", "array_above_max_length"),
        ({"weights": {"a": 1, "b": 1, "c": 1}}, "'weights': too many properties. Expected an object with at most 2 "
         "properties, but got an object with 3 properties instead.", "weights", "object_above_max_properties"),
    ],
)  # fmt: skip
def test_lengths(body: dict[str, Any], text: str, param: str, code: str) -> None:
    assert of(body) == (f"Invalid {text}", param, code)


@pytest.mark.parametrize(
    ("body", "text", "param"),
    [
        ({"inner": {"kind": "z"}}, "'z'. Supported values are: 'a', 'b', and 'c'.", "inner.kind"),
        ({"inners": [{"kind": "a"}, {"kind": "z"}]}, "'z'. Supported values are: 'a', 'b', and 'c'.", "inners[1].kind"),
        ({"two": "z"}, "'z'. Supported values are: 'in' and 'out'.", "two"),
        ({"one": "z"}, "'z'. Supported values are: 'only'.", "one"),
        ({"nested": {"k": {"kind": "z"}}}, "'z'. Supported values are: 'a', 'b', and 'c'.", "nested.k.kind"),
        ({"two": "z" * 100}, f"'{'z' * 61}...'. Supported values are: 'in' and 'out'.", "two"),
    ],
)
def test_choices(body: dict[str, Any], text: str, param: str) -> None:
    assert of(body) == (f"Invalid value: {text}", param, "invalid_value")


@pytest.mark.parametrize(
    ("body", "param"), [(b"{}", "must"), ({"inner": {}}, "inner.kind"), ({"inners": [{}]}, "inners[0].kind"),
                        ({"nested": {"ok": {"kind": "a"}, "k": {}}}, "nested.k.kind")],
)  # fmt: skip
def test_what_is_missing(body: bytes | dict[str, Any], param: str) -> None:
    assert of(body) == (f"Missing required parameter: '{param}'.", param, "missing_required_parameter")


def test_an_entry_of_a_mapping_is_named_and_quoted() -> None:
    text = "string too long. Expected a string with maximum length 5, but got a string with length 6 instead."
    assert of({"pairs": {"fine": "abc", "a.b": "abcdef"}}) == (
        f"Invalid 'pairs.a.b': {text}", "pairs.a.b", "string_above_max_length",
    )  # fmt: skip
    assert of({"pairs": {"a": 1}}) == kind("pairs.a", "a string", "an integer")
    assert of({"weights": {"a": 1, "b": 100.5}}) == bound("weights.b", "decimal", "above maximum", "<=", "100", "100.5")


def test_a_key_of_a_mapping() -> None:
    assert of({"pairs": {"a": "", "abcdefg": ""}}) == (
        "Invalid key in 'pairs': string too long. Expected a string with maximum length 4, but got a string with length 7 "
        "instead.", "pairs", "string_above_max_length",
    )  # fmt: skip


def test_a_key_given_twice_of_which_the_first_is_wrong() -> None:
    assert of(b'{"must": "", "pairs": {"a": 1, "a": "fine"}}') == kind("pairs", "a string", "an integer")


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"x"', b"true", b"1.5"])
def test_a_body_that_is_no_object(body: bytes) -> None:
    message, param, code = of(body)
    assert message.startswith("Invalid body: expected an object, but got ") and (param, code) == (None, "invalid_type")


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b'{"must": }', b'{"must": ""} x', b"must=x", b"\xff\xfe", b'{"must": "\xff"}', b"[" * 100_000,
        b'{"must": "", "x": ' + b"[" * 100_000, b'{"must": "", "real": NaN}', b'{"must": "\\ud800"}',
        b'{"must": "", "whole": 0, broken', b'{"must": "", "pairs": {"a": 1}, "x": ' + b"[" * 100_000, b"{'must': ''}",
    ],
)  # fmt: skip
def test_what_is_not_json(body: bytes) -> None:
    assert of(body) == (NOT_JSON, None, None)


def test_null_is_the_default_and_unknown_fields_travel_on() -> None:
    assert decode(DECODER, b'{"must": "x", "whole": null, "pairs": null, "other": [1]}') == Shape("x")


ANYTHING = some.recursive(
    some.none()
    | some.booleans()
    | some.integers()
    | some.floats(allow_nan=False, allow_infinity=False)
    | some.text(max_size=6),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(some.fixed_dictionaries({}, optional=dict.fromkeys(Shape.__struct_fields__, ANYTHING)))
def test_whatever_comes_it_is_a_struct_or_a_bad_request_with_a_message(body: dict[str, Any]) -> None:
    try:
        decode(DECODER, msgspec.json.encode(body))
    except BadRequest as error:
        assert error.message.endswith(".") and error.param and error.code
        assert error.param.replace("[", ".").split(".")[0] in Shape.__struct_fields__
