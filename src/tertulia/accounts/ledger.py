"""What was used and what it cost: one entry per call that reached an engine, appended to a journal before the answer's
last byte leaves. At start the journal is read back, so that money spent stays spent over a kill.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ..store.journal import Journal
from .entry import Entry, line_of, read_line

log = logging.getLogger("tertulia.accounts")


class Ledger:
    """Appends entries; knows what each project has spent this calendar month (UTC)."""

    def __init__(self, data: Path) -> None:
        self._journal = Journal(data / "ledger.jsonl")

    def append(self, entry: Entry) -> bytes:
        """Returns the line that was written."""
        line = line_of(entry)
        self._journal.append(line)
        return line

    def spent(self) -> dict[str, int]:
        """Nano-dollars by project, this month."""
        month = time.strftime("%Y-%m", time.gmtime())
        spent: dict[str, int] = {}
        for entry in self._entries():
            if entry.cost and time.strftime("%Y-%m", time.gmtime(entry.at)) == month:
                spent[entry.project] = spent.get(entry.project, 0) + entry.cost
        return spent

    def entries(self) -> list[Entry]:
        """All of them, oldest first."""
        return list(self._entries())

    def _entries(self) -> Iterator[Entry]:
        damaged: list[int] = []
        for number, line in enumerate(self._journal.lines(), 1):
            try:
                yield read_line(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                # torn by a crash or a full disk; broken lines must not keep the server from starting
                damaged.append(number)
        if damaged:
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            lines = ", ".join(map(str, damaged[:3])) + more
            log.warning("damaged lines of the ledger's journal were left out: %s", lines)

    def close(self) -> None:
        self._journal.close()
