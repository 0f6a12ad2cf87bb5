"""Entries of the ledger, made up."""

from __future__ import annotations

import random
import time

from tertulia.accounts.entry import Entry
from tertulia.accounts.fold import DAY
from tertulia.accounts.ledger import Ledger

NOON = int(time.time()) // DAY * DAY - DAY // 2  # yesterday


def some(count: int, seed: int = 1) -> list[Entry]:
    """Entries of four days, of few projects, keys and models."""
    chance = random.Random(seed)
    return [
        Entry(
            f"req_{seed}_{at}", chance.choice((0, 1, 1, 1, 2)), NOON - chance.randrange(4 * DAY) + 0.25,
            f"key_{chance.randrange(3)}", f"proj_{chance.randrange(3)}",
            chance.choice(("chat", "completion", "embedding")), "asked",
            chance.choice(("m", "n", "")), 200, "finished", chance.random() * 1000, chance.random() < 0.5,
            chance.randrange(100), chance.randrange(100), chance.randrange(10), chance.randrange(10),
            chance.randrange(10**6), chance.choice(("", "hit", "miss")), chance.randrange(2),
            chance.choice((None, "x")), client="127.0.0.1", target="far", unpriced=chance.random() < 0.1,
        )
        for at in range(count)
    ]  # fmt: skip


def put(ledger: Ledger, entries: list[Entry]) -> None:
    for entry in entries:
        intent = -1
        if entry.attempt:
            intent = ledger.intend(entry.id, entry.attempt, entry.key, entry.project, "chat", "asked", "m", "far", 1, 1)
        ledger.append(entry, intent)
