"""Limits are arithmetic: whatever is asked and whenever, never more than the limit, nothing is lost, and nobody is left
out for good."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from tertulia.accounts.limits import (
    CONCURRENT,
    DAILY,
    GRACE,
    NO_LIMIT,
    REQUESTS,
    TOKENS,
    Allowance,
    Bucket,
    Slot,
    duration,
)

steps = some.lists(some.tuples(some.floats(0, 90), some.integers(0, 400)), max_size=40)
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def allowance(
    requests: int = NO_LIMIT, tokens: int = NO_LIMIT, daily: int = NO_LIMIT, concurrent: int = NO_LIMIT
) -> Allowance:
    it = Allowance("org-1", "gpt-4o", 0.0)
    it.limit(requests, tokens, daily, concurrent)
    return it


def ask(it: Allowance, now: float, tokens: int = 0, key: str = "key_1") -> Slot | None:
    """As admit does: None if it is refused."""
    slot = it.take(tokens, now)
    if slot is not None:
        return slot
    return it.force(tokens, now, key) if it.refusal(tokens, now, key) is None else None


# windows
@quick
@given(some.integers(1, 20), some.lists(some.one_of(some.floats(0, 0.5), some.floats(0, 70)), max_size=150))
def test_in_no_minute_more_requests_than_the_limit(limit: int, pauses: list[float]) -> None:
    it, now, admitted = allowance(requests=limit), 0.0, []
    for pause in pauses:
        now += pause
        if ask(it, now):
            admitted.append(now)
        assert sum(at > now - 60 for at in admitted) <= limit


@quick
@given(
    some.integers(50, 500),
    some.lists(some.tuples(some.one_of(some.floats(0, 0.5), some.floats(0, 70)), some.integers(0, 300)), max_size=150),
)
def test_in_no_minute_more_tokens_than_the_limit(limit: int, calls: list[tuple[float, int]]) -> None:
    it, now, admitted = allowance(tokens=limit), 0.0, []
    for at, (pause, tokens) in enumerate(calls):
        now += pause
        if ask(it, now, tokens, f"key_{at % 3}"):
            admitted.append((now, tokens))
        assert sum(tokens for at, tokens in admitted if at > now - 60) <= limit


@quick
@given(some.integers(1, 15), some.lists(some.floats(0, 20_000), max_size=120))
def test_in_no_day_more_requests_than_the_limit(limit: int, pauses: list[float]) -> None:
    it, now, admitted = allowance(daily=limit), 0.0, []
    for pause in pauses:
        now += pause
        if ask(it, now):
            admitted.append(now)
        assert sum(at > now - 86_400 for at in admitted) <= limit


@quick
@given(some.integers(1, 5), some.lists(some.booleans(), max_size=60))
def test_never_more_at_a_time_than_the_limit(limit: int, comings: list[bool]) -> None:
    it, running = allowance(concurrent=limit), []
    for now, comes in enumerate(comings):
        if not comes and running:
            it.settle(running.pop(), 0, 0)
        elif comes and (slot := ask(it, float(now))):
            running.append(slot)
        assert len(running) == it.in_flight <= limit


@quick
@given(some.integers(1, 8), some.lists(some.floats(0, 30), min_size=1, max_size=60))
@example(6, [0.0, 0.0, 0.0, 0.0, 0.0, 1e-09, 1.6332139172185762])
def test_who_comes_back_when_he_was_told_is_admitted(limit: int, pauses: list[float]) -> None:
    """retry-after is honest: alone, nobody is sent away twice in a row."""
    it, now = allowance(requests=limit, tokens=limit * 10), 0.0
    for pause in pauses:
        now += pause
        if ask(it, now, 10):
            continue
        refusal = it.refusal(10, now, "key_1")
        assert refusal is not None and refusal.error.retry_after is not None
        assert 0 < refusal.error.retry_after <= 61
        now += (
            refusal.error.retry_after + 0.001
        )  # sums of times are no exact ones, and nobody waits parts of a millisecond
        assert ask(it, now, 10)


def test_the_wait_ends_when_the_slot_that_makes_room_expires() -> None:
    it = allowance(requests=3)
    for now in (0.0, 10.0, 20.0):
        assert ask(it, now)
    refusal = it.refusal(0, 25.0, "key_1")
    assert refusal is not None and refusal.error.retry_after == pytest.approx(35.0)
    assert ask(it, 59.9) is None
    assert ask(it, 60.0)
    assert ask(it, 60.0) is None


def test_a_steady_stream_may_use_all_of_it() -> None:
    """Windows are strict, but what they allow can be had: over ten minutes at least 95 % of it."""
    it, admitted = allowance(requests=60), 0
    for tick in range(6000):
        admitted += ask(it, tick / 10) is not None
    assert admitted >= 0.95 * 600


# settlement
@quick
@given(some.lists(some.tuples(some.integers(0, 300), some.integers(0, 300))))
def test_settling_gives_back_what_was_not_used(calls: list[tuple[int, int]]) -> None:
    it = allowance(tokens=10**6)
    used = 0
    for reserved, tokens in calls:
        slot = ask(it, 0.0, reserved)
        assert slot is not None
        it.settle(slot, reserved, tokens)
        used += tokens
    assert (it.tokens, it.requests, it.in_flight) == (used, len(calls), 0)


def test_what_is_given_back_late_is_given_to_the_slot_it_was_taken_from() -> None:
    it = allowance(tokens=100)
    slot = ask(it, 0.0, 80)
    assert slot is not None
    assert ask(it, 61.0, 90)
    it.settle(slot, 80, 5)  # its minute is over: it gives nothing to this one
    assert it.tokens == 90


def test_more_used_than_reserved_counts() -> None:
    it = allowance(tokens=100)
    slot = ask(it, 0.0, 10)
    assert slot is not None
    it.settle(slot, 10, 150)
    assert ask(it, 30.0, 1) is None
    assert ask(it, 60.0, 1)


def test_a_change_of_limits_loses_nothing_that_is_counted() -> None:
    it = allowance(requests=10, daily=10)
    for _ in range(5):
        assert ask(it, 0.0)
    it.limit(5, NO_LIMIT, 10, NO_LIMIT)
    assert ask(it, 1.0) is None
    it.limit(6, NO_LIMIT, 10, NO_LIMIT)
    assert ask(it, 3.6)
    it.limit(NO_LIMIT, NO_LIMIT, 7, NO_LIMIT)
    assert ask(it, 100.0) and ask(it, 100.0) is None


def test_what_was_before_a_restart_counts() -> None:
    it = allowance(requests=10, tokens=1000, daily=100)
    now = 1_000_000.0
    it = Allowance("org-1", "m", now)
    it.limit(10, 1000, 20, NO_LIMIT)
    for age, requests, tokens in ((80_000.0, 9, 9000), (59.0, 3, 300), (58.5, 4, 400), (1.0, 1, 100)):
        it.recall(age, requests, tokens, now)
    assert ask(it, now, 201) is None
    assert it.requests == 8 and it.tokens == 800
    assert it.day_requests == 9
    assert ask(it, now + 5.0, 700)  # 59 and 58.5 seconds ago are gone
    assert it.requests == 2 and it.day_requests == 16


# what is said
def test_too_many_requests() -> None:
    it = allowance(requests=60)
    for _ in range(60):
        assert ask(it, 0.0)
    refusal = it.refusal(0, 59.25, "key_1")
    assert refusal is not None and refusal.kind == REQUESTS
    error = refusal.error
    assert error.message == (
        "Rate limit reached for gpt-4o in organization org-1 on requests per min (RPM): Limit 60, Used 60, Requested "
        "1. Please try again in 750ms. Visit https://platform.openai.com/account/rate-limits to learn more."
    )
    assert (error.type, error.code, error.retry_after, error.retry) == ("requests", "rate_limit_exceeded", 0.75, True)


def test_too_many_tokens() -> None:
    it = allowance(requests=10, tokens=600)
    slot = ask(it, 0.0, 550)
    assert slot is not None
    refusal = it.refusal(200, 50.0, "key_1")
    assert refusal is not None and refusal.error.retry_after == 1.0  # most of it may be given back at any moment
    it.settle(slot, 550, 500)
    refusal = it.refusal(200, 50.0, "key_1")
    assert refusal is not None and refusal.kind == TOKENS and refusal.error.type == "tokens"
    assert refusal.error.message.startswith(
        "Rate limit reached for gpt-4o in organization org-1 on tokens per min (TPM): Limit 600, Used 500, Requested "
        "200. Please try again in 10s."
    )
    assert it.requests == 1  # the refused one was not counted


def test_too_many_a_day_and_at_a_time() -> None:
    it = allowance(daily=1)
    assert ask(it, 0.0)
    refusal = it.refusal(0, 10.0, "key_1")
    assert refusal is not None and refusal.kind == DAILY and refusal.error.retry_after == 86_390
    assert (
        "requests per day (RPD): Limit 1, Used 1, Requested 1. Please try again in 23h59m50s" in refusal.error.message
    )
    it = allowance(concurrent=1)
    assert ask(it, 0.0)
    refusal = it.refusal(0, 0.0, "key_1")
    assert refusal is not None and refusal.kind == CONCURRENT
    assert "on concurrent requests: Limit 1, Used 1, Requested 1. Please try again in 1s." in refusal.error.message


def test_who_must_wait_for_longer_than_a_client_does_is_told_not_to_try_again() -> None:
    """The SDK honours retry-after up to a minute; of a longer one it would make pauses of its own, and try in vain."""
    it = allowance(daily=1)
    assert ask(it, 0.0)
    for now, worth in ((10.0, False), (86_339.0, False), (86_341.0, True)):
        refusal = it.refusal(0, now, "key_1")
        assert refusal is not None and refusal.kind == DAILY
        assert (refusal.error.retry, refusal.error.retry_after) == (worth, 86_400 - now)
    it = allowance(requests=1)
    assert ask(it, 0.0)
    refusal = it.refusal(0, 0.0, "key_1")
    assert refusal is not None and (refusal.error.retry, refusal.error.retry_after) == (True, 60.0)


@quick
@given(some.integers(0, 60), some.lists(some.floats(0, 30), max_size=60))
def test_an_observing_limit_says_what_enforcing_would_have_done(tokens: int, pauses: list[float]) -> None:
    """But for those who wait in line: where nobody is refused, nobody waits."""
    enforced, watched = allowance(requests=5, tokens=200), allowance()
    watched.limit(5, 200, NO_LIMIT, NO_LIMIT, frozenset({REQUESTS, TOKENS}))
    now = 0.0
    for pause in pauses:
        now += pause
        refused = ask(enforced, now, tokens) is None
        slot = watched.take(tokens, now)
        refusal = None if slot is not None else watched.refusal(tokens, now, "key_1")
        if slot is None:
            slot = watched.force(tokens, now, "key_1")
        if refusal is not None:
            assert refusal.observed
            watched.pass_by(slot, tokens)
        assert (refusal is not None) == refused
    assert watched.requests - watched.passed == enforced.requests
    assert watched.tokens - watched.passed_tokens == enforced.tokens


def test_of_several_limits_the_longest_wait_is_told() -> None:
    it = allowance(requests=1, daily=1)
    assert ask(it, 0.0)
    refusal = it.refusal(0, 1.0, "key_1")
    assert refusal is not None and refusal.kind == DAILY


def test_what_can_never_fit_is_not_worth_another_try() -> None:
    it = allowance(tokens=100)
    refusal = it.refusal(101, 0.0, "key_1")
    assert refusal is not None
    assert refusal.error.message.startswith(
        "Request too large for gpt-4o in organization org-1 on tokens per min (TPM): Limit 100, Requested 101. "
    )
    assert (refusal.error.retry, refusal.error.retry_after) == (False, None)
    assert not it.places  # and nobody waits for it


def test_headers_say_where_the_project_stands() -> None:
    it = allowance(requests=10, tokens=100)
    assert ask(it, 0.0, 30)
    lines = it.taken().decode().split("\r\n")
    assert lines == [
        "x-ratelimit-limit-requests: 10", "x-ratelimit-limit-tokens: 100", "x-ratelimit-remaining-requests: 9",
        "x-ratelimit-remaining-tokens: 70", "x-ratelimit-reset-requests: 1m0s", "x-ratelimit-reset-tokens: 1m0s", "",
    ]  # fmt: skip
    assert b"x-ratelimit-reset-requests: 45s\r\n" in it.headers(15.0)
    assert b"x-ratelimit-reset-tokens: 0s\r\n" in allowance().headers(15.0)


# fairness
def flood(it: Allowance, now: float, key: str, times: int, tokens: int = 0) -> int:
    return sum(ask(it, now, tokens, key) is not None for _ in range(times))


def test_a_flood_of_one_key_leaves_half_to_another() -> None:
    """One key asks fifty times as often as the other: of what is there to be had, both get about the same."""
    it = allowance(requests=20)
    assert flood(it, 0.0, "greedy", 50) == 20  # nobody else was there
    got = {"greedy": 0, "modest": 0}
    wait_until, now = 0.0, 1.0
    while now < 600:
        if now >= wait_until:  # does what it is told, as the SDK does
            if ask(it, now, 0, "modest"):
                got["modest"] += 1
            elif (refusal := it.refusal(0, now, "modest")) is not None:
                wait_until = now + (refusal.error.retry_after or 0)
        got["greedy"] += flood(it, now, "greedy", 5)
        now += 0.1
    assert got["greedy"] + got["modest"] >= 0.9 * 20 * 10
    assert got["modest"] >= 0.4 * (got["greedy"] + got["modest"])


def test_who_needs_little_gets_it_and_a_flood_the_rest() -> None:
    it, got, modest = allowance(requests=60), 0, 0
    for tick in range(6000):
        now = tick / 10
        if tick % 100 == 0:  # six a minute
            modest += ask(it, now, 0, "modest") is not None
        got += flood(it, now, "greedy", 3)
    assert modest >= 53  # but in the first minute, which was taken before it came
    assert got + modest >= 0.85 * 600


@pytest.mark.parametrize("other", ["small", "large"])
def test_small_requests_do_not_keep_a_large_one_out(other: str) -> None:
    """Small ones, of another key or the same, take whatever is free at once: the large one has its turn as well."""
    it, now, large = allowance(tokens=1000), 0.0, 0
    due = 0.5
    while now < 300:
        flood(it, now, other, 3, 10)
        if now >= due:
            if ask(it, now, 800, "large"):
                large += 1
                due = now + 5
            elif (refusal := it.refusal(800, now, "large")) is not None:
                due = now + (refusal.error.retry_after or 0)
        now += 0.1
    assert large >= 2


def test_room_that_nobody_in_front_needs_is_not_kept_empty() -> None:
    """While a large request waits, small ones may have what is left beside it when its turn comes."""
    it = allowance(tokens=1000)
    slot = ask(it, 0.0, 700, "a")
    assert slot is not None
    it.settle(slot, 700, 700)
    refusal = it.refusal(800, 1.0, "large")
    assert refusal is not None and refusal.error.retry_after == pytest.approx(59.0)
    assert ask(it, 2.0, 200, "small")  # 200 + 800 fit when the 700 are gone
    assert ask(it, 3.0, 50, "small") is None  # these would not
    assert ask(it, 60.0, 800, "large")


def test_who_does_not_come_back_keeps_nobody_waiting() -> None:
    it = allowance(requests=1)
    assert ask(it, 0.0, key="a")
    assert it.refusal(0, 1.0, "gone") is not None
    assert ask(it, 60.0, key="b") is None  # it is the turn of another
    assert ask(it, 60.0 + GRACE + 0.1, key="b")


def test_places_are_few() -> None:
    it = allowance(requests=1)
    assert ask(it, 0.0)
    for number in range(1000):
        assert it.refusal(0, 1.0, f"key_{number}") is not None
    assert len(it.places) <= 64


# for upstreams
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
