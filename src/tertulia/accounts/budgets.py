"""Money: what an organization and each of its projects may spend in a calendar month (UTC), what they have spent, and
what calls under way may still come to. Integer nano-dollars; the clock is given, so that it can be tested.

A call is admitted if what is spent, what is reserved and the most it can cost stay within the limit. While it is under
way its worst case is reserved; when it is over, what it cost is spent and the rest is free again. So what is spent
never exceeds the limit, whatever calls come to in the end, as long as none costs more than its worst case.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable
from typing import Final

from ..errors import QuotaExceeded, RateLimited, TertuliaError

UNLIMITED: Final = 2**62  # nano-dollars: 4.6 billion dollars
A_MOMENT: Final = 1.0  # seconds to wait for calls under way to end, when nobody can know
SPEND: Final = "spend"


class Budget:
    """Of one project, or of the organization. All amounts are in nano-dollars, of this month."""

    __slots__ = ("alert_at", "crossed", "id", "limit", "observe_only", "reserved", "spent")

    def __init__(self, id: str, spent: int = 0) -> None:
        self.id = id
        self.spent, self.reserved, self.limit = spent, 0, UNLIMITED
        self.observe_only = False
        self.alert_at = UNLIMITED  # told when as much is spent
        self.crossed: Callable[[Budget], None] | None = None

    def pay(self, cost: int) -> None:
        """So much is spent."""
        self.spent += cost
        if self.spent >= self.alert_at:
            self.alert_at = UNLIMITED  # whoever watches sets the next one
            if self.crossed is not None:
                self.crossed(self)

    def refusal(self, cost: int) -> TertuliaError | None:
        """What is in the way of a call that may cost so much."""
        if self.spent + self.reserved + cost <= self.limit:
            return None
        if self.spent + cost <= self.limit:  # it may yet fit, once the calls under way have cost less than they might
            return RateLimited(
                "What is left of your quota is reserved for requests that are still being answered. Please try again "
                f"in {A_MOMENT:g}s.",
                type="requests",
                retry_after=A_MOMENT,
            )
        return QuotaExceeded(
            "You exceeded your current quota, please check your plan and billing details. For more information on "
            "this error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
        )


class Budgets:
    """All of them: they begin anew together when the month ends."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        """wall: unix seconds."""
        self._wall = wall
        self.all: dict[str, Budget] = {}
        self.month = month_of(wall())
        self.ends = month_end(wall())
        self.crossed: Callable[[Budget], None] | None = None  # told of every budget that has reached its alert_at
        self.rolled: Callable[[], None] | None = None  # told when a month has begun

    def of(self, id: str, spent: int = 0) -> Budget:
        """The budget of that id; made if it is new, with what was spent this month before."""
        found = self.all.get(id)
        if found is None:
            found = self.all[id] = Budget(id, spent)
            found.crossed = self._crossed
        return found

    def roll(self) -> None:
        """Begins a new month if the old one is over: nothing is spent. What is reserved stays so."""
        now = self._wall()
        if now < self.ends:
            return
        self.month, self.ends = month_of(now), month_end(now)
        for budget in self.all.values():
            budget.spent = 0
            budget.alert_at = UNLIMITED
        if self.rolled is not None:
            self.rolled()

    def _crossed(self, budget: Budget) -> None:
        if self.crossed is not None:
            self.crossed(budget)


def month_of(unix: float) -> str:
    """2026-11, in UTC."""
    return time.strftime("%Y-%m", time.gmtime(unix))


def month_end(unix: float) -> float:
    """When the month ends and the next one begins, in unix seconds."""
    now = time.gmtime(unix)
    year, month = (now.tm_year + 1, 1) if now.tm_mon == 12 else (now.tm_year, now.tm_mon + 1)
    return float(calendar.timegm((year, month, 1, 0, 0, 0)))
