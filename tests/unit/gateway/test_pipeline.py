"""The one door: the order of the stages, and that a call always ends in its Reply."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tertulia.accounts.ledger import Ledger
from tertulia.accounts.prices import NANO, Prices
from tertulia.api import chat, embeddings
from tertulia.config import Settings
from tertulia.core import CLIENT_LEFT, FINISHED, Call, ModelCard, Next, Principal, Reply, Usage
from tertulia.engines.base import Collector
from tertulia.engines.mock import Mock
from tertulia.errors import BadRequest, EngineFailed, QuotaExceeded, RateLimited, Unauthorized
from tertulia.gateway.accesslog import AccessLog
from tertulia.gateway.admit import Admit, Rules
from tertulia.gateway.cache import Cache
from tertulia.gateway.meter import Meter
from tertulia.gateway.names import Names
from tertulia.gateway.pipeline import Pipeline, check, compose
from tertulia.gateway.route import Route


class Wire(Collector):
    """A Collector that keeps the headers too."""

    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        super().begin(status, headers)
        lines = b"".join(headers).decode().split("\r\n")
        self.headers = dict(line.split(": ", 1) for line in lines if line)


async def through(pipeline: Pipeline, call: Call) -> None:
    rest = pipeline.run(call)
    if rest is not None:
        await rest


def counted(meter: Meter) -> dict[tuple[str, str, str, int], int]:
    return {key: series.calls for key, series in meter.series.items()}


class House:
    """The stages as the server builds them, around one engine."""

    def __init__(self, data: Path, engine: Any = None, **limits: Any) -> None:
        self.data = data
        self.engine = engine or Mock()
        self.ledger = Ledger(data)
        self.cache = Cache(Settings(cache=limits.pop("cache", "deterministic")), data)
        prices = Prices({"mock": {"input": 1000.0, "output": 1000.0}})  # a token is a million nano-dollars
        self.log = AccessLog(str(data / "access.log"))
        self.meter = Meter(self.ledger, self.log)
        spent = limits.pop("spent", {})
        rules = Rules(limits.get("requests", 100), limits.get("tokens", 10**6), spend=limits.get("spend"))
        self.admit = Admit(rules, prices, spent)
        names = Names([self.engine], {}, {}, {"chat": "mock", "embedding": "mock-embedding"})
        self.tasks = {make.__name__.rsplit(".")[-1]: make.task(names.resolve) for make in (chat, embeddings)}
        route = Route(Settings(request_timeout=limits.get("timeout", 5.0)), names)
        stages = [self.meter, check, self.admit, self.cache, route]
        self.pipeline = Pipeline(stages)
        self.who = Principal("key_1", "org-1", "proj_1")

    def call(self, body: dict[str, Any] | bytes, task: str = "chat") -> tuple[Call, Wire]:
        wire = Wire()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Call("req_1", self.who, self.tasks[task], raw, Reply(wire), 0), wire

    async def ask(self, body: dict[str, Any] | bytes, task: str = "chat") -> tuple[Call, Wire]:
        call, wire = self.call(body, task)
        await through(self.pipeline, call)
        await asyncio.wait_for(wire.done(), 5)
        return call, wire


def ask(text: str = "one two three", **more: Any) -> dict[str, Any]:
    return {"model": "mock", "messages": [{"role": "user", "content": text}], **more}


def test_stages_run_outermost_first_and_see_the_answer_innermost_first() -> None:
    told: list[str] = []

    def stage(name: str) -> Any:
        def run(call: Call, following: Next) -> Any:
            told.append(f"{name} down")
            call.reply.tap(lambda data: told.append(f"{name} sees"))
            call.reply.on_close(lambda outcome: told.append(f"{name} closes"))
            return following(call)

        return run

    def engine(call: Call, following: Next) -> None:
        call.reply.begin()
        call.reply.push(b"x")
        call.reply.close()

    async def run() -> None:
        call = Call("req_1", Principal("", "", ""), None, b"", Reply(Collector()), 0)  # type: ignore[arg-type]
        await through(Pipeline([stage("a"), stage("b"), stage("c"), engine]), call)

    asyncio.run(run())
    assert told == [
        "a down", "b down", "c down", "c sees", "b sees", "a sees", "c closes", "b closes", "a closes",
    ]  # fmt: skip


def test_the_innermost_stage_must_answer() -> None:
    async def passes(call: Call, following: Next) -> None:
        await following(call)

    with pytest.raises(AssertionError, match="innermost"):
        asyncio.run(compose([passes])(None))  # type: ignore[arg-type]


def test_an_answer_with_everything_around_it(tmp_path: Path) -> None:
    async def run() -> tuple[House, Call, Wire]:
        house = House(tmp_path)
        call, wire = await house.ask(ask())
        return house, call, wire

    house, call, wire = asyncio.run(run())
    assert (wire.status, call.reply.outcome) == (200, FINISHED)
    assert json.loads(b"".join(wire.pieces))["choices"][0]["message"]["content"] == "one two three"
    assert call.reply.usage == Usage(3, 3)
    assert wire.headers["x-tertulia-model"] == "mock"
    assert (
        wire.headers["x-ratelimit-limit-requests"] == "100" and wire.headers["x-ratelimit-remaining-requests"] == "99"
    )
    assert (
        wire.headers["x-ratelimit-limit-tokens"] == "1000000" and wire.headers["x-ratelimit-reset-requests"] == "1m0s"
    )
    (entry,) = house.ledger.entries()
    assert (entry.id, entry.key, entry.project, entry.asked, entry.model) == (
        "req_1",
        "key_1",
        "proj_1",
        "mock",
        "mock",
    )
    assert (entry.prompt_tokens, entry.completion_tokens, entry.cost, entry.status) == (3, 3, 6_000_000, 200)
    house.log.close()
    (line,) = (tmp_path / "access.log").read_text().splitlines()
    said = json.loads(line)
    assert (said["id"], said["task"], said["outcome"], said["completion_tokens"]) == ("req_1", "chat", FINISHED, 3)
    assert "one two" not in line and house.meter.in_flight == 0


def test_what_was_not_used_is_given_back(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, tokens=5000, spend=2 * NANO)
        for _ in range(4):  # each reserves more than 1,000 tokens and more than a dollar, and uses six
            _, wire = await house.ask(ask(max_tokens=1000))
            assert wire.status == 200
        budget, allowance = house.admit.budgets.all["proj_1"], house.who.state.allowances["mock"]
        assert (budget.reserved, budget.spent) == (0, 4 * 6_000_000)
        assert (allowance.tokens, allowance.in_flight) == (24, 0)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("limits", "kind", "remaining"),
    [
        ({"requests": 1}, RateLimited, "0"),
        ({"tokens": 1300}, RateLimited, "0"),
        ({"spend": NANO // 100}, QuotaExceeded, "100"),
    ],
)  # fmt: skip
def test_a_refusal_by_a_limit_is_recorded_and_says_where_one_stands(
    tmp_path: Path, limits: dict[str, Any], kind: type, remaining: str
) -> None:
    async def run() -> None:
        house = House(tmp_path, **limits)
        if kind is RateLimited:
            call, wire = house.call(ask(mock={"delay": 5}, max_tokens=900))
            running = asyncio.create_task(through(house.pipeline, call))
            await asyncio.sleep(0.05)  # holds what it reserved
        refused, wire = await house.ask(ask(max_tokens=1000))
        assert type(refused.reply.error) is kind and wire.status == 429
        if "tokens" not in limits:
            assert wire.headers["x-ratelimit-remaining-requests"] == remaining
        assert wire.headers["x-should-retry"] == ("true" if kind is RateLimited else "false")
        assert ("retry-after" in wire.headers) == (kind is RateLimited)
        assert counted(house.meter)[("chat", "mock", "failed", 429)] == 1
        if kind is RateLimited:
            call.reply.close(CLIENT_LEFT)
            await running
        assert house.meter.in_flight == 0

    asyncio.run(run())


def test_money_spent_before_a_restart_counts(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, spend=2 * NANO, spent={"proj_1": 2 * NANO})
        refused, _ = await house.ask(ask(max_tokens=1))
        assert isinstance(refused.reply.error, QuotaExceeded)

    asyncio.run(run())


def test_what_the_edge_refused_passes_the_meter(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path)
        call, wire = house.call(ask())
        call.refusal = Unauthorized("No.", code="invalid_api_key")
        await through(house.pipeline, call)
        assert wire.status == 401 and call.asked is None
        assert counted(house.meter) == {("chat", "", "failed", 401): 1} and house.ledger.entries() == []
        assert "x-ratelimit-limit-requests" not in wire.headers

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [(b"{", 400, None), (ask(n=0), 400, "n"), ({**ask(), "model": "nowhere"}, 404, None)],
)  # fmt: skip
def test_what_check_refuses(tmp_path: Path, body: Any, status: int, param: str | None) -> None:
    async def run() -> None:
        house = House(tmp_path)
        call, wire = await house.ask(body)
        assert wire.status == status and call.reply.error is not None and call.reply.error.param == param
        assert house.meter.in_flight == 0 and house.who.state is None  # nothing was reserved

    asyncio.run(run())


class Breaks(Mock):
    """An engine with a defect of the given kind."""

    def __init__(self, error: Exception, begun: bool = False) -> None:
        super().__init__()
        self.error, self.begun = error, begun

    async def answer(self, call: Call) -> None:
        if self.begun:
            call.reply.begin()
            call.reply.push(b"data: {}\n\n")
        raise self.error


def test_a_defect_is_a_typed_500_and_is_logged_without_the_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> tuple[Call, Wire]:
        house = House(tmp_path, Breaks(ZeroDivisionError("secret")))
        call, wire = await house.ask(ask("my prompt"))
        assert house.meter.in_flight == 0 and house.admit.budgets.all["proj_1"].reserved == 0
        return call, wire

    with caplog.at_level(logging.ERROR):
        _, wire = asyncio.run(run())
    assert wire.status == 500
    error = json.loads(b"".join(wire.pieces))["error"]
    assert error["type"] == "server_error" and "secret" not in error["message"]
    assert "req_1" in caplog.text and "my prompt" not in caplog.text


@pytest.mark.parametrize(("error", "code"), [(EngineFailed(), "engine_failed"), (ValueError(), None)])
def test_an_engine_that_breaks_within_a_stream(tmp_path: Path, error: Exception, code: str | None) -> None:
    async def run() -> Wire:
        return (await House(tmp_path, Breaks(error, begun=True)).ask(ask(stream=True)))[1]

    wire = asyncio.run(run())
    assert wire.status == 200 and wire.outcome == "failed"
    assert json.loads(wire.pieces[-1][6:])["error"]["code"] == code


def test_the_deadline(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, timeout=0.05)
        _, wire = await house.ask(ask(mock={"first_delay": 5}))
        assert (wire.status, wire.outcome) == (504, "deadline")
        assert counted(house.meter) == {("chat", "mock", "deadline", 504): 1}
        _, wire = await house.ask(ask(stream=True, mock={"delay": 5}))
        assert (wire.status, wire.outcome) == (200, "deadline")
        assert json.loads(wire.pieces[-1][6:])["error"]["code"] == "deadline_exceeded"

    asyncio.run(run())


def test_a_client_that_leaves_before_its_call_starts_costs_nothing(tmp_path: Path) -> None:
    class Untouched(Mock):
        async def answer(self, call: Call) -> None:
            raise AssertionError("nobody wants this answer")

    async def run() -> None:
        house = House(tmp_path, Untouched(), spend=10 * NANO)
        call, wire = house.call(ask())
        call.reply.close(CLIENT_LEFT)
        await through(house.pipeline, call)
        assert wire.outcome == CLIENT_LEFT and wire.status == 0
        assert house.meter.in_flight == 0 and house.admit.budgets.all["proj_1"].reserved == 0
        assert sum(counted(house.meter).values()) == 1

    asyncio.run(run())


def test_a_client_that_leaves_in_the_middle(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path)
        call, wire = house.call(ask(stream=True, mock={"delay": 0.02}))
        running = asyncio.create_task(through(house.pipeline, call))
        while len(wire.pieces) < 2:
            await asyncio.sleep(0.01)
        call.reply.close(CLIENT_LEFT)
        at = len(wire.pieces)
        await running
        await asyncio.sleep(0.06)
        assert len(wire.pieces) == at and house.meter.in_flight == 0
        assert [entry.outcome for entry in house.ledger.entries()] == [CLIENT_LEFT]

    asyncio.run(run())


def test_embeddings_reserve_no_output(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, tokens=100)
        _, wire = await house.ask({"model": "mock-embedding", "input": "one two"}, "embeddings")
        assert wire.status == 200

    asyncio.run(run())


def test_check_names_the_culprit_before_any_engine_is_asked() -> None:
    card = ModelCard(id="m", kind="chat", source="mock:")
    assert card.capabilities == ()
    with pytest.raises(BadRequest):
        chat.task(lambda call, model: None).check(Call("r", Principal("", "", ""), None, b"[]", None, 0))  # type: ignore[arg-type]


def test_what_nobody_came_back_for_is_paid_for_once(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, spend=10 * NANO)
        house.cache.reload(Settings(retry_grace=0.1))
        flights = house.cache.flights

        def account(call: Call, outcome: str) -> None:
            house.admit.unclaimed(call)
            house.meter.unclaimed(call, outcome)

        flights.account, flights.linger, flights.resume = account, house.admit.linger, house.admit.resume
        call, _ = house.call(ask(temperature=0, max_tokens=100, mock={"first_delay": 0.05}))
        await through(house.pipeline, call)
        budget = house.admit.budgets.all["proj_1"]
        held = budget.reserved
        call.reply.close(CLIENT_LEFT)
        assert (budget.spent, budget.reserved, len(flights)) == (0, held, 1) and held > 100_000_000
        await asyncio.sleep(0.2)
        assert (budget.spent, budget.reserved, len(flights)) == (6_000_000, 0, 0)
        assert [(entry.outcome, entry.cache, entry.cost) for entry in house.ledger.entries()] == [
            (CLIENT_LEFT, "joined", 0), (FINISHED, "", 6_000_000),
        ]  # fmt: skip
        again, _ = await house.ask(ask(temperature=0, max_tokens=100, mock={"first_delay": 0.05}))
        assert again.cache == "hit" and budget.spent == 6_000_000 and house.meter.in_flight == 0

    asyncio.run(run())


def test_of_many_who_share_an_answer_one_pays(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, spend=10 * NANO)
        calls = [
            house.call(ask(temperature=0, max_tokens=100, stream=True, mock={"delay": 0.01})) for _ in range(5)
        ]  # fmt: skip
        for call, _ in calls:
            await through(house.pipeline, call)
        await asyncio.sleep(0.015)
        calls[0][0].reply.close(CLIENT_LEFT)
        for _, wire in calls[1:]:
            await asyncio.wait_for(wire.done(), 5)
        budget = house.admit.budgets.all["proj_1"]
        assert (budget.spent, budget.reserved) == (6_000_000, 0)
        assert sorted(entry.cost for entry in house.ledger.entries()) == [0, 0, 0, 0, 6_000_000]
        assert {entry.completion_tokens for entry in house.ledger.entries()[1:]} == {3}

    asyncio.run(run())
