"""Writes TOML: tables of texts, numbers, yes/no, lists and tables, as configuration files have them. It knows no
setting."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def write(values: Mapping[str, Any]) -> str:
    """A TOML document: plain values first, then a [section] for each table, [section.NAME] for a table of tables."""
    plain = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    blocks = ["".join(f"{key(name)} = {inline(value)}\n" for name, value in plain.items())]
    for name, table in values.items():
        if isinstance(table, Mapping) and table:
            blocks += _sections([name], table)
    return "\n".join(block for block in blocks if block)


def _sections(path: list[str], table: Mapping[str, Any]) -> list[str]:
    if all(isinstance(value, Mapping) for value in table.values()):
        return [_section([*path, name], value) for name, value in table.items()]
    return [_section(path, table)]


def _section(path: list[str], table: Mapping[str, Any]) -> str:
    head = ".".join(key(name) for name in path)
    return f"[{head}]\n" + "".join(f"{key(name)} = {inline(value)}\n" for name, value in table.items())


def key(name: str) -> str:
    return name if BARE.fullmatch(name) else text(name)


def text(value: str) -> str:
    """A basic string: JSON's escapes are TOML's too, but for the one control character that JSON leaves alone."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def inline(value: Any) -> str:
    """A value on one line; a list of tables has one on each. Raises TypeError for what TOML does not have."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key(name)} = {inline(one)}" for name, one in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        if value and all(isinstance(one, Mapping) for one in value):
            return "[\n" + "".join(f"  {inline(one)},\n" for one in value) + "]"
        return "[" + ", ".join(inline(one) for one in value) + "]"
    raise TypeError(f"TOML has no {type(value).__name__}")
