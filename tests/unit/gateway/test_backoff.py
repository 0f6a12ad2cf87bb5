"""What a failure means, how long a pause is, and that retries cannot become the load themselves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tertulia.errors import (
    BadRequest,
    BadUpstreamAnswer,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailed,
    ModelNotFound,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    TertuliaError,
    TooLarge,
    UpstreamRefused,
    UpstreamTimeout,
)
from tertulia.gateway.backoff import (
    BASE_SECONDS,
    BUSY,
    CAP_SECONDS,
    FAILED,
    LEAST_BUDGET,
    LEAST_REFILL,
    REFUSED,
    Budget,
    delay,
    judge,
)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (EngineFailed(), FAILED), (BadUpstreamAnswer(), FAILED), (UpstreamTimeout(), FAILED), (TertuliaError(), FAILED),
        (UpstreamRefused(500), FAILED), (UpstreamRefused(503), FAILED), (UpstreamRefused(504), FAILED),
        (UpstreamRefused(408), FAILED), (UpstreamRefused(429), BUSY), (RateLimited(), BUSY), (QuotaExceeded(), BUSY),
        (Overloaded(), BUSY), (BadRequest(), REFUSED), (ContextLengthExceeded(), REFUSED), (TooLarge(), REFUSED),
        (ModelNotFound("m"), REFUSED), (UpstreamRefused(400), REFUSED), (UpstreamRefused(422), REFUSED),
        (UpstreamRefused(501), REFUSED), (DeadlineExceeded(), REFUSED),
    ],
)  # fmt: skip
def test_whose_fault_it_is(error: TertuliaError, verdict: str) -> None:
    assert judge(error) == verdict


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True), st.floats(0, 1000))
def test_a_pause_is_chance_within_a_doubling_bound_above_what_was_asked_for(
    tries: int, chance: float, floor: float
) -> None:
    wait = delay(tries, lambda: chance, floor)
    bound = min(CAP_SECONDS, BASE_SECONDS * 2.0 ** min(tries - 1, 100))
    assert floor <= wait <= floor + bound
    assert delay(tries, lambda: 0.0, floor) == floor  # full jitter reaches down to nothing
    assert delay(tries + 1, lambda: chance, floor) >= wait


def test_a_quiet_target_bears_a_few_retries_and_then_some_over_time() -> None:
    budget = Budget(0.0, 0.0)
    assert [budget.take(0, 0.0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert not budget.take(0, 1.9) and budget.take(0, 2.0) and not budget.take(0, 2.0)


def test_a_busy_one_bears_a_share_of_its_calls() -> None:
    budget = Budget(0.2, 0.0)
    for _ in range(10):
        budget.take(0, 0.0)
    assert [budget.take(calls, 0.0) for calls in range(1, 101)].count(True) == 20


class Machine(RuleBasedStateMachine):
    """However calls and retries come, there are never more retries than were earned."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.calls, self.taken = 0.0, 0, 0
        self.budget = Budget(0.2, 0.0)

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(count=st.integers(1, 200))
    def calls_come(self, count: int) -> None:
        self.calls += count

    @rule()
    def a_retry_is_wanted(self) -> None:
        self.taken += self.budget.take(self.calls, self.now)

    @invariant()
    def no_more_than_earned(self) -> None:
        assert self.taken <= LEAST_BUDGET + 0.2 * self.calls + LEAST_REFILL * self.now + 1e-6
        assert 0 <= self.budget.level <= max(LEAST_BUDGET, 60 * 0.2)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
