"""`tertulia keys` on a data directory that no server serves: what it warns of, and what becomes of client.env."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tertulia.accounts import client_env
from tertulia.accounts.directory import Directory
from tertulia.cli import main
from tertulia.store.database import open_database

URL = "http://127.0.0.1:8000/v1"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory as a first start leaves it."""
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    database = open_database(data)
    made = Directory(database, data).first_start(None, None)
    database.dispose()
    assert made is not None
    client_env.write(data, URL, *made)
    return data


@pytest.fixture
def keys(data: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`tertulia keys WORDS... --json`: (what it answers, what it says on standard error)."""

    def run(*words: str, code: int = 0) -> tuple[Any, str]:
        assert main(["keys", *words, "--data", str(data), "--json"]) == code
        said = capsys.readouterr()
        return json.loads(said.out or "null"), said.err

    return run


def knows(data: Path, key: str) -> str | None:
    database = open_database(data)
    try:
        return Directory(database, data).id_of(key)
    finally:
        database.dispose()


def test_a_second_project_of_a_name_is_made_and_warned_of(keys: Any) -> None:
    first, said = keys("projects", "create", "Twin")
    assert said == ""
    second, said = keys("projects", "create", "Twin")
    assert second["id"] != first["id"] and second["name"] == "Twin"
    assert said.startswith("tertulia: another active project has that name") and first["id"] in said
    for one in (first, second):
        keys("projects", "archive", one["id"])
    assert keys("projects", "create", "Twin")[1] == ""  # those are archived


@pytest.mark.parametrize("kind", ["project", "admin"])
def test_a_key_of_client_env_is_rotated_there_too(data: Path, keys: Any, kind: str) -> None:
    [old] = [key for key in keys("list")[0] if key["kind"] == kind]
    name, rest = ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY")[:: 1 if kind == "project" else -1]
    before = client_env.read(data)
    with open(data / "client.env", "a", encoding="utf-8") as file:
        file.write("export MINE='a b'\n# a note\n")
    made, said = keys("rotate", old["id"], "--grace", "0")
    after = client_env.read(data)
    assert after == {**before, name: made["value"]} and after[rest] == before[rest]
    assert knows(data, after[name]) == made["id"]
    assert (data / "client.env").read_text().endswith("export MINE='a b'\n# a note\n")
    assert stat.S_IMODE((data / "client.env").stat().st_mode) == 0o600
    assert said == f"tertulia: {data / 'client.env'} held that key, and holds the new one now\n"


def test_another_key_is_no_business_of_client_env(data: Path, keys: Any) -> None:
    before = (data / "client.env").read_bytes()
    other, _ = keys("create", "--name", "Other")
    assert keys("rotate", other["id"])[1] == ""
    assert (data / "client.env").read_bytes() == before


def test_a_client_env_that_cannot_be_written_keeps_nobody_from_the_new_key(
    data: Path, keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    [old] = [key for key in keys("list")[0] if key["kind"] == "project"]
    before = (data / "client.env").read_bytes()
    monkeypatch.setattr(client_env.os, "replace", full)  # type: ignore[attr-defined]
    made, said = keys("rotate", old["id"])
    assert knows(data, made["value"]) == made["id"] and "still holds the old key" in said
    assert (data / "client.env").read_bytes() == before
    assert [path.name for path in data.glob("client.env*")] == ["client.env"]


def test_no_scopes_because_of_an_empty_variable_are_not_all_scopes(keys: Any) -> None:
    for empty in ("", "  "):
        answer, said = keys("create", "--scopes", empty, code=2)
        assert answer is None and "--scopes is empty" in said
