"""The breaker as a state machine: whatever happens in whatever order, what it promises holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tertulia.gateway.breaker import CAP_SECONDS, CLOSED, HALF_OPEN, OPEN, PROBING_SECONDS, Breaker


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    breaker = Breaker(3, 10.0)
    for at in range(2):
        breaker.failed(at)
    breaker.succeeded()  # in a row: they start again
    for at in range(2):
        breaker.failed(at)
    assert breaker.state == CLOSED and breaker.allows(2.0) and breaker.wait(2.0) == 0
    breaker.failed(2.0)
    assert breaker.state == OPEN and not breaker.allows(11.9) and breaker.wait(4.0) == 8.0


def test_one_probe_after_the_cooldown_decides() -> None:
    breaker = Breaker(1, 10.0)
    breaker.failed(0.0)
    assert breaker.allows(10.0) and breaker.enter(10.0)
    assert breaker.state == HALF_OPEN and not breaker.allows(10.0) and breaker.wait(10.0) == PROBING_SECONDS
    breaker.failed(11.0, True)
    assert breaker.wait(11.0) == 20.0  # twice as long
    assert breaker.enter(31.0)
    breaker.succeeded(True)
    assert breaker.state == CLOSED and not breaker.enter(31.0)
    breaker.failed(32.0)
    assert breaker.wait(32.0) == 10.0  # success has reset it


def test_a_probe_whose_client_left_makes_room_for_the_next() -> None:
    breaker = Breaker(1, 10.0)
    breaker.failed(0.0)
    assert breaker.enter(10.0)
    breaker.released(12.0, True)
    assert breaker.allows(12.0) and breaker.enter(12.0)


def test_what_began_before_it_opened_changes_nothing() -> None:
    breaker = Breaker(1, 10.0)
    breaker.failed(0.0)
    breaker.succeeded()
    breaker.failed(5.0)
    breaker.released(5.0)
    assert breaker.state == OPEN and breaker.until == 10.0


@given(st.floats(0.001, 1000.0))
def test_the_cooldown_is_capped(cooldown: float) -> None:
    breaker, now = Breaker(1, cooldown), 0.0
    breaker.failed(now)
    for _ in range(40):
        now = breaker.until
        assert breaker.enter(now)
        breaker.failed(now, True)
        assert breaker.wait(now) <= max(CAP_SECONDS, cooldown) * 1.001
    assert breaker.cooldown == max(CAP_SECONDS, cooldown)


class Machine(RuleBasedStateMachine):
    """Calls come, and end in every way, while the clock goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker(3, 5.0)
        self.under_way: list[bool] = []  # the calls let through and not over: whether each is the probe
        self.row = 0  # failures in a row while closed
        self.opened_at = 0.0

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def a_call_comes(self) -> None:
        before = self.breaker.state
        if not self.breaker.allows(self.now):
            assert before != CLOSED and self.breaker.wait(self.now) > 0
            return
        assert before != HALF_OPEN  # somebody is probing already
        probe = self.breaker.enter(self.now)
        assert probe == (before == OPEN)
        self.under_way.append(probe)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), how=st.sampled_from(["succeeded", "failed", "released"]))
    def a_call_ends(self, data: st.DataObject, how: str) -> None:
        probe = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        before, until = self.breaker.state, self.breaker.until
        if how == "succeeded":
            self.breaker.succeeded(probe)
        elif how == "failed":
            self.breaker.failed(self.now, probe)
        else:
            self.breaker.released(self.now, probe)
        if probe:
            self.row = 0
            assert self.breaker.state == (CLOSED if how == "succeeded" else OPEN)
            assert self.breaker.allows(self.now) == (how != "failed")
        elif before == CLOSED:
            self.row = self.row + 1 if how == "failed" else 0 if how == "succeeded" else self.row
            assert (self.breaker.state == OPEN) == (self.row >= 3)
            if self.breaker.state == OPEN:
                self.row = 0
        else:
            assert (self.breaker.state, self.breaker.until) == (before, until)

    @invariant()
    def at_most_one_probes_and_only_while_half_open(self) -> None:
        assert sum(self.under_way) == (self.breaker.state == HALF_OPEN)

    @invariant()
    def it_always_lets_somebody_through_again(self) -> None:
        if self.breaker.state == OPEN:
            assert self.breaker.allows(self.now + self.breaker.wait(self.now) + 1e-6)
        assert self.breaker.wait(self.now) <= max(CAP_SECONDS, 5.0)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
