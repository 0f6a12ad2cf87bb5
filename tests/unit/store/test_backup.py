"""What is backed up comes back, from either kind of database into either; what is damaged or newer does not, and
nothing is replaced unasked.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import sqlite3
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import delete, insert, inspect, select, update

from tertulia.errors import SettingsError
from tertulia.store import backup as backups
from tertulia.store import database as store
from tertulia.store.backup import BackupFailed, backup, restore, verify
from tertulia.store.database import connect, open_database
from tertulia.store.journal import Journal, batches
from tertulia.store.schema import api_keys, counters, ledger, metadata, organizations, records, writers
from unit.store.test_database import release_0_1

ODD = 'quote " and \\ and \n and \r and \u2028 and \0 and ü and 𝄞'
LINES = 5000


@pytest.fixture(params=["sqlite", "postgresql"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of another empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'other.db'}"
        return
    with request.getfixturevalue("cluster").database() as url:
        yield url


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def filled(data: Path, database: str) -> tuple[Path, str]:
    """A data directory and a database with something of everything in it."""
    data.mkdir()
    fill(data, database)
    return data, database


def fill(data: Path, database: str | None) -> None:
    engine = open_database(data, database)
    rows = [entry(number) for number in range(LINES)]
    with engine.begin() as connection:
        connection.execute(insert(organizations).values(id="org-1", name=ODD.replace("\0", ""), created_at=1))
        connection.execute(insert(api_keys), [key(number) for number in range(300)])
        body = {"id": "proj_1", "kind": "project", "parent": "org-1", "created_at": 1, "revision": 1}
        connection.execute(insert(records).values(body=json.dumps({"name": ODD}), **body))
        connection.execute(insert(writers).values(id=1, name="writer_1", position=2**40))
        connection.execute(insert(ledger), rows)
        connection.execute(update(counters).values(value=2**53 + 1))  # more than a float holds
    engine.dispose()
    (data / "secret").write_bytes(os.urandom(32))
    (data / "client.env").write_text("export OPENAI_API_KEY=x\n")
    (data / "writer").write_text("writer_1")
    journal = Journal(data / "ledger")
    for number in range(100):
        journal.append(b"line %d" % number)
    journal.close()


def key(number: int) -> dict[str, Any]:
    return {
        "id": f"key_{number}", "kind": "project", "organization_id": "org-1", "project_id": None, "name": "n",
        "hash": random.Random(number).randbytes(32), "hint": "sk", "created_at": number, "revision": 1,
    }  # fmt: skip


def entry(number: int) -> dict[str, Any]:
    figures = dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost"), number)
    return {
        "id": 1 << 52 | number, "at": number, "call": f"chatcmpl-{number}", "attempt": 1, "key_id": "key_1",
        "project_id": "proj_1", "task": "chat", "asked": "m", "model": "m", "target": "mock", "status": 200,
        "outcome": "finished", "milliseconds": 1, "marks": "", "error": None if number % 2 else "e", **figures,
    }  # fmt: skip


def content(data: Path, database: str | None) -> dict[str, Any]:
    """All that a database holds."""
    engine = connect(data, database)
    with engine.connect() as connection:
        found = {
            name: sorted(connection.execute(select(table)).all(), key=str)
            for name, table in metadata.tables.items()
            if inspect(connection).has_table(name)
        }
    engine.dispose()
    return found


def test_it_comes_back_in_either_kind_of_database(tmp_path: Path, filled: tuple[Path, str], other: str) -> None:
    data, database = filled
    file, there = tmp_path / "backup.tar.gz", tmp_path / "there"
    said: list[str] = []
    manifest = backup(data, database, file, said.append)
    assert manifest.tables["ledger"].rows == LINES and "verifying" in said
    assert file.stat().st_mode & 0o777 == 0o600
    there.mkdir()
    assert restore(file, there, other, force=False) == manifest
    assert content(there, other) == content(data, database)
    for name in ("secret", "client.env", "writer", "ledger/000001.jsonl"):
        assert (there / name).read_bytes() == (data / name).read_bytes()
        assert (there / name).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in there.iterdir()) == ["client.env", "ledger", "secret", "writer"]
    open_database(there, other).dispose()  # it is one that is opened as it stands


def test_the_usual_database_comes_back_in_its_usual_place(tmp_path: Path, data: Path) -> None:
    data.mkdir()
    fill(data, None)
    backup(data, None, tmp_path / "b")
    (tmp_path / "there").mkdir()
    restore(tmp_path / "b", tmp_path / "there", None, force=False)
    assert content(tmp_path / "there", None) == content(data, None)
    file = tmp_path / "there" / "tertulia.db"
    assert file.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_it_is_of_one_moment_while_others_write(tmp_path: Path, data: Path, database: str) -> None:
    """A writer does what a server does: a line in the journal; then the lines as rows and the position in one
    transaction; then segments that are used up are removed. In a backup each line is either a row or still to come."""
    data.mkdir()
    engine = open_database(data, database)
    (data / "writer").write_text("writer_1")
    stop = threading.Event()
    journal = Journal(data / "ledger")
    written = 0

    def write() -> None:
        nonlocal written
        position = 0
        while not stop.is_set():
            for _ in range(50):
                journal.append(b"%d %s" % (written, b"x" * 20_000))
                written += 1
            end = journal.end
            rows = [int(line.split()[0]) for _, lines, _ in batches(journal.path, position, end) for line in lines]
            with engine.begin() as connection:
                connection.execute(insert(ledger), [entry(number) for number in rows])
                connection.execute(update(writers).values(position=end))
            position = end
            for number in range(1, position >> 25):
                (journal.path / f"{number:06d}.jsonl").unlink(missing_ok=True)

    with engine.begin() as connection:
        connection.execute(insert(writers).values(id=1, name="writer_1", position=0))
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(4):
            least = written
            file, there = tmp_path / f"{number}.tar.gz", tmp_path / f"there{number}"
            backup(data, database, file)
            there.mkdir()
            restore(file, there, None, force=False)
            rows = {row.call for row in content(there, None)["ledger"]}
            position = content(there, None)["writers"][0].position
            lines = [line for _, some, _ in batches(there / "ledger", position) for line in some]
            waiting = {f"chatcmpl-{line.split()[0].decode()}" for line in lines}
            assert not rows & waiting
            assert {*rows, *waiting} == {f"chatcmpl-{number}" for number in range(len(rows) + len(waiting))}
            assert len(rows) + len(waiting) >= least
    finally:
        stop.set()
        writer.join()
        journal.close()
        engine.dispose()
    assert written > 1000 and not (journal.path / "000001.jsonl").exists()  # segments were removed meanwhile


def test_nothing_is_replaced_unless_it_is_asked_for(tmp_path: Path, filled: tuple[Path, str]) -> None:
    data, database = filled
    before, secret = content(data, database), (data / "secret").read_bytes()
    backup(data, database, tmp_path / "b")
    with pytest.raises(SettingsError, match="exists; a backup replaces nothing"):
        backup(data, database, tmp_path / "b")
    with pytest.raises(SettingsError, match="exists; --force moves aside"):
        restore(tmp_path / "b", data, database, force=False)
    engine = connect(data, database)
    with engine.begin() as connection:
        connection.execute(delete(ledger))
        connection.execute(update(organizations).values(name="changed"))
    engine.dispose()
    (data / "secret").write_bytes(b"another")
    restore(tmp_path / "b", data, database, force=True)
    assert content(data, database) == before and (data / "secret").read_bytes() == secret
    assert [path.read_bytes() for path in data.glob("secret.before-*")] == [b"another"]
    if database.startswith("sqlite"):
        (aside,) = [path for path in data.parent.glob("given.db.before-*") if path.suffix[-1].isdigit()]
        assert content(data, f"sqlite:///{aside}")["organizations"][0].name == "changed"


def test_a_database_that_holds_something_is_not_replaced(tmp_path: Path, data: Path, postgresql: str) -> None:
    data.mkdir()
    fill(data, postgresql)
    backup(data, postgresql, tmp_path / "b")
    (tmp_path / "there").mkdir()
    with pytest.raises(SettingsError, match="holds an organization already; --force replaces"):
        restore(tmp_path / "b", tmp_path / "there", postgresql, force=False)
    assert list((tmp_path / "there").iterdir()) == []


def test_a_database_that_is_in_use_is_not_replaced(tmp_path: Path, data: Path, postgresql: str) -> None:
    data.mkdir()
    fill(data, postgresql)
    backup(data, postgresql, tmp_path / "b")
    engine = open_database(data, postgresql)
    with engine.connect() as connection, pytest.raises(SettingsError, match="in use by a running Tertulia"):
        connection.execute(select(counters)).all()
        restore(tmp_path / "b", data, postgresql, force=True)
    engine.dispose()
    restore(tmp_path / "b", data, postgresql, force=True)


def test_a_failure_changes_nothing(
    tmp_path: Path, filled: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    data, database = filled
    backup(data, database, tmp_path / "b")
    before, files = content(data, database), sorted(path.name for path in data.rglob("*"))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("_insert", "_read_files", "make_tables"):
        with monkeypatch.context() as patch:
            patch.setattr(backups, name, fail)
            with pytest.raises(BackupFailed, match="No space left on device"):
                restore(tmp_path / "b", data, database, force=True)
        assert content(data, database) == before
        assert sorted(path.name for path in data.rglob("*")) == files
        assert not [*data.parent.glob("restoring*"), *data.parent.glob("*.before-*")]
    with monkeypatch.context() as patch:
        patch.setattr(backups, "_write_table", fail)
        with pytest.raises(BackupFailed, match="No space left"):
            backup(data, database, tmp_path / "c")
    assert not list(tmp_path.glob("c*"))


def test_a_backup_of_an_older_release_comes_forward(tmp_path: Path, database: str, other: str) -> None:
    """One can be made of a database that no server has brought forward yet, and is when it is restored."""
    data = tmp_path
    release_0_1(data, database)
    (data / "ledger.jsonl").write_bytes(b'{"id":"req_1"}\n\0\0\0')
    manifest = backup(data, database, tmp_path / "b")
    assert manifest.schema == "0001"
    (tmp_path / "there").mkdir()
    restore(tmp_path / "b", tmp_path / "there", other, force=False)
    engine = connect(tmp_path, other)
    with engine.connect() as connection:
        assert store.found_version(connection) == store.HEAD
        assert connection.execute(select(records.c.id)).scalars().all() == ["proj_1", "proj_2"]
        assert len(connection.execute(select(api_keys)).all()) == 2
    engine.dispose()
    assert (tmp_path / "there" / "ledger.jsonl").read_bytes() == b'{"id":"req_1"}\n'


# what is no good backup
def rewritten(source: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A backup with other members."""
    members: dict[str, bytes] = {}
    with tarfile.open(source) as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            members[info.name] = file.read()
    change(members)
    target = source.with_name("changed")
    with tarfile.open(target, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return target


def manifest_with(**values: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members["manifest.json"] = msgspec.json.encode({**json.loads(members["manifest.json"]), **values})

    return change


def bad_key(members: dict[str, bytes]) -> None:
    name = next(name for name in members if name.startswith("tables/api_keys/"))
    members[name] = members[name].replace(b'"project"', b'"admin"', 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda members: members.pop("manifest.json"), "it has no manifest"),
        (lambda members: members.pop("files/secret"), "files/secret is not what the manifest says"),
        (bad_key, "tables/api_keys/000001.jsonl is not what the manifest says"),
        (lambda members: members.update({"../../etc/passwd": b""}), "something follows its manifest"),
        (lambda members: members.update({"manifest.json": b"{}"}), "its manifest cannot be read"),
        (manifest_with(format=2), "was written by a newer Tertulia"),
        (manifest_with(schema="0999"), "tables of version 0999, this program knows 0002"),
        (manifest_with(tables={}), "says nothing of its table"),
        (manifest_with(tables={"users": {"names": ["id"], "binary": [], "rows": 0}}), "its table 'users' is not known"),
    ],
    ids=range(9),
)
def test_what_is_not_as_it_was_written_is_refused(
    tmp_path: Path, data: Path, change: Callable[[dict[str, bytes]], None], says: str
) -> None:
    data.mkdir()
    fill(data, None)
    backup(data, None, tmp_path / "b")
    wrong = rewritten(tmp_path / "b", change)
    (tmp_path / "there").mkdir()
    with pytest.raises((BackupFailed, SettingsError), match=says):
        restore(wrong, tmp_path / "there", None, force=False)
    assert list((tmp_path / "there").iterdir()) == []


def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, data: Path) -> None:
    for name in ("../evil", "/etc/evil", "files/../../evil", "files/ledger/../../evil", "tables/x/../1.jsonl"):
        with tarfile.open(tmp_path / "t", "w:gz") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        with pytest.raises(BackupFailed, match="does not belong there"):
            verify(tmp_path / "t")
    with tarfile.open(tmp_path / "t", "w:gz") as tar:
        link = tarfile.TarInfo("files/secret")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(BackupFailed, match="is no file"):
        verify(tmp_path / "t")


def test_a_file_that_was_cut_or_damaged_anywhere_is_refused(tmp_path: Path, data: Path) -> None:
    data.mkdir()
    fill(data, None)
    backup(data, None, tmp_path / "b")
    whole = (tmp_path / "b").read_bytes()
    said, dice = gzip.decompress(whole), random.Random(5)
    for _ in range(40):
        at = dice.randrange(20, len(whole) - 20)
        flipped = whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :]
        for content in (whole[:at], flipped):
            with contextlib.suppress(OSError, EOFError, zlib.error):
                if gzip.decompress(content) == said:  # there are two ways to pack a thing
                    continue
            (tmp_path / "t").write_bytes(content)
            with pytest.raises(BackupFailed, match=r"damaged|no backup|cut short|cannot be read"):
                verify(tmp_path / "t")
    verify(tmp_path / "b")
    (tmp_path / "t").write_bytes(gzip.compress(b"a letter"))
    with pytest.raises(BackupFailed, match="no backup of Tertulia"):
        verify(tmp_path / "t")
    with pytest.raises(BackupFailed, match="cannot be read: No such file"):
        verify(tmp_path / "nowhere")


def test_where_there_is_nothing_there_is_no_backup(tmp_path: Path, postgresql: str) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        backup(tmp_path, None, tmp_path / "b")
    with pytest.raises(SettingsError, match="is empty"):
        backup(tmp_path, postgresql, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
