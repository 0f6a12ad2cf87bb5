"""The database opens, opens again, comes forward from an older release, and refuses what a newer program wrote: the
same on SQLite and PostgreSQL.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, exc, insert, inspect, select, text, update

from tertulia.errors import SettingsError
from tertulia.store import database as store
from tertulia.store import migrations
from tertulia.store.database import HEAD, connect, fact, found_version, name_of, open_database, set_fact, versions
from tertulia.store.schema import api_keys, counters, metadata, records, schema_version

HASH = bytes(range(32))


@contextlib.contextmanager
def opened(data: Path, url: str | None = None) -> Iterator[store.Database]:
    engine = open_database(data, url)
    try:
        yield engine
    finally:
        engine.dispose()


def alembic(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def release_0_1(data: Path, url: str) -> None:
    """A database as Tertulia 0.1 left it: an organization, two projects, a key of each kind, no word of Alembic."""
    (data / "given.db").touch()
    engine = connect(data, url)
    with engine.begin() as connection:
        command.upgrade(alembic(connection), "0001")
        connection.execute(text("DROP TABLE alembic_version"))
        connection.execute(text("INSERT INTO organizations VALUES ('org-1', 'Personal', 1700000000)"))
        for id, name in (("proj_1", "Default project"), ("proj_2", 'Say "hi" – ü')):
            row = {"id": id, "name": name}
            connection.execute(text("INSERT INTO projects VALUES (:id, 'org-1', :name, 1700000001)"), row)
        for number, (kind, project) in enumerate((("project", "proj_1"), ("admin", None))):
            row = {"id": f"key_{number}", "kind": kind, "project": project, "hash": HASH[number:] + HASH[:number]}
            connection.execute(
                text("INSERT INTO api_keys VALUES (:id, :kind, 'org-1', :project, 'n', :hash, 'sk-…', 1700000002)"), row
            )
    engine.dispose()


def tables(engine: Engine) -> dict[str, Any]:
    """What is really there, in words that can be compared."""
    look = inspect(engine)
    found: dict[str, Any] = {}
    for name in look.get_table_names():
        columns = {
            column["name"]: (str(column["type"]), column["nullable"], column["default"])
            for column in look.get_columns(name)
        }
        unique = sorted(tuple(each["column_names"]) for each in look.get_unique_constraints(name))
        indexes = sorted(
            (tuple(each["column_names"]), bool(each["unique"]))
            for each in look.get_indexes(name)
            if "duplicates_constraint" not in each
        )
        found[name] = columns, look.get_pk_constraint(name)["constrained_columns"], unique, indexes
    return found


def test_it_makes_its_tables_once_and_opens_again(tmp_path: Path, database: str) -> None:
    for _ in range(2):
        with opened(tmp_path, database) as engine:
            assert set(inspect(engine).get_table_names()) == {*metadata.tables, "alembic_version"}
            with engine.connect() as connection:
                assert connection.execute(select(versions.c.version_num)).scalars().all() == [HEAD]
                assert found_version(connection) == HEAD
                assert connection.execute(select(counters.c.name, counters.c.value)).all() == [("directory", 0)]


def test_the_newest_version_is_the_one_the_code_knows() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [HEAD]
    names = [each.revision for each in script.walk_revisions()]
    assert names == sorted(names, reverse=True)  # that a version is newer is seen by its name


def test_a_start_that_has_nothing_to_migrate_does_not_import_alembic(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from tertulia.store.database import open_database\n"
        f"for _ in range(2): open_database(pathlib.Path({str(tmp_path)!r})).dispose()\n"
        "print([name for name in sys.modules if name.startswith(('alembic', 'mako', 'psycopg'))])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_a_migrated_database_is_as_a_new_one(tmp_path: Path, database: str) -> None:
    release_0_1(tmp_path, database)
    with opened(tmp_path, database) as engine, opened(tmp_path) as new_sqlite:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_server_default": True})
            assert compare_metadata(context, metadata) == []
            assert connection.execute(select(schema_version.c.version)).scalar() == int(HEAD)
        if database.startswith("sqlite"):
            assert tables(engine) == tables(new_sqlite)


def test_a_new_database_is_as_the_metadata_says(tmp_path: Path, database: str) -> None:
    with opened(tmp_path, database) as engine, engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_keys_and_projects_of_an_older_release_are_kept(tmp_path: Path, database: str) -> None:
    release_0_1(tmp_path, database)
    with opened(tmp_path, database) as engine, engine.connect() as connection:
        kept = connection.execute(select(records).order_by(records.c.id)).all()
        assert [(row.id, row.kind, row.parent, row.created_at, row.revision) for row in kept] == [
            ("proj_1", "project", "org-1", 1700000001, 1), ("proj_2", "project", "org-1", 1700000001, 1),
        ]  # fmt: skip
        assert kept[1].body == '{"name": "Say \\"hi\\" \\u2013 \\u00fc", "archived_at": null}'
        keys = connection.execute(select(api_keys).order_by(api_keys.c.id)).all()
        assert [(row.id, row.kind, row.project_id, bytes(row.hash), row.scopes, row.revision) for row in keys] == [
            ("key_0", "project", "proj_1", HASH, None, 1), ("key_1", "admin", None, HASH[1:] + HASH[:1], None, 1),
        ]  # fmt: skip
        assert connection.execute(select(counters.c.value)).scalars().all() == [1]
        assert "projects" not in inspect(connection).get_table_names()


def test_the_file_is_kept_as_it_was(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'given.db'}"
    release_0_1(tmp_path, url)
    before = tables(connect(tmp_path, url))
    open_database(tmp_path, url).dispose()
    copy = tmp_path / "given.db.0001"
    assert tables(connect(tmp_path, f"sqlite:///{copy}")) == before
    assert copy.stat().st_mode & 0o777 == 0o600


def test_a_migration_that_fails_leaves_what_was(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release_0_1(tmp_path, database)
    engine = connect(tmp_path, database)
    with engine.begin() as connection:  # a hash that is there twice cannot be after 0002, which is by then half done
        connection.execute(text("CREATE TABLE audit_logs (mine INTEGER)"))
    before = tables(engine)
    with pytest.raises(SettingsError, match=r"could not be brought from version 0001 to 0002: .*audit_logs.*as it was"):
        open_database(tmp_path, database)
    assert tables(engine) == before
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE audit_logs"))
    engine.dispose()
    open_database(tmp_path, database).dispose()


@pytest.mark.parametrize("older", [False, True])
def test_many_starts_at_once_make_or_migrate_it_once(tmp_path: Path, database: str, older: bool) -> None:
    if older:
        release_0_1(tmp_path, database)
    start = threading.Barrier(8)

    def open_it() -> int:
        start.wait()
        with opened(tmp_path, database) as engine, engine.connect() as connection:
            return len(connection.execute(select(versions)).all())

    with ThreadPoolExecutor(8) as pool:
        assert [each.result() for each in [pool.submit(open_it) for _ in range(8)]] == [1] * 8


def test_a_newer_database_is_refused(tmp_path: Path, database: str) -> None:
    with opened(tmp_path, database) as engine:
        with engine.begin() as connection:
            connection.execute(update(versions).values(version_num="0999"))
        before = tables(engine)
        with pytest.raises(SettingsError, match=r"version 0999, this program knows 0002.*written by a newer Tertulia"):
            open_database(tmp_path, database)
        assert tables(engine) == before


def test_tertulia_0_1_refuses_it(tmp_path: Path, database: str) -> None:
    """What that release looks at is there, and says that it is newer."""
    with opened(tmp_path, database) as engine, engine.connect() as connection:
        assert connection.execute(text("SELECT version FROM schema_version")).scalar() > 1


def test_tables_of_somebody_else_are_left_alone(tmp_path: Path, database: str) -> None:
    (tmp_path / "given.db").touch()
    engine = connect(tmp_path, database)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE records (song VARCHAR(9))"))
    before = tables(engine)
    with pytest.raises(SettingsError, match="a table `records` that Tertulia did not make"):
        open_database(tmp_path, database)
    assert tables(engine) == before
    engine.dispose()


def test_an_older_database_is_not_changed_under_a_server_that_uses_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'given.db'}"
    release_0_1(tmp_path, url)
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write('4711 http://127.0.0.1:1/v1\\n'); file.flush(); print(flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "serve.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None and other.stdout is not None
    other.stdout.readline()
    with pytest.raises(SettingsError, match=r"`tertulia serve` \(process 4711\) uses it\. Stop that first."):
        open_database(tmp_path, url)
    other.stdin.close()
    other.wait()
    open_database(tmp_path, url).dispose()


def test_writers_follow_each_other(tmp_path: Path, database: str) -> None:
    """Each reads, then writes what it read: with SQLite's usual transactions half of them would fail at once."""
    with opened(tmp_path, database) as engine:

        def count() -> None:
            for _ in range(20):
                with engine.begin() as connection:
                    here = counters.c.name == "directory"
                    connection.execute(update(counters).where(here).values(value=counters.c.value + 1))
                    value = connection.execute(select(counters.c.value).where(here)).scalar()
                    connection.execute(insert(counters).values(name=f"n{value}", value=value))

        with ThreadPoolExecutor(5) as pool:
            for done in [pool.submit(count) for _ in range(5)]:
                done.result()
        with engine.connect() as connection:
            assert connection.execute(select(counters.c.value)).scalars().all().count(100) == 2


def test_reading_does_not_wait_for_a_writer(tmp_path: Path, database: str) -> None:
    with opened(tmp_path, database) as engine, engine.begin() as writer:
        writer.execute(update(counters).values(value=7))
        with engine.connect() as reader:
            assert reader.execute(select(counters.c.value)).scalar() == 0


def test_an_error_undoes_the_transaction(tmp_path: Path, database: str) -> None:
    with opened(tmp_path, database) as engine:
        with pytest.raises(ZeroDivisionError), engine.begin() as connection:
            connection.execute(update(counters).values(value=7))
            raise ZeroDivisionError
        with engine.connect() as connection:
            assert connection.execute(select(counters.c.value)).scalar() == 0


def test_facts(tmp_path: Path, database: str) -> None:
    with opened(tmp_path, database) as engine, engine.begin() as connection:
        assert fact(connection, "secret") is None
        for value in ("one", "two"):
            set_fact(connection, "secret", value)
            assert fact(connection, "secret") == value


def test_sqlite_is_set_up_for_keeping(tmp_path: Path) -> None:
    with opened(tmp_path) as engine, engine.connect() as connection:
        said = {name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in
                ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")}  # fmt: skip
        assert said == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("tertulia.db*")}
        assert set(modes) == {"tertulia.db", "tertulia.db-wal", "tertulia.db-shm"} and set(modes.values()) == {0o600}


def test_postgresql_waits_for_nobody_forever(tmp_path: Path, postgresql: str) -> None:
    with opened(tmp_path, postgresql) as engine, engine.connect() as connection:
        names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
        said = [connection.execute(text(f"SHOW {name}")).scalar() for name in names]
        assert said == ["5s", "20s", "30s"]


def test_postgresql_that_hangs_is_not_waited_for(
    tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(store, "STATEMENT_SECONDS", 1)
    monkeypatch.setattr(store, "WAIT_SECONDS", 0.5)
    with opened(tmp_path, postgresql) as engine:
        with engine.connect() as connection:
            pid = connection.execute(text("SELECT pg_backend_pid()")).scalar()
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            try:
                with pytest.raises(exc.OperationalError):
                    connection.execute(select(counters)).all()
            finally:
                os.kill(pid, signal.SIGCONT)
            assert 1.4 < time.monotonic() - began < 3
        with engine.connect() as connection:
            assert connection.execute(text("SELECT pg_backend_pid()")).scalar() != pid
            store.unhurried(connection)
            connection.execute(text("SELECT pg_sleep(2)"))
        with engine.connect() as connection, pytest.raises(exc.OperationalError, match="statement timeout"):
            connection.execute(text("SELECT pg_sleep(2)"))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_gone_takes_nothing_more(tmp_path: Path, replaced: bool) -> None:
    """SQLite would go on writing into the deleted file, and whoever was told `done` would find nothing later."""
    with opened(tmp_path) as engine:
        for path in tmp_path.glob("tertulia.db*"):
            path.unlink()
        if not replaced:
            with pytest.raises(exc.OperationalError, match="unable to open"), engine.begin() as connection:
                connection.execute(update(counters).values(value=7))
            assert not (tmp_path / "tertulia.db").exists()
            return
        open_database(tmp_path).dispose()
        with engine.begin() as connection:
            connection.execute(update(counters).values(value=7))
    with opened(tmp_path) as engine, engine.connect() as connection:
        assert connection.execute(select(counters.c.value)).scalar() == 7


def test_a_connection_that_was_read_only_is_not_used_again(tmp_path: Path, database: str) -> None:
    with opened(tmp_path, database) as engine:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                connection.execute(text("PRAGMA query_only = ON"))
            else:
                connection.execute(text("SET default_transaction_read_only = on"))
                connection.commit()
        with pytest.raises(store.FAILURES), engine.begin() as connection:
            connection.execute(update(counters).values(value=7))
        with engine.begin() as connection:
            connection.execute(update(counters).values(value=7))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://me:hunter2@localhost/x", "expected a URL of PostgreSQL"),
        ("sqlite://", "expected a URL of PostgreSQL"),
        ("sqlite:///:memory:", "expected a URL of PostgreSQL"),
        ("hunter2", "this is no URL"),
        ("postgresql://me:hunter2@127.0.0.1:9/tertulia", r"postgresql://me:\*\*\*@127.0.0.1:9/tertulia cannot be used"),
        ("postgres://me:hunter2@127.0.0.1:9/tertulia", r"postgresql://me:\*\*\*@127.0.0.1:9/tertulia cannot be used"),
        ("sqlite:////no/such/place/x.db", "/no/such/place/x.db cannot be used: No such file"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line_without_the_password(tmp_path: Path, url: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        open_database(tmp_path, url)
    assert "hunter2" not in caught.value.message and "\n" not in caught.value.message


def test_a_driver_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SettingsError, match=r"pip install 'tertulia\[postgresql\]'"):
        open_database(tmp_path, "postgresql://127.0.0.1/x")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tertulia.db").write_bytes(os.urandom(5000))
    with pytest.raises(SettingsError, match="file is not a database"):
        open_database(tmp_path)


def test_a_url_is_used_as_given(tmp_path: Path) -> None:
    with opened(tmp_path, f"sqlite:///{tmp_path / 'other.db'}") as engine:
        assert name_of(engine) == str(tmp_path / "other.db")
    assert [path.name for path in tmp_path.glob("*.db")] == ["other.db"]
