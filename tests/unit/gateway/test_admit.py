"""What is refused, what is reserved, what is settled: money and windows around a call that a test drives by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tertulia.accounts.limits import KINDS, TOKENS
from tertulia.accounts.prices import Prices
from tertulia.accounts.projects import ModelPermissions, Organization, Project, RateLimit, SpendLimit
from tertulia.api import chat, completions, embeddings
from tertulia.core import CLIENT_LEFT, FINISHED, Call, Leg, ModelCard, Plan, Principal, Reply, Target, Task, Usage
from tertulia.errors import Forbidden, QuotaExceeded, RateLimited, TertuliaError
from tertulia.gateway.admit import EVERYTHING, Admit, Rules
from tertulia.gateway.shared import Flights

from .scripted import Wire

PRICES = {"m": {"input": 1, "output": 1}, "dear": {"input": 10, "output": 10}, "alias": {"input": 1, "output": 1}}
TOKEN = 1000  # nano-dollars


class Far:
    def __init__(self, name: str = "far") -> None:
        self.name = name


def target(model: str = "m", context: int | None = None, source: str = "upstream:far") -> Target:
    return Target(Far(), model, ModelCard(id=model, kind="chat", source=source, context_length=context))


def plan(*targets: Target, name: str = "m", fallbacks: int = 0) -> Plan:
    groups = tuple((Leg(one),) for one in targets)
    return Plan(name=name, groups=groups)


class House:
    """Admit, and calls that end as the test says."""

    def __init__(self, rules: Rules | None = None, prices: dict[str, Any] | None = None, **more: Any) -> None:
        self.now = 1_795_000_000.0
        self.admit = Admit(
            rules or Rules(), Prices(PRICES if prices is None else prices), more.get("spent", {}), lambda: self.now
        )  # fmt: skip
        self.organization = Organization("org-1")
        self.project = Project("proj_1", self.organization)
        self.plans: dict[str, Plan] = {"m": plan(target())}
        self.tasks: dict[str, Task] = {
            "chat": chat.task(self._resolve), "completion": completions.task(self._resolve),
            "embedding": embeddings.task(self._resolve),
        }  # fmt: skip
        self.passed: list[Call] = []

    def _resolve(self, call: Call, model: str) -> None:
        call.plan = self.plans[model]
        call.target = call.plan.first

    def key(self, id: str = "key_1") -> Principal:
        who = Principal(id, "org-1", "proj_1")
        who.account = self.project
        return who

    def call(self, who: Principal | None = None, task: str = "chat", model: str = "m", **body: Any) -> Call:
        if task == "chat":
            body.setdefault("messages", [{"role": "user", "content": "hi"}])
        raw = json.dumps({"model": model, **body}).encode()
        call = Call("req_1", who or self.key(), self.tasks[task], raw, Reply(Wire()), 0)
        call.task.check(call)
        return call

    def run(self, call: Call) -> Awaitable[None] | None:
        def following(call: Call) -> None:
            self.passed.append(call)

        return self.admit(call, following)

    def ask(self, *args: Any, **more: Any) -> Call:
        call = self.call(*args, **more)
        assert self.run(call) is None
        return call

    def refused(self, kind: type[TertuliaError], *args: Any, **more: Any) -> Any:
        call = self.call(*args, **more)
        with pytest.raises(kind) as error:
            self.run(call)
        assert call not in self.passed
        return error.value

    def end(self, call: Call, usage: Usage | None = None, outcome: str = FINISHED) -> None:
        call.reply.usage = usage
        call.reply.close(outcome)

    @property
    def money(self) -> tuple[int, int]:
        budget = self.admit.budgets.all["proj_1"]
        whole = self.admit.budgets.all["org-1"]
        assert budget.reserved <= whole.reserved
        return budget.spent, budget.reserved

    def metric(self, name: str) -> dict[str, float]:
        lines = [line for line in self.admit.metrics() if line.startswith(name)]
        return {line.split(" ")[0].removeprefix(name): float(line.split(" ")[1]) for line in lines}

    def change(self, **limits: Any) -> None:
        for name, value in limits.items():
            setattr(self.project, name, value)
        self.project.version += 1
        self.admit.changed()


def run(test: Callable[[], Any]) -> None:
    async def inside() -> None:
        rest = test()
        if rest is not None:
            await rest

    asyncio.run(inside())


# money
def test_the_worst_case_is_reserved_and_what_was_used_is_paid() -> None:
    def test() -> None:
        house = House(Rules(spend=10**9))
        call = house.ask(max_tokens=500)
        spent, reserved = house.money
        assert spent == 0 and reserved == call.hold >= (500 + len(call.body)) * TOKEN
        house.end(call, Usage(9, 40))
        assert house.money == (49 * TOKEN, 0) and call.cost == 49 * TOKEN
        assert house.admit.budgets.all["org-1"].spent == 49 * TOKEN

    run(test)


@pytest.mark.parametrize(
    ("usage", "outcome", "paid"),
    [
        (None, CLIENT_LEFT, 0), (Usage(9, 7, estimated=True), CLIENT_LEFT, 16), (Usage(9, 7), FINISHED, 16),
        (Usage(9, 7), "failed", 16), (None, "failed", 0),
    ],
)  # fmt: skip
def test_whatever_ends_a_call_what_was_generated_is_paid_and_nothing_stays_reserved(
    usage: Usage | None, outcome: str, paid: int
) -> None:
    def test() -> None:
        house = House(Rules(spend=10**9, tokens=10**6))
        call = house.ask(max_tokens=500, stream=True)
        house.end(call, usage, outcome)
        assert house.money == (paid * TOKEN, 0)
        (allowance,) = call.principal.state.allowances.values()
        assert (allowance.tokens, allowance.in_flight, allowance.requests) == (paid, 0, 1)

    run(test)


@pytest.mark.parametrize("which", ["hit", "joined"])
def test_an_answer_that_was_made_for_another_costs_nothing(which: str) -> None:
    def test() -> None:
        house = House(Rules(spend=10**9, tokens=10**6))
        call = house.ask(max_tokens=500)
        call.cache = which
        house.end(call, Usage(9, 7))
        assert house.money == (0, 0) and call.principal.state.allowances["m"].tokens == 0

    run(test)


def test_over_the_limit_is_for_good_and_reserved_is_worth_another_try() -> None:
    def test() -> None:
        house = House(Rules(spend=1000 * TOKEN))
        first = house.ask(max_tokens=600)
        error = house.refused(RateLimited, max_tokens=600)
        assert (error.retry, error.retry_after) == (True, 1.0)
        house.end(first, Usage(0, 600))
        error = house.refused(QuotaExceeded, max_tokens=600)
        assert (error.retry, error.retry_after, error.code) == (False, None, "insufficient_quota")
        house.end(house.ask(max_tokens=200), Usage(10, 200))
        assert house.metric("tertulia_refused_total") == {'{limit="spend",project="proj_1"}': 2}

    run(test)


def test_the_organization_has_a_budget_of_its_own() -> None:
    def test() -> None:
        house = House(spent={"proj_2": 900 * TOKEN})
        house.organization.spend_limit = SpendLimit(1500 * TOKEN)
        house.refused(QuotaExceeded, max_tokens=600)
        house.end(house.ask(max_tokens=300), Usage(1, 300))
        assert house.admit.budgets.all["org-1"].spent == 1201 * TOKEN
        assert house.admit.reached(house.project, SpendLimit(301 * TOKEN))
        assert not house.admit.reached(house.organization, SpendLimit(1202 * TOKEN))

    run(test)


def test_the_dearest_of_those_who_may_answer_is_reserved_for() -> None:
    def test() -> None:
        house = House(Rules(spend=10**9))
        house.plans["m"] = plan(target("m"), target("dear"))
        call = house.ask(max_tokens=100)
        assert call.hold >= 100 * 10 * TOKEN
        call.target = house.plans["m"].groups[1][0].target
        house.end(call, Usage(1, 1))
        assert house.money == (20 * TOKEN, 0)

    run(test)


def test_a_lost_attempt_is_paid_at_once_and_another_needs_room() -> None:
    def test() -> None:
        house = House(Rules(spend=1500 * TOKEN, tokens=10**6))
        call = house.ask(max_tokens=600)
        assert house.admit.may_follow(call)
        paid = house.admit.lost(call, Usage(100, 500, estimated=True))
        assert paid == 600 * TOKEN and house.money == (paid, call.hold) and house.admit.may_follow(call)
        call.paid += paid
        call.paid += house.admit.lost(call, Usage(100, 500, estimated=True))
        assert not house.admit.may_follow(call)  # what is left does not hold a third one
        house.end(call)
        assert house.money == (1200 * TOKEN, 0) and call.cost == 1200 * TOKEN
        assert call.principal.state.allowances["m"].tokens == 1200

    run(test)


def test_a_new_month_begins_with_nothing_spent() -> None:
    def test() -> None:
        house = House(Rules(spend=1000 * TOKEN), spent={"proj_1": 1000 * TOKEN})
        house.refused(QuotaExceeded, max_tokens=100)
        house.now += 20 * 86_400
        house.end(house.ask(max_tokens=100), Usage(1, 1))
        assert house.money == (2 * TOKEN, 0)

    run(test)


# what nobody knows
def test_an_answer_of_unknown_length_is_given_a_maximum_where_money_is_limited() -> None:
    def test() -> None:
        house = House(Rules(spend=10**12))
        call = house.ask()
        assert json.loads(call.body)["max_tokens"] == call.asked.max_tokens == 4096 == call.output_tokens
        assert b"x-tertulia-max-tokens: 4096\r\n" in call.reply.headers and call.hold > 4096 * TOKEN
        assert json.loads(house.ask(max_completion_tokens=10).body).get("max_tokens") is None
        house.plans["m"] = plan(target(context=5000))  # what the model holds is known: that is the most
        call = house.ask()
        assert call.hold >= 5000 * TOKEN and "max_tokens" not in json.loads(call.body)
        house.plans["m"] = plan(target())
        house.admit.reload(Rules(), Prices(PRICES))  # without a limit nobody minds
        assert "max_tokens" not in json.loads(house.ask().body)

    run(test)


def test_a_maximum_that_is_imposed_fits_what_is_left() -> None:
    def test() -> None:
        house, used = House(Rules(spend=4000 * TOKEN)), 0
        while used < 3700:
            running = [house.ask() for _ in range(2)]
            for call in running:
                assert house.money[0] + house.money[1] <= 4000 * TOKEN
                house.end(call, Usage(10, min(40, call.asked.max_tokens)))
            used = house.money[0] // TOKEN
        while True:
            call = house.call()
            try:
                house.run(call)
            except QuotaExceeded:
                break
            house.end(call, Usage(1, 1))
        assert house.money[0] >= 0.95 * 4000 * TOKEN

    run(test)


def test_an_unknown_price_is_flagged_or_refused() -> None:
    def test() -> None:
        house = House(Rules(spend=10**9), prices={})
        house.plans["near"] = plan(target("near", source="file:/m.gguf"), name="near")
        call = house.ask(max_tokens=10)
        house.end(call, Usage(5, 5))
        assert call.unpriced and b"x-tertulia-unpriced: true\r\n" in call.reply.headers and call.cost == 0
        assert house.metric("tertulia_unpriced_total") == {'{model="m"}': 1}
        near = house.ask(model="near")
        assert not near.unpriced  # what runs here costs nothing unless somebody says so
        house.admit.reload(Rules(refuse_unpriced=True), Prices({}))
        error = house.refused(Forbidden, max_tokens=10)
        assert error.code == "model_price_unknown" and "`m`" in error.message
        house.end(house.ask(model="near"))

    run(test)


def test_n_best_of_and_many_prompts_multiply_the_answer() -> None:
    def test() -> None:
        house = House(Rules(spend=10**9))
        for more, tokens in (
            ({"max_tokens": 100, "n": 3}, 300), ({"max_completion_tokens": 50}, 50),
            ({"task": "completion", "prompt": "x", "max_tokens": 10, "best_of": 5}, 50),
            ({"task": "completion", "prompt": ["x", "y"], "max_tokens": 10, "n": 2}, 40),
            ({"task": "completion", "prompt": [1, 2, 3]}, 16), ({"task": "embedding", "input": "x"}, 0),
        ):  # fmt: skip
            call = house.ask(**more)
            assert call.output_tokens == tokens
            house.end(call)

    run(test)


def test_pictures_files_and_tools_are_more_than_their_bytes() -> None:
    def test() -> None:
        house = House(Rules(spend=10**12))
        picture = {"type": "image_url", "image_url": {"url": "http://h/x.png"}}
        text = {"type": "text", "text": "hi"}
        plain = house.ask(max_tokens=1).hold
        seen = house.ask(max_tokens=1, messages=[{"role": "user", "content": [text, picture, picture]}]).hold
        assert seen > plain + 2 * 48_169 * TOKEN  # gpt-4o-mini's most for one
        read = house.ask(max_tokens=1, messages=[{"role": "user", "content": [{"type": "file", "file": {}}]}]).hold
        assert read > 10**6 * TOKEN

    run(test)


# windows
def test_names_of_one_model_share_its_limits_unless_one_has_its_own() -> None:
    def test() -> None:
        house = House(Rules(requests=2))
        house.plans["alias"] = house.plans["m"]
        house.ask(max_tokens=1)
        house.ask(model="alias", max_tokens=1)
        house.refused(RateLimited, model="alias", max_tokens=1)
        house.change(rate_limits={"alias": RateLimit(requests_per_minute=1)})
        house.ask(model="alias", max_tokens=1)
        assert "alias in organization org-1" in house.refused(RateLimited, model="alias", max_tokens=1).message
        assert "m in organization org-1" in house.refused(RateLimited, max_tokens=1).message

    run(test)


def test_a_change_of_limits_holds_from_the_next_call_on_and_loses_nothing() -> None:
    def test() -> None:
        house = House()
        running = [house.ask(max_tokens=1) for _ in range(3)]
        house.change(rate_limits={"m": RateLimit(requests_per_minute=3)})
        house.refused(RateLimited, max_tokens=1)
        house.change(rate_limits={"m": RateLimit(requests_per_minute=10, concurrent_requests=3)})
        assert "concurrent requests" in house.refused(RateLimited, max_tokens=1).message
        house.end(running[0])
        house.ask(max_tokens=1)
        house.change(rate_limits={"m": RateLimit(requests_per_day=4)})
        assert "(RPD)" in house.refused(RateLimited, max_tokens=1).message
        house.change(rate_limits={}, spend_limit=SpendLimit(0))
        house.refused(QuotaExceeded, max_tokens=1)
        house.change(spend_limit=None)
        house.end(house.ask(max_tokens=1))

    run(test)


def test_refusals_say_where_one_stands() -> None:
    def test() -> None:
        house = House(Rules(requests=1, tokens=5000))
        house.ask(max_tokens=100)
        call = house.call(max_tokens=100)
        with pytest.raises(RateLimited) as error:
            house.run(call)
        lines = b"".join(call.reply.headers).decode()
        assert "x-ratelimit-limit-requests: 1\r\n" in lines and "x-ratelimit-remaining-requests: 0\r\n" in lines
        assert error.value.retry and 59 < (error.value.retry_after or 0) <= 60

    run(test)


def test_answers_without_a_maximum_have_room_in_a_small_window() -> None:
    """The model may say more than the minute allows in all: a few are admitted at a time, and 95 % can be used."""

    def test() -> None:
        house = House(Rules(tokens=4000))
        house.plans["m"] = plan(target(context=100_000))
        running = []
        for _ in range(4):
            running.append(house.ask())
        house.refused(RateLimited)
        for call in running:
            house.end(call, Usage(10, 90))
        used = 400
        while used < 3700:
            house.end(house.ask(), Usage(10, 90))
            used += 100
        house.end(house.ask(max_tokens=50), Usage(10, 50))

    run(test)


def test_what_is_set_aside_for_such_an_answer_can_be_set() -> None:
    def test() -> None:
        house = House(Rules(tokens=4000, reserve_output=100))
        for _ in range(15):
            assert json.loads(house.ask().body)["max_tokens"] == 100  # or it could say more

    run(test)


def test_an_answer_that_could_exceed_the_minute_is_given_a_maximum() -> None:
    """However many ask without one, and however much they are told: no minute has more than the limit."""

    def test() -> None:
        for context in (None, 100_000):
            house = House(Rules(tokens=4000), prices={})
            house.plans["m"] = plan(target(context=context))
            running = [house.ask() for _ in range(4)]
            for call in running:
                maximum = json.loads(call.body)["max_tokens"]
                assert maximum == call.asked.max_tokens == call.output_tokens <= 1000
                assert f"x-tertulia-max-tokens: {maximum}\r\n".encode() in call.reply.headers
                house.end(call, Usage(len(call.body) // 4, maximum))
            assert 3000 < running[0].principal.state.allowances["m"].tokens <= 4000
        house = House(Rules(tokens=4000), prices={})
        house.plans["m"] = plan(target("gpt-4o-mini", context=100_000))  # some of its kind know the newer name only
        assert json.loads(house.ask(n=2).body)["max_completion_tokens"] <= 500
        house.plans["m"] = plan(target(context=300))  # it cannot say more than fits
        assert "max_tokens" not in json.loads(house.ask().body)
        for rules in (Rules(), Rules(tokens=4000, observed=EVERYTHING), Rules(tokens=4000, observed=KINDS)):
            free = House(rules, prices={})
            assert "max_tokens" not in json.loads(free.ask().body)

    run(test)


# what goes on when its caller has left, or its answer has broken off
def test_what_goes_on_without_its_caller_keeps_its_place_and_its_tokens() -> None:
    def test() -> None:
        house = House(Rules(tokens=1000, concurrent=2, spend=10**9))
        flights = Flights(lambda call: call.id.encode())
        flights.grace = 60.0
        flights.linger, flights.resume = house.admit.linger, house.admit.resume
        flights.account = lambda call, outcome: house.admit.unclaimed(call)
        shared: list[Call] = []

        def following(call: Call) -> Awaitable[None] | None:
            return flights.launch(call, shared.append, None, False, None)

        for _ in range(6):
            call = house.call(max_tokens=200)
            try:
                assert house.admit(call, following) is None
            except RateLimited:
                continue
            call.reply.close(CLIENT_LEFT)
        allowance = call.principal.state.allowances["m"]
        assert len(shared) == allowance.in_flight == 2
        assert 400 < allowance.tokens == allowance.reserved <= 1000
        assert house.money == (0, sum(one.hold for one in shared))
        back = house.call(max_tokens=200)
        flight = flights.find(flights.retry_key(shared[0]))
        assert flight is not None
        flight.join(back)  # somebody has come back for the last one: that is paid by him
        assert allowance.in_flight == 1
        for one in shared:
            one.reply.usage = Usage(10, 20)
            one.reply.close()
        assert (allowance.in_flight, allowance.reserved, allowance.tokens) == (0, 0, 30)
        assert house.money == (30 * TOKEN, 0)

    run(test)


def test_what_goes_on_where_it_broke_off_needs_room_for_its_longer_prompt() -> None:
    def test() -> None:
        house = House(Rules(tokens=2000, spend=1500 * TOKEN), prices={"m": {"input": 1, "output": 2}})
        call = house.ask(max_tokens=300, stream=True)
        allowance = call.principal.state.allowances["m"]
        money, tokens, base = house.money, allowance.tokens, (call.prompt_tokens, call.output_tokens, call.hold)
        call.asked.max_tokens = 250  # 50 have come
        assert house.admit.may_continue(call, 200)
        assert house.money[1] == call.hold == money[1] + (216 - 2 * 50) * TOKEN
        assert allowance.tokens == allowance.reserved == tokens + 216 - 50 and call.output_tokens == 250
        call.reply.undo(call.reply._closers[-2])  # that attempt has broken off, too
        assert (house.money, allowance.tokens) == (money, tokens)
        assert (call.prompt_tokens, call.output_tokens, call.hold) == base
        assert not house.admit.may_continue(call, 1000)  # of money, that is
        house.admit.reload(Rules(tokens=1000, spend=10**9), Prices({"m": {"input": 1, "output": 2}}))
        house.ask(max_tokens=200)
        assert not house.admit.may_continue(call, 600)
        assert house.admit.may_continue(call, 100)
        house.end(call, Usage(100, 200))
        assert house.money[0] == 500 * TOKEN and allowance.in_flight == 1

    run(test)


# counting
def test_near_a_limit_token_ids_and_known_tokenizers_are_counted_exactly() -> None:
    async def test() -> None:
        house = House(Rules(tokens=130), prices={"gpt-4o": {"input": 1}})
        house.plans["gpt-4o"] = plan(target("gpt-4o"), name="gpt-4o")
        house.ask(task="embedding", input=list(range(60)))  # 240 bytes and more
        call = house.call(model="gpt-4o", max_tokens=20, messages=[{"role": "user", "content": "hello " * 20}])
        rest = house.run(call)
        assert rest is not None and not house.passed[1:]  # the table must be read: somebody waits
        await rest
        assert house.passed[-1] is call
        assert call.prompt_tokens == 21 + 7  # 21 tokens of text, 3 for the message, 1 for the role, 3 to begin
        again = house.call(model="gpt-4o", max_tokens=20, messages=[{"role": "user", "content": "hello " * 4}])
        assert house.run(again) is None  # now it is there
        with pytest.raises(RateLimited) as error:
            third = house.call(model="gpt-4o", max_tokens=20, messages=[{"role": "user", "content": "hello " * 60}])
            rest = house.run(third)
            assert rest is not None
            await rest
        assert "Used " in error.value.message
        house.admit.close()

    run(test)


@pytest.mark.parametrize(("said", "admitted"), [(12, True), (60, False), (None, False)])
def test_near_a_limit_models_of_this_machine_are_counted_by_their_engine(said: int | None, admitted: bool) -> None:
    class Near(Far):
        async def count(self, call: Call, target: Target) -> int | None:
            return said

    async def test() -> None:
        house = House(Rules(tokens=80))
        house.plans["m"] = plan(Target(Near("local"), "m", ModelCard(id="m", kind="chat", source="file:/m.gguf")))
        call = house.call(max_tokens=30, messages=[{"role": "user", "content": "hello " * 10}])
        rest = house.run(call)
        assert rest is not None
        if admitted:
            await rest
            assert call.prompt_tokens == said and call.principal.state.allowances["m"].tokens == 42
        else:
            with pytest.raises(RateLimited):
                await rest
        house.admit.close()

    run(test)


def test_who_leaves_while_it_is_counted_is_not_admitted() -> None:
    async def test() -> None:
        house = House(Rules(tokens=100))
        house.plans["m"] = plan(target("gpt-4o"))
        call = house.call(max_tokens=20, messages=[{"role": "user", "content": "hello " * 10}])
        rest = house.run(call)
        assert rest is not None
        call.reply.close(CLIENT_LEFT)
        await rest
        assert house.passed == [] and call.principal.state.allowances["m"].requests == 0
        house.admit.close()

    run(test)


# who may
@pytest.mark.parametrize(
    ("models", "permitted"),
    [
        (ModelPermissions(True, frozenset({"m"})), True), (ModelPermissions(True, frozenset({"other"})), False),
        (ModelPermissions(False, frozenset({"m"})), False), (ModelPermissions(False, frozenset({"other"})), True),
        (ModelPermissions(False, frozenset()), True), (ModelPermissions(True, frozenset()), False), (None, True),
    ],
)  # fmt: skip
def test_model_permissions(models: ModelPermissions | None, permitted: bool) -> None:
    def test() -> None:
        house = House()
        house.plans["alias"] = house.plans["m"]
        house.ask(max_tokens=1)
        house.change(models=models)
        for name in ("m", "alias"):  # by whatever name it is asked for
            if permitted:
                house.ask(model=name, max_tokens=1)
                continue
            error = house.refused(Forbidden, model=name, max_tokens=1)
            assert error.message == f"Project `proj_1` does not have access to model `{name}`"
            assert (error.status, error.type, error.code, error.param) == (
                403, "invalid_request_error", "model_not_found", None,
            )  # fmt: skip

    run(test)


# shadow mode
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(
    ("limit", "kind"),
    [
        (RateLimit(requests_per_minute=1), "requests"), (RateLimit(tokens_per_minute=200), "tokens"),
        (RateLimit(requests_per_day=1), "requests_per_day"), (RateLimit(concurrent_requests=1), "concurrent_requests"),
        (SpendLimit(200 * TOKEN), "spend"),
    ],
)  # fmt: skip
def test_what_only_observes_refuses_nothing_and_says_what_it_would_have(
    limit: Any, kind: str, everywhere: bool
) -> None:
    def test() -> None:
        house = House(Rules(observed=EVERYTHING if everywhere else frozenset()))
        mine = {"observe_only": True} if kind == "spend" else {"observed": KINDS}
        limit_here = limit if everywhere else limit._replace(**mine)
        house.change(**({"spend_limit": limit_here} if kind == "spend" else {"rate_limits": {"m": limit_here}}))
        first = house.ask(max_tokens=10)
        seen = [house.ask(max_tokens=10) for _ in range(3)]
        assert first.observed == "" and [call.observed for call in seen] == [kind] * 3
        assert b"x-tertulia-observed: %s\r\n" % kind.encode() in seen[0].reply.headers
        assert house.metric("tertulia_would_refuse_total") == {f'{{limit="{kind}",project="proj_1"}}': 3}
        assert house.metric("tertulia_refused_total") == {}
        for call in (first, *seen):
            house.end(call, Usage(5, 5))
        assert house.money[1] == 0
        allowance = first.principal.state.allowances["m"]
        assert allowance.in_flight == 0
        if kind != "spend":  # what would have been refused does not count: the report is what enforcing would bring
            assert allowance.requests == 1

    run(test)


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(
    ("limit", "kind"),
    [
        (RateLimit(requests_per_minute=1), "requests"), (RateLimit(tokens_per_minute=200), "tokens"),
        (RateLimit(requests_per_day=1), "requests_per_day"), (RateLimit(concurrent_requests=1), "concurrent_requests"),
    ],
)  # fmt: skip
def test_any_limit_may_be_the_one_that_observes(limit: RateLimit, kind: str, everywhere: bool) -> None:
    def test() -> None:
        seen = frozenset({kind})
        house = House(Rules(observed=seen if everywhere else frozenset()))
        house.change(rate_limits={"m": limit if everywhere else limit._replace(observed=seen)})
        first = house.ask(max_tokens=10)
        passed = [house.ask(max_tokens=10) for _ in range(3)]
        assert first.observed == "" and [call.observed for call in passed] == [kind] * 3
        house.change(rate_limits={"m": limit._replace(observed=KINDS - seen)})
        if not everywhere:
            house.refused(RateLimited, max_tokens=10)  # the others may observe, this one is enforced
        for call in (first, *passed):
            house.end(call, Usage(5, 5))
        allowance = first.principal.state.allowances["m"]
        assert (allowance.in_flight, allowance.passed_in_flight) == (0, 0)
        assert (allowance.requests, allowance.tokens, allowance.passed, allowance.passed_tokens) == (4, 40, 3, 30)

    run(test)


def test_what_one_limit_lets_pass_another_counts() -> None:
    """Tokens only observe, requests are enforced: calls that have too many tokens use up the requests all the same."""

    def test() -> None:
        house = House(Rules(requests=5))
        house.change(rate_limits={"m": RateLimit(tokens_per_minute=200, observed=frozenset({TOKENS}))})
        calls = [house.ask(max_tokens=10) for _ in range(5)]
        assert [call.observed for call in calls] == ["", *["tokens"] * 4]
        error = house.refused(RateLimited, max_tokens=10)
        assert "requests per min (RPM): Limit 5, Used 5" in error.message
        assert house.metric("tertulia_would_refuse_total") == {'{limit="tokens",project="proj_1"}': 4}

    run(test)


def test_what_passed_does_not_use_up_the_limit_that_let_it_pass() -> None:
    """The figures are those that enforcing would bring, whatever the calls come to in the end."""

    def test() -> None:
        house = House()
        house.change(rate_limits={"m": RateLimit(tokens_per_minute=200, observed=frozenset({TOKENS}))})
        first = house.ask(max_tokens=10)
        for used in (1, 90, 5000):
            passed = house.ask(max_tokens=80)
            assert passed.observed == "tokens"
            house.end(passed, Usage(used, 0))
        house.end(first, Usage(20, 10))
        assert house.ask(max_tokens=10).observed == ""  # 170 of 200 are free, as if the three had been refused
        assert house.ask(max_tokens=10).observed == "tokens"

    run(test)


# several gateways
def test_what_other_gateways_spend_counts_as_if_it_were_spent_here() -> None:
    def test() -> None:
        house = House(Rules(spend=1000 * TOKEN), spent={"proj_1": 100 * TOKEN, "proj_2": 5 * TOKEN})
        house.admit.adopt([house.project])
        month, told = 1_793_491_200, []  # 2026-11-01
        house.admit.budgets.crossed = told.append
        whole = house.admit.budgets.all["org-1"]
        whole.alert_at = 700 * TOKEN
        house.end(house.ask(max_tokens=10), Usage(5, 5))
        house.admit.hear(month, {"proj_1": 300 * TOKEN})
        house.admit.hear(month, {"proj_1": 300 * TOKEN, "proj_9": 50 * TOKEN})  # what was told before is in it
        assert house.money == (410 * TOKEN, 0) and whole.spent == 465 * TOKEN
        house.admit.hear(month, {"proj_1": 880 * TOKEN, "proj_9": 50 * TOKEN})
        assert told == [whole]
        house.refused(QuotaExceeded, max_tokens=10)
        new = Project("proj_9", house.organization)  # made by another gateway
        house.admit.adopt([new])
        assert house.admit.budgets.all["proj_9"].spent == 50 * TOKEN and whole.spent == 1045 * TOKEN
        house.now += 20 * 86_400
        house.admit.hear(month, {"proj_1": 990 * TOKEN})  # of the month before: too late
        assert house.money == (0, 0) and whole.spent == 0
        house.admit.hear(1_796_083_200, {"proj_1": 30 * TOKEN})
        assert house.money == (30 * TOKEN, 0) and whole.spent == 30 * TOKEN
        house.ask(max_tokens=10)

    run(test)


# over a restart
def test_windows_outlive_a_restart() -> None:
    def test() -> None:
        house = House(Rules(requests=5))
        house.admit.adopt([house.project])
        house.admit.recall(house.project, "m", 50.0, 3, 30)
        house.admit.recall(house.project, "m", 10.0, 1, 10)
        house.ask(max_tokens=1)
        error = house.refused(RateLimited, max_tokens=1)
        assert 9 < error.retry_after <= 10

    run(test)
