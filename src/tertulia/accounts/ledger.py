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


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One call, as the ledger keeps it and the access log shows it; nothing of a prompt or an answer is in it.

    at is when it ended, in unix seconds; ms from its first byte to its last; cost in nano-dollars. asked is the model
    name that was asked for, model the one that answered. attempts counts requests to engines, retry is the client's own
    count of its tries. Fields with their default value are left out of the line.
    """

    id: str
    at: float
    key: str
    project: str
    task: str
    asked: str
    model: str
    status: int
    outcome: str
    ms: float
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cost: int = 0
    attempts: int = 0
    cache: str = ""  # hit, miss or joined
    retry: int = 0
    error: str | None = None
    estimated: bool = False  # the tokens were counted here, as the answer broke off before its engine had told
    client: str = ""


log = logging.getLogger("tertulia.accounts")
line_of = _encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Entry)


class Ledger:
    """Appends entries; knows what each project has spent this calendar month (UTC)."""

    def __init__(self, data: Path) -> None:
        self._journal = Journal(data / "ledger.jsonl")

    def append(self, entry: Entry) -> bytes:
        """Returns the line that was written."""
        line = _encode(entry)
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
                yield _decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                # torn by a crash or a full disk; broken lines must not keep the server from starting
                damaged.append(number)
        if damaged:
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            lines = ", ".join(map(str, damaged[:3])) + more
            log.warning("damaged lines of the ledger's journal were left out: %s", lines)

    def close(self) -> None:
        self._journal.close()
