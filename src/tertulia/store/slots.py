"""A file of places for lines that stand only for a while: put one down, and free its place when it is over. Who opens
the file after a process that was killed finds what still stood in it. It knows nothing of what the lines say.

The file is written through shared memory, as the journal is: a line is in the kernel's hands when put returns, and on
disk when somebody has called flush. A place that is free begins with a zero byte. The places used last are used first,
so that the few that a quiet server needs stay in the processor's caches.
"""

from __future__ import annotations

import errno
import mmap
import os
from array import array
from pathlib import Path

PLACE = 1024  # bytes of a place; a line with its break must fit
STEP = 1024 * PLACE  # bytes made at a time


class Slots:
    """One thread puts and frees; flush may be called by another.

    left: the whole lines that stood in the file when it was opened, until clear is called; nothing may be put before,
    if there are any. dirty: something was put or freed since the last flush.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self.dirty = False
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self.left = _standing(self._file)
        self._window: mmap.mmap | None = None
        # where free places begin; as many small objects would keep the memory around them from being given back
        self._free = array("q")
        self._size = 0  # bytes of the window
        self._grow(os.fstat(self._file).st_size)

    def clear(self) -> None:
        """Forgets what is left."""
        self.left = []
        for at in range(0, self._size, PLACE):
            if self._window[at]:  # type: ignore[index]
                self._window[at] = 0  # type: ignore[index]
        self.dirty = True

    def put(self, line: bytes) -> int:
        """Where it stands. line without its line break, shorter than PLACE. Raises OSError when the disk has no room;
        then nothing of it stays."""
        if not self._free:
            self._grow(self._size + 1)
        at = self._free.pop()
        # a kill in the middle leaves a line of which nothing has been said to anybody yet
        self._window[at : at + len(line) + 1] = line + b"\n"  # type: ignore[index]
        self.dirty = True
        return at

    def free(self, at: int) -> None:
        """The line there is over."""
        self._window[at] = 0  # type: ignore[index]
        self._free.append(at)
        self.dirty = True

    def _grow(self, wanted: int) -> None:
        """To as many bytes, or some more. Raises OSError."""
        size = max(STEP, -(-wanted // STEP) * STEP)
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._file, size)  # a file system that cannot promise blocks
        window = mmap.mmap(self._file, size)
        if self._window is not None:
            self._window.close()
        self._free.extend(range(size - PLACE, self._size - PLACE, -PLACE))
        self._window, self._size = window, size

    def flush(self) -> None:
        """Returns when what was put and freed before is on disk. Raises OSError."""
        if self.dirty and self._file >= 0:
            self.dirty = False
            try:
                os.fsync(self._file)
            except OSError:
                self.dirty = True
                raise

    def close(self) -> None:
        """Flushes. What still stands is there for who opens the file next. Raises OSError."""
        if self._file < 0:
            return
        self.flush()
        if self._window is not None:
            self._window.close()
            self._window = None
        os.close(self._file)
        self._file = -1


def standing(path: Path) -> list[bytes]:
    """The lines that stand in somebody's file; none if there is none. Raises OSError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        return _standing(file)
    finally:
        os.close(file)


def _standing(file: int) -> list[bytes]:
    """The lines in places that are not free; one without its break was cut short by a kill."""
    found = []
    size = os.fstat(file).st_size
    for at in range(0, size, PLACE):
        data = os.pread(file, PLACE, at)
        if data[:1] != b"\0":
            line, end, _ = data.partition(b"\n")
            if end:
                found.append(line)
    return found
