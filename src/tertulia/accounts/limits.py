"""How much one project may ask of one model: requests and tokens a minute, requests a day, requests at a time. Pure
arithmetic in memory; the clock is given, so that it can be tested.

    windows   strict: in no 60 seconds (or 24 hours), wherever they begin, is more admitted than the limit. What comes
              is counted in slots of a second (a quarter of an hour for the day); a slot leaves the window as a whole, a
              minute after the last that was counted in it. What a call did not use is given back to its slot.
    shares    once half of a limit is used, each key that asked within the minute has an equal share of it. Who has had
              more than that may go on only with what the others do not need: twice what they asked for, or all of
              their shares if they wait in line. So a flood of one key does not keep the others out.
    places    who is refused for want of room has a place in line until its turn, which retry-after tells, and a moment
              longer. Nobody takes room that those in front need, unless they have it all the same when their turn has
              come. A key has one place for each order of magnitude of its requests, and goes to the end of the line
              once it had its turn. So small requests do not use up, crumb by crumb, what a large one waits for.

    observed  a limit that only observes refuses nothing, and says what it would have refused. That counts in the limits
              that are enforced, as it must, and not in those that observe: what they say is what enforcing would bring.

It does not know what a request is, who sends it, or what it costs.
"""

from __future__ import annotations

from typing import Final

from ..errors import RateLimited

MINUTE: Final = 60.0
DAY: Final = 86_400.0
GRAIN: Final = 1.0  # seconds that are counted together
DAY_GRAIN: Final = 900.0
NO_LIMIT: Final = 2**62
GRACE: Final = 2.5  # seconds a place is kept after its turn: who comes back needs a moment
PATIENCE: Final = 60.0  # seconds; the SDK does not wait longer, so there is no place for who would have to
MOST_PLACES: Final = 64
A_MOMENT: Final = 1.0  # seconds to wait for a request to end, when nobody can know
REQUESTS: Final = "requests"  # the limits by name, as metrics and ledger have them
TOKENS: Final = "tokens"
DAILY: Final = "requests_per_day"
CONCURRENT: Final = "concurrent_requests"
KINDS: Final = frozenset((REQUESTS, TOKENS, DAILY, CONCURRENT))
NONE: Final[frozenset[str]] = frozenset()


class Bucket:
    """limit units a minute, refilled evenly, never more than limit at once. Taking is lowering level after a refill.
    For what is sent to upstreams, which is to be spread evenly; projects have windows."""

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


class Slot:
    """What was admitted together: from first to last, in seconds of the clock."""

    __slots__ = ("allowance", "first", "last", "live", "passed", "passed_tokens", "requests", "shares", "tokens")

    def __init__(self, allowance: Allowance, first: float, last: float) -> None:
        self.allowance = allowance  # whose it is
        self.first, self.last = first, last
        self.requests = self.tokens = 0
        self.passed = self.passed_tokens = 0  # of these, what a limit that only observes would have refused
        self.live = True  # still within the minute
        self.shares: dict[str, Share] | None = None  # by key, of what was looked at closely


class Share:
    """What a key was admitted, and what it asked for."""

    __slots__ = ("asked", "asked_tokens", "requests", "tokens")

    def __init__(self) -> None:
        self.requests = self.tokens = self.asked = self.asked_tokens = 0


class Place:
    """Somebody waits for room: so many tokens, from his turn (until) to when he is given up."""

    __slots__ = ("expires", "kind", "tokens", "until")

    def __init__(self, kind: str, tokens: int, until: float) -> None:
        self.kind, self.tokens, self.until, self.expires = kind, tokens, until, until + GRACE


class Refusal:
    """Which limit is in the way, and what to tell whoever asked; observed: it is not enforced, nor is any other that
    would be in the way."""

    __slots__ = ("error", "kind", "observed")

    def __init__(self, kind: str, error: RateLimited, observed: bool) -> None:
        self.kind, self.error, self.observed = kind, error, observed


class Allowance:
    """The limits of one project and model, and what is used of them."""

    __slots__ = (
        "_form", "_fresh", "_kept", "_kept_at", "concurrent", "daily", "day", "day_requests", "in_flight", "model",
        "observe_only", "observed", "organization", "passed", "passed_day", "passed_in_flight", "passed_tokens",
        "places", "requests", "requests_limit", "reserved", "shares", "slot", "slots", "soft_requests", "soft_tokens",
        "tokens", "tokens_limit",
    )  # fmt: skip

    def __init__(self, organization: str, model: str, now: float) -> None:
        """Without any limit as yet. organization and model are what messages say."""
        self.organization, self.model = organization, model
        self.shares: dict[str, Share] = {}  # by key, of the last minute; of what was looked at closely
        self._kept, self._kept_at = (0, 0), -1.0  # of requests and tokens for all shares together, and since when
        self.places: dict[tuple[str, int], Place] = {}  # by key and magnitude, in line
        self.slot = Slot(self, now, now)
        self.slots: list[Slot] = [self.slot]  # of the last minute, oldest first
        self.requests = self.tokens = 0  # in them
        self.in_flight = self.reserved = 0  # calls that have not ended, and the tokens they have reserved
        self.day: list[Slot] = []  # of the last day, but for the last minute
        self.day_requests = 0
        self.passed = self.passed_tokens = self.passed_day = self.passed_in_flight = 0  # as in a slot, of each of these
        self.limit(NO_LIMIT, NO_LIMIT, NO_LIMIT, NO_LIMIT)

    def limit(
        self, requests: int, tokens: int, daily: int, concurrent: int, observed: frozenset[str] = NONE
    ) -> None:  # fmt: skip
        """Sets the limits; what is counted stays. observed: the kinds that are not enforced."""
        self.requests_limit, self.tokens_limit, self.daily, self.concurrent = requests, tokens, daily, concurrent
        self.observed, self.observe_only = observed, observed >= KINDS
        self._soften()
        self._form = (
            b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-limit-tokens: %d\r\n"
            b"x-ratelimit-remaining-requests: %%d\r\nx-ratelimit-remaining-tokens: %%d\r\n"
            b"x-ratelimit-reset-requests: %%b\r\nx-ratelimit-reset-tokens: %%b\r\n" % (requests, tokens)
        )
        self._fresh = self._form.replace(b"%b", b"1m0s")  # when something has just been taken

    def _soften(self) -> None:
        """How much of this minute needs no second look: half, or less if the day leaves no more; nothing while several
        want the rest."""
        left, half = self.daily - self.day_requests, self.requests_limit // 2
        self.soft_requests = -1 if self.places or len(self.shares) > 1 else left if left < half else half
        self.soft_tokens = self.tokens_limit // 2

    # admission
    def take(self, tokens: int, now: float) -> Slot | None:
        """Takes one request and tokens, if no limit is near: None if one is, and nothing is taken."""
        slot = self.slot
        if now - slot.first >= GRAIN:
            slot = self.turn(now)
        requests, total = self.requests + 1, self.tokens + tokens
        if (
            requests > self.soft_requests or total > self.soft_tokens or self.in_flight >= self.concurrent
        ):  # fmt: skip
            return None
        self.requests, self.tokens = requests, total
        self.in_flight += 1
        self.reserved += tokens
        slot.requests += 1
        slot.tokens += tokens
        slot.last = now
        return slot

    def force(self, tokens: int, now: float, key: str) -> Slot:
        """Takes one request and tokens for that key, whatever the limits say; after refusal has been asked."""
        slot = self.slot
        if now - slot.first >= GRAIN:
            slot = self.turn(now)
        self.requests += 1
        self.tokens += tokens
        self.in_flight += 1
        self.reserved += tokens
        slot.requests += 1
        slot.tokens += tokens
        slot.last = now
        for share in self._shares(slot, key):
            share.requests += 1
            share.tokens += tokens
        return slot

    def pass_by(self, slot: Slot, tokens: int) -> None:
        """What has just been forced would have been refused by a limit that only observes."""
        self.passed += 1
        self.passed_tokens += tokens
        self.passed_in_flight += 1
        slot.passed += 1
        slot.passed_tokens += tokens

    def settle_passed(self, slot: Slot, reserved: int, tokens: int) -> None:
        """The same as settle, besides it, for what was passed by."""
        self.passed_in_flight -= 1
        slot.passed_tokens += tokens - reserved
        if slot.live:
            self.passed_tokens += tokens - reserved

    def refusal(self, tokens: int, now: float, key: str) -> Refusal | None:
        """What is in the way of one request with so many tokens by that key, looked at closely: first of all what is
        enforced. Whoever is refused gets a place in line, and who is not has had his turn."""
        slot = self.turn(now)
        for share in self._shares(slot, key):
            share.asked += 1
            share.asked_tokens += tokens
        place = (key, tokens.bit_length() // 3)
        near = self._near(tokens, now, place)
        enforced = [one for one in near if one[0] not in self.observed]
        if not enforced:
            self.places.pop(place, None)
            self._soften()
            if not near:
                return None
        kind, seconds, used, limit, wanted = max(enforced or near, key=lambda one: one[1])
        error = self._error(kind, seconds, used, limit, wanted)
        if enforced and error.retry is not False:
            waiting = self.places.get(place)
            if waiting is not None:
                waiting.until, waiting.expires = now + seconds, now + seconds + GRACE
            elif len(self.places) < MOST_PLACES:
                self.places[place] = Place(kind, tokens, now + seconds)
        self._soften()
        return Refusal(kind, error, not enforced)

    def fits(self, tokens: int, now: float) -> bool:
        """Whether so many tokens could be taken at all, as far as the minute's tokens go."""
        self.turn(now)
        return tokens <= self.tokens_left()

    def tokens_left(self) -> int:
        """Of this minute; less than none if more were used than reserved."""
        return self.tokens_limit - self.tokens + (self.passed_tokens if TOKENS in self.observed else 0)

    def _requests_left(self) -> int:
        return self.requests_limit - self.requests + (self.passed if REQUESTS in self.observed else 0)

    def _near(self, tokens: int, now: float, place: tuple[str, int]) -> list[tuple[str, float, int, int, int]]:
        """Each limit in the way, seconds until it is not, what is used, the limit, what is wanted."""
        seen = self.observed
        requests, total = self.requests_limit - self._requests_left(), self.tokens_limit - self.tokens_left()
        day = self.day_requests + self.requests - (self.passed_day + self.passed if DAILY in seen else 0)
        in_flight = self.in_flight - (self.passed_in_flight if CONCURRENT in seen else 0)
        before = self._before(place, now)
        count, ahead, held = 0, 0, 0
        turn = now
        if before:
            turn = before[0].until if before[0].until > now else now
            for one in before:
                if one.kind == CONCURRENT:
                    held += 1
                else:
                    count += 1
                    ahead += one.tokens
        leaving, given = self._leaving(turn)
        mine = self.places.get(place)
        others = others_tokens = 0
        if mine is None or before or mine.until > now:  # who has waited for his turn has it, whatever his share
            others, others_tokens = self._others(place[0], tokens, now)
        found: list[tuple[str, float, int, int, int]] = []
        taken = requests - leaving + count  # when the first in line has his turn, with those in front
        kept = max(count, others) if before or others else 0
        if (
            requests >= self.requests_limit or (before and taken >= self.requests_limit)
            or (others and requests + others >= self.requests_limit)
        ):  # fmt: skip
            used = requests + kept
            found.append(
                (REQUESTS, self._until(used + 1 - self.requests_limit, now, True), used, self.requests_limit, 1)
            )
        if day >= self.daily:
            found.append((DAILY, self._day_until(now), day, self.daily, 1))
        booked = total - given + ahead + tokens
        if (
            total + tokens > self.tokens_limit or (before and booked > self.tokens_limit)
            or (others_tokens and total + tokens + others_tokens > self.tokens_limit)
        ):  # fmt: skip
            used = total + max(ahead, others_tokens)
            wait = self._until(used + tokens - self.tokens_limit, now, False)
            if used + tokens - self.reserved <= self.tokens_limit and wait > A_MOMENT:
                wait = A_MOMENT  # calls under way have reserved more than most of them will use
            found.append((TOKENS, wait, used, self.tokens_limit, tokens))
        if in_flight + held >= self.concurrent:
            found.append((CONCURRENT, A_MOMENT, in_flight + held, self.concurrent, 1))
        return found

    def _shares(self, slot: Slot, key: str) -> tuple[Share, Share]:
        """What is noted of the key, in the slot and in all."""
        if slot.shares is None:
            slot.shares = {}
        here, all = slot.shares.get(key), self.shares.get(key)
        if here is None:
            here = slot.shares[key] = Share()
        if all is None:
            all = self.shares[key] = Share()
        return here, all

    def _others(self, key: str, tokens: int, now: float) -> tuple[int, int]:
        """Requests and tokens that are kept for other keys, if this one has had its share; else none."""
        active = len(self.shares)
        if active < 2:
            return 0, 0
        requests, share = self.requests_limit // active, self.tokens_limit // active
        own = self.shares[key]
        if active < 16 or now - self._kept_at > 0.1:  # many are not added up for every one of them
            self._kept_at = now
            waiting = {key for key, _ in self.places}
            every = [_unused(one, requests, share, key in waiting) for key, one in self.shares.items()]
            self._kept = (sum([one for one, _ in every]), sum([one for _, one in every]))
        mine, mine_tokens = _unused(own, requests, share, any(waiting == key for waiting, _ in self.places))
        return (
            max(0, self._kept[0] - mine) if own.requests >= requests else 0,
            max(0, self._kept[1] - mine_tokens) if own.tokens + tokens > share else 0,
        )  # fmt: skip

    def _before(self, place: tuple[str, int], now: float) -> list[Place]:
        """Those in front in line; who has not come when it was his turn has lost his place."""
        if not self.places:
            return []
        for key in [key for key, one in self.places.items() if one.expires < now]:
            del self.places[key]
        found: list[Place] = []
        for key, one in self.places.items():
            if key == place:
                break
            found.append(one)
        return found

    def _leaving(self, until: float) -> tuple[int, int]:
        """Requests and tokens that will have left the window by then."""
        requests = tokens = 0
        for slot in self.slots:
            if slot.last + MINUTE > until:
                break
            requests += slot.requests
            tokens += slot.tokens
        return requests, tokens

    def _until(self, needed: int, now: float, requests: bool) -> float:
        """Seconds until so much has left the window; a whole window if it never will."""
        for slot in self.slots:
            needed -= slot.requests if requests else slot.tokens
            if needed <= 0:
                return max(0.001, slot.last + MINUTE - now)
        return MINUTE

    def _day_until(self, now: float) -> float:
        needed = self.day_requests + self.requests + 1 - self.daily
        for slots, seconds in ((self.day, DAY), (self.slots, DAY)):
            for slot in slots:
                needed -= slot.requests
                if needed <= 0:
                    return max(0.001, slot.last + seconds - now)
        return DAY

    # time
    def turn(self, now: float) -> Slot:
        """What is older than a minute leaves it; the slot for what comes now."""
        slots = self.slots
        gone = 0
        for slot in slots:
            if slot.last + MINUTE > now:
                break
            gone += 1
            slot.live = False
            self.requests -= slot.requests
            self.tokens -= slot.tokens
            self.passed -= slot.passed
            self.passed_tokens -= slot.passed_tokens
            if slot.requests:
                self._remember(slot)
            if slot.shares is not None:
                self._drop(slot.shares)
        if gone:
            del slots[:gone]
        if self.day and self.day[0].last + DAY <= now:
            self._forget(now)
        if gone:
            self._soften()
        if slots:
            slot = slots[-1]
            if now - slot.first < GRAIN:
                self.slot = slot
                return slot
        self.slot = slot = Slot(self, now, now)
        slots.append(slot)
        return slot

    def _drop(self, shares: dict[str, Share]) -> None:
        for key, gone in shares.items():
            share = self.shares[key]
            share.requests -= gone.requests
            share.tokens -= gone.tokens
            share.asked -= gone.asked
            share.asked_tokens -= gone.asked_tokens
            if not share.asked:
                del self.shares[key]

    def _remember(self, slot: Slot) -> None:
        self.day_requests += slot.requests
        self.passed_day += slot.passed
        if self.day and slot.last - self.day[-1].first < DAY_GRAIN:
            kept = self.day[-1]
            kept.requests += slot.requests
            kept.passed += slot.passed
            kept.last = slot.last
            return
        kept = Slot(self, slot.first, slot.last)
        kept.requests, kept.passed = slot.requests, slot.passed
        self.day.append(kept)

    def _forget(self, now: float) -> None:
        while self.day and self.day[0].last + DAY <= now:
            gone = self.day.pop(0)
            self.day_requests -= gone.requests
            self.passed_day -= gone.passed
        self._soften()

    def recall(self, age: float, requests: int, tokens: int, now: float) -> None:
        """What was admitted age seconds ago, before this process was; oldest first, before anything else is taken."""
        at = now - age
        last = self.slots[-1]
        if at - last.first >= GRAIN or not last.requests:
            if not last.requests:
                self.slots.pop()
            last = Slot(self, at, at)
            self.slots.append(last)
        last.requests += requests
        last.tokens += tokens
        last.last = max(last.last, at)
        self.requests += requests
        self.tokens += tokens
        self.turn(at)

    # settlement
    def settle(self, slot: Slot, reserved: int, tokens: int) -> None:
        """A call is over: it had reserved so many tokens in its slot, and used so many."""
        self.in_flight -= 1
        self.reserved -= reserved
        tokens -= reserved
        slot.tokens += tokens
        if slot.live:
            self.tokens += tokens

    def correct(self, slot: Slot, tokens: int) -> None:
        """So many tokens more than were taken; fewer if negative. Nothing changes once the slot has left the window."""
        slot.tokens += tokens
        if slot.live:
            self.tokens += tokens

    # what is said
    def taken(self) -> bytes:
        """Lines that say where the project stands, when something has just been taken."""
        return self._fresh % (self.requests_limit - self.requests, self.tokens_limit - self.tokens)

    def headers(self, now: float) -> bytes:
        """Lines that say where the project stands."""
        requests, tokens = self._requests_left(), self.tokens_left()
        left = self.slot.last + MINUTE - now if self.requests else 0.0
        reset = duration(left if left > 0 else 0.0).encode()
        return self._form % (requests if requests > 0 else 0, tokens if tokens > 0 else 0, reset, reset)

    def _error(self, kind: str, seconds: float, used: int, limit: int, wanted: int) -> RateLimited:
        on = {
            REQUESTS: "requests per min (RPM)", TOKENS: "tokens per min (TPM)", DAILY: "requests per day (RPD)",
            CONCURRENT: "concurrent requests",
        }[kind]  # fmt: skip
        type = TOKENS if kind == TOKENS else REQUESTS
        where = f"{self.model} in organization {self.organization} on {on}: Limit {limit}"
        if wanted > limit:  # it will never fit
            if kind == TOKENS:
                refusal = RateLimited(
                    f"Request too large for {where}, Requested {wanted}. The input or output tokens must be reduced in "
                    "order to run successfully.",
                    type=type,
                )
            else:
                refusal = RateLimited(f"Rate limit reached for {where}, Used {used}, Requested {wanted}.", type=type)
            refusal.retry = False
            return refusal
        refusal = RateLimited(
            f"Rate limit reached for {where}, Used {used}, Requested {wanted}. Please try again in "
            f"{duration(seconds)}. Visit https://platform.openai.com/account/rate-limits to learn more.",
            type=type,
            retry_after=seconds,
        )
        if seconds > PATIENCE:  # the SDK would take its own pauses instead, and try in vain
            refusal.retry = False
        return refusal


def _unused(share: Share, requests: int, tokens: int, waits: bool) -> tuple[int, int]:
    """What is kept for a key: twice what it asked for, so that it can want more, up to its share of so many requests
    and tokens; one that waits in line may want all of that."""
    one = (requests if waits else min(requests, 2 * share.asked)) - share.requests
    other = (tokens if waits else min(tokens, 2 * share.asked_tokens)) - share.tokens
    return one if one > 0 else 0, other if other > 0 else 0


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
