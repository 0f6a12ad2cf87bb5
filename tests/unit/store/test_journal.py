"""Lines survive the process, whole."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

from tertulia.store.journal import Journal


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", flush_seconds=0.01)
    assert journal.lines() == []
    for at in range(100):
        journal.append(b"%d" % at)
    assert journal.lines() == [b"%d" % at for at in range(100)]
    journal.close()
    journal.close()
    assert Journal(tmp_path / "j").lines()[-1] == b"99"
    assert stat.S_IMODE(os.stat(tmp_path / "j").st_mode) == 0o600


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"one\ntwo\nthr")
    assert Journal(tmp_path / "j").lines() == [b"one", b"two"]
    (tmp_path / "k").write_bytes(b"thr")
    assert Journal(tmp_path / "k").lines() == []


def test_what_was_appended_is_there_after_kill_9(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from tertulia.store.journal import Journal
journal = Journal(Path({str(tmp_path / "j")!r}), flush_seconds=60)
for at in range(1000):
    journal.append(b"%d" % at)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert Journal(tmp_path / "j").lines() == [b"%d" % at for at in range(1000)]


def test_appends_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")

    def write(letter: bytes) -> None:
        for _ in range(200):
            journal.append(letter * 300)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(journal.lines()) == [letter * 300 for letter in (b"a", b"b", b"c") for _ in range(200)]


def test_a_line_after_a_cut_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"one\ntw")
    journal = Journal(tmp_path / "j")
    journal.append(b"three")
    assert journal.lines()[-1] == b"three"
