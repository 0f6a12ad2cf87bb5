"""Smoke alarms: what separates the clean from the tangled, counted. Run with -rP to see the figures."""

from __future__ import annotations

import ast
import re

from house.sources import MODULES, ROOT, Module

LONGEST = 50  # lines of a function
DOCUMENTED = ("tertulia.core", "tertulia.errors", "tertulia.config", "tertulia.engines.base", "tertulia.gateway")


def reasons(module: Module) -> list[tuple[int, bool]]:
    """(line, has a comment there or on the next line) of every broad except."""
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type is not None else "everything"
            if re.search(r"\b(Exception|BaseException|everything)\b", caught):
                lines = module.lines[node.lineno - 1 : node.lineno + 1]
                found.append((node.lineno, any("#" in line for line in lines)))
    return found


def test_functions_are_short() -> None:
    functions = [(module, node) for module in MODULES.values() for node in module.functions()]
    long = [
        f"{module.where}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for module, node in functions
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > LONGEST
    ]
    print(f"functions over {LONGEST} lines: {len(long)} of {len(functions)} ({100 * len(long) / len(functions):.1f} %)")
    assert not long, "\n".join(long)


def test_a_broad_except_says_why() -> None:
    found = {module.where: reasons(module) for module in MODULES.values()}
    lines = sum(len(module.lines) for module in MODULES.values())
    count = sum(map(len, found.values()))
    print(f"broad excepts: {count} in {lines} lines ({1000 * count / lines:.2f} per thousand; at most 1.5)")
    silent = [f"{where}:{line}" for where, each in found.items() for line, told in each if not told]
    assert not silent, f"no reason given: {silent}"
    assert 1000 * count / lines <= 1.5


def test_every_module_says_what_it_knows() -> None:
    bare = [m.where for m in MODULES.values() if m.text.strip() and not ast.get_docstring(m.tree)]
    assert not bare, bare


def test_public_names_of_the_heart_are_documented() -> None:
    bare = []
    for module in MODULES.values():
        if not module.name.startswith(DOCUMENTED):
            continue
        for node in module.tree.body:
            inside = node.body if isinstance(node, ast.ClassDef) else []
            protocol = isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
            for one in [node, *([] if protocol else inside)]:
                if (
                    isinstance(one, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
                    and not one.name.startswith("_")
                    and one.name not in ("begin", "write", "end", "whole")  # a Sink's, documented by core.Sink
                    and not ast.get_docstring(one)
                    and not _is_stage(one)
                    and _says_more_than_its_name(one)
                ):
                    bare.append(f"{module.where}:{one.lineno} {one.name}")
    assert not bare, "\n".join(bare)


def _is_stage(node: ast.AST) -> bool:
    """A stage that is a function is documented by its module."""
    return isinstance(node, ast.AsyncFunctionDef) and [a.arg for a in node.args.args] == ["call", "following"]


def _says_more_than_its_name(node: ast.AST) -> bool:
    return not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) > 2 or len(node.args.args) > 2


def test_no_stray_names() -> None:
    vague = re.compile(r"(Manager|Service|Helper|Utils?)$")
    found = [
        f"{module.where}:{node.lineno} {node.name}"
        for module in MODULES.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and vague.search(node.name)
    ]
    found += [
        module.where for module in MODULES.values() if re.search(r"(helper|util|manager|common|misc)s?$", module.name)
    ]
    assert not found, found


ELSEWHERE = re.compile(r"(?<![\w.~{}/-])/(work|tmp|home|root|mnt)/")
REGISTRIES = re.compile(
    r"https?://[^\s\"']*(pypi|pythonhosted|simple/|artifact|nexus|devpi|mirror|proxy)|^\s*(--(extra-)?index-url|-i)\b",
    re.IGNORECASE | re.MULTILINE,
)


def test_nothing_names_the_machine_it_was_written_on() -> None:
    kept = [
        ROOT / name for name in ("Makefile", "pyproject.toml", "README.md", "CHANGELOG.md", ".ci/run", "bench/serve")
    ]
    for folder, ending in (("src", "*.py"), ("docs", "**/*.md"), ("examples", "*.py"), ("bench", "*.py")):
        kept += (ROOT / folder).rglob(ending)
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in kept
        if path.exists() and "/.data/" not in str(path)
        for match in ELSEWHERE.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_no_registry_is_named_where_packages_are_installed() -> None:
    kept = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci/run", *ROOT.glob("requirements*.lock"),
            *(ROOT / "tests/locks").glob("*.txt"), *(module.path for module in MODULES.values())]  # fmt: skip
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in kept
        for match in REGISTRIES.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
