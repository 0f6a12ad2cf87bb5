"""One answer for several calls: whoever comes and leaves at whatever piece, all is told once and truly, and paid for
once."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter_ns
from typing import Any

import pytest

from tertulia.core import CLIENT_LEFT, DEADLINE, FAILED, FINISHED, STOPPED, Call, Principal, Reply, Task, Usage
from tertulia.engines.base import Collector
from tertulia.errors import DeadlineExceeded, EngineFailed, Overloaded, RateLimited
from tertulia.gateway import shared
from tertulia.gateway.shared import Flight, Flights

PIECES = [b'data: {"n":%d}\n\n' % n for n in range(5)] + [b"data: [DONE]\n\n"]
TASK = Task("chat", "/v1/chat/completions", lambda call: None)
WHO = Principal("key_1", "org-1", "proj_1")


class Wire(Collector):
    """A client's side: what it was told."""

    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        super().begin(status, headers)
        self.head = b"".join(headers)
        self.begun = getattr(self, "begun", 0) + 1

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


class Caller:
    """A call with a client, and what its stages were told."""

    def __init__(self, stream: bool = True, name: str = "") -> None:
        self.wire = Wire()
        reply = Reply(self.wire, stream)
        self.call = Call(f"req_{name}", WHO, TASK, b"{}", reply, 0)
        self.call.stream = stream
        self.seen: list[bytes] = []
        self.told: list[tuple[str, str, Usage | None]] = []  # outcome, call.cache and usage as the meter finds them
        reply.tap(self.seen.append)
        reply.on_close(lambda outcome: self.told.append((outcome, self.call.cache, reply.usage)))

    @property
    def pays(self) -> bool:
        return self.told[0][1] in ("", "miss")

    def leave(self) -> None:
        self.call.reply.close(CLIENT_LEFT)


class Stage:
    """What stands further in: keeps the calls it was given, and their sources are paused and resumed."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outcomes: list[str] = []
        self.paused = False

    def __call__(self, call: Call) -> Awaitable[None] | None:
        self.calls.append(call)
        call.attempts += 1
        call.reply.headers.append(b"x-tertulia-model: mock\r\n")
        call.reply.source = self
        call.reply.on_close(self.outcomes.append)
        return None

    @property
    def reply(self) -> Reply:
        return self.calls[-1].reply

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Sky:
    """Flights with one in the air."""

    def __init__(self, stream: bool = True, keep: bool = True, grace: float = 0.0) -> None:
        self.flights = Flights(lambda call: b"retry")
        self.flights.grace = grace
        self.unclaimed: list[tuple[Call, str]] = []
        self.flights.account = lambda call, outcome: self.unclaimed.append((call, outcome))
        self.stage = Stage()
        self.landed: list[Flight] = []
        self.stream = stream
        self.leader = Caller(stream, "leader")
        self.leader.call.cache = "miss"
        key = b"key" if keep else None
        assert self.flights.launch(self.leader.call, self.stage, key, keep, self.landed.append) is None

    def joiner(self) -> Caller:
        caller = Caller(self.stream, "joiner")
        caller.call.cache = "joined"
        flight = self.flights.find(b"key")
        assert flight is not None
        flight.join(caller.call)
        return caller

    def nothing_left(self) -> None:
        assert len(self.flights) == 0 and self.flights.kept == 0 and not self.flights._by_key
        assert len(self.stage.outcomes) == 1


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def test_all_get_the_same_whenever_they_come() -> None:
    sky = Sky()
    callers = [sky.leader]
    for piece in PIECES:
        callers.append(sky.joiner())
        sky.stage.reply.push(piece)
    sky.stage.reply.close()
    for caller in callers:
        assert caller.wire.body == b"".join(PIECES) and b"".join(caller.seen) == caller.wire.body
        assert caller.wire.status == 200 and b"x-tertulia-model: mock\r\n" in caller.wire.head
        assert [outcome for outcome, _, _ in caller.told] == [FINISHED] and caller.wire.begun == 1
    assert [caller.pays for caller in callers] == [True] + [False] * len(PIECES)
    assert sky.leader.call.attempts == 1 and callers[1].call.attempts == 0
    assert [flight.pieces for flight in sky.landed] == [PIECES] and len(sky.stage.calls) == 1
    assert sky.unclaimed == []
    sky.nothing_left()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("at", range(len(PIECES) + 1))
@pytest.mark.parametrize("who", ["leader", "joiner", "both", "all"])
def test_leaving_at_every_piece(who: str, at: int, stream: bool) -> None:
    """who leaves before piece at: the others get all of it, one pays, and when nobody is left the source is stopped."""
    pieces = PIECES if stream else [b'{"answer":1}']
    if at > len(pieces):
        return
    sky = Sky(stream)
    first, second = sky.joiner(), sky.joiner()
    leaving = {
        "leader": [sky.leader], "joiner": [first], "both": [sky.leader, first], "all": [first, sky.leader, second],
    }[who]  # fmt: skip
    for piece in pieces[:at]:
        sky.stage.reply.push(piece)
    sky.stage.reply.usage = Usage(7, at)
    for caller in leaving:
        assert sky.stage.outcomes == []
        caller.leave()
    assert sky.stage.outcomes == ([CLIENT_LEFT] if who == "all" else [])
    for piece in pieces[at:]:
        sky.stage.reply.push(piece)
    sky.stage.reply.close()
    everyone = [sky.leader, first, second]
    for caller in everyone:
        given = pieces[:at] if caller in leaving else pieces
        assert caller.wire.body == b"".join(given) and len(caller.told) == 1
        assert caller.told[0][0] == (CLIENT_LEFT if caller in leaving else FINISHED)
    assert sum(caller.pays for caller in everyone) == 1 and sky.unclaimed == []
    payer = next(caller for caller in everyone if caller.pays)
    assert payer.told[0][2] == Usage(7, at) and payer.call.attempts == 1
    assert payer is {"leader": first, "joiner": sky.leader, "both": second, "all": second}[who]
    sky.nothing_left()


@pytest.mark.parametrize("at", range(len(PIECES) + 1))
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (EngineFailed(), FAILED),
        (RateLimited("Wait.", retry_after=3), FAILED),
        (Overloaded("Full."), FAILED),
        (DeadlineExceeded(), DEADLINE),
        (None, FAILED),
        (STOPPED, STOPPED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [True, False])
def test_the_shared_call_ends_at_every_piece(stream: bool, error: Any, outcome: str, at: int) -> None:
    pieces = PIECES if stream else [b'{"answer":1}']
    if at > len(pieces):
        return
    sky = Sky(stream)
    callers = [sky.leader, sky.joiner()]
    for piece in pieces[:at]:
        sky.stage.reply.push(piece)
    if at:
        callers.append(sky.joiner())
    if isinstance(error, Exception):
        sky.stage.reply.fail(error)  # type: ignore[arg-type]
    else:
        sky.stage.reply.close(error or FAILED)
    for caller in callers:
        wire, reply, said = caller.wire, caller.call.reply, error
        assert [one for one, _, _ in caller.told] == [outcome]
        if isinstance(error, DeadlineExceeded) and caller is not sky.leader:  # it was not its own time that ran out
            said = reply.error
            assert "had begun before it" in said.message and error.message in said.message and said.retry is True
        if not isinstance(error, Exception):
            assert reply.error is None and wire.body == b"".join(pieces[:at])
        elif at and stream:
            assert wire.status == 200 and wire.body == b"".join(pieces[:at]) + said.event()  # type: ignore[attr-defined]
        else:
            assert wire.status == error.status and wire.body == said.body()  # type: ignore[attr-defined]
            assert wire.head.count(b"retry-after:") == (1 if isinstance(error, RateLimited) else 0)
            assert wire.head.count(b"x-should-retry") == (0 if said.retry is None else 1)
            assert wire.head.count(b"x-tertulia-model") == 1
    assert sum(caller.pays for caller in callers) == 1
    sky.nothing_left()


def test_an_error_on_the_way_in_is_everybodys() -> None:
    async def test() -> None:
        flights = Flights(lambda call: b"retry")

        def refuses(call: Call) -> None:
            raise Overloaded("Full.")

        async def breaks(call: Call) -> None:
            await asyncio.sleep(0)
            raise ZeroDivisionError

        leader = Caller()
        assert flights.launch(leader.call, refuses, b"key", True, None) is None
        assert leader.wire.status == 503 and len(flights) == 0
        leader, joiner = Caller(), Caller()
        rest = flights.launch(leader.call, breaks, b"key", True, None)
        flight = flights.find(b"key")
        assert rest is not None and flight is not None
        flight.join(joiner.call)
        await rest
        assert leader.wire.status == joiner.wire.status == 500 and len(flights) == 0

    run(test)


def test_who_awaits_is_stopped() -> None:
    async def test() -> None:
        flights = Flights(lambda call: b"retry")

        async def forever(call: Call) -> None:
            await asyncio.sleep(60)

        leader = Caller()
        rest = flights.launch(leader.call, forever, b"key", True, None)
        task = asyncio.ensure_future(rest)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert leader.wire.outcome == STOPPED and len(flights) == 0

    run(test)


@pytest.mark.parametrize("how", [FINISHED, CLIENT_LEFT, FAILED])
def test_what_has_ended_is_freed_at_once(how: str) -> None:
    gc.disable()  # no circle needs to be found
    try:
        sky = Sky()
        found = sky.flights.find(b"key")
        assert found is not None
        flight = weakref.ref(found)
        callers = [sky.leader, sky.joiner()]
        sky.stage.reply.push(PIECES[0])
        if how == CLIENT_LEFT:
            for caller in callers:
                caller.leave()
        else:
            sky.stage.reply.close(how)
        sky.landed.clear()
        del found
        assert flight() is None
    finally:
        gc.enable()


def test_who_left_before_it_began_asks_nobody() -> None:
    flights, stage, caller = Flights(lambda call: b"retry"), Stage(), Caller()
    caller.leave()
    assert flights.launch(caller.call, stage, b"key", True, None) is None
    assert stage.calls == [] and len(flights) == 0
    sky = Sky()
    flight = sky.flights.find(b"key")
    assert flight is not None
    flight.join(caller.call)
    assert len(flight.listeners) == 1


def test_one_that_breaks_does_not_break_the_others() -> None:
    sky = Sky()
    joiner = sky.joiner()

    def breaks(data: bytes) -> None:
        raise ZeroDivisionError

    sky.leader.call.reply.tap(breaks)
    for piece in PIECES:
        sky.stage.reply.push(piece)
    sky.stage.reply.close()
    assert sky.leader.wire.outcome == FAILED and joiner.wire.body == b"".join(PIECES)
    assert [sky.leader.pays, joiner.pays] == [False, True]
    sky.nothing_left()


def test_a_slow_reader_alone_pauses_the_source() -> None:
    sky = Sky()
    sky.leader.call.reply.pause()
    assert sky.stage.paused
    sky.stage.reply.push(PIECES[0])  # on its way already
    assert sky.leader.wire.pieces == []
    sky.leader.call.reply.resume()
    assert not sky.stage.paused and sky.leader.wire.pieces == [PIECES[0]]


def test_a_slow_reader_among_others_is_waited_for_only_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LAG", 40)
    sky = Sky()
    joiner = sky.joiner()
    sky.leader.call.reply.pause()
    sent = 0
    while not sky.stage.paused:
        sky.stage.reply.push(PIECES[sent])
        sent += 1
        assert joiner.wire.body == b"".join(PIECES[:sent]) and sky.leader.wire.body == b""
    assert sent == 3  # 14 bytes each
    sky.leader.call.reply.resume()
    assert sky.leader.wire.body == joiner.wire.body and not sky.stage.paused
    sky.leader.call.reply.pause()
    for piece in PIECES[3:]:
        sky.stage.reply.push(piece)
    sky.leader.leave()
    assert not sky.stage.paused
    sky.stage.reply.close()
    assert joiner.wire.outcome == FINISHED and joiner.pays and not sky.leader.pays


def test_a_slow_reader_gets_the_rest_after_the_others_have_gone() -> None:
    sky = Sky()
    joiner = sky.joiner()
    sky.leader.call.reply.pause()
    for piece in PIECES:
        sky.stage.reply.push(piece)
    sky.stage.reply.close()
    assert joiner.wire.outcome == FINISHED and sky.leader.wire.outcome is None
    sky.leader.call.reply.resume()
    assert sky.leader.wire.body == b"".join(PIECES) and sky.leader.wire.outcome == FINISHED
    assert sky.leader.pays and not joiner.pays
    sky.nothing_left()


def test_a_slow_payer_that_leaves_last_pays_for_all() -> None:
    sky = Sky()
    sky.leader.call.reply.pause()
    for piece in PIECES:
        sky.stage.reply.push(piece)
    sky.stage.reply.usage = Usage(3, 4)
    sky.stage.reply.close()
    sky.leader.leave()
    assert sky.leader.told == [(CLIENT_LEFT, "miss", Usage(3, 4))]
    sky.nothing_left()


def test_heartbeats_reach_those_who_wait_and_are_no_part_of_the_answer() -> None:
    sky = Sky()
    sky.stage.reply.beat()
    joiner = sky.joiner()
    sky.stage.reply.beat()
    for piece in PIECES:
        sky.stage.reply.push(piece)
    sky.stage.reply.close()
    assert sky.leader.wire.body == b": waiting\n\n" * 2 + b"".join(PIECES)
    assert joiner.wire.body == b": waiting\n\n" + b"".join(PIECES)
    assert sky.leader.seen == PIECES and sky.landed[0].pieces == PIECES


def test_who_comes_after_a_heartbeat_and_a_failure_sees_a_status() -> None:
    sky = Sky()
    sky.stage.reply.beat()
    joiner = sky.joiner()
    sky.stage.reply.fail(Overloaded("Full."))
    assert sky.leader.wire.status == 200 and joiner.wire.status == 503


def test_too_long_an_answer_is_not_kept_for_late_comers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "KEPT", 40)
    sky = Sky()
    flight = sky.flights.find(b"key")
    assert flight is not None
    for piece in PIECES[:3]:
        sky.stage.reply.push(piece)
    assert sky.flights.find(b"key") is None and sky.flights.kept == 0 and flight.pieces == []
    for piece in PIECES[3:]:
        sky.stage.reply.push(piece)
    sky.stage.reply.close()
    assert sky.leader.wire.body == b"".join(PIECES) and sky.landed == []
    sky.nothing_left()


def test_all_answers_together_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "ALL_KEPT", 40)
    flights, stages = Flights(lambda call: b"retry"), [Stage() for _ in range(4)]
    for at, stage in enumerate(stages):
        flights.launch(Caller().call, stage, b"%d" % at, True, None)
        stage.reply.push(PIECES[0])
    assert flights.kept <= 40 and [flights.find(b"%d" % at) is not None for at in range(4)].count(True) == 2


# grace ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("at", [0, 1])
def test_a_client_that_comes_back_finds_its_call_running(keep: bool, at: int) -> None:
    async def test() -> None:
        sky = Sky(keep=keep, grace=5)
        sky.leader.leave()
        assert sky.stage.outcomes == [] and not sky.leader.pays
        for piece in PIECES[:at]:
            sky.stage.reply.push(piece)
        flight = sky.flights.find(b"key" if keep else b"retry")
        assert flight is not None
        again = Caller()
        again.call.cache = "joined"
        flight.join(again.call)
        for piece in PIECES[at:]:
            sky.stage.reply.push(piece)
        sky.stage.reply.close()
        assert again.wire.body == b"".join(PIECES) and again.pays and len(sky.stage.calls) == 1
        assert sky.unclaimed == []
        sky.nothing_left()

    run(test)


def test_nobody_comes_back() -> None:
    async def test() -> None:
        sky = Sky(grace=0.02)
        sky.leader.leave()
        sky.stage.reply.push(PIECES[0])
        sky.stage.reply.usage = Usage(3, 1)
        await asyncio.sleep(0.05)
        assert sky.stage.outcomes == [CLIENT_LEFT] and not sky.leader.pays
        ((call, outcome),) = sky.unclaimed
        assert (outcome, call.reply.usage, call.attempts, call.id) == (CLIENT_LEFT, Usage(3, 1), 1, "req_leader")
        sky.nothing_left()
        sky = Sky(grace=5)
        sky.leader.leave()
        sky.stage.reply.usage = Usage(3, 1)
        sky.stage.reply.close()
        ((call, outcome),) = sky.unclaimed
        assert (outcome, call.reply.usage) == (FINISHED, Usage(3, 1)) and len(sky.landed) == 1
        sky.nothing_left()

    run(test)


def test_no_grace_once_the_answer_has_begun_to_arrive() -> None:
    async def test() -> None:
        sky = Sky(grace=5)
        sky.stage.reply.push(PIECES[0])
        sky.leader.leave()
        assert sky.stage.outcomes == [CLIENT_LEFT] and sky.leader.pays

    run(test)


def test_the_server_stops() -> None:
    async def test() -> None:
        sky, lingering = Sky(), Sky(grace=5)
        lingering.leader.leave()
        for flights in (sky.flights, lingering.flights):
            flights.close()
        assert sky.stage.outcomes == lingering.stage.outcomes == [STOPPED] and sky.leader.wire.outcome == STOPPED
        sky.nothing_left()
        lingering.nothing_left()

    run(test)


@pytest.mark.parametrize("leads", [True, False])
def test_who_is_behind_when_the_shared_call_has_ended_has_its_own_deadline(leads: bool) -> None:
    async def go() -> None:
        sky = Sky()
        sky.flights.seconds = 0.1
        slow, other = (sky.leader, sky.joiner()) if leads else (sky.joiner(), sky.leader)
        slow.call.reply.pause()
        for piece in PIECES:
            sky.stage.reply.push(piece)
        sky.stage.reply.close()
        assert other.wire.outcome == FINISHED and slow.wire.outcome is None
        await asyncio.sleep(0.02)
        assert slow.wire.outcome is None
        await asyncio.wait_for(slow.wire.done(), 5)
        assert slow.wire.outcome == DEADLINE and [one for one, _, _ in slow.told] == [DEADLINE]
        sky.nothing_left()

    run(go)


def test_who_is_behind_and_catches_up_has_no_timer_left() -> None:
    async def go() -> None:
        sky = Sky()
        sky.flights.seconds = 5.0
        sky.leader.call.reply.pause()
        sky.stage.reply.push(PIECES[0])
        sky.stage.reply.close()
        listener = sky.leader.call.reply.source
        timer = listener.timer  # type: ignore[union-attr]
        sky.leader.call.reply.resume()
        assert sky.leader.wire.outcome == FINISHED and timer.cancelled() and listener.timer is None  # type: ignore[union-attr]

    run(go)


def test_who_is_behind_when_its_time_is_over_already_ends_at_once() -> None:
    async def go() -> None:
        sky = Sky()
        sky.flights.seconds = 60.0
        sky.leader.call.began = perf_counter_ns() - 60_000_000_000
        sky.leader.call.reply.pause()
        sky.stage.reply.push(PIECES[0])
        sky.stage.reply.fail(DeadlineExceeded())
        await asyncio.wait_for(sky.leader.wire.done(), 1)
        assert sky.leader.wire.outcome == DEADLINE

    run(go)
