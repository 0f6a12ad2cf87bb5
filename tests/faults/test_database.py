"""The database is busy, read-only, full, failing or gone while calls come in: they are answered from memory for
`database_grace`, accounting stays in the journal, administration says 503, and a valid key is never refused as unknown.
When it is back, everything is there exactly once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cluster import Cluster
from conftest import Served, serve
from tertulia.store.database import connect
from tertulia.store.schema import ledger

PR_CAPBSET_DROP, DAC_OVERRIDE = 24, 1
MODELS = ("--chat-model", "mock", "--embedding-model", "mock-embedding")
QUESTION = {"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
UNAVAILABLE = {"message", "type", "param", "code"}
FAULT_SECONDS = 3.0


def ask(served: Served, path: str, key: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Status and answer of one request, whatever it is."""
    request = urllib.request.Request(
        served.base_url + path, json.dumps(body).encode() if body is not None else None,
        {"authorization": f"Bearer {key}", "content-type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Traffic:
    """Calls with a valid key, one after the other in each of a few threads."""

    def __init__(self, served: Served) -> None:
        self.served, self.statuses, self.slowest = served, Counter[int](), 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(3)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _call(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            status, _ = ask(self.served, "/chat/completions", self.served.api_key, QUESTION)
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.statuses[status] += 1
            time.sleep(0.01)

    def stop(self) -> Counter[int]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.statuses


# the faults
@contextlib.contextmanager
def sqlite_busy(file: Path, served: Served) -> Iterator[None]:
    """Somebody else holds the lock for writers, for longer than anybody waits for it."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@contextlib.contextmanager
def sqlite_read_only(file: Path, served: Served) -> Iterator[None]:
    """The file is there as before, but may not be written."""
    _replaced(file, 0o400)
    yield
    _replaced(file, 0o600)


@contextlib.contextmanager
def sqlite_failing(file: Path, served: Served) -> Iterator[None]:
    """Every write of the process into a file fails, but those into the journal, whose room is there already."""
    before = resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    yield
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def sqlite_gone(file: Path, served: Served) -> Iterator[None]:
    aside = file.with_name("aside.db")
    _copied(file, aside)
    for ending in ("", "-wal", "-shm"):
        file.with_name(file.name + ending).unlink(missing_ok=True)
    yield
    assert not file.exists()  # nobody has made an empty one
    os.rename(aside, file)


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not a byte more fits on a disk."""
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(b"x" * 4096):
            pass
    yield
    (disk / "filler").unlink()


def _copied(file: Path, to: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as source, contextlib.closing(sqlite3.connect(to)) as target:
        source.backup(target)


def _replaced(file: Path, mode: int) -> None:
    aside = file.with_name("aside.db")
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as source:
        source.execute("BEGIN IMMEDIATE")
        _copied(file, aside)
        aside.chmod(mode)
        for ending in ("-wal", "-shm"):
            file.with_name(file.name + ending).unlink(missing_ok=True)
        os.rename(aside, file)


@contextlib.contextmanager
def postgresql_busy(url: str, cluster: Cluster) -> Iterator[None]:
    """Somebody else holds every table for himself, for longer than anybody waits for it."""
    with psycopg.connect(url) as other:
        tables = other.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        for (name,) in tables:
            other.execute(f'LOCK TABLE "{name}" IN ACCESS EXCLUSIVE MODE')  # type: ignore[call-overload]
        yield
        other.rollback()


@contextlib.contextmanager
def postgresql_read_only(url: str, cluster: Cluster) -> Iterator[None]:
    """As a standby is, that applications were sent to."""
    name = url.partition("@/")[2].partition("?")[0]
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    cluster.tell(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    cluster.tell(end)
    yield
    cluster.tell(f"ALTER DATABASE {name} RESET default_transaction_read_only")  # who is connected stays read-only


@contextlib.contextmanager
def postgresql_full(url: str, disk: Path) -> Iterator[None]:
    """Its tables are on a disk that is full, and so are the pages of the audit log, which every change adds to."""
    row = "INSERT INTO audit_logs VALUES (md5(random()::text), 0, 'filler', '', NULL, %s, NULL, NULL, NULL, '')"
    with full(disk):
        with psycopg.connect(url, autocommit=True) as connection:
            for size in (500, 1):
                with contextlib.suppress(psycopg.errors.DiskFull):
                    while True:
                        connection.execute(row, ("x" * size,))
        yield


@contextlib.contextmanager
def postgresql_gone(url: str, cluster: Cluster) -> Iterator[None]:
    cluster.stop()
    try:
        yield
    finally:
        cluster.start()


# what is shown
def cannot_override() -> None:
    """root obeys the modes of its files, too."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, DAC_OVERRIDE)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A small disk of its own, to be filled."""
    place = Path(tempfile.mkdtemp(prefix="disk"))
    place.chmod(0o755)
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", place], capture_output=True).returncode
    except FileNotFoundError:
        made = 1
    if made:
        place.rmdir()
        pytest.skip("a disk that is full is a small one of the test's own, which takes the right to mount")
    yield place
    subprocess.run(["umount", "-l", place], check=True)
    place.rmdir()


def shown(served: Served, fault: AbstractContextManager[None], writes_only: bool) -> int:
    """Traffic before, in and after the fault; what is administered before and after it is there in the end. Returns how
    many calls were answered."""
    administer = {"name": "before"}
    assert ask(served, "/organization/projects", served.admin_key, administer)[0] == 200
    traffic = Traffic(served)
    time.sleep(0.5)
    try:
        with fault:
            before = sum(traffic.statuses.values())
            began = time.monotonic()
            for path, body in (("/organization/projects", {"name": "never"}), ("/organization/projects", None)):
                status, answer = ask(served, path, served.admin_key, body)
                if body is None and writes_only:
                    assert status == 200 and answer["object"] == "list"
                    continue
                assert status == 503 and set(answer["error"]) == UNAVAILABLE, (status, answer)
                assert answer["error"]["code"] == "database_unavailable"
            unknown = lambda: ask(served, "/chat/completions", "sk-proj-" + "x" * 40, QUESTION)[0]  # noqa: E731
            while not writes_only and unknown() != 503:  # who knows whether it was made elsewhere
                assert time.monotonic() - began < 20, "the database cannot be read, and a key is called unknown"
                time.sleep(0.1)
            time.sleep(max(0.0, FAULT_SECONDS - (time.monotonic() - began)))
            assert unknown() == (401 if writes_only else 503)
            during = sum(traffic.statuses.values()) - before
        after = {"name": "after"}
        deadline = time.monotonic() + 20
        while ask(served, "/organization/projects", served.admin_key, after)[0] != 200:
            assert time.monotonic() < deadline, "the database is back, and administration is not"
            time.sleep(0.2)
        time.sleep(0.3)
    finally:
        statuses = traffic.stop()
    assert set(statuses) == {200}, statuses
    assert during > 20 and traffic.slowest < 2, (during, traffic.slowest)
    _, listed = ask(served, "/organization/projects?limit=100", served.admin_key)
    names = [project["name"] for project in listed["data"]]
    assert sorted(names) == ["Default project", "after", "before"]
    log = (served.data / "stderr.log").read_text()
    assert "Traceback" not in log, log
    return statuses[200]


def folded(data: Path, url: str) -> Counter[str]:
    """The calls in the database's ledger that asked an engine, and how often each is there."""
    engine = connect(data, url)
    with engine.connect() as connection:
        rows = connection.execute(ledger.select().where(ledger.c.attempt > 0)).all()
    engine.dispose()
    assert {row.status for row in rows} <= {200}
    return Counter(row.call for row in rows)


CONFIG = "fold_seconds = 1\ncache = 'off'\n"
WRITES_ONLY = ("busy", "read_only")  # what is read can be read all the same
SQLITE = {"busy": sqlite_busy, "read_only": sqlite_read_only, "failing": sqlite_failing, "gone": sqlite_gone}
POSTGRESQL = {"busy": postgresql_busy, "read_only": postgresql_read_only, "gone": postgresql_gone}


def run(data: Path, url: str, fault: Callable[[Served], AbstractContextManager[None]], writes_only: bool) -> None:
    served = serve(data, CONFIG, *MODELS, "--database", url, before=cannot_override)
    try:
        answered = shown(served, fault(served), writes_only)
        deadline = time.monotonic() + 20
        while len(folded(data, url)) < answered:
            assert time.monotonic() < deadline, "the database is back, and the ledger is not brought into it"
            time.sleep(0.2)
        assert served.stop() == 0
    finally:
        served.stop()
    calls = folded(data, url)
    assert len(calls) == answered and set(calls.values()) == {1}


@pytest.mark.parametrize("fault", SQLITE)
def test_sqlite(tmp_path: Path, fault: str) -> None:
    file = tmp_path / "database" / "given.db"
    file.parent.mkdir()
    run(tmp_path / "data", f"sqlite:///{file}", lambda served: SQLITE[fault](file, served), fault in WRITES_ONLY)


def test_sqlite_on_a_full_disk(tmp_path: Path, disk: Path) -> None:
    run(tmp_path, f"sqlite:///{disk / 'given.db'}", lambda _: full(disk), True)


@pytest.mark.parametrize("fault", POSTGRESQL)
def test_postgresql(tmp_path: Path, cluster: Cluster, postgresql: str, fault: str) -> None:
    run(tmp_path, postgresql, lambda _: POSTGRESQL[fault](postgresql, cluster), fault == "read_only")


def test_postgresql_on_a_full_disk(tmp_path: Path, cluster: Cluster, disk: Path) -> None:
    place = disk / "tables"
    place.mkdir()
    if cluster.user is not None:
        os.chown(place, cluster.user.pw_uid, cluster.user.pw_gid)
    cluster.tell(f"CREATE TABLESPACE small LOCATION '{place}'")
    try:
        with cluster.database("TABLESPACE small") as url:
            run(tmp_path, url, lambda _: postgresql_full(url, disk), True)
    finally:
        cluster.tell("DROP TABLESPACE small")


def test_a_journal_on_a_full_disk_refuses_calls_until_there_is_room(tmp_path: Path, disk: Path) -> None:
    """Only DATA/ledger is on that disk. What cannot be accounted for does not leave; what was answered is accounted."""
    data = tmp_path / "data"
    data.mkdir()
    (disk / "ledger").mkdir()
    (data / "ledger").symlink_to(disk / "ledger")
    served = serve(data, CONFIG, *MODELS)
    try:
        answered, deadline = 0, time.monotonic() + 60
        assert ask(served, "/chat/completions", served.api_key, QUESTION)[0] == 200
        with full(disk):
            while (told := ask(served, "/chat/completions", served.api_key, QUESTION))[0] == 200:
                answered += 1  # there is room for some more
                assert time.monotonic() < deadline, answered
            for _ in range(20):
                for body in (QUESTION, {**QUESTION, "stream": True}):
                    status, answer = ask(served, "/chat/completions", served.api_key, body)
                    assert (status, answer["error"]["code"]) == (503, "ledger_unavailable"), answer
            assert set(told[1]["error"]) == UNAVAILABLE
            assert ask(served, "/organization/projects", served.admin_key, {"name": "made"})[0] == 200
        deadline = time.monotonic() + 20
        while ask(served, "/chat/completions", served.api_key, QUESTION)[0] != 200:
            assert time.monotonic() < deadline, "there is room again, and calls are refused"
            time.sleep(0.1)
        assert served.stop() == 0
        assert "Traceback" not in (data / "stderr.log").read_text()
    finally:
        served.stop()
    calls = folded(data, f"sqlite:///{data / 'tertulia.db'}")
    assert len(calls) == 1 + answered + 1 and set(calls.values()) == {1}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_without_the_database_for_too_long_nobody_is_let_in_and_nobody_is_called_a_stranger(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "sqlite":
        file = tmp_path / "given.db"
        url = f"sqlite:///{file}"
    else:
        url, cluster = request.getfixturevalue("postgresql"), request.getfixturevalue("cluster")
    served = serve(tmp_path / "data", CONFIG, *MODELS, "--database", url, "--database-grace", "3")
    try:
        fault = sqlite_gone(file, served) if kind == "sqlite" else postgresql_gone(url, cluster)
        with Traffic(served) as traffic:
            with fault:
                time.sleep(1.5)
                assert set(traffic.statuses) == {200}
                deadline = time.monotonic() + 20
                while traffic.statuses[503] < 5 and time.monotonic() < deadline:
                    time.sleep(0.1)
                status, answer = ask(served, "/chat/completions", served.api_key, QUESTION)
                assert status == 503 and answer["error"]["code"] == "database_unavailable"
                assert ask(served, "/chat/completions", "sk-proj-" + "x" * 40, QUESTION)[0] == 503  # nobody can tell
                with urllib.request.urlopen(served.root + "/healthz", timeout=10) as healthy:
                    assert healthy.status == 200
            deadline = time.monotonic() + 20
            while (status := ask(served, "/chat/completions", served.api_key, QUESTION)[0]) != 200:
                assert time.monotonic() < deadline, status
                time.sleep(0.1)
        assert set(traffic.statuses) == {200, 503}
        assert served.stop() == 0
    finally:
        served.stop()


def test_a_backup_while_it_serves_is_a_server_of_its_own(tmp_path: Path, database: str) -> None:
    """Its keys are known where it is restored, and calls that were answered before it are in its ledger, once."""
    data, there = tmp_path / "data", tmp_path / "there"
    served = serve(data, CONFIG, *MODELS, "--database", database)
    try:
        with Traffic(served) as traffic:
            time.sleep(2)
            least = traffic.statuses[200]
            place = ("--data", data, "--database", database)
            run_cli("backup", tmp_path / "b.tar.gz", *place)
            assert "uses" in run_cli("restore", tmp_path / "b.tar.gz", *place, "--force", rc=2)
            run_cli("restore", tmp_path / "b.tar.gz", "--data", there)  # PostgreSQL's comes back as SQLite's
        assert set(traffic.statuses) == {200}
        second = serve(there, CONFIG, *MODELS)
        try:
            assert ask(second, "/chat/completions", served.api_key, QUESTION)[0] == 200
            assert ask(second, "/organization/projects", served.admin_key)[0] == 200
            assert second.stop() == 0
        finally:
            second.stop()
        calls = folded(there, f"sqlite:///{there / 'tertulia.db'}")
        assert least <= len(calls) <= traffic.statuses[200] + 1 and set(calls.values()) == {1}
    finally:
        served.stop()


def run_cli(*arguments: str | Path, rc: int = 0) -> str:
    """What a command says. Other than a server, it is not run by conftest.serve."""
    done = subprocess.run([sys.executable, "-m", "tertulia", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == rc, done.stderr
    return done.stdout + done.stderr
