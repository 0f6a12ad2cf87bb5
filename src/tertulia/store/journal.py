"""An append-only file of lines that survives the process: a line is in the kernel's hands when append returns, and on
disk at the latest `flush_seconds` later. It knows nothing of what the lines say.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

log = logging.getLogger("tertulia.store")


class Journal:
    """One process appends; readers read the file. append is one write call, without buffering or waiting."""

    def __init__(self, path: Path, flush_seconds: float = 1.0) -> None:
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._mend()
        self._dirty = False
        self._stop = threading.Event()
        self._flusher = threading.Thread(target=self._flush, args=(flush_seconds,), name="journal", daemon=True)
        self._flusher.start()

    def append(self, line: bytes) -> None:
        """line without its line break. Raises OSError when the disk does not take it; then nothing of it stays."""
        data = line + b"\n"
        written = os.write(self._file, data)
        if written < len(data):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._dirty = True

    def _mend(self) -> None:
        """Takes away a last line that a crash cut short, so that the next one does not grow together with it."""
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
        os.fsync(self._file)
        os.close(self._file)

    def lines(self) -> list[bytes]:
        """Whole lines so far; a last line that was cut short by a crash is left out."""
        data = self.path.read_bytes()
        return data[: data.rfind(b"\n") + 1].splitlines()
