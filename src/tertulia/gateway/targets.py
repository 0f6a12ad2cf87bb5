"""How every target is doing: calls in flight, latency, breaker, line and limits. Known by (engine, model), so that it
outlives a new configuration. It knows nothing of a call but its size; which target a call goes to is route's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Set
from time import perf_counter_ns

import msgspec

from ..accounts.limits import Bucket
from ..config import Settings, Upstream
from ..core import Target
from . import backoff
from .backoff import Budget
from .breaker import CLOSED, OPEN, Breaker
from .line import Line, Ticket
from .names import engine_name

log = logging.getLogger("tertulia.gateway")
READY, WAITS, BROKEN = 0, 1, 2  # a call may go there now; in a while; not until its breaker lets it
SMOOTHING = 0.2  # weight of the newest value in a moving average
HALF_LIFE = 30e9  # nanoseconds in which an unused target's latency counts half: so it is tried again
LONGEST_REST = 3600.0
LEAST_DURATION = 1.0  # seconds a call is taken to need as long as none has ended
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
CODE = re.compile(r"[a-z0-9_.-]{1,64}", re.IGNORECASE)


class Rates:
    """What one upstream may be sent a minute, over all its models."""

    __slots__ = ("requests", "tokens")

    def __init__(self, upstream: Upstream, now: float) -> None:
        self.requests = Bucket(upstream.requests_per_minute, now) if upstream.requests_per_minute else None
        self.tokens = Bucket(upstream.tokens_per_minute, now) if upstream.tokens_per_minute else None

    def wait(self, tokens: int, now: float) -> float:
        """Seconds until a call of so many tokens may be sent; one larger than the limit waits for a full bucket."""
        wait = 0.0
        for bucket, wanted in ((self.requests, 1), (self.tokens, tokens)):
            if bucket is not None:
                bucket.refill(now)
                wait = max(wait, bucket.wait(min(wanted, bucket.limit)))
        return wait

    def take(self, tokens: int) -> None:
        if self.requests is not None:
            self.requests.level -= 1
        if self.tokens is not None:
            self.tokens.level -= tokens

    def settle(self, taken: int, used: int) -> None:
        """The true figure is known."""
        if self.tokens is not None:
            self.tokens.level = min(self.tokens.limit, self.tokens.level + taken - used)


class Live:
    """One target. clear says that it takes any call at once: no limits, breaker closed, no rest; then nothing else
    needs to be looked at."""

    __slots__ = (
        "_pumping", "_wake", "breaker", "budget", "calls", "clear", "counts", "duration", "far", "finished", "gone",
        "header", "in_flight", "label", "latency", "latency_at", "limit", "line", "rates", "resting", "since",
        "time", "why",
    )  # fmt: skip

    def __init__(self, label: str, model: str, far: bool, time: Callable[[], float], settings: Settings) -> None:
        """far: it is an upstream's. An engine of ours looks after itself: it is not asked twice, and has no breaker."""
        self.label, self.far, self.time = label, far, time
        self.header = b"x-tertulia-model: %s\r\n" % _CONTROL.sub("", model).encode("latin-1", "replace")
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_cooldown)
        self.budget = Budget(settings.retry_budget, time())
        self.line = Line()
        self.limit: int | None = None
        self.rates: Rates | None = None
        self.in_flight = self.calls = self.finished = 0
        self.counts: dict[str, int] = {}  # attempts by outcome, but for those that finished
        self.latency = 0.0  # seconds to the first byte, a moving average; 0: not known
        self.latency_at = 0
        self.duration = 0.0  # seconds of a whole call, a moving average, measured where there is a limit
        self.since = 0.0  # when the oldest call in flight was sent, as long as none has ended
        self.resting = 0.0  # until then it asked to be left alone
        self.clear = True
        self.why = ""  # how it failed last: an error's code, or its status
        self.gone = False  # the settings do not have it any more
        self._wake: asyncio.TimerHandle | None = None
        self._pumping = False

    def tune(self, settings: Settings, limit: int | None, rates: Rates | None) -> None:
        """Other limits from now on; limit: calls in flight at once."""
        self.breaker.tune(settings.breaker_failures, settings.breaker_cooldown)
        self.budget.share = settings.retry_budget
        self.limit, self.rates = limit, rates
        self._look()
        self.pump_soon()

    def state(self, tokens: int, now: float) -> int:
        """READY, WAITS or BROKEN for a new call: those in line go first."""
        if self.clear:
            return READY
        if not self.breaker.allows(now):
            return BROKEN
        return WAITS if len(self.line) or self._full(tokens, now) else READY

    def _full(self, tokens: int, now: float) -> bool:
        return (self.limit is not None and self.in_flight >= self.limit) or self.pause(tokens, now) > 0

    def pause(self, tokens: int, now: float) -> float:
        """Seconds until it may be sent another call, however many are in flight."""
        rest = max(0.0, self.resting - now)
        return rest if self.rates is None else max(rest, self.rates.wait(tokens, now))

    def limited(self, tokens: int, now: float) -> bool:
        """Whether it is a rate that keeps calls waiting, rather than too many at once."""
        return self.pause(tokens, now) > 0

    def turn(self, level: int, project: str, tokens: int, now: float) -> float:
        """Seconds until one who joined the line now would have its turn, as far as can be known."""
        ahead = self.line.ahead(level, project)
        apart = self.duration / self.limit if self.limit is not None else 0.0
        if self.rates is not None and self.rates.requests is not None:
            apart = max(apart, 60.0 / self.rates.requests.limit)
        full = self.limit is not None and self.in_flight >= self.limit
        return self.pause(tokens, now) + apart * (ahead + full)

    def estimate(self, level: int, project: str, tokens: int, now: float) -> float:
        """As turn, and no less than can be believed: what no call has ended of takes as long as the oldest has had."""
        turn = self.turn(level, project, tokens, now)
        if self.duration or self.limit is None or self.in_flight < self.limit:
            return turn
        age = now - self.since if self.since else 0.0
        each = max(LEAST_DURATION, age) / max(1, self.limit)
        return max(turn, LEAST_DURATION, self.pause(tokens, now) + each * (self.line.ahead(level, project) + 1))

    # a call's way through it
    def enter(self, tokens: int, now: float) -> bool:
        """A call is sent; True if it is the breaker's probe. Only needed where not clear."""
        if not self.in_flight:
            self.since = now
        if self.rates is not None:
            self.rates.take(tokens)
        return self.breaker.enter(now)

    def leave(self, outcome: str, probe: bool, retry_after: float | None = None, silent: bool = False) -> None:
        """A call has ended otherwise than well, or not been clear to go: outcome is one of core's or of backoff's.
        silent: its deadline passed without a byte, which is the target's failure."""
        now, before = self.time(), self.breaker.state
        if outcome == "finished":
            self.finished += 1
        else:
            self.counts[outcome] = self.counts.get(outcome, 0) + 1
        if outcome in ("finished", backoff.REFUSED):
            self.breaker.succeeded(probe)
            self._tell(before)
        elif (outcome == backoff.FAILED or silent) and self.far:
            self.breaker.failed(now, probe)
            self._tell(before)
        else:
            if outcome == backoff.BUSY and self.far and retry_after is not None:
                self.resting = max(self.resting, now + min(retry_after, LONGEST_REST))
            self.breaker.released(now, probe)
        self._look()
        self.pump_soon()

    def proved(self) -> None:
        """The probe has its first byte: others need not wait until it is over."""
        before = self.breaker.state
        self.breaker.succeeded(True)
        self._tell(before)
        self._look()
        self.pump_soon()

    def _tell(self, before: int) -> None:
        """Says it where the breaker, which was in that state, has opened or closed."""
        if self.breaker.state == before:
            return
        if self.breaker.state == OPEN:
            why = self.why if CODE.fullmatch(self.why) else "it failed"  # an upstream may have put any text there
            log.warning("target %s is left alone for %g s: %s", self.label, self.breaker.cooldown, why)
        else:
            log.warning("target %s answers again", self.label)

    def learn(self, nanoseconds: int, at: int) -> None:
        """A call's time to the first byte; at is perf_counter_ns() now or so."""
        seconds = nanoseconds * 1e-9
        self.latency += (seconds - self.latency) * SMOOTHING if self.latency else seconds
        self.latency_at = at

    def took(self, nanoseconds: int) -> None:
        seconds = nanoseconds * 1e-9
        self.duration += (seconds - self.duration) * SMOOTHING if self.duration else seconds

    def slowness(self) -> float:
        """What `fastest` compares: latency, grown with the calls in flight, forgotten while nobody asks."""
        unused: float = min((perf_counter_ns() - self.latency_at) / HALF_LIFE, 60.0)
        return self.latency * (self.in_flight + 1) * math.exp2(-unused)

    def _look(self) -> None:
        self.clear = (
            self.limit is None and self.rates is None and self.breaker.state == CLOSED
            and (not self.resting or self.time() >= self.resting) and not len(self.line)
        )  # fmt: skip

    # its line
    def join(self, ticket: Ticket) -> None:
        """A call waits; its holder is told granted(live, ticket) or turned_away(ticket)."""
        self.line.join(ticket)
        self.clear = False
        self.pump_soon()

    def pump_soon(self) -> None:
        """Has who waits looked after, from a callback of its own: the call that leaves need not bear with it."""
        if len(self.line) and not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        while True:
            now = self.time()
            ticket = self.line.next(now)
            if ticket is None:
                self._look()
                return
            if self.breaker.state == OPEN and not self.breaker.allows(now):
                self.line.go(ticket)
                ticket.holder.turned_away(ticket)  # rather than wait for one that is broken
                continue
            if not self.breaker.allows(now) or self._full(ticket.tokens, now):
                wait = max(self.pause(ticket.tokens, now), self.breaker.wait(now))
                if wait > 0:
                    self._wake_in(wait)
                return  # who leaves calls again
            self.line.go(ticket)
            ticket.holder.granted(self, ticket)

    def _wake_in(self, seconds: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = asyncio.get_running_loop().call_later(seconds + 0.001, self._woken)

    def _woken(self) -> None:
        self._wake = None
        self.pump_soon()

    def close(self) -> None:
        if self._wake is not None:
            self._wake.cancel()


class Targets:
    """All of them."""

    def __init__(self, settings: Settings, time: Callable[[], float]) -> None:
        self._settings, self._time = settings, time
        self._lives: dict[tuple[str, str], Live] = {}
        self._rates: dict[str, Rates] = {}

    def __iter__(self) -> Iterator[Live]:
        self._clean()
        return iter(self._lives.values())

    def _clean(self) -> None:
        """What is gone is forgotten when its last call has ended."""
        for key, live in list(self._lives.items()):
            if live.gone and not live.in_flight and not len(live.line):
                live.close()
                del self._lives[key]

    def of(self, target: Target) -> Live:
        """How it is doing; kept with the target, so that it is found without looking from then on."""
        found: Live | None = target.live
        if found is not None:
            return found
        engine = engine_name(target.engine, target.card)
        found = self._lives.get((engine, target.model))
        if found is None:
            far = target.card.source.startswith("upstream:")
            label = f"{engine}/{target.model}" if engine and not target.model.startswith(f"{engine}/") else target.model
            found = self._lives[engine, target.model] = Live(label, target.model, far, self._time, self._settings)
            self._tune(engine, found)
        msgspec.structs.force_setattr(target, "live", found)
        return found

    def _tune(self, engine: str, live: Live) -> None:
        upstream = self._settings.upstreams.get(engine)
        limit, rates = None, None
        if upstream is not None:
            limit = upstream.max_concurrency
            if upstream.requests_per_minute or upstream.tokens_per_minute:
                rates = self._rates.get(engine)
                if rates is None:
                    rates = self._rates[engine] = Rates(upstream, self._time())
        live.tune(self._settings, limit, rates)

    def reload(self, settings: Settings, there: Set[tuple[str, str]]) -> None:
        """Other limits for the same targets; what is in flight stays counted. there: (upstream, model) of all there
        are; others go when they are idle."""
        old, self._settings = self._settings, settings
        for name in list(self._rates):
            if _limits(old.upstreams, name) != _limits(settings.upstreams, name):
                del self._rates[name]
        for (engine, model), live in self._lives.items():
            live.gone = (engine, model) not in there
            self._tune(engine, live)
        self._clean()

    def close(self) -> None:
        for live in self._lives.values():
            live.close()


def _limits(upstreams: Mapping[str, Upstream], name: str) -> object:
    upstream = upstreams.get(name)
    return upstream and (upstream.requests_per_minute, upstream.tokens_per_minute)
