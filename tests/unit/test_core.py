"""The Reply: however a call ends, at whichever piece, everything hung on it is told, once, in order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest

from tertulia.core import CLIENT_LEFT, DEADLINE, FAILED, FINISHED, STOPPED, Reply
from tertulia.errors import DeadlineExceeded, EngineFailed, Overloaded, RateLimited, TertuliaError

PIECES = [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"]
ENDS = [FINISHED, FAILED, CLIENT_LEFT, DEADLINE, STOPPED]


class Wire:
    """A Sink that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []

    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        self.told.append(("begin", status))
        self.headers = list(headers)

    def write(self, data: bytes) -> None:
        self.told.append(("write", data))

    def end(self, outcome: str) -> None:
        self.told.append(("end", outcome))

    @property
    def written(self) -> list[object]:
        return [what for kind, what in self.told if kind == "write"]


def end(reply: Reply, how: str) -> None:
    if how == FAILED:
        reply.fail(EngineFailed())
    elif how == DEADLINE:
        reply.fail(DeadlineExceeded())
    else:
        reply.close(how)


@pytest.mark.parametrize(("at", "how"), list(itertools.product(range(-1, len(PIECES) + 1), ENDS)))
def test_a_call_ended_at_every_piece_in_every_way(at: int, how: str) -> None:
    """at -1: before begin; else after that many pieces. Then everything is tried again, and must change nothing."""
    wire = Wire()
    reply = Reply(wire, stream=True)
    told: list[tuple[str, str]] = []
    seen: list[bytes] = []
    for stage in ("meter", "admit", "engine"):
        reply.on_close(lambda outcome, stage=stage: told.append((stage, outcome)))
    reply.tap(seen.append)
    if at >= 0:
        reply.begin(200)
        for piece in PIECES[:at]:
            reply.push(piece)
    end(reply, how)
    before = list(wire.told)
    for other in ENDS:
        end(reply, other)
    reply.begin(200)
    reply.push(b"late")

    assert told == [("engine", how), ("admit", how), ("meter", how)]
    assert seen == PIECES[: max(at, 0)]
    assert wire.told == before and wire.told[-1] == ("end", how) and reply.outcome == how
    error = {FAILED: EngineFailed(), DEADLINE: DeadlineExceeded()}.get(how)
    expected: list[object] = list(PIECES[: max(at, 0)])
    if error is not None:
        expected.append(error.body() if at < 0 else error.event())
    assert wire.written == expected
    status = {FAILED: 502, DEADLINE: 504}.get(how) if at < 0 else 200
    assert [what for kind, what in wire.told if kind == "begin"] == ([] if status is None else [status])
    assert (reply.error is None) == (error is None)


def test_taps_and_rewrites_run_innermost_first() -> None:
    wire = Wire()
    reply = Reply(wire, stream=True)
    outer: list[bytes] = []
    inner: list[bytes] = []
    reply.tap(outer.append)  # as the meter hangs it: sees what the client gets
    reply.rewrite(lambda data: data + b"b")
    reply.rewrite(lambda data: data + b"a")
    reply.tap(inner.append)  # as route hangs it: sees what the engine said
    reply.begin()
    reply.push(b"x")
    assert (inner, outer, wire.written) == ([b"x"], [b"xab"], [b"xab"])


def test_a_rewrite_can_swallow_a_piece() -> None:
    wire = Wire()
    reply = Reply(wire, stream=True)
    outer: list[bytes] = []
    reply.tap(outer.append)
    reply.rewrite(lambda data: b"" if data == b"no" else data)
    reply.begin()
    for piece in (b"yes", b"no", b"more"):
        reply.push(piece)
    assert wire.written == outer == [b"yes", b"more"]


def test_the_client_gets_the_last_byte_after_the_closers() -> None:
    """So that a ledger entry is in the journal before the answer is whole."""
    wire = Wire()
    reply = Reply(wire)
    reply.on_close(lambda outcome: wire.told.append(("closer", outcome)))
    reply.begin()
    reply.push(b"{}")
    reply.close()
    assert wire.told == [("begin", 200), ("write", b"{}"), ("closer", FINISHED), ("end", FINISHED)]


def test_one_broken_closer_keeps_no_other_from_settling() -> None:
    wire = Wire()
    reply = Reply(wire)
    told: list[str] = []

    def broken(outcome: str) -> None:
        raise OSError(28, "No space left on device")

    reply.on_close(told.append)
    reply.on_close(broken)
    reply.on_close(told.append)
    with pytest.raises(OSError, match="No space left"):
        reply.close()
    assert told == [FINISHED, FINISHED] and wire.told == [("end", FINISHED)]
    reply.close()  # nothing is told again
    assert told == [FINISHED, FINISHED]


def test_a_closer_hung_after_the_end_is_told_at_once() -> None:
    """The client left before the first stage had its turn: what the stages count must still come out even."""
    reply = Reply(Wire())
    reply.close(CLIENT_LEFT)
    told: list[str] = []
    reply.on_close(told.append)
    assert told == [CLIENT_LEFT]


def test_a_failure_before_the_first_byte_is_an_ordinary_answer() -> None:
    wire = Wire()
    reply = Reply(wire, stream=True)
    reply.header("x-tertulia-model", "mock")
    reply.fail(RateLimited("Wait.", retry_after=1.5))
    assert wire.told == [("begin", 429), ("write", reply.error.body()), ("end", FAILED)]  # type: ignore[union-attr]
    assert wire.headers == [
        b"x-tertulia-model: mock\r\n", b"x-should-retry: true\r\n", b"retry-after: 2\r\n", b"retry-after-ms: 1500\r\n",
    ]  # fmt: skip
    assert reply.stream is False


def test_a_failure_after_begin_is_an_error_event() -> None:
    wire = Wire()
    reply = Reply(wire, stream=True)
    reply.begin()
    reply.push(PIECES[0])
    reply.fail(Overloaded())
    event = wire.written[-1]
    assert isinstance(event, bytes) and event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert json.loads(event[6:])["error"]["code"] == "server_is_overloaded"
    assert reply.stream is True and reply.status == 200


def test_recover_may_take_over_a_failure_until_the_call_has_ended() -> None:
    wire = Wire()
    reply = Reply(wire, stream=True)
    asked: list[TertuliaError] = []

    def recover(error: TertuliaError) -> bool:
        asked.append(error)
        return len(asked) == 1

    reply.recover = recover
    first, second = EngineFailed("one"), EngineFailed("two")
    reply.fail(first)
    assert not reply.closed and wire.told == []
    reply.fail(second)
    assert asked == [first, second] and reply.closed and reply.error is second

    wire = Wire()
    reply = Reply(wire, stream=True)
    reply.recover = recover
    asked.clear()
    reply.beat()
    assert reply.begun and not reply.started
    reply.push(b"data: x\n\n")
    assert reply.started
    reply.fail(first)  # taken over: who goes on where the answer broke off needs no new beginning
    assert not reply.closed
    reply.push(b"data: y\n\n")
    reply.close()
    reply.fail(second)
    assert asked == [first] and reply.closed


def test_begin_counts_once() -> None:
    wire = Wire()
    reply = Reply(wire)
    reply.begin(201)
    reply.begin(500)
    assert wire.told == [("begin", 201)] and reply.status == 201


def test_line_breaks_cannot_get_into_a_header() -> None:
    reply = Reply(Wire())
    reply.header("x-tertulia-model", "a\r\nset-cookie: b\u2713")
    assert reply.headers == [b"x-tertulia-model: a  set-cookie: b?\r\n"]


def test_a_slow_client_pauses_the_source() -> None:
    class Socket:
        paused = False

        def pause_reading(self) -> None:
            self.paused = True

        def resume_reading(self) -> None:
            self.paused = False

    reply, source = Reply(Wire()), Socket()
    reply.pause()  # nothing to pause yet
    assert reply.paused
    reply.resume()
    reply.source = source
    reply.pause()
    assert source.paused and reply.paused
    reply.resume()
    assert not source.paused and not reply.paused
    reply.close()
    reply.pause()
    assert not source.paused  # let go of at the end
