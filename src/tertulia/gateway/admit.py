"""Limits before anything is spent: requests and tokens of a project and model, money of a project and organization.
Reserves the worst case on the way down and settles with the true figures on the way up.

    the way most calls go    no limit is near even for the most that the request can come to: a few additions
    near a limit             its tokens are counted exactly, if that can be done and matters; then every limit is looked
                             at: the call is refused, or passes marked where the limit only observes

Limits are kept for each model that answers, not for each name it goes by, or whoever is refused would ask for another
name; a name for which the project has a limit of its own is counted by itself. What is reserved is the most the call
can cost with the dearest of those who may answer, the prompt counted generously and the answer as long as it may be.
An attempt that failed and cost something is paid at once, and no other follows if that would not fit any more.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from ..accounts.budgets import SPEND, UNLIMITED, Budget, Budgets, month_of
from ..accounts.limits import KINDS, NO_LIMIT, NONE, TOKENS, Allowance, Slot
from ..accounts.prices import FASTER, FREE, PICO, Price, Prices, dearest
from ..accounts.projects import Organization, Project, RateLimit, SpendLimit
from ..core import BYTES_PER_TOKEN, Call, Next, Principal, Target, Usage
from ..errors import Forbidden, TertuliaError
from ..turns import CLOCK
from .metrics import COUNTER, GAUGE, family
from .tokens import TEMPLATE_TOKENS, Counter, bound, finer, table_of, targets_of

DEFAULT_OUTPUT: Final = 4096  # tokens reserved for an answer whose longest nobody knows, where that costs nothing
UNKNOWN_OUTPUT: Final = 131_072  # what a minute's tokens must have room for, or such an answer is given a maximum
LEGACY_OUTPUT: Final = 16  # what a completion has if its caller gives no maximum
NANO: Final = 10**9
EVERYTHING: Final = KINDS | {SPEND}
WAYS: Final = 1024  # names of one project that are remembered; callers choose them
LOOK_SECONDS: Final = 1.0  # how often it is asked whether the month is over
TURN_TOKENS: Final = 16  # what a template says around one more message


class Rules(NamedTuple):
    """What the settings say: the limits of projects that have none of their own, by minute unless named otherwise;
    spend in nano-dollars a month."""

    requests: int = NO_LIMIT
    tokens: int = NO_LIMIT
    daily: int = NO_LIMIT
    concurrent: int = NO_LIMIT
    spend: int | None = None
    observed: frozenset[str] = NONE  # the limits that refuse nothing, in no project
    refuse_unpriced: bool = False
    reserve_output: int | None = None  # tokens a minute reserves for an answer whose caller gives no maximum


class Account:
    """One project as admit sees it."""

    __slots__ = ("allowances", "budget", "project", "seen", "ways", "whole")

    def __init__(self, project: Project, budget: Budget, whole: Budget) -> None:
        self.project: Any = project
        self.budget, self.whole = budget, whole
        self.seen = -1  # the state of affairs that its limits were taken from
        self.ways: dict[str, Way] = {}  # by the name that is asked for
        self.allowances: dict[str, Allowance] = {}  # by the model that is counted


class Way:
    """What a name that a project asks for comes to, worked out once. longest and context are in tokens, 0 if one of
    those who may answer is not known well enough; price is the dearest of theirs, first that of target, None if nobody
    has said."""

    __slots__ = ("allowance", "context", "first", "longest", "price", "priced", "refusal", "target", "unpriced")

    def __init__(self, allowance: Allowance, target: Target, price: Price, first: Price | None) -> None:
        self.allowance, self.target, self.price, self.first = allowance, target, price, first
        self.priced = bool(price.input or price.output or price.written)
        self.unpriced = False
        self.longest = self.context = 0
        self.refusal: Callable[[], TertuliaError] | None = None


class Held:
    """What a call has reserved that goes on though its caller left."""

    __slots__ = ("account", "cost", "slot", "tokens")

    def __init__(self, account: Account, slot: Slot | None, tokens: int, cost: int) -> None:
        self.account, self.slot, self.tokens, self.cost = account, slot, tokens, cost


class Settlement:
    """What is to be settled when a call ends. A bound method is called at less than half the price of a function with
    what it encloses, where both are compiled."""

    __slots__ = ("_account", "_admit", "_call", "_cost", "_slot", "_tokens", "_way")

    def __init__(
        self, admit: Admit, call: Call, account: Account, way: Way, slot: Slot | None, tokens: int, cost: int
    ) -> None:
        self._admit, self._call, self._account, self._way = admit, call, account, way
        self._slot, self._tokens, self._cost = slot, tokens, cost

    def close(self, outcome: str) -> None:
        self._admit.settle(self._call, self._account, self._way, self._slot, self._tokens, self._cost)


class Admit:
    """The stage. What is counted is kept for the life of the server."""

    def __init__(
        self, rules: Rules, prices: Prices, spent: Mapping[str, int], wall: Callable[[], float] = time.time
    ) -> None:
        """spent: nano-dollars this month, by project. wall: unix seconds. Needs the running loop."""
        self._rules, self._prices, self._spent = rules, prices, dict(spent)
        self.budgets = Budgets(wall)
        self._month = self.budgets.month  # which spent and heard are of
        self._heard: dict[str, int] = {}  # what others have spent, of what is in the budgets
        self.counter = Counter()
        self._accounts: dict[str, Account] = {}
        self._look_at = CLOCK.monotonic() + LOOK_SECONDS
        self._seen = 0
        self._lingering: dict[Call, Held] = {}  # calls that go on though nobody waits for them
        self._going: Call | None = None  # the one of them whose caller is just being settled
        self._refused: dict[tuple[str, str], int] = {}  # by limit and project
        self._observed: dict[tuple[str, str], int] = {}
        self._unpriced: dict[str, int] = {}  # by model

    def reload(self, rules: Rules, prices: Prices) -> None:
        """Other rules and prices from the next call on; what was counted and spent stays so."""
        self._rules, self._prices = rules, prices
        self.changed()

    def changed(self) -> None:
        """Limits, permissions or projects have changed: they are looked at before the next call."""
        self._seen += 1

    def close(self) -> None:
        """No thread is left."""
        self.counter.close()

    def __call__(self, call: Call, following: Next) -> Awaitable[None] | None:
        now = CLOCK.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self.budgets.roll()
        found: Account | None = call.principal.state
        account = self._enter(call.principal) if found is None else found
        if account.seen != self._seen:
            self._refresh(account)
        way = account.ways.get(call.model)
        if way is None or way.target is not call.target:
            way = self._way(account, call)
        if way.refusal is not None:
            raise way.refusal()
        body: bytes = call.body
        prompt = size = len(body)
        asked: Any = call.shape
        given: int | None = None
        if call.task.name == "chat":
            prompt += TEMPLATE_TOKENS
            if asked.tools or asked.functions or _has_parts(asked.messages) or prompt > way.context > 0:
                prompt = bound(call, way.context)
            if asked.n is None and asked.prediction is None:
                given = asked.max_completion_tokens  # nobody may give both
                if given is None:
                    given = asked.max_tokens
        if given is None:
            output, reserved = self._output(call, way, prompt)
        else:
            output = reserved = way.longest if way.longest and given > way.longest else given
        cost = 0
        if way.priced:
            cost = self._most(call, way, prompt, output)
            own, whole = account.budget, account.whole
            if own.spent + own.reserved + cost > own.limit or whole.spent + whole.reserved + cost > whole.limit:
                return self._near(call, following, account, way, prompt, output, reserved)
            call.hold = cost
        tokens = prompt + reserved
        slot = way.allowance.take(tokens, now)
        if slot is None:
            return self._near(call, following, account, way, prompt, output, reserved)
        call.prompt_tokens, call.output_tokens = size // BYTES_PER_TOKEN, output
        call.reply.headers.append(way.allowance.taken())
        return self._go(call, following, account, way, slot, tokens, cost)

    def _go(
        self, call: Call, following: Next, account: Account, way: Way, slot: Slot | None, tokens: int, cost: int
    ) -> Awaitable[None] | None:
        """It is admitted. slot: where it is counted, None if it is not."""
        if cost:
            account.budget.reserved += cost
            account.whole.reserved += cost
        if way.unpriced:
            self._flag(call, way)
        call.held = slot
        call.reply.on_close(Settlement(self, call, account, way, slot, tokens, cost).close)
        return following(call)

    def settle(self, call: Call, account: Account, way: Way, slot: Slot | None, tokens: int, cost: int) -> None:
        """The call is over: what it used and cost counts, the rest of what it had reserved is free again."""
        if cost:
            account.budget.reserved -= cost
            account.whole.reserved -= cost
        call.held = None
        used = 0
        # of a hit, and of an answer that somebody else pays for, nothing was made for this call
        if call.cache != "hit" and call.cache != "joined":
            call.cost = call.paid  # of attempts that others followed, and that are paid
            reply = call.reply
            usage = reply.usage if reply.own is None else reply.own
            if usage is not None:
                if usage.estimated:
                    usage = self._mend(call, usage)
                used = usage.prompt_tokens + usage.completion_tokens
                if way.first is not FREE or call.target is not way.target:
                    call.cost += self._charge(call, account, usage)
        elif self._going is not None:
            self._keep(account, slot, tokens, cost)
        if slot is not None:
            slot.allowance.settle(slot, tokens, used)

    # the worst case
    def _output(self, call: Call, way: Way, prompt: int) -> tuple[int, int]:
        """(tokens of the answer at most, those that the minute reserves)."""
        asked: Any = call.shape
        task: str = call.task.name
        if task == "embedding":
            return 0, 0
        longest = way.longest
        given: int | None = asked.max_tokens
        if task == "chat":
            if given is None:
                given = asked.max_completion_tokens
            times = 1 if asked.n is None else int(asked.n)
        else:
            given = LEGACY_OUTPUT if given is None else given
            times = _choices(asked)
        if given is None and not longest and way.priced:
            given = self._impose(call, way, prompt, times)
        if given is not None:
            output = reserved = (longest if longest and given > longest else given) * times
        else:
            output, most = (longest or DEFAULT_OUTPUT) * times, (longest or UNKNOWN_OUTPUT) * times
            reserved = self._unsaid(way, prompt, most)
            if reserved < most and self._limits_tokens(way):  # or it could say more than is left
                maximum = max(1, reserved // times)
                self._cap(call, maximum)
                output = reserved = maximum * times
        if task == "chat" and asked.prediction is not None:  # what it predicts and is not said is paid as an answer
            output += prompt
            reserved += prompt
        return output, reserved

    def _unsaid(self, way: Way, prompt: int, output: int) -> int:
        """What the minute reserves for an answer whose caller gives no maximum. As much as there can be, or nobody but
        one would be admitted where the model's longest is more than the minute allows: a quarter of that at most, and
        what is left of it, if it is worth mentioning."""
        wanted, limit = self._rules.reserve_output, way.allowance.tokens_limit
        left = way.allowance.tokens_left() - prompt
        reserved = min(output, output if wanted is None else wanted, max(1, limit // 4))
        return reserved if reserved <= left else min(reserved, max(left, limit // 20, 1))

    def _limits_tokens(self, way: Way) -> bool:
        """Whether a limit of tokens is in force."""
        allowance = way.allowance
        return allowance.tokens_limit < NO_LIMIT and TOKENS not in allowance.observed

    def _cap(self, call: Call, maximum: int) -> None:
        """Gives an answer a maximum: it is sent along, and the caller is told. In the words that OpenAI's models
        want, some of which do not know the older ones, if one of them may answer."""
        openai = any(table_of(one.model) is not None for one in targets_of(call, call.plan))
        name = "max_completion_tokens" if openai else "max_tokens"
        call.body = call.body.rstrip()[:-1] + b',"%b":%d}' % (name.encode(), maximum)
        setattr(call.asked, name, maximum)
        call.reply.header("x-tertulia-max-tokens", str(maximum))

    def _impose(self, call: Call, way: Way, prompt: int, times: int) -> int | None:
        """A maximum for an answer that has none, of a model whose longest nobody knows: without one, nobody could say
        that it stays within a spend limit. It is sent along, and the caller is told. None if no such limit is in
        force."""
        account = self._enter(call.principal)
        limits = [
            budget.limit - budget.spent - budget.reserved for budget in (account.budget, account.whole)
            if budget.limit < UNLIMITED and not budget.observe_only
        ]  # fmt: skip
        if not limits or not way.price.output:
            return None
        left = (min(limits) - self._most(call, way, prompt, 0)) * PICO // way.price.output
        maximum = max(LEGACY_OUTPUT, min(DEFAULT_OUTPUT, left // 4 // times))  # others want to be answered, too
        self._cap(call, maximum)
        return maximum

    def _most(self, call: Call, way: Way, prompt: int, output: int) -> int:
        cost = way.price.most(prompt, output)
        if way.price.listed and _tier(call) in FASTER:
            cost *= 2
        return cost

    # near a limit
    def _near(
        self, call: Call, following: Next, account: Account, way: Way, prompt: int, output: int, reserved: int
    ) -> Awaitable[None] | None:
        """A limit would be exceeded, or may be: counts if that can change anything, and looks closely."""
        self.budgets.roll()
        now = CLOCK.monotonic()
        if not self._fits(account, way, prompt + reserved, self._most(call, way, prompt, output), now) and self._fits(
            account, way, 1 + reserved, self._most(call, way, 1, output), now
        ):
            exact = self.counter.now(call, call.plan)
            if exact is None and self.counter.can(call, call.plan):
                return self._count(call, following, account, way, prompt, output, reserved)
            if exact is not None:
                return self._look(call, following, account, way, min(exact, prompt), output, reserved, True)
            prompt = min(prompt, finer(call))
        return self._look(call, following, account, way, prompt, output, reserved, False)

    async def _count(
        self, call: Call, following: Next, account: Account, way: Way, prompt: int, output: int, reserved: int
    ) -> None:
        exact = await self.counter.later(call, call.plan)
        if call.reply.closed:
            return
        counted = exact is not None
        least = min(prompt, finer(call) if exact is None else exact)
        rest = self._look(call, following, account, way, least, output, reserved, counted)
        if rest is not None:
            await rest

    def _fits(self, account: Account, way: Way, tokens: int, cost: int, now: float) -> bool:
        own, whole = account.budget, account.whole
        return (
            way.allowance.fits(tokens, now) and own.spent + own.reserved + cost <= own.limit
            and whole.spent + whole.reserved + cost <= whole.limit
        )  # fmt: skip

    def _look(
        self, call: Call, following: Next, account: Account, way: Way, prompt: int, output: int, reserved: int,
        counted: bool,
    ) -> Awaitable[None] | None:  # fmt: skip
        """Every limit, closely. Raises what the first of them says that does not only observe."""
        now, allowance = CLOCK.monotonic(), way.allowance
        cost = self._most(call, way, prompt, output) if way.priced else 0
        seen: list[str] = []
        if cost:
            for budget in (account.budget, account.whole):
                error = budget.refusal(cost)
                if error is None:
                    continue
                if not budget.observe_only:
                    raise self._refuse(call, SPEND, error, allowance, now)
                if SPEND not in seen:
                    seen.append(SPEND)
        slot: Slot | None = None
        refusal = allowance.refusal(prompt + reserved, now, call.principal.key_id)
        if refusal is not None:
            if not refusal.observed:
                raise self._refuse(call, refusal.kind, refusal.error, allowance, now)
            seen.append(refusal.kind)
        if refusal is None or not allowance.observe_only:  # what all of them would refuse counts nowhere
            slot = allowance.force(prompt + reserved, now, call.principal.key_id)
            if refusal is not None:
                self._pass_by(call, slot, prompt + reserved)
        if seen:
            self._mark(call, seen)
        call.prompt_tokens = prompt if counted else len(call.body) // BYTES_PER_TOKEN
        call.output_tokens, call.hold = output, cost
        call.reply.headers.append(allowance.headers(now))
        return self._go(call, following, account, way, slot, prompt + reserved, cost)

    def _pass_by(self, call: Call, slot: Slot, tokens: int) -> None:
        """A limit that only observes would have refused it: it counts in those that are enforced alone."""
        slot.allowance.pass_by(slot, tokens)

        def settle(outcome: str) -> None:  # after the call itself has been settled
            usage = call.reply.usage if call.reply.own is None else call.reply.own
            used = 0
            if usage is not None and call.cache != "hit" and call.cache != "joined":
                used = usage.prompt_tokens + usage.completion_tokens
            slot.allowance.settle_passed(slot, tokens, used)

        call.reply.on_close(settle)

    def _refuse(self, call: Call, kind: str, error: TertuliaError, allowance: Allowance, now: float) -> TertuliaError:
        key = (kind, call.principal.project)
        self._refused[key] = self._refused.get(key, 0) + 1
        call.reply.headers.append(allowance.headers(now))
        return error

    def _mark(self, call: Call, seen: list[str]) -> None:
        for kind in seen:
            key = (kind, call.principal.project)
            self._observed[key] = self._observed.get(key, 0) + 1
        call.observed = ",".join(seen)
        call.reply.header("x-tertulia-observed", call.observed)

    def _flag(self, call: Call, way: Way) -> None:
        """Nobody has said what it costs: that shows everywhere."""
        call.unpriced = True
        call.reply.headers.append(b"x-tertulia-unpriced: true\r\n")
        model: str = way.target.model
        self._unpriced[model] = self._unpriced.get(model, 0) + 1

    # settlement
    def _charge(self, call: Call, account: Account, usage: Usage) -> int:
        """Pays for what was used; nano-dollars."""
        target: Any = call.target
        cost = self._prices.of(target, usage, _tier(call))
        if cost:
            self.budgets.roll()
            account.budget.pay(cost)
            account.whole.pay(cost)
        return cost

    def _mend(self, call: Call, usage: Usage) -> Usage:
        """An estimate, made better where the prompt was not counted: text of other alphabets than ours has more tokens
        for its bytes."""
        guessed = len(call.body) // BYTES_PER_TOKEN
        if usage.prompt_tokens != guessed or call.body.isascii():
            return usage
        better = msgspec.structs.replace(usage, prompt_tokens=2 * guessed)
        reply = call.reply
        if reply.own is usage:
            reply.own = better
        if reply.usage is usage:
            reply.usage = better
        return better

    def lost(self, call: Call, usage: Usage) -> int:
        """An attempt has failed that used something, and another may follow: it is paid now. Its cost, in nano-dollars;
        what is reserved stays for the next one."""
        if usage.estimated:
            usage = self._mend(call, usage)
        slot: Slot | None = call.held
        if slot is not None:
            slot.allowance.correct(slot, usage.prompt_tokens + usage.completion_tokens)
        return self._charge(call, self._enter(call.principal), usage)

    def may_follow(self, call: Call) -> bool:
        """Whether another attempt still fits into what the limits leave, after what the lost ones have used."""
        slot: Slot | None = call.held
        if slot is not None:
            allowance = slot.allowance
            if TOKENS not in allowance.observed and allowance.tokens > allowance.tokens_limit:
                return False
        if not call.hold:
            return True
        account = self._enter(call.principal)
        return all(
            budget.observe_only or budget.spent + budget.reserved <= budget.limit
            for budget in (account.budget, account.whole)
        )

    def may_continue(self, call: Call, more: int) -> bool:
        """Whether a call that is about to go on where its answer broke off still fits: its prompt is longer by the
        text so far, of so many bytes, and its answer shorter by its tokens. If so, what that may come to beyond what
        the call has reserved is reserved too, until the attempt is over."""
        account, asked = self._enter(call.principal), call.shape
        way = account.ways.get(call.model)
        if way is None or way.target is not call.plan.first:  # type: ignore[union-attr]  # it has come this far
            way = self._way(account, call)
        base = call.prompt_tokens, call.output_tokens, call.hold
        more += TURN_TOKENS
        given: int | None = asked.max_tokens
        if call.task.name == "chat":
            given = asked.max_completion_tokens if given is None else given
            given = None if asked.prediction is not None else given  # what it predicts is in our figure
        output = base[1] if given is None or given > base[1] else given
        tokens = max(0, more + output - base[1])
        cost = 0
        if base[2]:
            before = self._most(call, way, call.prompt_tokens, base[1])
            cost = max(0, self._most(call, way, call.prompt_tokens + more, output) - before)
        slot: Slot | None = call.held
        if not self._has_room(account, slot, tokens, cost):
            return False
        self._add(account, slot, tokens, cost)
        call.prompt_tokens, call.output_tokens, call.hold = base[0] + more // BYTES_PER_TOKEN, output, base[2] + cost

        def settle(outcome: str) -> None:
            self._add(account, slot, -tokens, -cost)
            call.prompt_tokens, call.output_tokens, call.hold = base

        call.reply.on_close(settle)
        return True

    def _has_room(self, account: Account, slot: Slot | None, tokens: int, cost: int) -> bool:
        """Whether a call that has been admitted may have so much more."""
        if slot is not None and slot.live:
            allowance = slot.allowance
            if TOKENS not in allowance.observed and allowance.tokens + tokens > allowance.tokens_limit:
                return False
        return not cost or all(
            budget.observe_only or budget.spent + budget.reserved + cost <= budget.limit
            for budget in (account.budget, account.whole)
        )

    def _add(self, account: Account, slot: Slot | None, tokens: int, cost: int) -> None:
        """So much more is reserved; less if negative."""
        account.budget.reserved += cost
        account.whole.reserved += cost
        if slot is not None:
            slot.allowance.reserved += tokens
            slot.allowance.correct(slot, tokens)

    def linger(self, call: Call) -> None:
        """Nobody waits for the answer any more, and it goes on all the same: whatever its caller, who is settled
        next, had reserved stays so."""
        self._going = call

    def _keep(self, account: Account, slot: Slot | None, tokens: int, cost: int) -> None:
        """The caller of what goes on is being settled: what it gives back is held by the call that goes on."""
        call, self._going = self._going, None
        if call is None:
            return
        self._lingering[call] = Held(account, slot, tokens, cost)
        self._add(account, slot, tokens, cost)
        if slot is not None:
            slot.allowance.in_flight += 1
            call.held = slot  # there, what it uses counts

    def resume(self, call: Call) -> None:
        """Somebody has come back for it, or it is over."""
        if self._going is call:
            self._going = None
        held = self._lingering.pop(call, None)
        if held is not None:
            self._add(held.account, held.slot, -held.tokens, -held.cost)
            if held.slot is not None:
                held.slot.allowance.in_flight -= 1

    def unclaimed(self, call: Call) -> None:
        """A shared call has ended that nobody waits for any more: its project pays what was used."""
        self.resume(call)
        usage = call.reply.usage if call.reply.own is None else call.reply.own
        call.cost = call.paid
        if usage is not None and call.target is not None:
            call.cost += self.lost(call, usage)

    # projects
    def _enter(self, who: Principal) -> Account:
        """The account of a key's project."""
        known: Account | None = who.state
        if known is not None:
            return known
        project: Project | None = who.account
        id = who.project if project is None else project.id
        account = self._accounts.get(id)
        if account is None:
            if project is None:  # nobody keeps one: the settings hold for it
                project = Project(id, Organization(who.organization))
            self._begin()
            budget = self.budgets.of(id, self._spent.get(id, 0))
            whole = self.budgets.of(project.organization.id, sum(self._spent.values()))
            account = self._accounts[id] = Account(project, budget, whole)
        who.state = account
        return account

    def _refresh(self, account: Account) -> None:
        """What its records and the settings say now; what is counted stays."""
        project = account.project
        account.seen = self._seen
        everywhere = SPEND in self._rules.observed
        _limit_budget(account.budget, project.spend_limit, self._rules.spend, everywhere)
        _limit_budget(account.whole, project.organization.spend_limit, None, everywhere)
        account.ways.clear()
        for name, allowance in account.allowances.items():
            self._limit(allowance, project.rate_limits.get(name))

    def _limit(self, allowance: Allowance, record: RateLimit | None) -> None:
        rules = self._rules
        if record is None:
            allowance.limit(rules.requests, rules.tokens, rules.daily, rules.concurrent, rules.observed)
            return
        allowance.limit(
            rules.requests if record.requests_per_minute is None else record.requests_per_minute,
            rules.tokens if record.tokens_per_minute is None else record.tokens_per_minute,
            rules.daily if record.requests_per_day is None else record.requests_per_day,
            rules.concurrent if record.concurrent_requests is None else record.concurrent_requests,
            rules.observed | record.observed,
        )

    def _allowance(self, account: Account, name: str) -> Allowance:
        """What the project may ask of that model."""
        found = account.allowances.get(name)
        if found is None:
            found = account.allowances[name] = Allowance(account.project.organization.id, name, CLOCK.monotonic())
            self._limit(found, account.project.rate_limits.get(name))
        return found

    def _way(self, account: Account, call: Call) -> Way:
        project, target = account.project, call.target
        assert target is not None
        name: str = call.model
        means: str = target.model if call.plan is None else call.plan.name
        if name not in project.rate_limits:
            name = means
        targets = targets_of(call, call.plan)
        prices = [self._prices.find(one) for one in targets]
        known = [price for price in prices if price is not None]
        way = Way(self._allowance(account, name), target, dearest(known), self._prices.find(target))
        way.unpriced = None in prices
        lengths = [_lengths(one, self._prices.known(one)) for one in targets]
        if all(context for context, _ in lengths):
            way.context = max(context for context, _ in lengths)
        if all(longest for _, longest in lengths):
            way.longest = max(longest for _, longest in lengths)
        way.refusal = self._forbidden(project, call.model, means, targets)
        if way.refusal is None and way.unpriced and self._rules.refuse_unpriced:
            way.refusal = _no_price(call.model)
        if len(account.ways) >= WAYS:
            account.ways.clear()
        account.ways[call.model] = way
        return way

    def _forbidden(
        self, project: Project, model: str, means: str, targets: Iterable[Target]
    ) -> Callable[[], TertuliaError] | None:
        """What to raise if the project may not ask for the model. A model that is denied is so by every name."""
        models = project.models
        if models is None:
            return None
        names = [model, means]
        if models.allow:
            permitted = any(name in models.models for name in names)
        else:
            names += [target.model for target in targets]
            permitted = not any(name in models.models for name in names)
        if permitted:
            return None
        id = project.id
        return lambda: Forbidden(f"Project `{id}` does not have access to model `{model}`", code="model_not_found")

    # the past, others, and what is shown
    def _begin(self) -> None:
        """Forgets what was of the month before."""
        if self._month != self.budgets.month:
            self._month = self.budgets.month
            self._spent, self._heard = {}, {}

    def hear(self, month: int, spent: Mapping[str, int]) -> None:
        """What other gateways have spent by project since this one began, in the month that began then (unix seconds):
        it counts as if it were spent here."""
        self.budgets.roll()
        self._begin()
        if month_of(month) != self._month:
            return
        whole = next((account.whole for account in self._accounts.values()), None)
        for id, cost in spent.items():
            more = cost - self._heard.get(id, 0)
            if more:
                self._heard[id] = cost
                budget = self.budgets.all.get(id)
                if budget is not None:
                    budget.pay(more)
                else:
                    self._spent[id] = self._spent.get(id, 0) + more
                if whole is not None:
                    whole.pay(more)

    def recall(self, project: Project, name: str, age: float, requests: int, tokens: int) -> None:
        """Before the first call, oldest first: what the project was admitted age seconds ago by the process before this
        one. name: of the model that is counted."""
        account = self._accounts.get(project.id)
        if account is not None:
            self._allowance(account, name).recall(age if age > 0 else 0.0, requests, tokens, CLOCK.monotonic())

    def adopt(self, projects: Iterable[Project]) -> None:
        """The projects there are: their budgets are known, and alerts can watch them, before anybody calls."""
        for project in projects:
            who = Principal("", project.organization.id, project.id)
            who.account = project
            account = self._enter(who)
            account.project = project
            self._refresh(account)

    def reached(self, about: Organization | Project, limit: SpendLimit) -> bool:
        """Whether such a limit refuses its calls now."""
        budget = self.budgets.all.get(about.id)
        spent = 0 if budget is None else budget.spent
        return spent >= limit.amount and not limit.observe_only and SPEND not in self._rules.observed

    def metrics(self) -> list[str]:
        """What was refused, and where the money stands."""
        budgets = [one for one in self.budgets.all.values() if one.spent or one.reserved or one.limit < UNLIMITED]

        def by(counts: dict[tuple[str, str], int]) -> list[tuple[dict[str, str], int]]:
            return [({"limit": limit, "project": project}, count) for (limit, project), count in counts.items()]

        return [
            *family("tertulia_refused_total", COUNTER, "Calls that a limit refused.", by(self._refused)),
            *family(
                "tertulia_would_refuse_total", COUNTER, "Calls that a limit which only observes would have refused.",
                by(self._observed),
            ),
            *family(
                "tertulia_unpriced_total", COUNTER, "Calls of models whose price nobody has said.",
                [({"model": model}, count) for model, count in self._unpriced.items()],
            ),
            *family(
                "tertulia_spent_dollars", GAUGE, "US dollars spent this month, by organization and project.",
                [({"of": one.id}, one.spent / NANO) for one in budgets],
            ),
            *family(
                "tertulia_reserved_dollars", GAUGE, "US dollars that calls under way may yet cost.",
                [({"of": one.id}, one.reserved / NANO) for one in budgets],
            ),
        ]  # fmt: skip


def _limit_budget(budget: Budget, record: Any, default: int | None, observed: bool) -> None:
    if record is not None:
        budget.limit, budget.observe_only = record.amount, observed or record.observe_only
    else:
        budget.limit, budget.observe_only = UNLIMITED if default is None else default, observed


def _lengths(target: Target, listed: Price | None) -> tuple[int, int]:
    """(tokens a model holds, tokens it answers at most), 0 for what is not known."""
    context: int = target.card.context_length or 0
    if listed is not None:
        context = context or listed.context
        if listed.max_output:
            return context, min(listed.max_output, context)
    return context, context


def _no_price(model: str) -> Callable[[], TertuliaError]:
    return lambda: Forbidden(
        f"Nobody has said what the model `{model}` costs, and this server refuses calls whose cost is not known.",
        code="model_price_unknown",
    )


def _choices(asked: Any) -> int:
    """Answers that a completion asks for."""
    prompts = 1
    if isinstance(asked.prompt, list) and not isinstance(asked.prompt[0], int):
        prompts = len(asked.prompt)
    return prompts * max(asked.n or 1, asked.best_of or 1)


def _tier(call: Call) -> str | None:
    tier: str | None = getattr(call.shape, "service_tier", None)
    return tier


def _has_parts(messages: list[Any]) -> bool:
    """Whether any message is more than a text: a picture, say, is more tokens than bytes."""
    for message in messages:  # noqa: SIM110  # looked for in the bytes, it would take longer than all the rest
        if type(message.content) is list:
            return True
    return False
