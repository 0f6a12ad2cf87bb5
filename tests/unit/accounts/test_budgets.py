"""Money is arithmetic, too: never more than the limit, and nothing stays reserved."""

from __future__ import annotations

import calendar

import pytest
from hypothesis import given
from hypothesis import strategies as some

from tertulia.accounts.budgets import UNLIMITED, Budget, Budgets, month_end, month_of
from tertulia.errors import QuotaExceeded, RateLimited


def unix(*date: int) -> float:
    return float(calendar.timegm((*date, *[0] * (6 - len(date)))))


@given(some.integers(0, 1000), some.lists(some.tuples(some.integers(0, 300), some.integers(0, 300), some.booleans())))
def test_what_is_spent_never_exceeds_the_limit(limit: int, calls: list[tuple[int, int, bool]]) -> None:
    """Calls that are admitted by their worst case, and come to that or less, in any order."""
    it, running = Budget("proj_1"), []
    it.limit = limit
    for most, cost, ends in calls:
        if it.refusal(most) is None:
            it.reserved += most
            running.append((most, min(cost, most)))
        if ends and running:
            reserved, paid = running.pop(0)
            it.reserved -= reserved
            it.pay(paid)
        assert it.spent + it.reserved <= limit
    for reserved, paid in running:
        it.reserved -= reserved
        it.pay(paid)
    assert it.reserved == 0 and it.spent <= limit


def test_over_the_limit_is_for_good_and_reserved_is_for_now() -> None:
    it = Budget("proj_1", spent=50)
    it.limit = 100
    assert it.refusal(50) is None
    it.reserved = 40
    soon = it.refusal(50)
    assert isinstance(soon, RateLimited) and (soon.retry, soon.retry_after) == (True, 1.0)
    gone = it.refusal(51)
    assert isinstance(gone, QuotaExceeded)
    assert (gone.retry, gone.retry_after, gone.type, gone.code) == (
        False, None, "insufficient_quota", "insufficient_quota",
    )  # fmt: skip
    assert gone.message.startswith("You exceeded your current quota, please check your plan and billing details.")


def test_without_a_limit_everything_fits() -> None:
    it = Budget("proj_1", spent=10**15)
    assert it.limit == UNLIMITED and it.refusal(10**15) is None


def test_a_new_month_begins_without_a_restart() -> None:
    now = unix(2026, 11, 30, 23, 59, 59)
    it = Budgets(lambda: now)
    told: list[str] = []
    it.rolled = lambda: told.append(it.month)
    budget = it.of("proj_1", 70)
    budget.limit, budget.reserved = 100, 20
    it.roll()
    assert (it.month, budget.spent) == ("2026-11", 70)
    now += 1
    it.roll()
    assert (it.month, budget.spent, budget.reserved) == ("2026-12", 0, 20)  # the calls under way are paid in December
    budget.pay(5)
    assert it.of("proj_1", 99) is budget and budget.spent == 5
    now = unix(2027, 1, 1)
    it.roll()
    assert (it.month, budget.spent, told) == ("2027-01", 0, ["2026-12", "2027-01"])


@pytest.mark.parametrize(
    ("at", "month", "end"),
    [
        ((2026, 1, 1), "2026-01", (2026, 2, 1)), ((2026, 12, 31, 23, 59, 59), "2026-12", (2027, 1, 1)),
        ((2028, 2, 29, 12), "2028-02", (2028, 3, 1)),
    ],
)  # fmt: skip
def test_months_are_those_of_the_calendar_in_utc(
    at: tuple[int, ...], month: str, end: tuple[int, ...]
) -> None:  # fmt: skip
    assert (month_of(unix(*at)), month_end(unix(*at))) == (month, unix(*end))


def test_who_watches_is_told_once_when_as_much_is_spent() -> None:
    it, told = Budgets(lambda: 0.0), []
    it.crossed = lambda budget: told.append((budget.id, budget.spent))
    budget = it.of("proj_1")
    budget.alert_at = 100
    for _ in range(5):
        budget.pay(40)
    assert told == [("proj_1", 120)]
