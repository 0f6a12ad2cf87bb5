"""Answers on disk, over a restart: one SQLite file of its own, with the least recently used ones given up when there is
no more room. All of it happens in one thread beside the event loop; the loop asks a set of what is there.

It is a cache: a file that is damaged is put aside and begun anew, and a disk that takes no more costs nothing but hits.
Whoever can read the file reads the answers: it is its owner's alone (mode 0600). It knows nothing of what a key means.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from ..core import Usage

log = logging.getLogger("tertulia.store")
VERSION = 1  # of the table and of what is in it; a file of another version is emptied
ROW_BYTES = 200  # what a row costs beside its answer
WAITING_LIMIT = 16 * 2**20  # bytes of answers that may wait to be written; what comes on top is not kept
ROOM = 0.9  # of the limit that is left filled when old answers make room
SHORT = 8  # bytes of a key that memory keeps of each answer on disk
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
T = TypeVar("T")
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, used REAL NOT NULL, stored REAL NOT NULL, size INTEGER NOT NULL, answer BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS answers_used ON answers (used);
"""


class Answer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One whole answer as it went over the wire. head: header lines to send again; stored: unix seconds; pieces: of a
    stream whole server-sent events, else one body; size: bytes it counts for."""

    model: str
    head: bytes
    stored: float
    pieces: list[bytes]
    usage: Usage | None
    size: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Answer).decode


class Answers:
    """The file. `key in answers` may be asked by the loop; get waits for the thread, put does not."""

    def __init__(self, path: Path, limit: int, lifetime: float) -> None:
        """limit in bytes of answers; lifetime in seconds after which one is not wanted any more. Never raises: what is
        wrong with the file is logged, and nothing is kept then."""
        self.path, self.limit, self.lifetime = path, limit, lifetime
        self.bytes = 0
        self._keys: set[bytes] | None = None  # None until they have been read
        self._waiting = 0
        self._database: sqlite3.Connection | None = None
        self._complained = 0.0
        self._thread = ThreadPoolExecutor(1, "answers")
        self._thread.submit(self._try, self._open, None)

    def __contains__(self, key: bytes) -> bool:
        """Whether get may find something: yes until the file has been looked through."""
        return self._keys is None or key[:SHORT] in self._keys

    def __len__(self) -> int:
        return len(self._keys or ())

    async def get(self, key: bytes) -> Answer | None:
        """The answer stored under key, whatever its age."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._try, lambda: self._read(key), None)

    def put(self, key: bytes, answer: Answer) -> None:
        """Writes it some time soon; nothing is kept of what is too large, or comes faster than the disk takes it."""
        if answer.size > self.limit // 8 or self._waiting + answer.size > WAITING_LIMIT:
            return
        self._waiting += answer.size
        self._thread.submit(self._try, lambda: self._write(key, answer), None)

    def touch(self, key: bytes) -> None:
        """It was used; said of what memory kept in the meantime."""
        if self._keys is not None and key[:SHORT] in self._keys:
            self._thread.submit(self._try, lambda: self._touch(key), None)

    def close(self) -> None:
        """Waits until everything is written."""
        self._thread.submit(self._try, self._close, None)
        self._thread.shutdown()

    # in the thread
    def _try(self, work: Callable[[], T], otherwise: T) -> T:
        try:
            return work()
        except sqlite3.DatabaseError as error:
            if (getattr(error, "sqlite_errorcode", 0) & 0xFF) in DAMAGED:
                self._begin_anew()
            else:
                self._complain(error)
        except OSError as error:
            self._complain(error)
        except msgspec.MsgspecError:  # written by somebody else
            log.warning("an answer in %s cannot be read", self.path.name)
        return otherwise

    def _complain(self, error: Exception) -> None:
        if time.monotonic() - self._complained > 60 or not self._complained:
            self._complained = time.monotonic()
            log.warning("answers cannot be kept in %s: %s", self.path.name, error)
        self._keys = self._keys or set()

    def _open(self) -> None:
        file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.fchmod(file, 0o600)  # its -wal and -shm get the same
        os.close(file)
        database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self._database = database
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute("PRAGMA busy_timeout=1000")
        if database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            database.execute("DROP TABLE IF EXISTS answers")
            database.execute(f"PRAGMA user_version={VERSION}")
        database.executescript(SCHEMA)
        database.execute("DELETE FROM answers WHERE stored < ?", (time.time() - self.lifetime,))
        self.bytes = int(database.execute("SELECT total(size) FROM answers").fetchone()[0])
        self._keys = {row[0] for row in database.execute(f"SELECT substr(key, 1, {SHORT}) FROM answers")}
        self._make_room()

    def _begin_anew(self) -> None:
        """Puts a damaged file aside, where it can be looked at, and begins another."""
        log.warning("%s is damaged; it is put aside as %s.damaged", self.path.name, self.path.name)
        self._close()
        self._keys = set()
        self.bytes = 0
        try:
            os.replace(self.path, self.path.with_name(self.path.name + ".damaged"))
            for ending in ("-wal", "-shm"):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as error:
            self._complain(error)

    def _read(self, key: bytes) -> Answer | None:
        if self._database is None:
            return None
        row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        self._touch(key)
        return _decode(row[0])

    def _touch(self, key: bytes) -> None:
        if self._database is not None:
            self._database.execute("UPDATE answers SET used = ? WHERE key = ?", (time.time(), key))

    def _write(self, key: bytes, answer: Answer) -> None:
        self._waiting -= answer.size
        database = self._database
        if database is None:
            return
        data = _encode(answer)
        size = len(data) + ROW_BYTES
        old = database.execute("SELECT size FROM answers WHERE key = ?", (key,)).fetchone()
        row = (key, time.time(), answer.stored, size, data)
        database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", row)
        self.bytes += size - (old[0] if old else 0)
        if self._keys is not None:
            self._keys.add(key[:SHORT])
        if self.bytes > self.limit:
            self._make_room()

    def _make_room(self) -> None:
        database, keys = self._database, self._keys
        assert database is not None and keys is not None
        if self.bytes <= self.limit:
            return
        while self.bytes > self.limit * ROOM:
            rows = database.execute("SELECT key, size FROM answers ORDER BY used LIMIT 64").fetchall()
            if not rows:
                self.bytes = 0
                return
            for key, size in rows:
                database.execute("DELETE FROM answers WHERE key = ?", (key,))
                keys.discard(key[:SHORT])
                self.bytes -= size
                if self.bytes <= self.limit * ROOM:
                    return

    def _close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()
