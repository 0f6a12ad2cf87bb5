"""No limit is overshot, whatever the crowd does: what the upstream says it answered is never more than was allowed, and
next to all of what was allowed can be had."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crowds import COST, PROMPT_TOKENS, TOKENS, Crowd, Found, play
from mock_upstream import Mock, started

CROWD = 1000
WORTH = 100  # of the requests
MONEY = f"spend_limit = {WORTH * COST / 1e9}"


@pytest.fixture
def upstream() -> Iterator[Mock]:
    with started("--gap", "0.01", "--delay", "0.1") as mock:
        yield mock


def crowd(data: Path, upstream: Mock, limits: str, **more: Any) -> Found:
    found = asyncio.run(play(data / "data", upstream, limits, callers=CROWD, **more))
    print(found)
    assert found.reserved == 0
    return found


def test_money_against_a_thousand_callers(tmp_path: Path, upstream: Mock) -> None:
    found = crowd(tmp_path, upstream, MONEY)
    assert 0.95 * WORTH * COST <= found.cost == found.spent <= WORTH * COST
    assert found.requests <= WORTH and set(found.statuses) == {200, 429}


def test_money_when_callers_leave_and_upstreams_fail(tmp_path: Path, upstream: Mock) -> None:
    """What was left or broken off is charged as far as it was generated, or may have been: so the upstream never says
    more than the gateway does, and with it the limit is used up."""
    found = crowd(tmp_path, upstream, MONEY, leaving=0.3, failing=0.3, seed=2)
    assert found.cost <= found.spent <= WORTH * COST
    assert found.spent >= 0.95 * WORTH * COST and found.cost >= 0.7 * WORTH * COST
    assert {200, 429} < set(found.statuses) and max(found.statuses) >= 500


def test_money_over_kill_9_and_restart(tmp_path: Path, upstream: Mock) -> None:
    async def in_the_middle(crowd: Crowd) -> None:
        while crowd.answered < WORTH // 3:
            await asyncio.sleep(0.005)

    found = crowd(tmp_path, upstream, MONEY, leaving=0.1, failing=0.1, seed=3, kill_after=in_the_middle)
    assert found.cost <= found.spent <= WORTH * COST  # what was under way when it was killed is charged at its most
    assert found.spent >= 0.95 * WORTH * COST


@pytest.mark.parametrize("kill", [False, True], ids=["", "kill-9"])
def test_requests_a_minute(tmp_path: Path, upstream: Mock, kill: bool) -> None:
    async def in_the_middle(crowd: Crowd) -> None:
        while crowd.answered < WORTH // 3:
            await asyncio.sleep(0.005)

    found = crowd(
        tmp_path, upstream, f"requests_per_minute = {WORTH}", kill_after=in_the_middle if kill else None,
        leaving=0.2 if kill else 0.0,
    )  # fmt: skip
    assert (0.95 if not kill else 0.8) * WORTH <= found.requests <= WORTH


@pytest.mark.parametrize("kill", [False, True], ids=["", "kill-9"])
def test_tokens_a_minute(tmp_path: Path, upstream: Mock, kill: bool) -> None:
    async def in_the_middle(crowd: Crowd) -> None:
        while crowd.answered < WORTH // 3:
            await asyncio.sleep(0.005)

    limit = WORTH * (PROMPT_TOKENS + TOKENS)
    found = crowd(
        tmp_path, upstream, f"tokens_per_minute = {limit}", leaving=0.2 if kill else 0.0,
        kill_after=in_the_middle if kill else None,
    )  # fmt: skip
    assert (0.95 if not kill else 0.7) * limit <= found.tokens <= limit
