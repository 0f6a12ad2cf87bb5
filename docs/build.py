"""Writes settings.md, cli.md, outcomes.md and admin-api.md from the tables, parsers and clients they are about: python
docs/build.py.

A test compares the files with what this would write, so they cannot be out of date.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from openai import OpenAI

from tertulia.api import usage
from tertulia.api.admin.kinds import Absent
from tertulia.api.admin.table import ELSEWHERE, ROWS
from tertulia.cli import build_parser
from tertulia.config import LocalModel, Policy, Route, RouteTarget, Setting, Settings, Upstream, table
from tertulia.core import Preset
from tertulia.repl import COMMANDS

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- Made by docs/build.py; do not edit. -->\n"

SETTINGS = """\
# Settings

Every setting can be given in four ways; the later wins: its default, a TOML file (`--config FILE` or
`TERTULIA_CONFIG`), an environment variable, a flag of `tertulia serve`. `tertulia.client(NAME=...)` takes the same
names. A name that does not exist, or a value that cannot be, is an error that names the key and the nearest right one.
"""
TARGETS = """\
Each target is such a table, or in one line: `targets = [{ upstream = "a", model = "x" }, { model = "b" }]`.\
"""
RELOAD = """
## A changed file

The file is read again when it changes (unless `watch` is off) and on SIGHUP. It is looked at twice a second, and read
when it is the same for two looks, so that one that is just being written is left alone. A file with a mistake, or with
nothing in it, changes nothing: the settings in force stay, and a line on standard error says what is wrong; a file that
is missing is said once. Otherwise a line says what has changed, and the new settings hold for every call that comes
after; calls under way go on as they began, on the upstream they have, even if it is gone for others. Keys
are read again from where `key` points. What cannot change while the server runs keeps its value until the next start,
and a line on standard error names it, once for each change.
"""
PRESET = {
    "model": "a model, alias or other preset that answers",
    "system": "system message put before the caller's messages",
    "examples": 'earlier turns: `[{ user = "...", assistant = "..." }]`',
    "parameters": "body parameters used where the caller gives none",
}


def spell(value: Any) -> str:
    """A default as TOML has it."""
    if value is None:
        return "not given"
    if value == "":
        return "empty"
    return f"`{msgspec.json.encode(value).decode()}`" if not isinstance(value, str) else f"`{value}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def rows(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    whole = [head, tuple("---" for _ in head), *lines]
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in whole)


def kind(row: Setting) -> str:
    """A setting's type, or the few texts it may be."""
    return ", ".join(f"`{choice}`" for choice in row.choices) or row.shape


def section(title: str, words: str, settings: list[Setting]) -> str:
    """One table such as [models.NAME]."""
    required = {field.name for field in msgspec.structs.fields(_shape(title)) if field.required}
    lines = [
        (
            f"`{row.name}`",
            kind(row),
            "required" if row.name in required else spell(row.default),
            row.help or PRESET[row.name],
        )
        for row in settings
    ]
    return f"\n## [{title}]\n\n{words}\n\n" + rows(("key", "type", "default", "what"), lines)


def _shape(title: str) -> type[msgspec.Struct]:
    return {
        "models.NAME": LocalModel, "presets.NAME": Preset, "upstreams.NAME": Upstream, "routes.NAME": Route,
        "routes.NAME.targets": RouteTarget, "policies.KEY_ID": Policy,
    }[title]  # fmt: skip


def settings_page() -> str:
    """docs/settings.md."""
    plain = [row for row in table(Settings) if row.plain]
    text = NOTE + SETTINGS + "\n## Plain settings\n\n"
    text += rows(
        ("TOML key", "environment", "type", "default", "what"),
        [(f"`{row.name}`", f"`{row.env}`", kind(row), spell(row.default), row.help) for row in plain],
    )
    text += (
        "\nThe flag of each is its name with dashes: `--memory-budget`; one of type yes/no has a `--no-` form too.\n"
    )
    text += "\n## Tables and lists\n\nIn the TOML file only.\n\n"
    text += rows(("TOML key", "what"), [
        (f"`{row.name}`" if row.shape == "list" else f"`[{row.name}]`", row.help)
        for row in table(Settings) if not row.plain
    ])  # fmt: skip
    text += section(
        "models.NAME", "A model of your own; NAME is what callers ask for. Give `file` or `source`.", table(LocalModel)
    )
    text += section("presets.NAME", "How-to: [how-to/presets.md](how-to/presets.md).", table(Preset))
    text += section("upstreams.NAME", "How-to: [how-to/upstreams.md](how-to/upstreams.md).", table(Upstream))
    text += section(
        "routes.NAME", "A model name with several targets behind; NAME is what callers ask for.", table(Route)
    )
    text += (
        section("routes.NAME.targets", TARGETS, table(RouteTarget)).replace("## [", "## [[").replace("]\n", "]]\n", 1)
    )
    text += section("policies.KEY_ID", "KEY_ID is the `key` of the access log's lines.", table(Policy))
    text += RELOAD
    return text


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, in the order of --help; one that has commands itself gives way to those."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                within = commands(one)
                found |= {f"{name} {rest}": each for rest, each in within.items()} if within else {name: one}
    return found


def about(parser: argparse.ArgumentParser) -> dict[str, str]:
    """What --help says of each command."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {one.dest: one.help or "" for one in action._choices_actions}
            for name, one in action.choices.items():
                found |= {f"{name} {rest}": help for rest, help in about(one).items()}
    return found


def sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def option(action: argparse.Action) -> tuple[str, str]:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    takes = bool(action.option_strings) and action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction)
    meta = action.metavar or action.dest.upper()
    what = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return names + (f" `{meta}`" if takes else ""), what


def cli_page() -> str:
    """docs/cli.md."""
    parser = build_parser()
    helps = about(parser)
    text = NOTE + "# Command line\n\n"
    found = commands(parser)
    links = {name: f"[`tertulia {name}`](#tertulia-{name.replace(' ', '-')})" for name in found}
    text += rows(("command", "what"), [(link, helps.get(name, "")) for name, link in links.items()])
    text += "\nExit codes: 0 done, 1 failed, 2 asked wrongly (unknown option, bad setting), 130 interrupted.\n"
    for name, command in found.items():
        text += f"\n## tertulia {name}\n\n{sentence(command.description or helps.get(name) or name)}\n\n"
        text += rows(("argument", "what"), [option(one) for one in command._actions if one.dest != "help"])
        if name == "chat":
            text += "\nWithin a conversation:\n\n"
            text += rows(
                ("command", "what"),
                [(f"`/{word} {takes}`".replace(" `", "`"), what) for word, (takes, what) in COMMANDS.items()],
            )
    return text


def outcomes_page() -> str:
    """docs/outcomes.md: the table that the tests of faults hold a server to."""
    spec = importlib.util.spec_from_file_location("outcomes", DOCS.parent / "tests" / "faults" / "outcomes.py")
    assert spec is not None and spec.loader is not None
    outcomes = sys.modules["outcomes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outcomes)
    return NOTE + str(outcomes.page())


ADMIN = """\
# Admin API reference

Every method that the official SDK has below `client.admin.organization`, made from the SDK and the server's own table:
`yes` means that it works as OpenAI's reference says; `no`, that it is answered with a 404 and the code `not_available`,
and nothing is done. How-to: [how-to/admin-api.md](how-to/admin-api.md).

Lists are read page by page with `after` and `limit`; `order` and `before` work where the SDK has them. A parameter that
is not known, of a body or a query, is a 400 with the code `unknown_parameter`; one that OpenAI has and this server has
not is a 400 with the code `unsupported_parameter`, unless it is null.
"""
NEVER = "always empty: nothing here feeds it"


def sdk_methods(part: Any, name: str = "") -> Iterator[str]:
    """The names of all methods of a part of the SDK's client."""
    for each in dir(part):
        if not each.startswith(("_", "with_")):
            found, path = getattr(part, each), f"{name}.{each}".lstrip(".")
            yield from [path] if inspect.ismethod(found) else sdk_methods(found, path)


def admin_methods() -> list[tuple[str, str, str]]:
    """(method, whether it works, what is to be known of it) for every one. A new one in the SDK is an error here."""
    ours = {row.sdk: row for row in ROWS if row.sdk is not None}
    used = {f"usage.{kind.path}": "" if kind.fed else NEVER for kind in usage.KINDS} | {"usage.costs": ""}
    found = []
    for name in sdk_methods(OpenAI(api_key="none", admin_api_key="none").admin.organization):
        reason = next((why for sdk, _, why in ELSEWHERE if name.startswith(f"{sdk}.")), None)
        if name in ours:
            row = ours[name]
            refused = [f"`{key}`" for key, kind in row.kind.takes.get(row.verb, {}).items() if kind is Absent]
            found.append((name, "yes", f"but not {', '.join(refused)}" if refused else ""))
        elif name in used:
            found.append((name, "yes", used[name]))
        elif reason is not None:
            found.append((name, "no", reason))
        else:
            raise LookupError(f"the SDK has {name}: put it into tertulia/api/admin/table.py")
    return found


def admin_page() -> str:
    """docs/admin-api.md."""
    methods = admin_methods()
    works = sum(1 for _, works, _ in methods if works == "yes")
    text = NOTE + ADMIN + f"\n## Methods of the SDK\n\n{works} of {len(methods)} work.\n\n"
    text += rows(("method", "works", "notes"), [(f"`{name}`", works, notes) for name, works, notes in methods])
    text += "\n## Tertulia's own\n\nWhat the SDK has no method for; `client.post(PATH, body=..., cast_to=object)`.\n\n"
    own = [row for row in ROWS if row.sdk is None]
    text += rows(("call", "parameters", "what"), [
        (f"`{row.method} /v1{row.path}`", ", ".join(f"`{name}`" for name in row.kind.takes[row.verb]),
         sentence((row.act.__doc__ or "").replace("Tertulia's own: ", "").split("\n\n")[0].replace("\n    ", " ")))
        for row in own
    ])  # fmt: skip
    return text


PAGES = {"settings.md": settings_page, "cli.md": cli_page, "outcomes.md": outcomes_page, "admin-api.md": admin_page}

if __name__ == "__main__":
    for page, made in PAGES.items():
        (DOCS / page).write_text(made(), encoding="utf-8")
