"""What was used and what it cost: one entry per attempt at a call, appended to a journal before the answer's last byte
leaves. While an attempt is under way its intent stands beside the journal, from before its first byte left: at start an
intent without its entry, of a process that was killed, becomes one. From the journal the entries are folded into the
database (fold).

This module is on the way of every call: what is slow or needs the database is in fold.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..store.journal import PLACE as POSITION
from ..store.journal import Journal, batches, remove, segments
from ..store.slots import PLACE, Slots
from ..turns import CLOCK
from .entry import Entry, Intent, line_of, read_intent, read_line, read_name
from .fold import Admitted, Fold, month_of

if TYPE_CHECKING:
    from ..store.database import Database

log = logging.getLogger("tertulia.accounts")
ENTRY = 1024  # bytes of an entry, about
NAME = 32  # letters of a name in an intent that would be too long: each may take six bytes


class Ledger:
    """Appends entries; knows what each project has spent this calendar month (UTC)."""

    def __init__(
        self, data: Path, database: Database | None = None, *, flush_seconds: float = 1.0, fold_seconds: float = 30.0,
        days: int = 0,
    ) -> None:  # fmt: skip
        """Opens the journal in data and accounts for what a killed process had under way. Without a database nothing is
        folded; with one, nothing before start(). Raises OSError."""
        self._journal = Journal(data / "ledger", flush_seconds)
        self._intents = self._journal.beside = Slots(data / "ledger" / "intents")
        self._under_way = 0  # attempts with an intent
        self.interrupted = self._recover()
        if self._journal.stopped is not None:
            log.warning(
                "the machine stopped under the ledger: entries of its last %g s (flush_seconds) may be missing",
                self._journal.stopped,
            )
        self.fold: Fold | None = None
        if database is not None:
            self.fold = Fold(self._journal, database, writer_name(data), fold_seconds, days, self._tidy)

    def start(self) -> None:
        """Begins to fold, now and then, in a thread."""
        if self.fold is not None:
            self.fold.start()

    def intend(
        self, id: str, attempt: int, key: str, project: str, task: str, asked: str, model: str, target: str,
        prompt_tokens: int, hold: int, output_tokens: int = 0,
    ) -> int:  # fmt: skip
        """An attempt is about to leave; returns where its intent stands, until append is told. Raises OSError when that
        cannot be written; then it must not."""
        intent = Intent(
            id, attempt, CLOCK.time(), key, project, task, asked, model, target, prompt_tokens, hold, output_tokens
        )
        line: bytes = line_of(intent)
        if len(line) >= PLACE:  # its names are too long; what they begin with is enough here
            line = line_of(
                msgspec.structs.replace(intent, asked=asked[:NAME], model=model[:NAME], target=target[:NAME])
            )
        self._journal.promise((self._under_way + 1) * ENTRY)  # or nobody could account for its end
        at: int = self._intents.put(line)
        self._under_way += 1
        return at

    def append(self, entry: Entry, intent: int = -1) -> bytes:
        """Returns the line that was written. intent: where that of its attempt stands; it is over. Raises OSError."""
        line: bytes = line_of(entry)
        self._journal.append(line)
        if intent >= 0:
            self._intents.free(intent)
            self._under_way -= 1
        return line

    def _recover(self) -> int:
        """Makes entries of the intents that have none; how many. Killed on the way, it is done again for the rest."""
        intents: dict[tuple[str, int], Intent] = {}
        for line in self._intents.left:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):  # cut short, and so nothing had left
                intent = read_intent(line)
                intents[intent.open, intent.attempt] = intent
        if intents:  # who is killed between the two has written an entry of one that still stands
            for _, lines, _ in batches(self._journal.path):
                for line in lines:
                    try:
                        named = read_name(line)
                    except (msgspec.MsgspecError, UnicodeDecodeError):
                        continue  # torn by a crash or a full disk; told when it is folded
                    intents.pop((named.id, named.attempt), None)
        for intent in intents.values():
            self._journal.append(line_of(intent.interrupted()))
        if intents:
            self._journal.flush()
            log.warning(
                "%d attempts had no end when the last process ended: they are charged what was reserved", len(intents)
            )
        if self._intents.left:
            self._intents.clear()
        return len(intents)

    def _tidy(self, position: int) -> None:
        """Removes the segments of which all is in the database before position. What stands of intents on disk is newer
        than they are: the journal was flushed before it was folded."""
        for number in segments(self._journal.path):
            if number >= position >> POSITION:
                return
            remove(self._journal.path, number)

    def spent(self) -> dict[str, int]:
        """Nano-dollars by project, this month."""
        position = 0
        spent: dict[str, int] = {}
        month = month_of(time.time())
        if self.fold is not None:
            position, spent = self.fold.spent(month)
        for entry in self._entries(position):
            if entry.cost and entry.at >= month:
                spent[entry.project] = spent.get(entry.project, 0) + entry.cost
        return spent

    def admitted(self, seconds: float) -> list[Admitted]:
        """What was admitted in the last so many seconds, oldest first: for limits that count over a restart. What is in
        the database is told by the second, and before the last minute by the quarter of an hour."""
        position, now = 0, time.time()
        found: list[Admitted] = []
        if self.fold is not None:
            position, found = self.fold.admitted(now, seconds)
        for entry in self._entries(position):
            began = entry.at - entry.ms / 1000
            if began > now - seconds:
                tokens = entry.prompt_tokens + entry.completion_tokens if entry.attempt else 0
                found.append(Admitted(began, entry.project, entry.asked, 1 if entry.attempt <= 1 else 0, tokens))
        return sorted(found)

    def entries(self) -> list[Entry]:
        """Those in the journal, oldest first: what has been folded goes, a segment at a time."""
        return list(self._entries(0))

    def _entries(self, position: int) -> Iterator[Entry]:
        for _, lines, _ in batches(self._journal.path, position, self._journal.end):
            for line in lines:
                try:
                    yield read_line(line)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    continue  # broken lines must not keep the server from starting

    def catch_up(self) -> None:
        """Folds all there is at this moment. Raises what the database raises (store.database.FAILURES), or OSError."""
        if self.fold is not None:
            self.fold.now()

    def close(self) -> None:
        """Folds what is left, if the database takes it, and closes the journal."""
        if self.fold is not None:
            self.fold.stop()
        self._journal.close()


def writer_name(data: Path) -> str:
    """What tells the journal of this data directory from all others; random, made once."""
    path = data / "writer"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        name = f"writer_{secrets.token_hex(12)}"
        partial = path.with_name(f"writer.{os.getpid()}")
        file = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        os.write(file, name.encode())
        os.fsync(file)
        os.close(file)
        os.rename(partial, path)
        return name
