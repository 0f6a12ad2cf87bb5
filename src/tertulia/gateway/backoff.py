"""What a failure means for a next try: whether there may be one, how long to wait before it, and how many a target
bears. Pure arithmetic: clock and chance are given.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import DeadlineExceeded, Overloaded, TertuliaError

BASE_SECONDS = 0.25  # the first wait is chance between nothing and this; the bound doubles with every try
CAP_SECONDS = 8.0
PATIENCE_SECONDS = 60.0  # a longer retry-after is not waited for
LEAST_BUDGET = 10.0  # retries a target bears at once, however few its calls are
LEAST_REFILL = 0.5  # and a second, so that a quiet server retries too

# What an attempt came to; the words are the `outcome` of tertulia_upstream_attempts_total.
FAILED, BUSY, REFUSED = "failed", "busy", "refused"


def judge(error: TertuliaError) -> str:
    """FAILED: the target is at fault. BUSY: it is well, but asks for a pause. REFUSED: the request is at fault, or is
    over; asking anybody again changes nothing."""
    status = error.status
    if isinstance(error, DeadlineExceeded):
        return REFUSED
    if status == 429 or isinstance(error, Overloaded):  # Overloaded is only said by engines of ours
        return BUSY
    if status == 408 or (status >= 500 and status != 501):
        return FAILED
    return REFUSED


def delay(tries: int, random: Callable[[], float], floor: float = 0.0) -> float:
    """Seconds to wait before a target that was asked `tries` times is asked again: full jitter, on top of what the
    target itself asked for (floor)."""
    return floor + random() * min(CAP_SECONDS, BASE_SECONDS * 2.0 ** min(tries - 1, 30))


class Budget:
    """How many retries a target bears: a share of its calls, and a few in any case."""

    __slots__ = ("_at", "_calls", "level", "share")

    def __init__(self, share: float, now: float) -> None:
        self.share = share
        self.level = LEAST_BUDGET
        self._at = now
        self._calls = 0

    def take(self, calls: int, now: float) -> bool:
        """Takes one retry if there is one. calls: how many calls the target has had in all, a count that only grows."""
        earned = (calls - self._calls) * self.share + (now - self._at) * LEAST_REFILL
        most = max(LEAST_BUDGET, 60 * self.share)
        self.level = min(most, self.level + max(0.0, earned))
        self._at, self._calls = now, calls
        if self.level < 1.0:
            return False
        self.level -= 1.0
        return True
