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


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One attempt. at in unix seconds; cost in nano-dollars; microseconds from first byte to last."""

    id: str
    at: int
    key: str
    project: str
    asked: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cost: int
    microseconds: int
    status: int
    outcome: str


log = logging.getLogger("tertulia.accounts")
_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Entry)


class Ledger:
    """Appends entries; knows what each project has spent this calendar month (UTC)."""

    def __init__(self, data: Path) -> None:
        self._journal = Journal(data / "ledger.jsonl")

    def append(self, entry: Entry) -> None:
        self._journal.append(_encode(entry))

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
        for number, line in enumerate(self._journal.lines(), 1):
            try:
                yield _decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                # torn by a crash or a full disk; one broken line must not keep the server from starting
                log.warning("line %d of the ledger's journal is damaged and was left out", number)

    def close(self) -> None:
        self._journal.close()
