"""What is written is what a reader of TOML reads."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tertulia.importers import toml

TEXTS = st.text(st.characters(codec="utf-8"))
PLAIN = TEXTS | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=8)


@given(st.dictionaries(TEXTS, VALUES.filter(lambda value: value != {})))
def test_everything_comes_back(values: dict[str, Any]) -> None:
    assert tomllib.loads(toml.write(values)) == values


def test_how_it_looks() -> None:
    assert (
        toml.write({"b": {"x.y": {"k": [1, "t"]}}, "a": True, "empty": {}}) == 'a = true\n\n[b."x.y"]\nk = [1, "t"]\n'
    )


def test_what_toml_does_not_have() -> None:
    with pytest.raises(TypeError, match="TOML has no NoneType"):
        toml.write({"a": None})
