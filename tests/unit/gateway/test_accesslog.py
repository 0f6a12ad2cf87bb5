"""The access log under a full disk, rotation, a flood, and at the end."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tertulia.errors import SettingsError
from tertulia.gateway.accesslog import AccessLog


class Line(msgspec.Struct):
    n: int
    model: str | None = None


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def until(true: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


@pytest.fixture
def made(path: Path) -> Iterator[AccessLog]:
    it = AccessLog(str(path))
    yield it
    it.close()


def test_structs_and_bytes_become_lines_in_order(made: AccessLog, path: Path) -> None:
    made.write(Line(1, "m"))
    made.write(b'{"n":2}')
    made.write(Line(3))
    until(lambda: path.stat().st_size)
    assert lines(path) == [{"n": 1, "model": "m"}, {"n": 2}, {"n": 3, "model": None}]
    assert path.stat().st_mode & 0o777 == 0o600


def test_writing_touches_no_file(made: AccessLog, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, real, seen = threading.get_ident(), os.write, []
    monkeypatch.setattr(os, "write", lambda *given: (seen.append(threading.get_ident()), real(*given))[1])
    made.write(Line(1))
    until(lambda: seen)
    assert here not in seen


def test_close_writes_what_waits_and_ends_the_thread(path: Path) -> None:
    made = AccessLog(str(path))
    for n in range(2500):
        made.write(Line(n))
    made.close()
    assert [line["n"] for line in lines(path)] == list(range(2500))
    assert not made._writer.is_alive() and made.dropped == 0


def test_lines_of_several_runs_are_appended(path: Path) -> None:
    for n in range(2):
        made = AccessLog(str(path))
        made.write(Line(n))
        made.close()
    assert [line["n"] for line in lines(path)] == [0, 1]


def test_a_file_that_was_moved_away_is_left_for_a_new_one(made: AccessLog, path: Path) -> None:
    made.write(Line(1))
    until(lambda: path.stat().st_size)
    old = path.rename(path.with_suffix(".1"))
    made.write(Line(2))
    until(lambda: path.exists() and path.stat().st_size)
    assert [line["n"] for line in lines(old)] == [1] and [line["n"] for line in lines(path)] == [2]
    assert path.stat().st_mode & 0o777 == 0o600


def test_reopen_makes_the_new_file_without_a_line(made: AccessLog, path: Path) -> None:
    path.rename(path.with_suffix(".1"))
    made.reopen()
    until(path.exists)


def test_a_directory_that_is_gone_keeps_the_old_file(
    made: AccessLog, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hidden = path.parent.rename(path.parent.with_name("elsewhere"))
    made.write(Line(1))
    until(lambda: (hidden / path.name).stat().st_size)
    assert "cannot be opened again (No such file or directory)" in caplog.text and made.dropped == 0
    hidden.rename(path.parent)


def test_a_file_that_cannot_be_opened_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^access_log: .* cannot be written \(Is a directory\)$"):
        AccessLog(str(tmp_path))


def test_a_full_disk_loses_lines_counts_them_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    made = AccessLog("/dev/full")
    for n in range(3):
        made.write(Line(n))
        until(lambda n=n: made.dropped == n + 1)
    made.close()
    assert [record.message for record in caplog.records] == [
        "the access log cannot be written (No space left on device): lines are lost"
    ]
    assert made.metrics()[-1] == "tertulia_access_log_dropped_total 3"


def test_a_flood_is_bounded_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    made = AccessLog(str(pipe), limit=5000)
    big = Line(0, "x" * 1000)
    with caplog.at_level(logging.WARNING):
        for _ in range(8000):
            made.write(big)
    assert len(made._records) == 5000 and made.dropped >= 8000 - 5000 - 2 * 1000
    assert len(caplog.records) == 1 and "lines are dropped (more than 5000 wait)" in caplog.text
    os.set_blocking(reader, True)
    threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reader, 1 << 20), b"")], daemon=True).start()
    until(lambda: not made._records)  # it catches up
    full = made._full
    made.write(Line(1))
    assert made._full == full
    made.close()


def test_standard_error() -> None:
    program = (
        "from tertulia.gateway.accesslog import AccessLog\n"
        "log = AccessLog('-'); log.write(b'{}'); log.reopen(); log.close()\n"
        "import sys; print('still there', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["{}", "still there"]
