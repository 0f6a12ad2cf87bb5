"""Who answers a call, and what happens when it does not: deadline, balance, retries, fallback, the line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tertulia.core import CLIENT_LEFT, DEADLINE, FAILED, FINISHED, Call, Usage, Wishes
from tertulia.errors import (
    BadRequest,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailed,
    TertuliaError,
    UpstreamRefused,
)
from tertulia.gateway.breaker import CLOSED, OPEN
from tertulia.gateway.line import LOW
from unit.gateway.scripted import Far, House, Near, fails, hangs, later, says, streams

ONE = b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"one"}}]}\n\n'


def runs(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def no_calls_left(house: House) -> None:
    assert all(live.in_flight == 0 and not len(live.line) for live in house.route.targets)
    assert not house.route._deadlines._entries and not house.route.waits


# The straight way -------------------------------------------------------------------------------------------------


@runs
async def test_a_healthy_target_is_asked_by_a_plain_function() -> None:
    house = House(Far("a"))
    call, wire = house.call()
    assert house.pipeline.run(call) is None  # no coroutine, no task
    assert (wire.status, wire.body, wire.outcome) == (200, b"a", FINISHED)
    assert wire.headers == {"x-tertulia-model": "m"} and call.attempts == 1
    assert call.deadline is not None and house.live("a/m").finished == 1
    no_calls_left(house)


@runs
async def test_an_engine_that_waits_is_waited_for() -> None:
    async def waits(call: Call) -> None:
        await asyncio.sleep(0.01)
        says(b"x")(call)

    house = House(Far("a", waits))
    _, wire = await house.ask()
    assert wire.body == b"x"
    no_calls_left(house)


@runs
async def test_a_client_that_has_left_costs_nobody_anything() -> None:
    engine = Far("a")
    house = House(engine)
    call, wire = house.call()
    call.reply.close(CLIENT_LEFT)
    house.send(call)
    assert not engine.calls and wire.outcome == CLIENT_LEFT


@runs
async def test_the_deadline_wins_and_is_not_retried() -> None:
    engine = Far("a", hangs)
    house = House(engine, request_timeout=0.05, retries=5)
    began = time.monotonic()
    _, wire = await house.ask()
    assert time.monotonic() - began < 0.3
    assert (wire.status, wire.outcome, wire.error["code"]) == (504, DEADLINE, "deadline_exceeded")
    assert len(engine.calls) == 1 and engine.closed == [DEADLINE]
    assert house.live("a/m").breaker.failures == 1 and house.live("a/m").counts == {DEADLINE: 1}
    no_calls_left(house)


@runs
async def test_the_deadline_counts_from_the_requests_first_byte() -> None:
    house = House(Far("a", hangs), request_timeout=1.0)
    call, wire = house.call()
    call.began -= 950_000_000  # its body took long
    began = time.monotonic()
    house.send(call)
    await asyncio.wait_for(wire.done(), 5)
    assert time.monotonic() - began < 0.5 and wire.outcome == DEADLINE
    no_calls_left(house)


@runs
async def test_a_route_has_a_deadline_of_its_own() -> None:
    route = {"targets": [{"model": "m"}], "timeout": 0.05}
    house = House(Far("a", hangs), routes={"r": route})
    _, wire = await house.ask("r")
    assert wire.status == 504 and "0.05 seconds" in wire.error["message"]


@runs
async def test_an_engines_own_deadline_error_is_final() -> None:
    house = House(Far("a", fails(DeadlineExceeded())), Far("b"))
    engine = house.names.plan("m").groups[0][0].target.engine
    house.route.random = lambda: 0.0
    _, wire = await house.ask()
    assert wire.outcome == DEADLINE and len(engine.calls) == 1


# Retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize("task", ["chat", "completions", "embeddings"])
def test_a_failure_before_the_first_byte_is_retried_unseen(task: str, raised: bool) -> None:
    async def run() -> None:
        engine = Far("a", fails(EngineFailed(), raised), fails(UpstreamRefused(500, b"{}"), raised), says(b"fine"))
        house = House(engine)
        call, wire = await house.ask(task=task)
        assert (wire.status, wire.body, wire.outcome) == (200, b"fine", FINISHED)
        assert wire.headers == {"x-tertulia-model": "m", "x-tertulia-attempts": "3"} and call.attempts == 3
        assert engine.closed == [FAILED, FAILED, FINISHED]  # each attempt is told how it ended, once
        assert house.route.retries == 2 and house.live("a/m").counts == {"failed": 2}
        no_calls_left(house)

    asyncio.run(run())


@runs
async def test_when_the_tries_are_used_up_the_last_error_is_the_answer() -> None:
    engine = Far("a", fails(EngineFailed("first")), fails(EngineFailed("second")), fails(EngineFailed("third")), says())
    house = House(engine)
    _, wire = await house.ask()
    assert (wire.status, wire.error["message"], wire.outcome) == (502, "third", FAILED)
    assert wire.headers["x-tertulia-attempts"] == "3" and len(engine.calls) == 3
    no_calls_left(house)


@pytest.mark.parametrize(
    "error",
    [BadRequest("no"), ContextLengthExceeded(), UpstreamRefused(400), UpstreamRefused(404), UpstreamRefused(413),
     UpstreamRefused(422)],
)  # fmt: skip
def test_what_the_caller_did_wrong_is_not_retried_and_is_no_failure(error: TertuliaError) -> None:
    async def run() -> None:
        engine, other = Far("a", fails(error)), Near()
        house = House(engine, other, fallback=["local"])
        _, wire = await house.ask()
        assert wire.status == error.status and len(engine.calls) == 1 and not other.calls
        assert house.live("a/m").counts == {"refused": 1} and house.live("a/m").breaker.failures == 0

    asyncio.run(run())


@runs
async def test_no_use_asking_the_same_one_again() -> None:
    error = EngineFailed()
    error.retry = False
    engine = Far("a", fails(error), says())
    house = House(engine)
    _, wire = await house.ask()
    assert wire.status == 502 and len(engine.calls) == 1


@runs
async def test_who_has_no_quota_left_is_not_asked_again() -> None:
    error = UpstreamRefused(429)
    error.code = "insufficient_quota"
    engine = Far("a", fails(error), says())
    _, wire = await House(engine).ask()
    assert wire.status == 429 and len(engine.calls) == 1


@runs
async def test_another_target_is_preferred_and_asked_at_once() -> None:
    first, second = Far("a", fails(EngineFailed())), Far("b")
    house = House(first, second, random=0.0)
    house.route.random = lambda: 0.0  # the first leg is drawn; a pause would be none, but nobody is asked twice
    call, wire = await house.ask()
    assert wire.body == b"b" and len(first.calls) == 1 and call.attempts == 2
    assert wire.headers["x-tertulia-attempts"] == "2" and "x-tertulia-fallback" not in wire.headers


@runs
async def test_the_pause_grows_and_honours_retry_after() -> None:
    engine = Far("a", fails(UpstreamRefused(503, retry_after=0.08)), fails(EngineFailed()), says(b"x"))
    house = House(engine, random=0.1)
    at: list[float] = []
    engine.answer = lambda call, real=engine.answer: (at.append(time.monotonic()), real(call))[1]  # type: ignore[method-assign]
    await house.ask()
    assert at[1] - at[0] == pytest.approx(0.08 + 0.025, abs=0.03)
    assert at[2] - at[1] == pytest.approx(0.05, abs=0.03)


@runs
async def test_a_pause_that_the_deadline_does_not_allow_is_not_waited_for() -> None:
    engine = Far("a", fails(UpstreamRefused(429, retry_after=20.0)), says())
    house = House(engine, request_timeout=10.0)
    began = time.monotonic()
    _, wire = await house.ask()
    assert time.monotonic() - began < 0.5 and wire.status == 429
    assert wire.headers["retry-after"] == "20" and len(engine.calls) == 1


@runs
async def test_retries_end_with_their_budget() -> None:
    engine = Far("a", fails(EngineFailed()))
    house = House(engine, retries=1, retry_budget=0.0, breaker_failures=1000)
    for _ in range(20):
        await house.ask()
    assert 30 <= len(engine.calls) <= 31 and house.route.retries == len(engine.calls) - 20


@runs
async def test_after_the_first_byte_nothing_is_tried_again() -> None:
    engine = Far("a", streams(ONE, then=EngineFailed("cut")))
    house = House(engine, Near(), fallback=["local"])
    _, wire = await house.ask(stream=True)
    assert wire.pieces[0] == ONE and wire.error["message"] == "cut" and wire.outcome == FAILED
    assert len(engine.calls) == 1 and house.live("a/m").counts == {"failed": 1}


@runs
async def test_an_engine_of_this_machine_is_not_asked_twice_and_has_no_breaker() -> None:
    engine = Near(fails(EngineFailed()))
    house = House(engine)
    for _ in range(8):
        _, wire = await house.ask("local")
        assert wire.status == 502
    assert len(engine.calls) == 8 and house.live("local").breaker.state == CLOSED


@runs
async def test_a_defect_is_logged_and_another_target_may_do() -> None:
    house = House(Far("a", fails(ZeroDivisionError(), raised=True)), Far("b"))  # type: ignore[arg-type]
    house.route.random = lambda: 0.0
    _, wire = await house.ask()
    assert wire.body == b"b"


@runs
async def test_what_an_attempt_says_that_is_over_does_not_count() -> None:
    async def fails_twice(call: Call) -> None:
        call.reply.fail(EngineFailed("first"))
        await asyncio.sleep(0.02)
        raise EngineFailed("again")

    engine = Far("a", fails_twice, later(0.05, says(b"x")))
    house = House(engine)
    _, wire = await house.ask()
    assert wire.body == b"x" and len(engine.calls) == 2


@runs
async def test_a_client_that_leaves_during_a_pause_or_an_attempt() -> None:
    engine = Far("a", fails(UpstreamRefused(503, retry_after=1.0)), says())
    house = House(engine)
    call, wire = house.call()
    house.send(call)
    await asyncio.sleep(0.02)
    call.reply.close(CLIENT_LEFT)
    await asyncio.sleep(0.02)
    assert len(engine.calls) == 1 and wire.outcome == CLIENT_LEFT
    no_calls_left(house)


# Fallback ---------------------------------------------------------------------------------------------------------


@runs
async def test_when_nobody_of_the_group_answers_the_fallback_does() -> None:
    first, local = Far("a", fails(EngineFailed())), Near()
    house = House(first, local, fallback=["local"])
    call, wire = await house.ask()
    assert (wire.status, wire.body) == (200, b"local") and len(first.calls) == 3
    assert wire.headers == {
        "x-tertulia-model": "local", "x-tertulia-attempts": "4", "x-tertulia-fallback": "m",
    }  # fmt: skip
    assert call.target is not None and call.target.model == "local" and house.route.fallbacks == 1 and call.fallback
    no_calls_left(house)


@pytest.mark.parametrize("refusal", [BadRequest("cannot"), ContextLengthExceeded()])
def test_a_fallback_that_cannot_leaves_the_first_error_as_the_answer(refusal: TertuliaError) -> None:
    async def run() -> None:
        house = House(Far("a", fails(EngineFailed("original"))), Near(fails(refusal, raised=True)), fallback=["local"])
        _, wire = await house.ask()
        assert (wire.status, wire.error["message"]) == (502, "original")

    asyncio.run(run())


@runs
async def test_a_fallback_that_fails_itself_is_the_last_error() -> None:
    house = House(Far("a", fails(EngineFailed("a"))), Near(fails(EngineFailed("b"))), fallback=["local"])
    _, wire = await house.ask()
    assert wire.error["message"] == "b"


@runs
async def test_too_long_a_rest_is_not_waited_for_where_another_can_answer() -> None:
    first = Far("a", fails(UpstreamRefused(429, retry_after=5.0)))
    house = House(first, Near(), fallback=["local"])
    began = time.monotonic()
    assert (await house.ask())[1].body == b"local"
    assert (await house.ask())[1].body == b"local"  # it rests: it is not asked at all
    assert time.monotonic() - began < 0.5 and len(first.calls) == 1
    assert house.live("a/m").breaker.failures == 0 and house.live("a/m").counts == {"busy": 1}


# Silence ----------------------------------------------------------------------------------------------------------


def hurried(house: House) -> Any:
    """The limit of the first attempts under way."""
    return next(iter(house.route._hurries.values()))


@runs
async def test_who_is_silent_for_half_the_time_gives_way_to_the_fallback() -> None:
    engine, local = Far("a", hangs), Near()
    route = {"targets": [{"model": "m"}], "fallback": ["local"], "timeout": 0.8}
    house = House(engine, local, routes={"r": route}, retries=5)
    began = time.monotonic()
    _, wire = await house.ask("r")
    assert (wire.status, wire.body) == (200, b"local") and 0.3 < time.monotonic() - began < 0.75
    assert wire.headers["x-tertulia-attempts"] == "2" and wire.headers["x-tertulia-fallback"] == "r"
    assert engine.closed == [FAILED] and len(engine.calls) == 1  # it has had its share, and is not asked again
    assert house.live("a/m").breaker.failures == 1 and house.live("a/m").counts == {FAILED: 1}
    no_calls_left(house)
    assert not len(hurried(house))


@runs
async def test_whose_breaker_opens_by_silence_is_not_asked_any_more() -> None:
    engine = Far("a", hangs)
    house = House(engine, Near(), fallback=["local"], request_timeout=100, breaker_failures=2)
    for _ in range(3):
        call, wire = house.call()
        house.send(call)
        for trip in list(hurried(house)._entries):  # as if half of 100 s had passed
            house.route.cut(trip)
        await asyncio.wait_for(wire.done(), 5)
        assert wire.body == b"local"
    assert len(engine.calls) == 2 and house.live("a/m").breaker.state == OPEN
    assert hurried(house).seconds == 50


@runs
async def test_each_who_is_asked_has_half_of_what_is_left_and_the_last_one_all_of_it() -> None:
    engines = [Far(name, hangs, models=[f"m{name}"]) for name in "abc"]
    route = {"targets": [{"model": "ma"}], "fallback": ["mb", "mc"], "timeout": 0.8}
    house = House(*engines, routes={"r": route})
    at: list[float] = []
    for engine in engines:
        engine.answer = lambda call, real=engine.answer: (at.append(time.monotonic()), real(call))[1]  # type: ignore[method-assign]
    began = time.monotonic()
    _, wire = await house.ask("r")
    assert wire.outcome == DEADLINE and time.monotonic() - began == pytest.approx(0.8, abs=0.1)
    assert [one - began for one in at] == pytest.approx([0.0, 0.4, 0.6], abs=0.1)
    assert [house.live(f"{name}/m{name}").breaker.failures for name in "abc"] == [1, 1, 1]
    no_calls_left(house)


@runs
async def test_who_has_begun_or_stands_alone_is_not_hurried() -> None:
    def begins(call: Call) -> None:
        call.reply.push(ONE)

    house = House(Far("a", begins), Near(), fallback=["local"])
    call, wire = house.call(stream=True)
    house.send(call)
    house.route.cut(next(iter(hurried(house)._entries)))
    assert wire.outcome is None and house.live("a/m").in_flight == 1
    call.reply.close(CLIENT_LEFT)
    assert not len(hurried(house)) and house.live("a/m").breaker.failures == 0
    for engines in ([Far("a", hangs)], [Near(hangs, models=["m"]), Far("b", models=["n"])]):
        house = House(*engines, fallback=["n"] if len(engines) > 1 else [])
        call, _ = house.call()
        house.send(call)
        assert not house.route._hurries  # nobody else, or an engine of this machine
        call.reply.close(CLIENT_LEFT)


@runs
async def test_where_the_others_are_broken_who_is_silent_is_waited_for() -> None:
    house = House(Far("a", hangs), Far("b", hangs), breaker_failures=1)
    house.route.random = lambda: 0.0
    second = house.names.plan("m").groups[0][1].target
    house.route.targets.of(second).leave(FAILED, False)
    call, wire = house.call()
    house.send(call)
    house.route.cut(next(iter(hurried(house)._entries)))
    assert wire.outcome is None and house.live("a/m").in_flight == 1
    call.reply.close(CLIENT_LEFT)


@runs
async def test_a_call_that_came_late_is_hurried_by_what_it_has_left() -> None:
    house = House(Far("a", hangs), Near(), fallback=["local"], request_timeout=2.0)
    call, wire = house.call()
    call.began -= 1_600_000_000
    began = time.monotonic()
    house.send(call)
    await asyncio.wait_for(wire.done(), 5)
    assert wire.body == b"local" and time.monotonic() - began == pytest.approx(0.2, abs=0.1)


@runs
async def test_a_deadline_that_left_a_target_no_time_proves_nothing() -> None:
    house = House(Far("a", hangs), request_timeout=10.0)
    call, wire = house.call()
    call.began -= 9_950_000_000
    house.send(call)
    await asyncio.wait_for(wire.done(), 5)
    assert wire.outcome == DEADLINE and house.live("a/m").breaker.failures == 0


@runs
async def test_no_line_break_of_a_models_name_gets_into_a_header() -> None:
    house = House(Far("a", models=["m", "x\r\ny: z\x00"]))
    live = house.route.targets.of(house.names.plan("x\r\ny: z\x00").first)
    assert live.header == b"x-tertulia-model: xy: z\r\n"


# Breaker ----------------------------------------------------------------------------------------------------------


@runs
async def test_an_open_breaker_leaves_the_target_alone_and_says_for_how_long() -> None:
    engine = Far("a", fails(EngineFailed()))
    house = House(engine, retries=0, breaker_failures=2, breaker_cooldown=7.0)
    for _ in range(2):
        await house.ask()
    _, wire = await house.ask()
    assert (wire.status, wire.error["code"]) == (503, "server_is_overloaded") and len(engine.calls) == 2
    assert wire.headers["retry-after"] == "7" and wire.headers["x-should-retry"] == "true"
    no_calls_left(house)


@runs
async def test_one_probe_at_its_first_byte_closes_it_again() -> None:
    def begins(call: Call) -> None:
        call.reply.push(ONE)

    engine = Far("a", fails(EngineFailed()), begins, says(b"x"))
    house = House(engine, retries=0, breaker_failures=1, breaker_cooldown=0.05)
    await house.ask()
    live = house.live("a/m")
    assert live.breaker.state == OPEN and not live.clear
    await asyncio.sleep(0.06)
    call, _ = house.call(stream=True)
    house.send(call)  # the probe goes on for long, but proves itself at once
    assert live.breaker.state == CLOSED and live.clear
    assert (await house.ask())[1].body == b"x"
    call.reply.close(CLIENT_LEFT)
    no_calls_left(house)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (EngineFailed(), "engine_failed"),
        (EngineFailed(code="sk-1 and\na prompt"), "it failed"),
        (TertuliaError(), "500"),
    ],
)
def test_a_breaker_that_opens_or_closes_is_said_once(
    error: TertuliaError, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        house = House(
            Far("a", fails(error), fails(error), fails(error), says(b"x"), says(b"x")),
            retries=0, breaker_failures=2, breaker_cooldown=0.03,
        )  # fmt: skip
        for pause in (0.0, 0.0, 0.0, 0.04, 0.07, 0.0):
            await asyncio.sleep(pause)
            await house.ask()

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records if record.name == "tertulia.gateway"] == [
        f"target a/m is left alone for 0.03 s: {why}",
        f"target a/m is left alone for 0.06 s: {why}",  # the probe failed too
        "target a/m answers again",
    ]


@runs
async def test_while_one_probes_nobody_else_is_let_through() -> None:
    engine = Far("a", fails(EngineFailed()), hangs, says(b"x"))
    house = House(engine, retries=0, breaker_failures=1, breaker_cooldown=0.03)
    await house.ask()
    await asyncio.sleep(0.04)
    probe, _ = house.call()
    house.send(probe)
    _, wire = await house.ask()
    assert wire.status == 503 and len(engine.calls) == 2
    probe.reply.close(CLIENT_LEFT)  # proves nothing, and the next one is let through
    assert (await house.ask())[1].body == b"x"
    assert house.live("a/m").breaker.state == CLOSED


@runs
async def test_a_broken_target_is_passed_by_where_there_is_another() -> None:
    first, second = Far("a", fails(EngineFailed())), Far("b")
    house = House(first, second, breaker_failures=1)
    house.route.random = lambda: 0.0
    for _ in range(5):
        assert (await house.ask())[1].body == b"b"
    assert len(first.calls) == 1


# Balance ----------------------------------------------------------------------------------------------------------


@runs
async def test_by_weight() -> None:
    first, second = Far("a", models=["x"]), Far("b", models=["y"])
    route = {"targets": [{"model": "x", "weight": 3}, {"model": "y"}]}
    house = House(first, second, routes={"r": route})
    for at in range(100):
        house.route.random = lambda at=at: at / 100
        await house.ask("r")
    assert (len(first.calls), len(second.calls)) == (75, 25)


@runs
async def test_by_calls_in_flight() -> None:
    first, second = Far("a", hangs, models=["x"]), Far("b", hangs, models=["y"])
    route = {"targets": [{"model": "x"}, {"model": "y", "weight": 2}], "balance": "least_busy"}
    house = House(first, second, routes={"r": route})
    calls = [house.call("r")[0] for _ in range(9)]
    for call in calls:
        house.send(call)
    assert (len(first.calls), len(second.calls)) == (3, 6)
    for call in calls:
        call.reply.close(CLIENT_LEFT)
    no_calls_left(house)


@runs
async def test_by_latency() -> None:
    slow, fast = Far("a", later(0.05, says(b"a")), models=["x"]), Far("b", later(0.005, says(b"b")), models=["y"])
    route = {"targets": [{"model": "x"}, {"model": "y"}], "balance": "fastest"}
    house = House(slow, fast, routes={"r": route})
    for _ in range(8):
        await house.ask("r")
    assert len(slow.calls) == 1 and len(fast.calls) == 7  # each is tried once
    live = house.live("a/x")
    assert 0.04 < live.latency < 0.2
    live.latency_at -= 600_000_000_000  # unused for long: what it was is forgotten, and it is tried again
    await house.ask("r")
    assert len(slow.calls) == 2


# The line ---------------------------------------------------------------------------------------------------------

LIMIT = {"a": {"max_concurrency": 1}}


@runs
async def test_a_busy_target_has_a_line() -> None:
    engine = Far("a", later(0.03, says(b"x")))
    house = House(engine, upstreams=LIMIT)
    waiting = [house.ask() for _ in range(3)]
    done = asyncio.gather(*waiting)
    await asyncio.sleep(0.01)
    live = house.live("a/m")
    assert (live.in_flight, len(live.line)) == (1, 2)
    assert all(wire.body == b"x" for _, wire in await done)
    assert live.finished == 3 and house.route.queued.count == 2 and house.route.queued.sum >= 0.05
    no_calls_left(house)


@runs
async def test_who_leaves_the_line_is_out_at_once_and_never_asked_for() -> None:
    engine = Far("a", later(0.03, says(b"x")))
    house = House(engine, upstreams=LIMIT)
    first = asyncio.ensure_future(house.ask())
    await asyncio.sleep(0)
    call, _ = house.call()
    house.send(call)
    assert len(house.live("a/m").line) == 1
    call.reply.close(CLIENT_LEFT)
    assert len(house.live("a/m").line) == 0
    await first
    await asyncio.sleep(0.01)
    assert len(engine.calls) == 1
    no_calls_left(house)


@runs
async def test_the_line_is_bounded_and_says_how_long_it_is() -> None:
    engine = Far("a", later(0.1, says(b"x")), later(1, says(b"x")))
    house = House(engine, upstreams=LIMIT, queue_size=2)
    await house.ask()  # now it is known how long one takes
    calls = [house.call()[0] for _ in range(3)]
    for call in calls:
        house.send(call)
    _, wire = await house.ask()
    assert wire.status == 503 and wire.headers["x-should-retry"] == "true"
    assert 200 <= int(wire.headers["retry-after-ms"]) <= 600 and house.route.refused == 1
    for call in calls:
        call.reply.close(CLIENT_LEFT)
    no_calls_left(house)


@runs
async def test_how_long_to_wait_is_estimated_while_no_call_has_ended() -> None:
    house = House(Far("a", hangs), upstreams=LIMIT, queue_size=0)
    now = house.route.time()
    house.route.time = lambda: now
    first, _ = house.call()
    house.send(first)
    assert (await house.ask())[1].headers["retry-after-ms"] == "1000"  # nothing is known
    now += 7.0
    assert (await house.ask())[1].headers["retry-after-ms"] == "7000"  # the one in flight takes that long at least
    first.reply.close(CLIENT_LEFT)


@runs
async def test_who_waits_too_long_is_refused() -> None:
    house = House(Far("a", hangs), upstreams=LIMIT, queue_timeout=0.05)
    first, _ = house.call()
    house.send(first)
    began = time.monotonic()
    _, wire = await house.ask()
    assert wire.status == 503 and 0.04 < time.monotonic() - began < 0.5
    first.reply.close(CLIENT_LEFT)
    no_calls_left(house)


@pytest.mark.parametrize("limit", ["deadline", "patience", "queue_timeout"])
def test_who_cannot_be_served_in_time_is_refused_at_once(limit: str) -> None:
    async def run() -> None:
        settings: dict[str, Any] = {"request_timeout": 1.0} if limit == "deadline" else {}
        settings |= {"queue_timeout": 1.0} if limit == "queue_timeout" else {}
        house = House(Far("a", hangs), upstreams=LIMIT, **settings)
        house.route.targets.of(house.names.find("m")).duration = 5.0
        first, _ = house.call()
        house.send(first)
        began = time.monotonic()
        _, wire = await house.ask(wishes=Wishes(patience=1.0) if limit == "patience" else Wishes())
        assert wire.status == 503 and time.monotonic() - began < 0.3
        assert wire.headers["retry-after"] == "5"
        first.reply.close(CLIENT_LEFT)
        no_calls_left(house)

    asyncio.run(run())


@runs
async def test_a_busy_group_without_a_place_falls_back() -> None:
    house = House(Far("a", hangs), Near(), upstreams=LIMIT, queue_size=0, fallback=["local"])
    first, _ = house.call()
    house.send(first)
    _, wire = await house.ask()
    assert wire.body == b"local" and wire.headers["x-tertulia-fallback"] == "m"


@runs
async def test_priorities_and_projects() -> None:
    order: list[str] = []

    def notes(call: Call) -> None:
        order.append(f"{call.principal.project}{call.principal.key_id}")
        later(0.005, says(b"x"))(call)

    house = House(Far("a", notes), upstreams=LIMIT, policies={"vip": {"priority": "high"}, "bulk": {"priority": "low"}})
    asked: list[dict[str, Any]] = [
        {"project": "a", "key": "0"}, {"project": "a", "key": "1"}, {"project": "a", "key": "2"},
        {"project": "b", "key": "3"}, {"project": "c", "key": "bulk", "service_tier": "priority"},
        {"project": "c", "key": "vip"}, {"project": "d", "key": "4", "service_tier": "flex"},
        {"project": "d", "key": "5", "service_tier": "priority"},
    ]  # fmt: skip
    await asyncio.gather(*(house.ask(**one) for one in asked))
    assert order == ["a0", "cvip", "a1", "b3", "d5", "a2", "cbulk", "d4"]  # nobody goes first by asking for it
    call, _ = house.call(key="vip", service_tier="flex")
    call.task.check(call)
    assert house.route.level(call) == LOW  # who asks for less gets it


@runs
async def test_one_who_waits_for_two_takes_whichever_is_free_first() -> None:
    first, second = Far("a", hangs, models=["x"]), Far("b", later(0.03, says(b"b")), says(b"b"), models=["y"])
    house = House(
        first, second, upstreams={"a": {"max_concurrency": 1}, "b": {"max_concurrency": 1}},
        routes={"r": {"targets": [{"model": "x"}, {"model": "y"}]}},
    )  # fmt: skip
    calls = [house.call("r")[0] for _ in range(2)]
    for call in calls:
        house.send(call)
    _, wire = await house.ask("r")
    assert wire.body == b"b" and not len(house.live("a/x").line)
    calls[0].reply.close(CLIENT_LEFT)


@runs
async def test_who_waits_for_a_target_that_breaks_is_sent_on() -> None:
    engine = Far("a", later(0.03, fails(EngineFailed())))
    house = House(engine, Near(), upstreams=LIMIT, retries=0, breaker_failures=1, fallback=["local"])
    (_, one), (_, two) = await asyncio.gather(house.ask(), house.ask())
    assert one.body == two.body == b"local" and len(engine.calls) == 1
    no_calls_left(house)


@runs
async def test_an_upstreams_own_limits_a_minute() -> None:
    engine = Far("a")
    house = House(engine, upstreams={"a": {"requests_per_minute": 1200}}, queue_timeout=5)
    live = house.route.targets.of(house.names.find("m"))
    live.rates.requests.level = 1.0
    began = time.monotonic()
    await asyncio.gather(*(house.ask() for _ in range(4)))  # one at once, then one every 50 ms
    assert 0.13 < time.monotonic() - began < 0.6 and len(engine.calls) == 4
    live.rates.requests.level = -1200.0
    _, wire = await house.ask()
    assert (wire.status, wire.error["code"]) == (429, "rate_limit_exceeded")
    assert int(wire.headers["retry-after"]) == 61
    no_calls_left(house)


@runs
async def test_tokens_a_minute_are_settled_with_the_true_count() -> None:
    def uses(call: Call) -> None:
        call.reply.usage = Usage(100, 200)
        says(b"x")(call)

    house = House(Far("a", uses), upstreams={"a": {"tokens_per_minute": 1000}})
    await house.ask()
    assert house.live("a/m").rates.tokens.level == pytest.approx(700, abs=5)


@runs
async def test_a_rest_is_waited_for_by_everybody() -> None:
    engine = Far("a", fails(UpstreamRefused(429, retry_after=0.08)), says(b"x"))
    house = House(engine)
    began = time.monotonic()
    answers = await asyncio.gather(house.ask(), house.ask())
    assert [wire.body for _, wire in answers] == [b"x", b"x"] and time.monotonic() - began >= 0.07
    assert len(engine.calls) == 3
    no_calls_left(house)
    assert house.live("a/m").clear


# Heartbeats, reload, figures --------------------------------------------------------------------------------------


@runs
async def test_heartbeats_until_something_comes() -> None:
    house = House(Far("a", later(0.13, streams(ONE))), heartbeat=0.05)
    _, wire = await house.ask(stream=True)
    assert wire.pieces == [b": waiting\n\n"] * 2 + [ONE, b"data: [DONE]\n\n"] and wire.outcome == FINISHED
    assert house.route.beats is not None and not house.route.beats._entries
    _, wire = await house.ask()  # not a stream
    assert b"waiting" not in wire.body


def paced(*gaps: float) -> Callable[[Call], None]:
    """Pieces of a stream after these pauses, then its end."""

    def step(call: Call) -> None:
        async def go() -> None:
            for gap in gaps:
                await asyncio.sleep(gap)
                call.reply.push(ONE)
            call.reply.push(b"data: [DONE]\n\n")
            call.reply.close(FINISHED)

        task = asyncio.ensure_future(go())
        call.reply.on_close(lambda outcome: task.cancel() and None)

    return step


@runs
async def test_heartbeats_in_a_silence_within_a_stream() -> None:
    house = House(Far("a", paced(0.0, 0.05, 0.05, 0.27, 0.0)), heartbeat=0.1)
    _, wire = await house.ask(stream=True)
    beat = b": waiting\n\n"
    assert wire.pieces == [ONE, ONE, ONE, beat, beat, ONE, ONE, b"data: [DONE]\n\n"]
    assert house.route.beats is not None and not house.route.beats._entries and not house.route.silences


@runs
async def test_a_stream_that_flows_has_no_heartbeats_and_leaves_no_timer() -> None:
    house = House(Far("a", paced(*[0.03] * 8)), heartbeat=0.1)
    _, wire = await house.ask(stream=True)
    assert wire.pieces == [ONE] * 8 + [b"data: [DONE]\n\n"] and not house.route.silences
    call, wire = house.call(stream=True)
    house.send(call)
    await asyncio.sleep(0.15)
    assert house.route.silences
    call.reply.close(CLIENT_LEFT)
    assert not house.route.silences and house.route.beats is not None and not house.route.beats._entries


@runs
async def test_no_heartbeats_for_a_client_that_is_behind() -> None:
    house = House(Far("a", paced(0.0, 0.25)), heartbeat=0.1)
    call, wire = house.call(stream=True)
    house.send(call)
    await asyncio.sleep(0.01)
    call.reply.pause()
    await asyncio.wait_for(wire.done(), 5)
    assert b"waiting" not in wire.body


@runs
async def test_after_a_heartbeat_it_may_still_be_another_one_who_answers() -> None:
    house = House(Far("a", later(0.08, fails(EngineFailed())), streams(ONE)), heartbeat=0.05)
    _, wire = await house.ask(stream=True)
    assert wire.pieces == [b": waiting\n\n", ONE, b"data: [DONE]\n\n"]


@runs
async def test_a_reload_keeps_what_is_known_of_targets() -> None:
    engine = Far("a", hangs)
    house = House(engine)
    call, _ = house.call()
    house.send(call)
    live = house.live("a/m")
    other = House(engine, upstreams={"a": {"max_concurrency": 1}}, request_timeout=3.0, breaker_failures=1)
    house.names.replace(other.names)
    house.route.reload(other.settings)
    assert house.live("a/m") is live and live.limit == 1 and live.in_flight == 1 and not live.clear
    waiting, _ = house.call()
    house.send(waiting)
    assert len(live.line) == 1 and waiting.target is not call.target
    call.reply.close(CLIENT_LEFT)
    await asyncio.sleep(0.01)
    assert len(engine.calls) == 2 and waiting.deadline is not None
    waiting.reply.close(CLIENT_LEFT)
    no_calls_left(house)


@runs
async def test_a_target_that_is_gone_is_forgotten_when_its_last_call_has_ended() -> None:
    house = House(Far("a", hangs, models=("m", "n")))
    call, _ = house.call()
    house.send(call)
    await asyncio.wait([asyncio.ensure_future(house.ask("n"))], timeout=0.01)
    assert {live.label for live in house.route.targets} == {"a/m", "a/n"}
    other = House(Far("a", models=("n",)), Near())
    house.names.replace(other.names)
    house.route.reload(other.settings)
    assert {live.label for live in house.route.targets} == {"a/m", "a/n"}  # it is in flight
    call.reply.close(CLIENT_LEFT)
    assert {live.label for live in house.route.targets} == {"a/n"}
    assert 'target="a/m"' not in "\n".join(house.route.metrics())
    house.route.close()


@runs
async def test_metrics() -> None:
    house = House(Far("a", fails(EngineFailed()), says()), Near(), fallback=["local"])
    await house.ask()
    await house.ask("local")
    lines = house.route.metrics()
    for line in (
        'tertulia_upstream_attempts_total{target="a/m",outcome="failed"} 1',
        'tertulia_upstream_attempts_total{target="a/m",outcome="finished"} 1',
        'tertulia_upstream_attempts_total{target="local",outcome="finished"} 1',
        'tertulia_target_in_flight{target="a/m"} 0', 'tertulia_breaker_state{target="a/m"} 0',
        "tertulia_retries_total 1", "tertulia_fallbacks_total 0", 'tertulia_queue_waiting{target="a/m"} 0',
        "tertulia_queue_refused_total 0", "tertulia_queue_seconds_count 0",
    ):  # fmt: skip
        assert line in lines, lines
    assert any(line.startswith('tertulia_target_latency_seconds{target="a/m"} ') for line in lines)
