"""Limits before anything is spent: requests and tokens a minute and money, per project. Reserves the worst case on the
way down and settles with the true figures on the way up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping

from ..accounts.limits import Allowance
from ..accounts.prices import Prices
from ..core import BYTES_PER_TOKEN, Call, Next
from ..errors import TertuliaError

DEFAULT_OUTPUT = 1024  # tokens reserved for an answer without a given maximum


class Admit:
    """The stage. Allowances are made on first use and kept for the life of the server."""

    def __init__(
        self, requests: int, tokens: int, spend_limit: int | None, prices: Prices, spent: Mapping[str, int]
    ) -> None:
        """requests and tokens a minute of one project; spend_limit and spent in nano-dollars this month."""
        self._limits = (requests, tokens, spend_limit)
        self._prices = prices
        self._spent = dict(spent)
        self._allowances: dict[str, Allowance] = {}
        self._time = asyncio.get_running_loop().time

    def reload(self, requests: int, tokens: int, spend_limit: int | None, prices: Prices) -> None:
        """Other limits and prices from now on; what was used and spent stays so."""
        self._limits, self._prices = (requests, tokens, spend_limit), prices
        for allowance in self._allowances.values():
            allowance.limit(requests, tokens, spend_limit)

    def __call__(self, call: Call, following: Next) -> Awaitable[None] | None:
        who, target, asked, reply = call.principal, call.target, call.asked, call.reply
        assert target is not None
        allowance: Allowance | None = who.state
        now = self._time()
        if allowance is None:
            allowance = who.state = self._allowance(who.organization, who.project, now)
        tokens, output = len(call.body) // BYTES_PER_TOKEN, 0
        if call.task.name != "embedding":
            output = _maximum(asked)
            longest = target.card.context_length  # no answer is longer, whatever maximum was asked for
            if longest is not None and output > longest:
                output = longest
            if asked.n is not None:
                output *= asked.n
        prices = self._prices
        cost = prices.cost(target, tokens, output)
        tokens += output
        try:
            reply.headers.append(allowance.admit(tokens, cost, call.model, now))
        except TertuliaError:
            reply.headers.append(allowance.headers())
            raise

        def settle(outcome: str) -> None:
            usage = reply.usage
            if usage is None or call.cache == "hit" or call.cache == "joined":  # nothing was made for this call
                allowance.settle(tokens, 0, cost, 0)
                return
            call.cost = prices.of(call.target, usage)  # type: ignore[arg-type]
            allowance.settle(tokens, usage.prompt_tokens + usage.completion_tokens, cost, call.cost)

        reply.on_close(settle)
        return following(call)

    def unclaimed(self, call: Call) -> None:
        """A shared call has ended that nobody waits for any more: its project pays what was used."""
        usage, allowance, target = call.reply.usage, call.principal.state, call.target
        if usage is not None and target is not None and isinstance(allowance, Allowance):
            call.cost = self._prices.of(target, usage)
            allowance.settle(0, usage.prompt_tokens + usage.completion_tokens, 0, call.cost)

    def _allowance(self, organization: str, project: str, now: float) -> Allowance:
        allowance = self._allowances.get(project)
        if allowance is None:
            requests, tokens, limit = self._limits
            allowance = Allowance(organization, requests, tokens, limit, self._spent.get(project, 0), now)
            self._allowances[project] = allowance
        return allowance


def _maximum(asked: object) -> int:
    maximum: int | None = asked.max_tokens  # type: ignore[attr-defined]
    if maximum is None:
        maximum = getattr(asked, "max_completion_tokens", None)  # a completion has none
    return DEFAULT_OUTPUT if maximum is None else maximum
