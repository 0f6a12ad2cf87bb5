"""Limits of time that many calls share: each expires once, at its time, and nothing is left behind."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest

from far import run
from tertulia.engines.timeouts import Timeouts


def test_each_expires_once_at_its_time_and_only_if_it_is_still_there() -> None:
    async def test() -> None:
        expired: dict[str, float] = {}
        began: dict[str, float] = {}
        timeouts: Timeouts[str] = Timeouts(0.5, lambda name: expired.update({name: monotonic()}))
        for name in "abcdef":
            timeouts.add(name)
            began[name] = monotonic()
            await asyncio.sleep(0.05)
        timeouts.remove("b")
        timeouts.remove("e")
        timeouts.remove("e")
        timeouts.remove("never")
        await asyncio.sleep(0.8)
        assert list(expired) == ["a", "c", "d", "f"] and not timeouts
        for name, at in expired.items():
            assert 0.48 < at - began[name] < 0.7

    run(test)


def test_an_entry_may_come_back_and_remove_others_while_it_expires() -> None:
    async def test() -> None:
        seen: list[str] = []

        def expire(name: str) -> None:
            seen.append(name)
            timeouts.remove("b")
            if seen.count("a") < 3:
                timeouts.add(name)

        timeouts: Timeouts[str] = Timeouts(0.05, expire)
        timeouts.add("a")
        timeouts.add("b")
        await asyncio.sleep(0.4)
        assert seen == ["a", "a", "a"]

    run(test)


def test_an_error_of_one_does_not_keep_the_others_waiting() -> None:
    async def test() -> None:
        seen: list[int] = []
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context["exception"]))

        def expire(number: int) -> None:
            seen.append(number)
            if number == 1:
                raise ZeroDivisionError

        timeouts: Timeouts[int] = Timeouts(0.05, expire)
        for number in range(4):
            timeouts.add(number)
        await asyncio.sleep(0.3)
        assert seen == [0, 1, 2, 3] and len(errors) == 1

    run(test)


@pytest.mark.parametrize("many", [0, 5])
def test_after_close_nothing_expires(many: int) -> None:
    async def test() -> None:
        seen: list[int] = []
        timeouts: Timeouts[int] = Timeouts(0.05, seen.append)
        for number in range(many):
            timeouts.add(number)
        timeouts.close()
        await asyncio.sleep(0.15)
        assert not seen and not timeouts

    run(test)
