"""What the ledger keeps of a call."""

from __future__ import annotations

import msgspec


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
    target: str = ""  # who was asked last: an upstream by its name, or local or mock; nobody for a hit
    fallback: bool = False  # and whether it was asked in another's stead


line_of = msgspec.json.Encoder().encode
read_line = msgspec.json.Decoder(Entry).decode
