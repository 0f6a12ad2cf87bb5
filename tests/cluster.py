"""A PostgreSQL of the tests' own: in a temporary directory, reached through a socket there, gone with the tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

PR_SET_PDEATHSIG = 1
# what was committed is kept when it is killed, but not when the machine stops
QUICK = ["fsync=off", "full_page_writes=off", "max_connections=200", "listen_addresses="]


class Cluster:
    """One server; start and stop may be called in turns."""

    def __init__(self, place: Path, programs: Path) -> None:
        self.place, self.programs = place, programs
        self.user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None  # it refuses to run as root
        if self.user is not None:
            os.chown(place, self.user.pw_uid, self.user.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-U", "tertulia", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync").wait()
        self.start()

    @classmethod
    @contextlib.contextmanager
    def started(cls) -> Iterator[Cluster]:
        """Skips the test where PostgreSQL is not installed."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        program = found[-1] if found else shutil.which("postgres")
        if program is None:
            pytest.skip("PostgreSQL is not installed; on Debian: apt-get install postgresql")
        with tempfile.TemporaryDirectory(prefix="pg") as place:
            cluster = cls(Path(place), Path(program).resolve().parent)
            try:
                yield cluster
            finally:
                cluster.stop()

    def url(self, database: str) -> str:
        return f"postgresql://tertulia@/{database}?host={self.place}"

    @contextlib.contextmanager
    def database(self, options: str = "") -> Iterator[str]:
        """The URL of a new, empty database."""
        name = f"t{secrets.token_hex(6)}"
        self.tell(f"CREATE DATABASE {name} {options}")
        try:
            yield self.url(name)
        finally:
            self.tell(f"DROP DATABASE {name} WITH (FORCE)")

    def tell(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    def start(self) -> None:
        options = [word for setting in QUICK for word in ("-c", setting)]
        self._process = self._run("postgres", "-k", str(self.place), *options)
        deadline = time.monotonic() + 30
        while True:
            try:
                return self.tell("SELECT 1")
            except psycopg.OperationalError:
                log = (self.place / "log").read_text(errors="replace")
                assert self._process.poll() is None and time.monotonic() < deadline, f"PostgreSQL does not start: {log}"
                time.sleep(0.05)

    def stop(self) -> None:
        """At once, as it would be gone by a crash: every connection breaks."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    def _run(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        def end_with_the_tests() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)

        user, group = (self.user.pw_uid, self.user.pw_gid) if self.user else (None, None)
        with open(self.place / "log", "ab") as log:
            return subprocess.Popen(
                [self.programs / program, "-D", self.place / "data", *options], stdout=log, stderr=log,
                cwd=self.place, user=user, group=group, extra_groups=[] if self.user else None,
                preexec_fn=end_with_the_tests,
            )  # fmt: skip
