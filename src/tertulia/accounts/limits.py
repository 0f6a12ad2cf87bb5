"""How much a project may ask for: token buckets for requests and tokens a minute, and money reserved and spent.
Pure arithmetic in memory; the clock is given, so that it can be tested. Money is in nano-dollars.
"""

from __future__ import annotations

from ..errors import QuotaExceeded, RateLimited


class Bucket:
    """limit units a minute, refilled evenly, never more than limit at once. take may be undone by give."""

    __slots__ = ("at", "level", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit, self.level, self.at = limit, float(limit), now

    def refill(self, now: float) -> float:
        limit = self.limit
        level = self.level + (now - self.at) * limit / 60
        self.level = level = limit if level > limit else level
        self.at = now
        return level

    def wait(self, wanted: float) -> float:
        """Seconds until wanted units are there; refill first."""
        return max(0.0, (wanted - self.level) * 60 / self.limit)

    def reset(self) -> float:
        """Seconds until the bucket is full again."""
        return (self.limit - self.level) * 60 / self.limit


class Allowance:
    """The limits of one project."""

    __slots__ = ("organization", "requests", "reserved", "spend_limit", "spent", "tokens")

    def __init__(
        self, organization: str, requests: int, tokens: int, spend_limit: int | None, spent: int, now: float
    ) -> None:
        self.organization = organization
        self.requests = Bucket(requests, now)
        self.tokens = Bucket(tokens, now)
        self.spend_limit = spend_limit
        self.spent = spent
        self.reserved = 0

    def admit(self, tokens: int, cost: int, model: str, now: float) -> None:
        """Takes one request and tokens, and reserves cost. Raises RateLimited or QuotaExceeded, taking nothing."""
        requests, bucket = self.requests, self.tokens
        if requests.refill(now) < 1:
            raise self._limited("requests", requests, 1, model, "RPM")
        if bucket.refill(now) < tokens:
            raise self._limited("tokens", bucket, tokens, model, "TPM")
        if self.spend_limit is not None and self.spent + self.reserved + cost > self.spend_limit:
            raise QuotaExceeded(
                "You exceeded your current quota, please check your plan and billing details. For more information on "
                "this error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
            )
        requests.level -= 1
        bucket.level -= tokens
        self.reserved += cost

    def settle(self, reserved_tokens: int, tokens: int, reserved_cost: int, cost: int) -> None:
        """Gives back what was reserved and not used."""
        bucket = self.tokens
        bucket.level = min(bucket.limit, bucket.level + reserved_tokens - tokens)
        self.reserved -= reserved_cost
        self.spent += cost

    def _limited(self, kind: str, bucket: Bucket, wanted: float, model: str, unit: str) -> RateLimited:
        wait = bucket.wait(wanted)
        if wanted > bucket.limit:
            refusal = RateLimited(
                f"Request too large for {model} in organization {self.organization} on {kind} per min ({unit}): "
                f"Limit {bucket.limit}, Requested {wanted:g}. The input or output tokens must be reduced in order to "
                "run successfully.",
                type=kind,
            )
            refusal.retry = False  # it will never fit
            return refusal
        return RateLimited(
            f"Rate limit reached for {model} in organization {self.organization} on {kind} per min ({unit}): Limit "
            f"{bucket.limit}, Used {bucket.limit - max(0, int(bucket.level))}, Requested {wanted:g}. Please try again "
            f"in {duration(wait)}. Visit https://platform.openai.com/account/rate-limits to learn more.",
            type=kind,
            retry_after=wait,
        )


def duration(seconds: float) -> str:
    """As Go prints it, and so the x-ratelimit-reset headers: 17ms, 1.5s, 6m0s, 1h0m0s."""
    milliseconds = int(seconds * 1000 + 0.999)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds > 0 else "0s"
    whole, rest = divmod(milliseconds, 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    tail = f"{second}.{rest:03d}".rstrip("0") + "s" if rest else f"{second}s"
    return (f"{hours}h{minute}m{tail}" if hours else f"{minutes}m{tail}") if minutes else tail
