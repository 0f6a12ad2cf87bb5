"""Every entry comes out as it went in, and what does not agree is found. On both databases."""

from __future__ import annotations

import csv
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from tertulia import cli
from tertulia.accounts import export
from tertulia.accounts.audit import itself
from tertulia.accounts.directory import Directory
from tertulia.accounts.entry import Entry
from tertulia.accounts.export import COLUMNS, Part, day_of, project_of, rows, verify, write_csv, write_parquet
from tertulia.accounts.fold import DAY
from tertulia.accounts.ledger import Ledger
from tertulia.errors import SettingsError
from tertulia.store.database import Database, open_database
from tertulia.store.schema import ledger, usage_days, usage_hours
from unit.accounts.entries import NOON, put, some

GIVEN = some(1500)


@pytest.fixture
def store(tmp_path: Path, database: str) -> Iterator[Database]:
    """1,000 entries are in the database, 500 in the journal alone; the server is running."""
    opened = open_database(tmp_path, database)
    it = Ledger(tmp_path, opened)
    put(it, GIVEN[:1000])
    it.catch_up()
    put(it, GIVEN[1000:])
    yield opened
    opened.dispose()


def names(found: Iterator[list[Any]]) -> list[str]:
    return [row[COLUMNS.index("call")] for some in found for row in some]


def test_all_entries_come_out_in_order(store: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "AT_ONCE", 300)
    assert names(rows(store, tmp_path, Part())) == [entry.id for entry in GIVEN]


def test_a_part_of_them(store: Database, tmp_path: Path) -> None:
    part = Part(NOON - 2 * DAY, NOON - DAY, "proj_1")
    expected = [one.id for one in GIVEN if NOON - 2 * DAY <= int(one.at) < NOON - DAY and one.project == "proj_1"]
    assert names(rows(store, tmp_path, part)) == expected and len(expected) > 50


def test_csv(store: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.csv"
    assert write_csv(rows(store, tmp_path, Part()), path) == 1500
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == COLUMNS and [one["call"] for one in found] == [one.id for one in GIVEN]
    assert [int(one["cost"]) for one in found] == [one.cost for one in GIVEN]
    with pytest.raises(SettingsError):
        write_csv(rows(store, tmp_path, Part()), path)  # never over a file
    write_csv(rows(store, tmp_path, Part()), None)
    assert capsys.readouterr().out == path.read_text()


def test_parquet(store: Database, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "out.parquet"
    assert write_parquet(rows(store, tmp_path, Part()), path) == 1500
    found = pyarrow.parquet.read_table(path)
    assert tuple(found.column_names) == COLUMNS and found.schema.field("cost").type == pyarrow.int64()
    assert found.column("call").to_pylist() == [one.id for one in GIVEN]
    assert found.column("cost").to_pylist() == [one.cost for one in GIVEN]
    assert found.column("error").to_pylist() == [one.error for one in GIVEN]


def test_parquet_without_its_package_says_what_to_install(
    store: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingsError, match=r"pip install 'tertulia\[parquet\]'"):
        write_parquet(rows(store, tmp_path, Part()), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_days() -> None:
    assert day_of("1970-01-02") == DAY and day_of("1970-01-01T01:00") == 3600
    assert day_of("1970-01-01T01:00+01:00") == 0


# verify
def test_a_sound_ledger_agrees(store: Database, tmp_path: Path) -> None:
    said: list[str] = []
    assert verify(store, tmp_path, said.append) == []
    assert said[0] == "journal: 1500 entries in 1 segments" and said[1].startswith("database: 1000 entries;")


def test_what_does_not_agree_is_found(store: Database, tmp_path: Path) -> None:
    with store.begin() as connection:
        connection.execute(update(usage_days).where(usage_days.c.project_id == "proj_1").values(cost=1))
        connection.execute(delete(usage_hours).where(usage_hours.c.hour >= NOON - DAY))
    wrong = verify(store, tmp_path, lambda said: None)
    assert any(line.startswith("usage_days: the sums of ") for line in wrong)
    assert any(line.startswith("usage_hours: the sums of ") for line in wrong)


def test_rows_that_went_after_their_days_are_not_missed(store: Database, tmp_path: Path) -> None:
    with store.begin() as connection:
        connection.execute(delete(ledger).where(ledger.c.at < NOON - DAY - 77))
    assert verify(store, tmp_path, lambda said: None) == []
    with store.begin() as connection:
        connection.execute(delete(ledger).where(ledger.c.at > NOON - 5000, ledger.c.attempt > 0))
    assert verify(store, tmp_path, lambda said: None)


def test_an_attempt_twice_and_a_damaged_line_are_found(tmp_path: Path) -> None:
    store = open_database(tmp_path)
    it = Ledger(tmp_path, store)
    for _ in range(2):
        it.append(Entry("req_1", 1, NOON, "k", "p", "chat", "a", "m", 200, "finished", 1.0))
    it._journal.append(b"{")
    it.close()
    wrong = verify(store, tmp_path, lambda said: None)
    assert wrong == ["journal: segment 1 has a damaged line", "attempt 1 of req_1 has more than one entry"]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    it = Ledger(tmp_path, open_database(tmp_path))
    put(it, GIVEN)
    it.close()
    place = ["--data", str(tmp_path)]
    assert cli.main(["ledger", "verify", *place]) == 0
    assert capsys.readouterr().out.endswith("all of it agrees\n")
    assert cli.main(["ledger", "export", *place, "--project", "proj_1", "--since", "2020-01-01"]) == 0
    assert capsys.readouterr().out.count("\n") == 1 + sum(one.project == "proj_1" for one in GIVEN)
    assert cli.main(["ledger", "export", *place, "--project", "Nobody's"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith('tertulia: --project: There is no project "Nobody\'s"')
    out = tmp_path / "all.parquet"
    assert cli.main(["ledger", "export", *place, "-o", str(out)]) == 0 and out.read_bytes()[:4] == b"PAR1"
    assert capsys.readouterr().out == f"{out}: 1,500 entries\n"
    assert cli.main(["ledger", "export", *place, "-o", str(out)]) == 2
    with pytest.raises(SystemExit):
        cli.main(["ledger", "export", *place, "--since", "yesterday"])


def test_a_project_is_found_by_its_name_too(tmp_path: Path, store: Database) -> None:
    directory = Directory(store, tmp_path)
    directory.first_start(None, None)
    with directory.change(itself("test")) as change:
        one, twin, gone = (
            change.create("project", change.organization, {"name": name, "archived_at": archived}).id
            for name, archived in (("One", None), ("Twin", None), ("One", 1))
        )
        change.create("project", change.organization, {"name": "Twin", "archived_at": None})
    assert [project_of(store, text) for text in (one, "One", gone)] == [one, one, gone]
    with pytest.raises(SettingsError, match=rf"Several projects are named 'Twin'.*{twin}"):
        project_of(store, "Twin")
    with pytest.raises(SettingsError, match="There is no project 'one'"):
        project_of(store, "one")
