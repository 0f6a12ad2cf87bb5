"""The line of calls that wait for a busy target: by priority, and fair among projects within one.

Pure bookkeeping, the clock is given: who may go is the target's business, who goes first is known here alone.
"""

from __future__ import annotations

from typing import Any

HIGH, NORMAL, LOW = 0, 1, 2
AGED_SECONDS = 5.0  # who has waited longer than this is old
AGED_TURNS = 4  # every so manieth turn is the oldest one's, if it is old: so nobody waits for ever


class Ticket:
    """A place in line, or in several lines at once: whichever target has room first takes it."""

    __slots__ = ("holder", "level", "lines", "project", "since", "tokens")

    def __init__(self, holder: Any, level: int, project: str, since: float, tokens: int) -> None:
        self.holder, self.level, self.project, self.since, self.tokens = holder, level, project, since, tokens
        self.lines: list[Line] = []

    def leave(self) -> None:
        """Out of every line; no effect if it is in none."""
        for line in self.lines:
            line.discard(self)
        self.lines = []


class Line:
    """One target's line."""

    __slots__ = ("_all", "_levels", "_turns", "_waiting")

    def __init__(self) -> None:
        # by level, then project: its tickets as they came. The project whose turn it is stands first.
        self._levels: tuple[dict[str, dict[Ticket, None]], ...] = ({}, {}, {})
        self._waiting = [0, 0, 0]
        self._all: dict[Ticket, None] = {}  # as they came
        self._turns = 0

    def __len__(self) -> int:
        return len(self._all)

    def join(self, ticket: Ticket) -> None:
        """It stands behind those of its level and project."""
        self._levels[ticket.level].setdefault(ticket.project, {})[ticket] = None
        self._waiting[ticket.level] += 1
        self._all[ticket] = None
        ticket.lines.append(self)

    def discard(self, ticket: Ticket) -> None:
        """It is out of line; no effect if it is not in it."""
        if ticket not in self._all:
            return
        del self._all[ticket]
        self._waiting[ticket.level] -= 1
        projects = self._levels[ticket.level]
        del projects[ticket.project][ticket]
        if not projects[ticket.project]:
            del projects[ticket.project]

    def ahead(self, level: int, project: str) -> int:
        """How many would go before one who joined now."""
        better = sum(self._waiting[:level])
        projects = self._levels[level]
        own = len(projects.get(project, ()))
        return better + min(self._waiting[level], (own + 1) * (len(projects) + (project not in projects)) - 1)

    def next(self, now: float) -> Ticket | None:
        """Whose turn it is; None if nobody waits. It stays in line until go()."""
        if not self._all:
            return None
        if self._turns % AGED_TURNS == AGED_TURNS - 1:
            oldest = next(iter(self._all))
            if now - oldest.since > AGED_SECONDS:
                return oldest
        projects = next(level for level in self._levels if level)
        return next(iter(next(iter(projects.values()))))

    def go(self, ticket: Ticket) -> None:
        """It goes: out of every line, and its project stands behind the others."""
        self._turns += 1
        projects = self._levels[ticket.level]
        ticket.leave()
        rest = projects.pop(ticket.project, None)
        if rest is not None:
            projects[ticket.project] = rest
