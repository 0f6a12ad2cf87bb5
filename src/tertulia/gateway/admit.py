"""Limits before anything is spent: requests and tokens a minute and money, per project. Reserves the worst case on the
way down and settles with the true figures on the way up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ..accounts.limits import Allowance, duration
from ..accounts.prices import Prices
from ..core import Call, Next, Usage

BYTES_PER_TOKEN = 4  # how a prompt is estimated before its engine has counted it
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

    async def __call__(self, call: Call, following: Next) -> None:
        who, asked, target = call.principal, call.asked, call.target
        assert target is not None
        allowance: Allowance | None = who.state
        now = self._time()
        if allowance is None:
            allowance = who.state = self._allowance(who.organization, who.project, now)
        prompt = len(call.body) // BYTES_PER_TOKEN
        output = 0
        if call.task.name != "embedding":  # no answer is longer than the context, whatever maximum was asked for
            output = min(_maximum(asked), target.card.context_length or 2**31) * (asked.n or 1)
        cost = self._prices.cost(target.model, prompt, output)
        try:
            allowance.admit(prompt + output, cost, call.model, now)
        finally:
            _tell(call, allowance)
        reply = call.reply

        def settle(outcome: str) -> None:
            usage: Usage | None = reply.usage
            if usage is None:
                allowance.settle(prompt + output, 0, cost, 0)
            else:
                used = usage.prompt_tokens + usage.completion_tokens
                allowance.settle(prompt + output, used, cost, self._prices.of(target.model, usage))

        reply.on_close(settle)
        await following(call)

    def _allowance(self, organization: str, project: str, now: float) -> Allowance:
        allowance = self._allowances.get(project)
        if allowance is None:
            requests, tokens, limit = self._limits
            allowance = Allowance(organization, requests, tokens, limit, self._spent.get(project, 0), now)
            self._allowances[project] = allowance
        return allowance


def _maximum(asked: object) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value = getattr(asked, name, None)
        if value is not None:
            return int(value)
    return DEFAULT_OUTPUT


def _tell(call: Call, allowance: Allowance) -> None:
    requests, tokens = allowance.requests, allowance.tokens
    call.reply.headers.append(
        b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-requests: %d\r\n"
        b"x-ratelimit-remaining-tokens: %d\r\nx-ratelimit-reset-requests: %s\r\nx-ratelimit-reset-tokens: %s\r\n"
        % (
            requests.limit, tokens.limit, max(0, requests.level), max(0, tokens.level),
            duration(requests.reset()).encode(), duration(tokens.reset()).encode(),
        )
    )  # fmt: skip
