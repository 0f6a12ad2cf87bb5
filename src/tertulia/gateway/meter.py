"""The outermost stage: counts every call, writes one line to the access log and one entry to the ledger, whatever
became of it. Nothing of a prompt or an answer is written.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from ..accounts.entry import Entry, line_of
from ..accounts.ledger import Ledger
from ..core import BYTES_PER_TOKEN, Call, Next, Usage
from .accesslog import AccessLog
from .metrics import COUNTER, GAUGE, PAUSES, Histogram, family, histogram
from .traces import Traces

NOTHING = Usage()
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
        self.sources: list[Callable[[], list[str]]] = []

    def __call__(self, call: Call, following: Next) -> Awaitable[None] | None:
        self.in_flight += 1
        reply = call.reply
        reply.pace = self._pace
        reply.on_close(lambda outcome: self._record(call, outcome))
        return following(call)

    def _record(self, call: Call, outcome: str) -> None:
        self.in_flight -= 1
        reply, target, who = call.reply, call.target, call.principal
        nanoseconds = _now() - call.began
        if call.attempts:
            model, engine = target.model, target.engine.name  # type: ignore[union-attr]  # it was asked
        elif target is not None:
            model, engine = target.model, target.engine.name if call.cache == "joined" else ""
        else:
            model = engine = ""
        usage = reply.usage or NOTHING
        if usage.estimated and not usage.prompt_tokens:
            usage = reply.usage = Usage(len(call.body) // BYTES_PER_TOKEN, usage.completion_tokens, estimated=True)
        task, error = call.task.name, reply.error
        entry = Entry(
            call.id, time.time(), who.key_id, who.project, task, call.model, model, reply.status, outcome,
            nanoseconds // 10_000 / 100, call.stream, usage.prompt_tokens, usage.completion_tokens,
            usage.cached_tokens, usage.reasoning_tokens, call.cost, call.attempts, call.cache,
            call.wishes.retry_count, error.code if error is not None else None, usage.estimated, call.client,
            engine, call.fallback,
        )  # fmt: skip
        # what reached no engine and was answered by none is no business of the ledger's
        line = self._ledger.append(entry) if call.attempts or call.cache else None
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
        self._record(call, outcome)

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
        for (_, model, _, _), series in self.series.items():
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
