"""Lines survive the process, whole, and the machine but for the last flush interval."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tertulia.store import journal as module
from tertulia.store.journal import PLACE, STEP, Journal, batches, read, remove, segments


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Segments of few lines."""
    monkeypatch.setattr(module, "SEGMENT", 2 * STEP)
    return 2 * STEP


def first(path: Path) -> Path:
    return path / "000001.jsonl"


def given(path: Path, data: bytes) -> Path:
    """A journal whose first segment has these bytes."""
    path.mkdir(exist_ok=True)
    first(path).write_bytes(data)
    return path


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", flush_seconds=0.01)
    assert journal.lines() == []
    for at in range(100):
        assert journal.append(b"%d" % at) == 1
    assert journal.lines() == [b"%d" % at for at in range(100)]
    journal.close()
    journal.close()
    assert Journal(tmp_path / "j").lines()[-1] == b"99"
    assert stat.S_IMODE(os.stat(first(tmp_path / "j")).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "j").st_mode) == 0o700


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    assert Journal(given(tmp_path / "j", b"one\ntwo\nthr")).lines() == [b"one", b"two"]
    assert Journal(given(tmp_path / "k", b"thr")).lines() == []


def test_what_was_appended_is_there_after_kill_9(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from tertulia.store import journal
journal.SEGMENT = 2**20
it = journal.Journal(Path({str(tmp_path / "j")!r}), flush_seconds=60)
for at in range(30_000):
    it.append(b"%0100d" % at)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert len(segments(tmp_path / "j")) > 2
    again = Journal(tmp_path / "j")
    assert again.lines() == [b"%0100d" % at for at in range(30_000)] and again.stopped is None


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
    journal = Journal(given(tmp_path / "j", b"one\ntw"))
    journal.append(b"three")
    assert journal.lines()[-1] == b"three"


def test_room_is_made_ahead_and_cut_off_at_the_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    lines = [b"%07d" % at * 40 for at in range(12_000)]  # more than three steps of room
    for line in lines:
        journal.append(line)
    size, file = sum(map(len, lines)) + len(lines), first(tmp_path / "j")
    assert journal.lines() == read(tmp_path / "j") == lines
    assert os.stat(file).st_size % 4096 == 0 and os.stat(file).st_size > size
    journal.close()
    assert os.stat(file).st_size == size
    again = Journal(tmp_path / "j")
    again.append(b"x" * (STEP * 2 + 5))  # longer than the room that is made at a time
    again.append(b"last")
    again.close()
    assert read(tmp_path / "j") == [*lines, b"x" * (STEP * 2 + 5), b"last"]


def test_a_line_that_a_kill_cut_short_is_cut_off(tmp_path: Path) -> None:
    for torn in (b"tw\0\0", b"\0\0o", b"\0" * 9000, b"two" + b"\0" * 70_000):
        given(tmp_path / "j", b"one\n" + torn)
        assert read(tmp_path / "j") == [b"one"]
        journal = Journal(tmp_path / "j")
        journal.append(b"three")
        journal.close()
        assert first(tmp_path / "j").read_bytes() == b"one\nthree\n"


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


# segments and positions
def test_a_full_segment_is_followed_by_a_new_one(tmp_path: Path, small: int) -> None:
    journal = Journal(tmp_path / "j")
    lines = [b"%0999d" % at for at in range(8000)]
    numbers = [journal.append(line) for line in lines]
    assert segments(tmp_path / "j") == [1, 2, 3] and numbers == sorted(numbers) and {*numbers} == {1, 2, 3}
    assert journal.lines() == lines
    assert all(os.stat(tmp_path / "j" / f"{number:06d}.jsonl").st_size <= small + STEP for number in (1, 2))
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.append(b"more") == 3 and again.lines() == [*lines, b"more"]


def test_every_line_has_its_position_and_can_be_read_on_from_there(tmp_path: Path, small: int) -> None:
    journal = Journal(tmp_path / "j")
    places = {}
    for at in range(5000):
        place = journal.end
        number = journal.append(b"%0999d" % at)
        places[at] = place if place >> PLACE == number else number << PLACE
    found = {}
    for position, lines, last in batches(tmp_path / "j"):
        for line in lines:
            found[int(line)] = position
            position += len(line) + 1
        assert position == last
    assert found == places
    for at in random.Random(1).sample(range(5000), 20):
        [one, *_] = [line for _, lines, _ in batches(tmp_path / "j", places[at]) for line in lines]
        assert int(one) == at
        until = [line for _, lines, _ in batches(tmp_path / "j", 0, places[at]) for line in lines]
        assert len(until) == at
    assert list(batches(tmp_path / "j", journal.end)) == []


def test_a_segment_that_is_used_up_can_go(tmp_path: Path, small: int) -> None:
    journal = Journal(tmp_path / "j")
    lines = [b"%0999d" % at for at in range(8000)]
    for line in lines:
        journal.append(line)
    remove(tmp_path / "j", 1)
    assert segments(tmp_path / "j") == [2, 3] and lines[-len(journal.lines()) :] == journal.lines()
    journal.close()
    assert Journal(tmp_path / "j").append(b"x") == 3


def test_positions_never_go_back(tmp_path: Path) -> None:
    """Who knows of later lines than there are (a disk gone back to an older state) misses none that come."""
    journal = Journal(tmp_path / "j")
    journal.append(b"one")
    journal.begin_after(journal.end)
    assert journal.append(b"two") == 1
    later = 7 << PLACE | 123
    journal.begin_after(later)
    assert journal.append(b"three") == 8
    assert [lines for _, lines, _ in batches(tmp_path / "j", later)] == [[b"three"]]
    journal.close()
    assert read(tmp_path / "j") == [b"one", b"two", b"three"]


def test_the_single_file_of_an_older_release_is_taken_over(tmp_path: Path, small: int) -> None:
    lines = [b"%0999d" % at for at in range(5000)]
    (tmp_path / "j.jsonl").write_bytes(b"\n".join(lines) + b"\n" + b"cut sho")
    journal = Journal(tmp_path / "j")
    assert journal.lines() == lines and not (tmp_path / "j.jsonl").exists() and len(segments(tmp_path / "j")) == 3
    journal.append(b"new")
    journal.close()
    (tmp_path / "j.jsonl").write_bytes(b"later\n")  # the older release was used once more
    assert Journal(tmp_path / "j").lines() == [*lines, b"new", b"later"]


def test_taking_over_can_be_killed_and_done_again(tmp_path: Path, small: int) -> None:
    lines = [b"%0999d" % at for at in range(5000)]
    path = tmp_path / "j"
    path.mkdir()
    (path / "000001.whole").write_bytes(b"\n".join(lines) + b"\n")  # renamed; then one segment was half written
    (path / "000001.jsonl").write_bytes(b"\n".join(lines[:100]) + b"\n00")
    assert Journal(path).lines() == lines and not list(path.glob("*.whole"))


# the machine
class Disk:
    """What would be left of a directory if the machine stopped: what fsync has been called for."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.kept = path, path.with_name("kept")
        self.kept.mkdir()
        self.lock = threading.Lock()
        self.longest = 0.0  # seconds that a flush took
        fsync = os.fsync

        def flush(file: int) -> None:
            began = time.monotonic()
            fsync(file)
            place = Path(os.readlink(f"/proc/self/fd/{file}"))
            with self.lock:
                if place == path:  # names are kept by a flush of the directory
                    for one in path.iterdir():
                        (self.kept / one.name).touch()
                    for one in self.kept.iterdir():
                        if not (path / one.name).exists():
                            one.unlink()
                elif place.parent == path and (self.kept / place.name).exists():
                    shutil.copy(place, self.kept / place.name)
            self.longest = max(self.longest, time.monotonic() - began)

        monkeypatch.setattr(module.os, "fsync", flush)

    def stop(self) -> list[bytes]:
        """The lines that are left."""
        with self.lock:
            return read(self.kept)


def test_a_power_loss_costs_at_most_the_flush_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(module, "SEGMENT", STEP)  # two or three of them while it runs
    disk = Disk(tmp_path / "j", monkeypatch)
    journal = Journal(tmp_path / "j", flush_seconds=0.2)
    chance, times, losses = random.Random(2), [], []
    until, moment = time.monotonic() + 4, time.monotonic() + 0.5
    while (now := time.monotonic()) < until:
        journal.append(b"%0500d" % len(times))
        times.append(now)
        if now > moment:
            left = disk.stop()
            assert left == [b"%0500d" % at for at in range(len(left))]  # from the first one on, without a gap
            losses.append(now - times[len(left)] if len(left) < len(times) else 0.0)
            moment = time.monotonic() + chance.uniform(0.02, 0.3)
        time.sleep(0.0005)
    assert len(losses) > 8 and len(segments(tmp_path / "j")) > 1
    # the interval, what the disk needed for two flushes (of a full segment and the next), and a busy machine
    assert max(losses) < 0.2 + 2 * disk.longest + 0.3, (losses, disk.longest)
    journal.close()
    assert disk.stop() == journal.lines()


def test_who_opens_it_after_a_power_loss_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path / "j", flush_seconds=2.5)
    assert Journal(tmp_path / "j").stopped is None  # a process that was killed costs nothing
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(module, "BOOT", tmp_path / "boot")
    again = Journal(tmp_path / "j", flush_seconds=2.5)
    assert again.stopped == 1.0
    again.close()
    (tmp_path / "boot").write_text("third\n")
    assert Journal(tmp_path / "j").stopped is None  # it was closed
    (tmp_path / "boot").unlink()
    assert Journal(tmp_path / "j").stopped == 1.0 and Journal(tmp_path / "j").stopped is None
