"""What the command line sets up around a server."""

from __future__ import annotations

import subprocess
import sys
import time

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
