"""Limits are arithmetic: whatever is asked and whenever, never more than the limit, and nothing is lost."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from tertulia.accounts.limits import Allowance, Bucket, duration
from tertulia.errors import QuotaExceeded, RateLimited

steps = some.lists(some.tuples(some.floats(0, 90), some.integers(0, 400)), max_size=40)
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def allowance(requests: int = 10, tokens: int = 1000, spend: int | None = None, spent: int = 0) -> Allowance:
    return Allowance("org-1", requests, tokens, spend, spent, 0.0)


@quick
@given(some.integers(1, 500), steps)
def test_in_any_minute_no_more_than_limit_and_one_refill(limit: int, steps: list[tuple[float, int]]) -> None:
    """A full bucket and a minute's refill is the most that a window of a minute can let through."""
    bucket, now, taken = Bucket(limit, 0.0), 0.0, []
    for pause, wanted in steps:
        now += pause
        assert 0 <= bucket.refill(now) <= limit
        if bucket.level >= wanted:
            bucket.level -= wanted
            taken.append((now, wanted))
        window = sum(count for at, count in taken if at > now - 60)
        assert window <= 2 * limit + 1e-6


@quick
@given(some.integers(1, 500), steps)
def test_after_the_wait_it_fits(limit: int, steps: list[tuple[float, int]]) -> None:
    bucket, now = Bucket(limit, 0.0), 0.0
    for pause, wanted in steps:
        now += pause
        bucket.refill(now)
        wanted = min(wanted, limit)
        wait = bucket.wait(wanted)
        assert (wait == 0) == (bucket.level >= wanted)
        now += wait
        assert bucket.refill(now) >= wanted - 1e-6
        bucket.level -= wanted


@quick
@given(some.integers(1, 500), steps)
def test_after_the_reset_it_is_full(limit: int, steps: list[tuple[float, int]]) -> None:
    bucket = Bucket(limit, 0.0)
    for pause, wanted in steps:
        bucket.refill(bucket.at + pause)
        bucket.level -= min(wanted, bucket.level)
    assert bucket.refill(bucket.at + bucket.reset()) == pytest.approx(limit)


@quick
@given(
    some.lists(some.tuples(some.integers(0, 300), some.integers(0, 100), some.integers(0, 300), some.integers(0, 100)))
)
def test_settling_gives_back_what_was_not_used(calls: list[tuple[int, int, int, int]]) -> None:
    it = allowance(10**6, 10**6, 10**6)
    used = paid = 0
    for reserved, cost, tokens, price in calls:
        tokens, price = min(tokens, reserved), min(price, cost)
        it.admit(reserved, cost, "m", 0.0)
        assert it.reserved == cost
        it.settle(reserved, tokens, cost, price)
        used, paid = used + tokens, paid + price
    assert it.tokens.level == 10**6 - used and it.reserved == 0 and it.spent == paid
    assert it.requests.level == 10**6 - len(calls)


def test_settling_late_does_not_fill_over_the_limit() -> None:
    it = allowance(tokens=100)
    it.admit(80, 0, "m", 0.0)
    it.tokens.refill(60.0)
    it.settle(80, 0, 0, 0)
    assert it.tokens.level == 100


def test_more_used_than_reserved_is_owed() -> None:
    it = allowance(tokens=100)
    it.admit(10, 0, "m", 0.0)
    it.settle(10, 150, 0, 0)
    assert it.tokens.level == -50
    with pytest.raises(RateLimited):
        it.admit(1, 0, "m", 30.0)
    it.admit(1, 0, "m", 31.0)


def test_too_many_requests() -> None:
    it = allowance(requests=60)
    for _ in range(60):
        it.admit(0, 0, "gpt-4o", 0.0)
    with pytest.raises(RateLimited) as error:
        it.admit(0, 0, "gpt-4o", 0.25)
    assert error.value.message == (
        "Rate limit reached for gpt-4o in organization org-1 on requests per min (RPM): Limit 60, Used 60, "
        "Requested 1. Please try again in 750ms. Visit https://platform.openai.com/account/rate-limits to learn more."
    )
    assert (error.value.type, error.value.code, error.value.retry_after, error.value.retry) == (
        "requests", "rate_limit_exceeded", 0.75, True,
    )  # fmt: skip
    it.admit(0, 0, "gpt-4o", 1.0)


def test_too_many_tokens() -> None:
    it = allowance(tokens=600)
    it.admit(500, 0, "m", 0.0)
    with pytest.raises(RateLimited) as error:
        it.admit(200, 0, "m", 0.0)
    assert error.value.message.startswith(
        "Rate limit reached for m in organization org-1 on tokens per min (TPM): Limit 600, Used 500, Requested 200. "
        "Please try again in 10s."
    )
    assert error.value.type == "tokens"
    assert it.requests.level == 9  # the refused one was not counted


def test_what_can_never_fit_is_not_worth_another_try() -> None:
    it = allowance(tokens=100)
    with pytest.raises(RateLimited) as error:
        it.admit(101, 0, "m", 0.0)
    assert error.value.message.startswith(
        "Request too large for m in organization org-1 on tokens per min (TPM): Limit 100, "
    )
    assert (error.value.retry, error.value.retry_after) == (False, None)
    assert (it.requests.level, it.tokens.level, it.reserved) == (10, 100, 0)


def test_money_reserved_counts_as_spent_until_it_is_given_back() -> None:
    it = allowance(spend=100, spent=50)
    it.admit(0, 40, "m", 0.0)
    with pytest.raises(QuotaExceeded) as error:
        it.admit(0, 11, "m", 0.0)
    assert error.value.message.startswith(
        "You exceeded your current quota, please check your plan and billing details."
    )
    assert (error.value.retry, error.value.retry_after, it.reserved) == (False, None, 40)
    it.settle(0, 0, 40, 10)
    it.admit(0, 40, "m", 0.0)
    assert (it.spent, it.reserved) == (60, 40)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.017, "17ms"), (0.9991, "1s"), (1, "1s"), (1.5, "1.5s"), (11.05, "11.05s"),
     (59.9999, "1m0s"), (60, "1m0s"), (61.25, "1m1.25s"), (360, "6m0s"), (3600, "1h0m0s"), (7384.5, "2h3m4.5s")],
)  # fmt: skip
def test_durations_as_go_prints_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@quick
@given(some.floats(0, 10**6))
def test_a_duration_is_never_shorter_than_the_time_and_at_most_a_millisecond_longer(seconds: float) -> None:
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?([\d.]+)(m?)s", duration(seconds))
    assert found
    hours, minutes, rest, milli = found.groups()
    total = int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(rest) / (1000 if milli else 1)
    assert seconds - 1e-5 <= total < seconds + 0.00101
