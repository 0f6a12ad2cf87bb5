"""An append-only file of lines that survives the process: a line is in the kernel's hands when append returns, and on
disk at the latest `flush_seconds` later. It knows nothing of what the lines say.

The file is written through shared memory: a line costs a copy instead of a system call, and the page cache has it all
the same if the process is killed. Room is made ahead, STEP bytes at a time, by allocating blocks, so that a full disk
is an error when room is made and never a fault in the middle of a copy. What is not written yet reads as zero bytes;
they lie behind the last line break until the journal is closed or opened again.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from pathlib import Path

log = logging.getLogger("tertulia.store")

STEP = 2**20  # bytes of room made at a time


class Journal:
    """One process appends, from any of its threads; readers read the file by read()."""

    def __init__(self, path: Path, flush_seconds: float = 1.0) -> None:
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._base = self._mend()  # where the window begins in the file
        self._window: mmap.mmap | None = None
        self._at = self._room = 0  # within the window
        self._dirty = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._flusher = threading.Thread(target=self._flush, args=(flush_seconds,), name="journal", daemon=True)
        self._flusher.start()

    def append(self, line: bytes) -> None:
        """line without its line break. Raises OSError when the disk does not take it; then nothing of it stays."""
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

    def _make_room(self, wanted: int) -> None:
        """A window with room for wanted more bytes, from the page of the next one on. Raises OSError."""
        place = self._base + self._at
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

    def _mend(self) -> int:
        """Cuts off room that was not used, and a last line that a crash cut short; returns the end of the last line."""
        size = end = os.fstat(self._file).st_size
        while end > 0:
            start = max(0, end - 65536)
            found = os.pread(self._file, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)
        return end

    def _flush(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            if self._dirty:
                self._dirty = False
                try:
                    os.fsync(self._file)
                except OSError as error:
                    self._dirty = True
                    log.error("the journal %s cannot be flushed: %s", self.path.name, error.strerror)

    def close(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._flusher.join()
        if self._window is not None:
            self._window.close()
            os.ftruncate(self._file, self._base + self._at)
        os.fsync(self._file)
        os.close(self._file)

    def lines(self) -> list[bytes]:
        """Whole lines so far."""
        return read(self.path)


def read(path: Path) -> list[bytes]:
    """The whole lines of a journal, somebody else's too; what is being written or was cut short is left out."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].splitlines()
