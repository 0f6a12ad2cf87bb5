"""The documentation names everything there is, and nothing that is not."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from house.sources import MODULES, ROOT
from tertulia.cli import build_parser
from tertulia.config import LocalModel, Policy, Route, RouteTarget, Settings, Upstream, load
from tertulia.core import Preset

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
API = (DOCS / "api.md").read_text(encoding="utf-8")
SOURCE = "\n".join(module.text for module in MODULES.values())


def build() -> Any:
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = build()


@pytest.mark.parametrize("page", sorted(BUILD.PAGES))
def test_generated_pages_are_current(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == BUILD.PAGES[page](), "run: .venv/bin/python docs/build.py"


def test_every_setting_is_documented_and_does_something() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    others = "\n".join(module.text for name, module in MODULES.items() if name != "tertulia.config")
    for shape in (Settings, LocalModel, Upstream, Preset, Route, RouteTarget, Policy):
        for name in shape.__struct_fields__:
            assert f"`{name}`" in text or f"`[{name}]`" in text, name
            assert re.search(rf"\.{name}\b", others) or name == "config", f"{shape.__name__}.{name} changes nothing"


def test_every_command_is_documented() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, parser in BUILD.commands(build_parser()).items():
        assert f"\n## tertulia {name}\n" in text
        for action in parser._actions:
            assert all(f"`{flag}`" in text for flag in action.option_strings if flag not in ("-h", "--help"))


def paths() -> set[str]:
    """Every path that a Route or a Task is made with."""
    found = set()
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                "Route",
                "WebSocketRoute",
                "Task",
            ):
                found |= {
                    one.value
                    for one in node.args
                    if isinstance(one, ast.Constant) and isinstance(one.value, str) and one.value.startswith("/")
                }
    return {re.sub(r":\w+}", "}", path) for path in found}


def test_every_path_is_documented_and_every_documented_path_exists() -> None:
    documented = set(re.findall(r"^\| `(?:[A-Z]+ )(/\S*)` \|", API, re.MULTILINE))
    assert documented == paths() and len(documented) > 5


def test_every_header_of_ours_is_documented_and_every_documented_one_exists() -> None:
    used = set(re.findall(r"x-tertulia-[a-z]+(?:-[a-z]+)*", SOURCE))
    assert used == set(re.findall(r"x-tertulia-[a-z]+(?:-[a-z]+)*", API)) and used
    for header in set(
        re.findall(r"b?[\"'\s](x-ratelimit-[a-z-]+|openai-[a-z]+(?:-[a-z]+)*|x-request-id)(?=: )", SOURCE)
    ):
        assert f"`{header}`" in API, header


def test_every_error_code_with_a_class_of_its_own_is_documented() -> None:
    for code in re.findall(r"^    code = \"(\w+)\"", MODULES["tertulia.errors"].text, re.MULTILINE):
        assert f"`{code}`" in API, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        assert where.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", where.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


def blocks(kind: str) -> list[tuple[str, str]]:
    """(page:line, text) of every fenced block whose info string is kind."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{re.escape(kind)}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            found.append((f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}", match[1]))
    return found


@pytest.mark.parametrize(("where", "text"), blocks("toml"), ids=[where for where, _ in blocks("toml")])
def test_every_configuration_in_the_docs_is_a_valid_one(where: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(text, encoding="utf-8")
    load({"config": str(tmp_path / "t.toml")}, {})


@pytest.mark.parametrize(("where", "text"), blocks("bash"), ids=[where for where, _ in blocks("bash")])
def test_every_command_in_the_docs_exists(where: str, text: str) -> None:
    commands = BUILD.commands(build_parser())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in text.splitlines():
        words = re.sub(r"\s#.*", "", line).split()
        if words[:1] == ["tertulia"]:
            name = next(name for name in commands if words[1:][: len(name.split())] == name.split())
            options = {flag for action in commands[name]._actions for flag in action.option_strings}
            assert {word for word in words if word.startswith("-")} <= options, line
        elif words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line


def test_architecture_lists_every_room() -> None:
    text = (DOCS / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for module in MODULES.values():
        if module.room and module.room != "__main__":
            assert re.search(rf"\b{module.room}\b", text), module.room
    assert len(text.split()) < 1700, "two pages and a half"
