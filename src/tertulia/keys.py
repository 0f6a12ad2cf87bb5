"""`tertulia keys`: keys and projects from the command line, on the data directory or the database of the settings,
whether a server runs there or not. A server that does notices within a second. Who may read the directory may do this.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from .accounts import client_env, scopes
from .accounts.audit import local, printable
from .accounts.change import Change
from .accounts.directory import Directory
from .accounts.records import chosen
from .config import Settings, load
from .errors import BadRequest, NotFound, SettingsError

LONGEST_NAME = 256
PAGE = 1000


def run(command: str, options: argparse.Namespace) -> int:
    """Runs one command on the directory that the settings name, and prints what it says. Raises SettingsError and
    others."""
    try:
        with opened(options) as directory:
            answer = COMMANDS[command](options, directory)
    except BadRequest as error:  # what was typed is wrong, like a setting
        raise SettingsError(error.message) from None
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(answer)).decode())
        return 0
    rows = answer if isinstance(answer, list) else [answer]
    print(table(rows) if isinstance(answer, list) else sheet(answer))
    for row in rows:
        if "value" in row:
            print("\nIt is shown this once.")
    return 0


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[Directory]:
    """The directory; nothing is made where there is none. Raises SettingsError."""
    from .store.database import open_database

    settings = settings_of(options)
    data = settings.data_dir
    if not (data / "secret").exists():  # one without a database may be a second gateway's, one without a secret none's
        raise SettingsError(f"There are no keys in {data} yet: `tertulia serve` makes the first at its first start.")
    database = open_database(data, settings.database)
    try:
        directory = Directory(database, data)
        if not directory.organization.id:
            raise SettingsError("The database is empty yet: `tertulia serve` makes the first keys at its first start.")
        yield directory
    finally:
        database.dispose()


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises SettingsError."""
    return load({"data": options.data, "config": options.config, "database": options.database})


def say(line: str) -> None:
    """On standard error: what is printed beside it may be read by a program."""
    print(f"tertulia: {line}", file=sys.stderr)


# The commands: each returns what it shows.


def list_keys(options: argparse.Namespace, directory: Directory) -> list[dict[str, Any]]:
    project = project_of(directory, options.project) if options.project else None
    found: list[dict[str, Any]] = []
    after, more = None, True
    while more:
        rows, more = directory.key_page("admin" if options.admin else None, project, after, PAGE)
        found += rows
        after = rows[-1]["id"] if rows else None
    return [view(directory, row) for row in found]


def create_key(options: argparse.Namespace, directory: Directory) -> dict[str, Any]:
    name, kind = a_name(options.name), "admin" if options.admin else "project"
    if options.scopes is not None and not options.scopes.strip():  # a variable that was not set must not allow all
        raise BadRequest("--scopes is empty. Leave it out for a key that may do everything.")
    wanted = scopes.checked(part.strip() for part in options.scopes.split(",")) if options.scopes else None
    if options.admin and (options.project or wanted):
        raise BadRequest("An admin key has no project and no scopes: what it may do, its owner's role says.")
    if options.expires_in == 0:
        raise BadRequest("A key must live for a while: --expires-in is at least 1s.")
    project = None if options.admin else project_of(directory, options.project)
    owner = owner_of(directory, options.owner)
    if project is not None:
        refuse_archived(directory, project)
        if owner is not None and not directory.roles.may_enter(owner, project):
            raise BadRequest(f"{options.owner} has no access to that project.")
    with changing(directory) as change:
        expires = change.now + options.expires_in if options.expires_in else None
        row, secret = directory.create_key(change, kind, project, owner, name, wanted, expires)
    return {**view(directory, row), "value": secret}


def show_key(options: argparse.Namespace, directory: Directory) -> dict[str, Any]:
    return view(directory, directory.key(options.id))


def rotate_key(options: argparse.Namespace, directory: Directory) -> dict[str, Any]:
    """A key that DATA/client.env holds is replaced there, too."""
    data = settings_of(options).data_dir
    held = {key for key in client_env.keys(data) if directory.id_of(key) == options.id}
    with changing(directory) as change:
        row, secret = directory.rotate_key(change, options.id, options.grace)
    if held:
        try:
            client_env.replace(data, held, secret)
            say(f"{data / 'client.env'} held that key, and holds the new one now")
        except OSError as error:  # the new key is in force all the same, and is shown this once
            say(f"{data / 'client.env'} still holds the old key, it could not be written: {error.strerror}")
    return {**view(directory, row), "replaces": options.id, "value": secret}


def revoke_key(options: argparse.Namespace, directory: Directory) -> dict[str, Any]:
    with changing(directory) as change:
        row = directory.revoke_key(change, options.id)
    return {"id": row["id"], "name": row["name"], "revoked": True}


def list_projects(options: argparse.Namespace, directory: Directory) -> list[dict[str, Any]]:
    return [project_view(record.id, record.created_at, record.body) for record in directory.records.all("project")]


def create_project(options: argparse.Namespace, directory: Directory) -> dict[str, Any]:
    name = a_name(options.name)
    for other in directory.projects.values():
        if other.name == name and other.archived_at is None:
            say(f"another active project has that name ({other.id}): from now on each is to be named by its id")
            break
    with changing(directory) as change:
        made = change.create("project", change.organization, {"name": name, "archived_at": None})
        change.audit("project.created", made.id, {"id": made.id, "data": {"name": name, "title": name}})
    return project_view(made.id, made.created_at, made.body)


def archive_project(options: argparse.Namespace, directory: Directory) -> dict[str, Any]:
    id = project_of(directory, options.project)
    refuse_archived(directory, id)
    with changing(directory) as change:
        found = change.records.get("project", id)
        body = {**found.body, "archived_at": change.now}
        change.update(id, body)
        change.audit("project.archived", id, {"id": id}, id)
    return project_view(id, found.created_at, body)


COMMANDS: dict[str, Callable[[argparse.Namespace, Directory], Any]] = {
    "list": list_keys, "create": create_key, "show": show_key, "rotate": rotate_key, "revoke": revoke_key,
    "projects list": list_projects, "projects create": create_project, "projects archive": archive_project,
}  # fmt: skip


def changing(directory: Directory) -> contextlib.AbstractContextManager[Change]:
    """A change in the name of whoever typed this."""
    try:
        login = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, in a container
        login = str(os.getuid())
    return directory.change(local(login))


# What was typed, and what is shown


def a_name(text: str) -> str:
    if not text.strip() or len(text) > LONGEST_NAME or not text.isprintable():
        raise BadRequest(f"A name has 1 to {LONGEST_NAME} printable characters.")
    return text


def project_of(directory: Directory, text: str | None) -> str:
    """The id of the project of that id or name, or of the first one. Raises NotFound, or BadRequest if two have it."""
    if text is None:
        return directory.home()[1]
    return chosen(text, [(one.id, one.name, one.archived_at is None) for one in directory.projects.values()])


def refuse_archived(directory: Directory, project: str) -> None:
    if directory.projects[project].archived_at is not None:
        raise BadRequest(f"The project {project} is archived.")


def owner_of(directory: Directory, text: str | None) -> str | None:
    """The id of the user of that id or e-mail address, or of the first who owns the organization."""
    if text is None:
        return next(iter(directory.roles.owners()), None)
    if directory.roles.user(text) is not None:
        return text
    found = directory.records.find("user", directory.organization.id, text.strip().lower())
    if found is None:
        raise NotFound(f"There is no user {text!r}.")
    return found.id


def view(directory: Directory, row: Mapping[str, Any]) -> dict[str, Any]:
    """A key as it is shown."""
    project = directory.projects.get(row["project_id"] or "")
    return {
        "id": row["id"], "kind": row["kind"], "project": row["project_id"],
        "project_name": project.name if project is not None else None, "owner": row["owner_id"], "name": row["name"],
        "key": re.sub(r"\*+", "...", row["hint"]), "scopes": row["scopes"], "created": row["created_at"],
        "expires": row["expires_at"], "last_used": row["last_used_at"],
    }  # fmt: skip


def project_view(id: str, created_at: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": id, "name": body.get("name"), "created": created_at, "archived": body.get("archived_at")}


def said(name: str, value: Any) -> str:
    """One value for people: times as dates (UTC), nothing as a dash."""
    if value is None:
        return "everything" if name == "scopes" else "-"
    if name in ("created", "expires", "last_used", "archived") and isinstance(value, int):
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(" ".join(value) if isinstance(value, list) else str(value))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns as wide as what is in them; ids of projects give way to their names."""
    if not rows:
        return "There are none."
    names = [name for name in rows[0] if name not in ("project", "owner")]
    lines = [[name.upper().replace("_", " ").replace("PROJECT NAME", "PROJECT") for name in names]]
    lines += [[said(name, row[name]) for name in names] for row in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(names))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def sheet(row: Mapping[str, Any]) -> str:
    """One thing, a line for each of its values."""
    width = max(map(len, row))
    return "\n".join(f"{name.replace('_', ' '):{width}}  {said(name, value)}" for name, value in row.items())
