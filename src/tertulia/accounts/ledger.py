"""What was used and what it cost: one entry per call that reached an engine, appended to a journal before the answer's
last byte leaves. At start the journal is read back, so that money spent stays spent over a kill.
"""

from __future__ import annotations

import time
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
        for line in self._journal.lines():
            entry = _decoder.decode(line)
            if entry.cost and time.strftime("%Y-%m", time.gmtime(entry.at)) == month:
                spent[entry.project] = spent.get(entry.project, 0) + entry.cost
        return spent

    def entries(self) -> list[Entry]:
        return [_decoder.decode(line) for line in self._journal.lines()]

    def close(self) -> None:
        self._journal.close()
