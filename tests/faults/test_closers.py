"""A call ended before and after each piece, in every way, through the real stages and a scripted engine in one process:
whoever hung something on the reply, at any depth, is told once and truly, and nothing reserved stays reserved.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tertulia.accounts.ledger import Ledger
from tertulia.accounts.prices import Prices
from tertulia.api import chat
from tertulia.config import Settings
from tertulia.core import (
    CLIENT_LEFT,
    DEADLINE,
    FAILED,
    FINISHED,
    STOPPED,
    Call,
    ModelCard,
    Next,
    Principal,
    Reply,
    Stage,
)  # fmt: skip
from tertulia.engines.base import Collector
from tertulia.errors import EngineFailed
from tertulia.gateway.admit import Admit, Rules
from tertulia.gateway.cache import Cache
from tertulia.gateway.meter import Meter
from tertulia.gateway.names import Names
from tertulia.gateway.pipeline import Pipeline, check
from tertulia.gateway.route import Route

WAYS = (FINISHED, FAILED, CLIENT_LEFT, DEADLINE, STOPPED)
TOKENS = 3
DEADLINE_SECONDS = 0.03
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {"cache": "off", "coalesce": False},
    "continuing": {"cache": "off", "coalesce": False, "on_break": "continue", "heartbeat": 0.01},
    "caching": {"cache": "all", "coalesce": True},
}


def chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    data = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "scripted", "choices": [choice]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


END = chunk("", "stop") + b"data: [DONE]\n\n"
WHOLE = b'{"id":"x","object":"chat.completion","choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}'


class Scripted:
    """An engine that does nothing by itself: the test pushes what it likes into the reply of the call it was given."""

    name = "scripted"

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.told: list[str] = []

    def answer(self, call: Call) -> None:
        self.calls.append(call)
        call.sending()
        call.reply.on_close(self.told.append)

    def models(self) -> Sequence[ModelCard]:
        return [ModelCard(id="scripted", kind="chat", source="test:")]

    async def ready(self, model: str) -> bool:
        return True

    async def close(self) -> None:
        pass


class House:
    """The stages as the server has them, and between every two of them somebody who listens."""

    def __init__(self, data: Path, more: dict[str, Any]) -> None:
        settings = Settings(data=str(data), request_timeout=DEADLINE_SECONDS, retries=0, **more)
        self.engine = Scripted()
        self.names = Names([self.engine], {}, {}, {"chat": "scripted"}, retries=0, on_break=settings.on_break)
        self.ledger = Ledger(data)
        prices = Prices({})
        self.meter = Meter(self.ledger)
        self.admit = Admit(Rules(1000, 1_000_000), prices, {})
        self.route = Route(settings, self.names)
        self.told: dict[int, list[str]] = {}
        stages: list[Stage] = [self.meter, check, self.admit, Cache(settings, data), self.route]
        between = [self.listen(depth) for depth in range(len(stages))]
        self.pipeline = Pipeline([each for pair in zip(between, stages, strict=True) for each in pair])
        self.sink = Collector()
        self.who = Principal("key", "org", "project")

    def listen(self, depth: int) -> Stage:
        told = self.told[depth] = []

        def stage(call: Call, following: Next) -> Awaitable[None] | None:
            call.reply.on_close(told.append)
            return following(call)

        return stage

    def call(self, stream: bool) -> Reply:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "x"}], "stream": stream}
        reply = Reply(self.sink)
        task = chat.task(self.names.resolve)
        rest = self.pipeline.run(
            Call("req_1", self.who, task, json.dumps(body).encode(), reply, time.perf_counter_ns())
        )
        assert rest is None
        return reply

    async def end(self, reply: Reply, inner: Reply, way: str, last: bytes) -> None:
        """reply is the client's, inner the one the engine has, which may be another."""
        if way == FINISHED:
            inner.push(last)
            inner.close()
        elif way == FAILED:
            inner.fail(EngineFailed())
        elif way == DEADLINE:
            pass  # whoever measures time does it
        else:
            reply.close(way)
        deadline = time.monotonic() + 2
        while reply.outcome is None and time.monotonic() < deadline:
            await asyncio.sleep(0.005)


def check_all_told(house: House, way: str) -> None:
    assert house.sink.outcome == way
    assert house.told == {depth: [way] for depth in house.told}
    assert len(house.engine.told) == 1 and (house.engine.told[0] == FINISHED) == (way == FINISHED)
    assert house.meter.in_flight == 0
    assert all(live.in_flight == 0 for live in house.route.targets)
    (entry,) = house.ledger.entries()
    assert entry.outcome == way and entry.id == "req_1"
    allowance = house.who.state.allowances["scripted"]
    used = entry.prompt_tokens + entry.completion_tokens
    assert (allowance.tokens, allowance.in_flight) == (used, 0), "a reservation stayed"


def play(data: Path, more: dict[str, Any], stream: bool, pieces: Sequence[bytes], last: bytes, way: str) -> House:
    async def work() -> House:
        house = House(data, more)
        reply = house.call(stream)
        (call,) = house.engine.calls
        for piece in pieces:
            call.reply.push(piece)
        await house.end(reply, call.reply, way, last)
        said = list(house.sink.pieces)
        late: list[Callable[[], object]] = [
            lambda: call.reply.push(b"late"), lambda: call.reply.fail(EngineFailed()), call.reply.close,
            lambda: reply.close(STOPPED), lambda: reply.fail(EngineFailed()),
        ]  # fmt: skip
        for each in late:  # the end is the end
            each()
        await asyncio.sleep(DEADLINE_SECONDS + 0.02)  # no timer is left that would end it again
        assert house.sink.pieces == said
        house.route.close()
        return house

    return asyncio.run(work())


@pytest.mark.parametrize("more", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize(("at", "way"), list(itertools.product(range(TOKENS + 1), WAYS)))
def test_everybody_is_told_of_a_streams_end_once(tmp_path: Path, at: int, way: str, more: dict[str, Any]) -> None:
    pieces = [chunk(f"{number}") for number in range(at)]
    house = play(tmp_path, more, True, pieces, END, way)
    check_all_told(house, way)
    said = b"".join(piece for piece in house.sink.pieces if not piece.startswith(b":"))
    if way == FINISHED:
        assert said == b"".join([*pieces, END])
    elif way in (FAILED, DEADLINE):
        assert said.startswith(b"".join(pieces)) and said.count(b'"error"') == 1
    else:
        assert said == b"".join(pieces)


@pytest.mark.parametrize("more", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_everybody_is_told_of_an_answers_end_once(tmp_path: Path, way: str, more: dict[str, Any]) -> None:
    house = play(tmp_path, more, False, [], WHOLE, way)
    check_all_told(house, way)
    assert (b"".join(house.sink.pieces) == WHOLE) == (way == FINISHED)
