"""Imports point down the list of rooms, never up and never in a circle; one file alone calls an engine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from house.sources import MODULES, Module, imports

# From top to bottom; docs/ARCHITECTURE.md shows the same list. A room may import those below it, and itself.
ROOMS = [
    ("", "cli", "keys", "repl", "doctor", "inprocess", "testing", "__main__"),
    ("server", "reload"),
    ("api", "importers"),
    ("dialogue", "knowledge", "jobs"),
    ("gateway",),
    ("safety",),
    ("accounts",),
    ("engines",),
    ("store",),
    ("core", "call", "direct", "turns", "config", "errors"),
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
BOTTOM = {"core": {"call", "errors"}, "call": {"errors"}, "config": {"core", "errors"}, "errors": set()}


def everything() -> list[tuple[Module, int, Module, tuple[str, ...]]]:
    return [
        (module, line, MODULES[name], taken) for module in MODULES.values() for line, name, taken in imports(module)
    ]


def test_every_module_has_its_room() -> None:
    assert {module.room for module in MODULES.values()} <= RANK.keys()


def test_no_import_points_upward() -> None:
    upward = [
        f"{module.where}:{line} imports {other.name}"
        for module, line, other, taken in everything()
        # the version stands in the package itself, which is always there
        if RANK[other.room] < RANK[module.room] and not (other.name == "tertulia" and taken == ("__version__",))
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("room", sorted(BOTTOM))
def test_the_bottom_stands_on_nothing(room: str) -> None:
    assert {other.room for _, name, _ in imports(MODULES[f"tertulia.{room}"]) for other in [MODULES[name]]} <= BOTTOM[
        room
    ]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The first circle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_circle_of_imports() -> None:
    graph: dict[str, set[str]] = {}
    for module, _, other, taken in everything():
        if module is not other and taken != ("__version__",):
            graph.setdefault(module.name, set()).add(other.name)
    found = cycle(graph)
    assert not found, " -> ".join(found)


def test_the_search_for_circles_finds_one() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_one_door_only_route_calls_an_engine() -> None:
    callers = {
        f"{module.where}:{node.lineno}"
        for module in MODULES.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "answer"
        # an engine made of parts may hand a call on to one of them, and nobody else
        if module.name != "tertulia.gateway.route" and module.room != "engines"
    }
    assert not callers, f"call it through gateway.pipeline: {sorted(callers)}"
    assert ".answer(" in MODULES["tertulia.gateway.route"].text


def test_the_order_of_the_stages_stands_in_one_place() -> None:
    order = [module.where for module in MODULES.values() if re.search(r"stages\b[^=\n]*= \[", module.text)]
    assert order == ["src/tertulia/server.py"]


@pytest.mark.parametrize(
    ("what", "without"),
    [
        ("tertulia", ["openai", "uvicorn", "sqlalchemy", "xllamacpp", "tertulia.server"]),
        ("tertulia.cli", ["openai", "uvicorn", "sqlalchemy", "xllamacpp", "huggingface_hub", "tertulia.server"]),
        ("tertulia.server", ["openai", "torch", "xllamacpp", "huggingface_hub", "pytest"]),
    ],
)
def test_what_is_heavy_is_imported_when_it_is_needed(what: str, without: list[str]) -> None:
    program = f"import sys, {what}; print([name for name in {without!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
