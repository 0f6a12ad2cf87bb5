"""A limit of time for many things at once, at the price of two dictionary operations each: no timer per call.

All entries of one Timeouts wait equally long, so the order in which they were added is the order in which they expire,
and one timer, set for the oldest, serves them all. It knows nothing of what its entries are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from time import monotonic
from typing import Generic, TypeVar

from ..turns import CLOCK

E = TypeVar("E", bound=Hashable)
GRAIN = 0.01  # seconds: entries that close to their time expire together


class Timeouts(Generic[E]):
    """Calls expire(entry) once for each entry that has been here for `seconds`; the entry is out by then."""

    __slots__ = ("_entries", "_expire", "_timer", "seconds")

    def __init__(self, seconds: float, expire: Callable[[E], None]) -> None:
        self.seconds = seconds
        self._expire = expire
        self._entries: dict[E, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: E) -> None:
        """Its time starts now. Adding what is there already is a mistake: remove it first."""
        self._entries[entry] = CLOCK.monotonic()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self._sweep)

    def remove(self, entry: E) -> None:
        """Its time does not matter any more; no effect if it is not here."""
        self._entries.pop(entry, None)

    def close(self) -> None:
        """Forgets everything; nothing expires any more."""
        self._entries.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        due = monotonic() - self.seconds + GRAIN
        late = []
        for entry, since in self._entries.items():
            if since > due:
                break
            late.append(entry)
        try:
            for entry in late:
                if self._entries.pop(entry, None) is not None:  # one that expired before may have removed it
                    self._expire(entry)
        finally:  # whatever an entry does when it expires, the others do not wait for ever
            self._timer = None
            self._arm()

    def _arm(self) -> None:
        oldest = next(iter(self._entries.values()), None)
        if oldest is not None:
            wait = max(GRAIN, oldest + self.seconds - monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait, self._sweep)
