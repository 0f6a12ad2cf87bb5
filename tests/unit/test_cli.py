"""What the command line sets up around a server."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tertulia.cli import main, sized

LOGGING = """
import logging, sys
from tertulia.cli import log_to_stderr
log_to_stderr("info")
log = logging.getLogger("tertulia.x")
log.debug("not this")
try:
    1 / 0
except ZeroDivisionError:
    log.error("%s broke", "it", exc_info=True)
for n in range(int(sys.argv[1])):
    log.info("line %d %s", n, "x" * 200)
print("done", flush=True)
"""


def test_log_lines_are_written_in_order_and_all_by_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING, "500"], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert lines[0] == "ERROR tertulia.x: it broke" and lines[1].startswith("Traceback")
    assert "ZeroDivisionError: division by zero" in lines
    assert [line[:30].split(" x")[0] for line in lines[-500:]] == [f"INFO tertulia.x: line {n}" for n in range(500)]


def test_logging_to_a_pipe_that_nobody_reads_waits_for_nobody() -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", LOGGING, "5000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None and running.stderr is not None
    began = time.monotonic()
    assert running.stdout.readline() == "done\n"  # a megabyte is logged, and the pipe holds 64 KiB
    assert time.monotonic() - began < 10 and running.poll() is None
    assert running.stderr.read().count("INFO tertulia.x") == 5000
    assert running.wait() == 0


@pytest.mark.parametrize(
    ("bytes", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (3000, "3.0 KB"), (999_900, "999.9 KB"), (1_500_000, "1.5 MB"),
     (2_340_000_000, "2.3 GB")],
)  # fmt: skip
def test_sizes_for_people(bytes: int, said: str) -> None:
    assert sized(bytes) == said


def test_a_restore_that_fails_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, there = tmp_path / "bad.tar.gz", tmp_path / "there"
    bad.write_bytes(b"no backup")
    for file in (bad, tmp_path / "none.tar.gz"):
        assert main(["restore", str(file), "--data", str(tmp_path / "a" / "b")]) == 1
    assert not (tmp_path / "a").exists()
    there.mkdir()
    assert main(["restore", str(bad), "--data", str(there)]) == 1
    assert list(there.iterdir()) == []
    for name in ("serve.lock", "note"):  # what was there stays
        (there / name).touch()
    assert main(["restore", str(bad), "--data", str(there)]) == 1
    assert sorted(path.name for path in there.iterdir()) == ["note", "serve.lock"]
    assert "Traceback" not in capsys.readouterr().err
