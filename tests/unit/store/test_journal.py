"""Lines survive the process, whole."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

from tertulia.store.journal import STEP, Journal, read


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
from tertulia.store.journal import STEP, Journal, read
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


def test_room_is_made_ahead_and_cut_off_at_the_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    lines = [b"%07d" % at * 40 for at in range(12_000)]  # more than three steps of room
    for line in lines:
        journal.append(line)
    size = sum(map(len, lines)) + len(lines)
    assert journal.lines() == read(tmp_path / "j") == lines
    assert os.stat(tmp_path / "j").st_size % 4096 == 0 and os.stat(tmp_path / "j").st_size > size
    journal.close()
    assert os.stat(tmp_path / "j").st_size == size
    again = Journal(tmp_path / "j")
    again.append(b"x" * (STEP * 2 + 5))  # longer than the room that is made at a time
    again.append(b"last")
    again.close()
    assert read(tmp_path / "j") == [*lines, b"x" * (STEP * 2 + 5), b"last"]


def test_a_line_that_a_kill_cut_short_is_cut_off(tmp_path: Path) -> None:
    for torn in (b"tw\0\0", b"\0\0o", b"\0" * 9000, b"two" + b"\0" * 70_000):
        (tmp_path / "j").write_bytes(b"one\n" + torn)
        assert read(tmp_path / "j") == [b"one"]
        journal = Journal(tmp_path / "j")
        journal.append(b"three")
        journal.close()
        assert (tmp_path / "j").read_bytes() == b"one\nthree\n"


def test_a_full_disk_is_an_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    program = f"""
import resource
from pathlib import Path
from tertulia.store.journal import Journal, read
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, 3 * 2**20))
path = Path({str(tmp_path / "j")!r})
journal, taken = Journal(path), 0
try:
    while True:
        journal.append(b"y" * 999)
        taken += 1
except OSError as error:
    print(error.errno, taken, len(read(path)))
for _ in range(2):
    try:
        journal.append(b"z" * 2**21)
        print("taken")
    except OSError:
        pass
journal.close()
print(len(read(path)))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[1]) == int(out[2]) == int(out[3]) > 2000
