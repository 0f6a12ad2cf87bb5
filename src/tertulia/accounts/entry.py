"""What the ledger keeps of an attempt to answer a call, and how a line of the journal is written and read."""

from __future__ import annotations

from typing import Any

import msgspec


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One attempt at a call, as the ledger keeps it and the access log shows it; nothing of a prompt or an answer is in
    it. id is the call's; attempt counts its requests to engines from 1, and is 0 where none was asked (a hit, a joined
    or refused call).

    at is when it ended, in unix seconds; ms from its first byte to its last; cost in nano-dollars. asked is the model
    name that was asked for, model the one that answered. retry is the client's own count of its tries. Fields with
    their default value are left out of the line.
    """

    id: str
    attempt: int
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
    cache: str = ""  # hit, miss or joined
    retry: int = 0
    error: str | None = None
    estimated: bool = False  # the tokens were counted here, as the answer broke off before its engine had told
    client: str = ""
    target: str = ""  # who was asked: an upstream by its name, or local or mock; nobody for a hit
    fallback: bool = False  # and whether it was asked in another's stead
    observed: str = ""  # what a limit that only observes would have refused it for: requests, tokens, spend, ...
    unpriced: bool = False  # nobody has said what the model costs


class Intent(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An attempt that is about to leave for an engine: what becomes its entry if the process ends before it does.

    open is the call's id; at is when it left, in unix seconds; hold is what was reserved for it, in nano-dollars.
    """

    open: str
    attempt: int
    at: float
    key: str
    project: str
    task: str
    asked: str
    model: str
    target: str
    prompt_tokens: int = 0
    hold: int = 0
    output_tokens: int = 0

    def interrupted(self) -> Entry:
        """Nobody knows any more what it came to: it is charged what was reserved."""
        return Entry(
            self.open, self.attempt, self.at, self.key, self.project, self.task, self.asked, self.model, 0, INTERRUPTED,
            0.0, prompt_tokens=self.prompt_tokens, completion_tokens=self.output_tokens, cost=self.hold,
            error=INTERRUPTED, estimated=True, target=self.target,
        )  # fmt: skip


class Named(msgspec.Struct, gc=False):
    """Which attempt an entry is of."""

    id: str
    attempt: int = 0


INTERRUPTED = "interrupted"  # the outcome of an attempt whose process was killed
line_of = msgspec.json.Encoder().encode
read_intent = msgspec.json.Decoder(Intent).decode
read_name = msgspec.json.Decoder(Named).decode
_read = msgspec.json.Decoder(Entry).decode
_read_any = msgspec.json.Decoder(dict[str, Any]).decode


def read_line(line: bytes) -> Entry:
    """The entry of a line. Raises msgspec.MsgspecError or UnicodeDecodeError for a damaged one."""
    try:
        return _read(line)
    except msgspec.ValidationError:
        fields = _read_any(line)  # of Tertulia 0.1, whose entries were of calls: attempts says how many tries one took
        if "attempt" in fields:
            raise
        return msgspec.convert({**fields, "attempt": fields.get("attempts", 0)}, Entry)
