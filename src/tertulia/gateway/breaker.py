"""A circuit breaker: who fails again and again is left alone for a while, then tried with a single call.

A pure state machine; the clock is given. It knows nothing of calls or of what counts as a failure.

    CLOSED ── failures in a row reach the threshold ──> OPEN ── cooldown over, one call let through ──> HALF_OPEN
      ^                                                  ^                                               │   │
      └────────────── the probe succeeds ────────────────┼───────────────────────────────────────────────┘   │
                                                         └── the probe fails: twice the cooldown; or ends otherwise
"""

from __future__ import annotations

CLOSED, HALF_OPEN, OPEN = 0, 1, 2
CAP_SECONDS = 60.0  # a cooldown does not double beyond this, unless it was set longer to begin with
PROBING_SECONDS = 1.0  # what a caller is told to wait while a probe is under way: nobody knows how long it takes


class Breaker:
    """Times are in seconds of whichever clock the caller uses."""

    __slots__ = ("_base", "_threshold", "cooldown", "failures", "state", "until")

    def __init__(self, threshold: int, cooldown: float) -> None:
        """threshold: failures in a row that open it; cooldown: seconds until the first probe after that."""
        self.state = CLOSED
        self.failures = 0
        self.until = 0.0
        self.tune(threshold, cooldown)

    def tune(self, threshold: int, cooldown: float) -> None:
        """Other settings, from the next opening on."""
        self._threshold, self._base, self.cooldown = threshold, cooldown, cooldown

    def allows(self, now: float) -> bool:
        """Whether a call may be let through; enter() then says that it is."""
        return self.state == CLOSED or (self.state == OPEN and now >= self.until)

    def enter(self, now: float) -> bool:
        """A call goes through; allows(now) must hold. True: it is the probe, and whoever tells its end says so."""
        if self.state == CLOSED:
            return False
        self.state = HALF_OPEN
        return True

    def succeeded(self, probe: bool = False) -> None:
        """A call was answered. One that began before the breaker opened proves nothing."""
        if probe or self.state == CLOSED:
            self.state, self.failures, self.cooldown = CLOSED, 0, self._base

    def failed(self, now: float, probe: bool = False) -> None:
        """A call failed. One that began before the breaker opened proves nothing new."""
        if probe:
            self.cooldown = max(self._base, min(2 * self.cooldown, CAP_SECONDS))
            self._open(now)
        elif self.state == CLOSED:
            self.failures += 1
            if self.failures >= self._threshold:
                self._open(now)

    def released(self, now: float, probe: bool = False) -> None:
        """A call ended and proved nothing either way: the next one may be the probe."""
        if probe:
            self.state, self.until = OPEN, now

    def wait(self, now: float) -> float:
        """Seconds until it may let a call through."""
        if self.state == CLOSED:
            return 0.0
        return PROBING_SECONDS if self.state == HALF_OPEN else max(0.0, self.until - now)

    def _open(self, now: float) -> None:
        self.state, self.until = OPEN, now + self.cooldown
