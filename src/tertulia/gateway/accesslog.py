"""The access log: a line of JSON for every call, written by a thread of its own. The loop only appends to a list; the
disk, however slow or full, is met by the thread alone. What a line says is the meter's business.
"""

from __future__ import annotations

import logging
import os
import threading
import time

import msgspec

from ..errors import SettingsError
from .metrics import COUNTER, family

log = logging.getLogger("tertulia.accesslog")
PAUSE = 0.25  # seconds between two writes
MANY = 1000  # lines that are written at once, without waiting for the pause to end
LIMIT = 100_000  # lines that may wait; further ones are dropped, and counted
LEAVE_SECONDS = 5.0  # what a disk is given to take the last lines when the server stops
STDERR = 2


class AccessLog:
    """Lines of JSON to a file (mode 0600, appended) or, for "-", to standard error.

    A file that was rotated away is left for a new one of the same name: at the next line, or at reopen().
    """

    def __init__(self, path: str, limit: int = LIMIT) -> None:
        """limit: lines that may wait to be written. Raises SettingsError if the file cannot be opened."""
        self._path, self._limit = path, limit
        self._records: list[msgspec.Struct | bytes] = []
        self._full = 0  # lines dropped because too many waited; counted by the loop
        self._lost = 0  # lines that could not be written; counted by the thread
        self._told_full = self._told_lost = False
        self._torn = b""
        self._wake = threading.Event()
        self._stopped = self._reopen = False
        self._encoder = msgspec.json.Encoder()
        try:
            self._file = self._open()
        except OSError as error:
            raise SettingsError(f"access_log: {path} cannot be written ({error.strerror})") from None
        self._writer = threading.Thread(target=self._work, name="tertulia-accesslog", daemon=True)
        self._writer.start()

    def write(self, record: msgspec.Struct | bytes) -> None:
        """One line: a Struct, which must not change any more, or JSON as bytes. Never waits, never raises."""
        waiting = len(self._records)
        if waiting >= self._limit:
            self._drop()
            return
        self._records.append(record)
        if waiting == MANY:
            self._wake.set()

    def _drop(self) -> None:
        self._full += 1
        if not self._told_full:
            self._told_full = True
            log.warning("the access log is slower than the calls: lines are dropped (more than %d wait)", self._limit)

    @property
    def dropped(self) -> int:
        """Lines that were not written, for whatever reason."""
        return self._full + self._lost

    def metrics(self) -> list[str]:
        """The lines of its figures, for /metrics."""
        help = "Lines of the access log that were not written: the disk was full, or too slow."
        return family("tertulia_access_log_dropped_total", COUNTER, help, [({}, self.dropped)])

    def reopen(self) -> None:
        """Opens the file anew, as after a rotation; lines that wait go to the new one."""
        self._reopen = True
        self._wake.set()

    def close(self) -> None:
        """Writes what waits, and ends the thread. Gives a stuck disk up after some seconds."""
        self._stopped = True
        self._wake.set()
        self._writer.join(LEAVE_SECONDS)

    # the thread
    def _work(self) -> None:
        while not self._stopped:
            self._wake.wait(PAUSE)
            self._wake.clear()
            self._flush()
        self._flush()  # what came between the last look and the stop
        if self._file != STDERR:
            os.close(self._file)

    def _flush(self) -> None:
        if self._reopen or (self._records and self._moved()):
            self._reopen = False
            self._change()
        while self._records:
            batch = self._records[:MANY]
            # The loop appends at the other end meanwhile: one deletion of what was copied keeps both right.
            del self._records[: len(batch)]
            self._put(batch)
        self._told_full = False

    def _put(self, batch: list[msgspec.Struct | bytes]) -> None:
        lines = [one if isinstance(one, bytes) else self._encoder.encode(one) for one in batch]
        data = memoryview(self._torn + b"\n".join(lines) + b"\n")
        try:
            while data:
                written = os.write(self._file, data)
                data = data[written:]
                self._torn = b"\n"  # if the disk stops here, what comes later starts a line of its own
        except BlockingIOError:  # standard error is a pipe that somebody set not to wait, and nobody reads it
            time.sleep(PAUSE)
            self._lose(batch, "nobody reads it")
        except OSError as error:
            self._lose(batch, error.strerror)
        else:
            self._told_lost, self._torn = False, b""

    def _lose(self, batch: list[msgspec.Struct | bytes], why: str | None) -> None:
        self._lost += len(batch)
        if not self._told_lost:
            self._told_lost = True
            log.warning("the access log cannot be written (%s): lines are lost", why)

    def _open(self) -> int:
        if self._path == "-":
            return STDERR
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _moved(self) -> bool:
        """Whether the path no longer leads to the file that is open."""
        if self._file == STDERR:
            return False
        try:
            there = os.stat(self._path)
        except OSError:
            return True
        here = os.fstat(self._file)
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)

    def _change(self) -> None:
        if self._file == STDERR:
            return
        try:
            new = self._open()
        except OSError as error:  # the old file is better than none
            log.warning("the access log cannot be opened again (%s); it goes on in the old file", error.strerror)
            return
        os.close(self._file)
        self._file = new
