"""The outermost stage: counts every call, writes one line to the access log and one entry to the ledger, whatever
became of it. Nothing of a prompt or an answer is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from ..accounts.entry import Entry, line_of
from ..accounts.ledger import Ledger
from ..core import FAILED, Call, Next, Usage
from ..errors import TertuliaError, Unavailable
from ..turns import CLOCK
from .accesslog import AccessLog
from .metrics import COUNTER, GAUGE, PAUSES, Histogram, family, histogram
from .traces import Traces

log = logging.getLogger("tertulia.gateway")
NOTHING = Usage()


def _nothing(call: Call, usage: Usage) -> int:
    return 0


def _always(call: Call) -> bool:
    return True


def _any(call: Call, more: int) -> bool:
    return True


_now = time.perf_counter_ns


class Series:
    """The figures of all calls of one kind that ended alike."""

    __slots__ = ("cached", "calls", "completion", "prompt", "reasoning", "seconds")

    def __init__(self) -> None:
        self.calls = self.prompt = self.completion = self.cached = self.reasoning = 0
        self.seconds = Histogram()

    def count(self, usage: Usage, seconds: float) -> None:
        """One more call, with what it used and how long it took."""
        self.calls += 1
        self.prompt += usage.prompt_tokens
        self.completion += usage.completion_tokens
        self.cached += usage.cached_tokens
        self.reasoning += usage.reasoning_tokens
        self.seconds.observe(seconds)


class Tab:
    """What is to be done when a call ends. Its bound method is called at a third of the price of a lambda, compiled."""

    __slots__ = ("_call", "_meter")

    def __init__(self, meter: Meter, call: Call) -> None:
        self._meter, self._call = meter, call

    def close(self, outcome: str) -> None:
        self._meter.record(self._call, outcome)


class Meter:
    """The stage, and the figures it has gathered. Each part of the server with figures of its own adds its metrics
    function to sources."""

    def __init__(self, ledger: Ledger, access_log: AccessLog | None = None, traces: Traces | None = None) -> None:
        self._ledger = ledger
        self._log = access_log
        self._traces = traces
        self.in_flight = 0
        self.series: dict[tuple[str, str, str, int], Series] = {}  # task, model, outcome, status
        self.first: dict[str, Histogram] = {}  # task -> seconds to the first piece of a stream
        self.pauses = Histogram(PAUSES)  # seconds between two pieces of a stream
        self._pace = self.pauses.observe
        self.charge: Callable[[Call, Usage], int] = _nothing  # nano-dollars of a lost attempt; admit's
        self.may_follow: Callable[[Call], bool] = _always  # whether the limits allow for another one; admit's too
        self.may_continue: Callable[[Call, int], bool] = _any  # and for one that goes on after so many bytes
        self._lost: dict[str, Series] = {}  # by model: what attempts used that others followed
        self.sources: list[Callable[[], list[str]]] = []

    def __call__(self, call: Call, following: Next) -> Awaitable[None] | None:
        self.in_flight += 1
        reply = call.reply
        reply.pace = self._pace
        call.watch = self
        reply.on_close(Tab(self, call).close)
        return following(call)

    # the Watch
    def sending(self, call: Call) -> None:
        """Before the bytes of an attempt leave, the journal says so: an attempt is in the ledger even if we are killed
        before it ends."""
        who, target = call.principal, call.target
        try:
            call.intent = self._ledger.intend(
                call.opener, call.sent + 1, who.key_id, who.project, call.task.name, call.model,
                target.model, target.engine.name, call.prompt_tokens, call.hold, call.output_tokens,  # type: ignore[union-attr]
            )  # fmt: skip
        except OSError as error:
            log.error("%s is refused: the ledger's journal cannot be written (%s)", call.id, error.strerror)
            call.reply.recover = None  # another target cannot be accounted for either
            raise Unavailable(
                "This server cannot keep account of calls at the moment. Please try again later.",
                retry_after=5,
                code="ledger_unavailable",
            ) from None
        call.sent += 1
        call.open = True

    def lost(self, call: Call, error: TertuliaError) -> bool:
        """An attempt that another one may follow has an entry of its own."""
        usage, target, who = call.reply.usage, call.target, call.principal
        assert target is not None
        call.open = False
        cost = 0
        if usage is None:
            usage = NOTHING
        else:
            cost = self.charge(call, usage)
            usage = call.reply.usage or usage  # it may have been mended
            call.paid += cost
            call.used += usage.prompt_tokens + usage.completion_tokens
            self._lost.setdefault(target.model, Series()).count(usage, 0.0)
        entry = Entry(
            call.opener, call.sent, time.time(), who.key_id, who.project, call.task.name, call.model, target.model,
            error.status, FAILED, (_now() - call.began) // 10_000 / 100, call.stream, usage.prompt_tokens,
            usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens, cost, call.cache,
            call.wishes.retry_count, error.code, usage.estimated, call.client, target.engine.name, call.fallback,
            call.observed, call.unpriced,
        )  # fmt: skip
        try:
            self._ledger.append(entry, call.intent)
        except OSError as problem:  # its intent stands, and becomes an entry at the next start
            log.error("%s: an attempt has no entry yet: %s", call.id, problem.strerror)
            return False
        return self.may_follow(call)

    def continues(self, call: Call, more: int) -> bool:
        """A broken answer is gone on with: whether the limits allow for its longer prompt."""
        return self.may_continue(call, more)

    def record(self, call: Call, outcome: str) -> None:
        """A call has ended."""
        self.in_flight -= 1
        reply, target, who = call.reply, call.target, call.principal
        nanoseconds = _now() - call.began
        if call.sent:
            model, engine = target.model, target.engine.name  # type: ignore[union-attr]  # it was asked
        elif target is not None:
            model, engine = target.model, target.engine.name if call.cache == "joined" else ""
        else:
            model = engine = ""
            if not call.model.isprintable():  # only a name that nothing has may be anything
                call.model = ascii(call.model)[1:-1]
        usage = (reply.usage if reply.own is None else reply.own) or NOTHING
        task, error = call.task.name, reply.error
        now = CLOCK.time()
        who.used = int(now)
        entry = Entry(
            call.opener if call.open else call.id, call.sent, now, who.key_id, who.project, task, call.model,
            model, reply.status, outcome, nanoseconds // 10_000 / 100, call.stream, usage.prompt_tokens,
            usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens, call.cost - call.paid, call.cache,
            call.wishes.retry_count, error.code if error is not None else None, usage.estimated, call.client,
            engine, call.fallback, call.observed, call.unpriced,
        )  # fmt: skip
        # the ledger has each attempt, and who was answered without one; what reached nobody is no business of its
        line = None
        if call.open or (call.cache and not call.sent):
            line = self._ledger.append(entry, call.intent if call.open else -1)
        call.open = False
        key = (task, model, outcome, reply.status)
        series = self.series.get(key)
        if series is None:
            series = self.series[key] = Series()
        if call.cache and call.cache != "miss":
            usage = NOTHING  # it was generated for another call, and is counted there
        series.count(usage, nanoseconds * 1e-9)
        if call.stream and reply.first:
            self._observe_first(task, (reply.first - call.began) * 1e-9)
        if self._log is not None:
            self._log.write(line or line_of(entry))
        if self._traces is not None:
            self._traces.finished(call, outcome, nanoseconds, reply.first - call.began if reply.first else None)

    def unclaimed(self, call: Call, outcome: str) -> None:
        """A shared call has ended that nobody waits for any more: it is accounted all the same."""
        self.in_flight += 1  # as every call that is recorded
        self.record(call, outcome)

    def _observe_first(self, task: str, seconds: float) -> None:
        first = self.first.get(task)
        if first is None:
            first = self.first[task] = Histogram()
        first.observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        lines = [
            *family("tertulia_calls_in_flight", GAUGE, "Calls that have not ended.", [({}, self.in_flight)]),
            *family(
                "tertulia_calls_total", COUNTER, "Calls that have ended.",
                [
                    ({"task": task, "model": model, "outcome": outcome, "status": str(status)}, series.calls)
                    for (task, model, outcome, status), series in self.series.items()
                ],
            ),
            *family("tertulia_tokens_total", COUNTER, "Tokens, as engines counted them.", self._tokens()),
            *histogram("tertulia_call_seconds", "From a call's first byte to its answer's last.", self._seconds()),
            *histogram(
                "tertulia_first_piece_seconds", "From a call's first byte to the first piece of its stream.",
                [({"task": task}, seen) for task, seen in self.first.items()],
            ),
            *histogram("tertulia_pause_seconds", "Between two pieces of a stream.", [({}, self.pauses)]),
        ]  # fmt: skip
        for source in self.sources:
            lines += source()
        return ("\n".join(lines) + "\n").encode()

    def _tokens(self) -> list[tuple[dict[str, str], float]]:
        sums: dict[tuple[str, str], int] = {}
        all_series = [(key[1], series) for key, series in self.series.items()] + list(self._lost.items())
        for model, series in all_series:
            for kind in ("prompt", "completion", "cached", "reasoning"):
                sums[model, kind] = sums.get((model, kind), 0) + getattr(series, kind)
        return [({"model": model, "kind": kind}, count) for (model, kind), count in sums.items() if count]

    def _seconds(self) -> list[tuple[dict[str, str], Histogram]]:
        """By task: what the series of a task have seen, put together."""
        sums: dict[str, Histogram] = {}
        for (task, _, _, _), series in self.series.items():
            seen = sums.setdefault(task, Histogram())
            seen.counts = [one + other for one, other in zip(seen.counts, series.seconds.counts, strict=True)]
            seen.sum += series.seconds.sum
        return [({"task": task}, seen) for task, seen in sums.items()]
