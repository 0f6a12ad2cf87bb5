"""The program as house tests see it: every module's path, text and syntax tree, and who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of src/tertulia; name as it is imported."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """The first part of the name below tertulia: "gateway" for tertulia.gateway.route; "" for tertulia itself."""
        return [*self.name.split("."), ""][1]

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def modules() -> dict[str, Module]:
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


MODULES = modules()


def imports(module: Module) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, module of ours, names taken from it) of every import that runs, wherever it stands."""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    for node in _running(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "tertulia":
                    yield node.lineno, _nearest(alias.name), ()
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] != "tertulia":
                continue
            taken = {alias.name for alias in node.names}
            below = {name for name in taken if f"{base}.{name}" in MODULES}
            for name in sorted(below):
                yield node.lineno, f"{base}.{name}", ()
            if taken - below:
                yield node.lineno, _nearest(base), tuple(sorted(taken - below))


def _nearest(name: str) -> str:
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from _running(other)
            continue
        yield child
        yield from _running(child)
