"""An append-only journal of lines that survives the process: a line is in the kernel's hands when append returns, and
on disk at the latest `flush_seconds` later (and what the disk needs). It knows nothing of what the lines say.

It is a directory of segments, 000001.jsonl and so on, of SEGMENT bytes or little more; who has used one up may remove
it. A line's position is its segment << PLACE | where it begins in there.

A segment is written through shared memory: a line costs a copy instead of a system call, and the page cache has it all
the same if the process is killed. Room is made ahead, STEP bytes at a time, by allocating blocks, so that a full disk
is an error when room is made and never a fault in the middle of a copy. What is not written yet reads as zero bytes;
they lie behind the last line break until the journal is closed or opened again.

Lines that stand only for a while can be kept beside it (slots): they are flushed just before it is.

If the machine stops (power), what was not flushed may be gone. Who opens the journal next is told: the file `open` has
the boot it was opened in, and is removed when it is closed.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .slots import Slots

log = logging.getLogger("tertulia.store")

STEP = 2**20  # bytes of room made at a time
SEGMENT = 2**24  # bytes after which a new segment begins
PLACE = 25  # bits of a position that say where in its segment a line begins
CHUNK = 2**18  # bytes read at a time
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """One process appends, from any of its threads; readers read the files by batches() or read().

    beside: what is flushed and closed with it.
    stopped: the flush_seconds of a run that ended with its machine, so that entries of so long may be missing; None if
    the last run did not.
    """

    def __init__(self, path: Path, flush_seconds: float = 1.0) -> None:
        """path is the directory; it is made if it is not there. A file of lines called path.jsonl (Tertulia 0.1 had
        one) becomes part of it. Raises OSError."""
        self.path = path
        path.mkdir(mode=0o700, exist_ok=True)
        adopt(path)
        self.stopped = _stopped(path)
        numbers = segments(path)
        self.segment = numbers[-1] if numbers else 1
        self._file = _open(path, self.segment)
        self._base = _mend(self._file)  # where the window begins in the file
        self._window: mmap.mmap | None = None
        self._at = self._room = 0  # within the window
        self._dirty = False
        self._full: list[int] = []  # files of segments that are full, but not flushed yet
        self._fresh = True  # the directory is to be flushed, too
        self.beside: Slots | None = None
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._stop = threading.Event()
        _say_open(path, flush_seconds)
        self._flusher = threading.Thread(target=self._flush, args=(flush_seconds,), name="journal", daemon=True)
        self._flusher.start()

    def append(self, line: bytes) -> int:
        """line without its line break; returns its segment. Raises OSError when the disk does not take it; then nothing
        of it stays."""
        with self._lock:
            end = self._at + len(line)
            if end >= self._room:
                self._make_room(len(line) + 1)
                end = self._at + len(line)
            window = self._window
            window[self._at : end] = line  # type: ignore[index]
            window[end] = 10  # type: ignore[index]  # the break last: a line that a kill cuts short has none
            self._at = end + 1
            self._dirty = True
            return self.segment

    def promise(self, size: int) -> None:
        """There is room for size more bytes, or OSError. For the thread that appends."""
        if self._at + size > self._room:
            with self._lock:
                self._make_room(size)

    @property
    def end(self) -> int:
        """The position behind the last line: what is before it can be read."""
        with self._lock:
            return self.segment << PLACE | (self._base + self._at)

    def _make_room(self, wanted: int) -> None:
        """A window with room for wanted more bytes, from the page of the next one on. Raises OSError."""
        place = self._base + self._at
        if place > 0 and place + wanted > SEGMENT:
            self._begin(self.segment + 1)
            place = 0
        base = place - place % mmap.ALLOCATIONGRANULARITY
        room = -(-(place - base + wanted) // STEP) * STEP
        try:
            os.posix_fallocate(self._file, base, room)
        except OSError as error:
            os.ftruncate(self._file, place)
            self._room = self._at  # what was left of the old room is gone with it
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._file, base + room)  # a file system that cannot promise blocks
        window = mmap.mmap(self._file, room, offset=base)
        if self._window is not None:
            self._window.close()
        self._window, self._base, self._at, self._room = window, base, place - base, room

    def _begin(self, number: int) -> None:
        """Goes on in a new segment. Raises OSError; then it goes on in the old one."""
        file = _open(self.path, number)
        if self._window is not None:
            self._window.close()
            self._window = None
        os.ftruncate(self._file, self._base + self._at)
        self._full.append(self._file)
        self._file, self.segment, self._base, self._at, self._room = file, number, 0, 0, 0
        self._fresh = True

    def begin_after(self, position: int) -> None:
        """Lines from now on have positions after this one, whatever was there before. Raises OSError."""
        with self._lock:
            if self.segment << PLACE | (self._base + self._at) < position:
                self._begin((position >> PLACE) + 1)

    def _flush(self, seconds: float) -> None:
        took = 0.0
        while not self._stop.wait(max(0.0, seconds - took)):
            began = time.monotonic()
            if self._dirty or self._full or (self.beside is not None and self.beside.dirty):
                try:
                    self.flush()
                except OSError as error:
                    log.error("the journal in %s cannot be flushed: %s", self.path, error.strerror)
            took = time.monotonic() - began

    def flush(self) -> None:
        """Returns when all that was appended before is on disk. Raises OSError."""
        with self._flushing:
            with self._lock:
                fresh, full, file = self._fresh, self._full.copy(), self._file
                self._fresh = self._dirty = False
            if file < 0:
                return  # closed, and flushed then
            try:
                if self.beside is not None:  # first: of an attempt that ends now, both are there or only the intent
                    self.beside.flush()
                if fresh:
                    _flush_directory(self.path)
                for one in full:
                    os.fsync(one)
                    os.close(one)
                    self._full.remove(one)
                os.fsync(file)
            except OSError:
                self._fresh = self._dirty = True
                raise

    def close(self) -> None:
        """Flushes; nothing can be appended afterwards."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._flusher.join()
        with self._lock:
            if self._window is not None:
                self._window.close()
                self._window = None
            self._room = 0
            os.ftruncate(self._file, self._base + self._at)
        self.flush()
        with self._flushing:
            os.close(self._file)
            self._file = -1
            if self.beside is not None:
                self.beside.close()
        (self.path / "open").unlink(missing_ok=True)

    def lines(self) -> list[bytes]:
        """Whole lines so far."""
        return read(self.path)


# the files
def segments(path: Path) -> list[int]:
    """The numbers of the segments that are there, oldest first."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return []
    return sorted(int(name[:-6]) for name in names if name.endswith(".jsonl") and name[:-6].isdecimal())


def segment_file(path: Path, number: int) -> Path:
    """Where a segment is."""
    return path / f"{number:06d}.jsonl"


def remove(path: Path, number: int) -> None:
    """Removes a segment for good: one that is removed later is not gone before it."""
    segment_file(path, number).unlink(missing_ok=True)
    _flush_directory(path)


def batches(path: Path, position: int = 0, end: int | None = None) -> Iterator[tuple[int, list[bytes], int]]:
    """Whole lines from position on, some at a time: (position of the first, lines, position behind the last). end is a
    position where a line ends; without it, all there is, but for what is being written or was cut short."""
    for number in segments(path):
        if number < position >> PLACE:
            continue
        place = position & (1 << PLACE) - 1 if number == position >> PLACE else 0
        limit = None
        if end is not None:
            if number > end >> PLACE:
                return
            limit = end & (1 << PLACE) - 1 if number == end >> PLACE else None
        try:
            file = os.open(segment_file(path, number), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # removed meanwhile: it was used up
        try:
            for first, lines, last in _batches(file, place, limit):
                yield number << PLACE | first, lines, number << PLACE | last
        finally:
            os.close(file)


def _batches(file: int, place: int, limit: int | None) -> Iterator[tuple[int, list[bytes], int]]:
    size = CHUNK
    while limit is None or place < limit:
        data = os.pread(file, size if limit is None else min(size, limit - place), place)
        last = data.rfind(b"\n")
        if last < 0:
            if len(data) < size:
                return
            size *= 2  # one line is longer than what was read
            continue
        size = CHUNK
        yield place, data[:last].split(b"\n"), place + last + 1
        place += last + 1


def read(path: Path) -> list[bytes]:
    """The whole lines of a journal, somebody else's too; what is being written or was cut short is left out."""
    return [line for _, lines, _ in batches(path) for line in lines]


def adopt(path: Path) -> None:
    """Makes the lines of a single file beside the directory its next segments. May be killed at any point and done
    again: nothing is appended before it is through."""
    old = path.with_suffix(".jsonl")
    if old.exists():
        numbers = segments(path)
        os.rename(old, path / f"{numbers[-1] + 1 if numbers else 1:06d}.whole")
    for whole in sorted(path.glob("*.whole")):
        if whole.stat().st_size <= SEGMENT:
            os.rename(whole, whole.with_suffix(".jsonl"))
        else:
            _split(whole)
    _flush_directory(path)


def _split(whole: Path) -> None:
    number = int(whole.stem)
    source = os.open(whole, os.O_RDONLY | os.O_CLOEXEC)
    place = 0
    while data := os.pread(source, SEGMENT, place):
        data = data[: data.rfind(b"\n") + 1]
        if not data:  # the last line was cut short
            break
        target = _open(whole.parent, number)
        os.ftruncate(target, 0)
        written = 0
        while written < len(data):
            written += os.write(target, data[written:])
        os.fsync(target)
        os.close(target)
        place, number = place + len(data), number + 1
    os.close(source)
    _flush_directory(whole.parent)
    whole.unlink()


def _open(path: Path, number: int) -> int:
    return os.open(segment_file(path, number), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _mend(file: int) -> int:
    """Cuts off room that was not used, and a last line that a crash cut short; returns the end of the last line."""
    size = end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
    return end


def _flush_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# the machine
def _boot() -> str:
    """Which start of the machine this is; the same for ever where nobody says."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return "-"


def _stopped(path: Path) -> float | None:
    """The flush_seconds of who had the journal open when the machine stopped; None if it did not stop so."""
    try:
        boot, _, seconds = (path / "open").read_text().partition(" ")
        return float(seconds) if boot != _boot() else None
    except (OSError, ValueError):  # not there, or cut short: then nothing can have been appended under it
        return None


def _say_open(path: Path, seconds: float) -> None:
    file = os.open(path / "open", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, f"{_boot()} {seconds:g}".encode())
        os.fsync(file)
    finally:
        os.close(file)
    _flush_directory(path)
