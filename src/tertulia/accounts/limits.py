"""How much a project may ask for: token buckets for requests and tokens a minute, and money reserved and spent.
Pure arithmetic in memory; the clock is given, so that it can be tested. Money is in nano-dollars.
"""

from __future__ import annotations

from ..errors import QuotaExceeded, RateLimited


class Bucket:
    """limit units a minute, refilled evenly, never more than limit at once. Taking is lowering level after a refill."""

    __slots__ = ("at", "level", "limit", "pace")

    def __init__(self, limit: int, now: float) -> None:
        self.limit, self.level, self.at = limit, float(limit), now
        self.pace = limit / 60  # units a second

    def refill(self, now: float) -> float:
        level = self.level + (now - self.at) * self.pace
        if level > self.limit:
            level = float(self.limit)
        self.level, self.at = level, now
        return level

    def wait(self, wanted: float) -> float:
        """Seconds until wanted units are there; refill first."""
        return max(0.0, (wanted - self.level) / self.pace)

    def reset(self) -> float:
        """Seconds until the bucket is full again."""
        return (self.limit - self.level) / self.pace


class Allowance:
    """The limits of one project."""

    __slots__ = ("_form", "organization", "requests", "reserved", "spend_limit", "spent", "tokens")

    def __init__(
        self, organization: str, requests: int, tokens: int, spend_limit: int | None, spent: int, now: float
    ) -> None:
        self.organization = organization
        self.requests = Bucket(requests, now)
        self.tokens = Bucket(tokens, now)
        self.spent = spent
        self.reserved = 0
        self.limit(requests, tokens, spend_limit)

    def limit(self, requests: int, tokens: int, spend_limit: int | None) -> None:
        """Sets the limits; a bucket that held more than its new one holds that much."""
        for bucket, limit in ((self.requests, requests), (self.tokens, tokens)):
            bucket.limit, bucket.pace = limit, limit / 60
            bucket.level = min(bucket.level, float(limit))
        self.spend_limit = spend_limit
        self._form = (
            b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-limit-tokens: %d\r\n"
            b"x-ratelimit-remaining-requests: %%d\r\nx-ratelimit-remaining-tokens: %%d\r\n"
            b"x-ratelimit-reset-requests: %%b\r\nx-ratelimit-reset-tokens: %%b\r\n" % (requests, tokens)
        )

    def headers(self) -> bytes:
        """Lines that say where the project stands."""
        requests, tokens = self.requests, self.tokens
        one, other = requests.level, tokens.level
        return self._form % (
            one if one > 0 else 0, other if other > 0 else 0,
            _short((requests.limit - one) / requests.pace), _short((tokens.limit - other) / tokens.pace),
        )  # fmt: skip

    def admit(self, tokens: int, cost: int, model: str, now: float) -> bytes:
        """Takes one request and tokens, reserves cost, and returns headers(). Raises RateLimited or QuotaExceeded,
        taking nothing."""
        requests, bucket = self.requests, self.tokens
        one, other = requests.refill(now), bucket.refill(now)
        if one < 1:
            raise self._limited("requests", requests, 1, model, "RPM")
        if other < tokens:
            raise self._limited("tokens", bucket, tokens, model, "TPM")
        if self.spend_limit is not None and self.spent + self.reserved + cost > self.spend_limit:
            raise QuotaExceeded(
                "You exceeded your current quota, please check your plan and billing details. For more information on "
                "this error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
            )
        requests.level = one = one - 1
        bucket.level = other = other - tokens
        self.reserved += cost
        return self._form % (
            one, other, _short((requests.limit - one) / requests.pace), _short((bucket.limit - other) / bucket.pace),
        )  # fmt: skip

    def settle(self, reserved_tokens: int, tokens: int, reserved_cost: int, cost: int) -> None:
        """Gives back what was reserved and not used."""
        bucket = self.tokens
        level = bucket.level + reserved_tokens - tokens
        bucket.level = level if level < bucket.limit else float(bucket.limit)
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


_known: dict[int, bytes] = {}  # milliseconds to their text; most projects are near their full limits


def _short(seconds: float) -> bytes:
    milliseconds = int(seconds * 1000 + 0.999)
    text = _known.get(milliseconds)
    if text is None:
        text = duration(seconds).encode()
        if len(_known) < 4096:
            _known[milliseconds] = text
    return text


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
