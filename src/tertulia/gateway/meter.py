"""The outermost stage: counts every call, writes one line to the access log and one entry to the ledger, whatever
became of it. Nothing of a prompt or an answer is written.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import IO

import msgspec

from ..accounts.ledger import Entry, Ledger
from ..accounts.prices import Prices
from ..core import Call, Next, Usage

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds
_encode = msgspec.json.Encoder().encode


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0
    reasoning_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Answer)


class Meter:
    """The stage, and the figures it has gathered."""

    def __init__(self, ledger: Ledger, prices: Prices, access_log: AccessLog | None) -> None:
        self._ledger = ledger
        self._prices = prices
        self._log = access_log
        self.in_flight = 0
        self.outcomes: dict[tuple[str, str, str, int], int] = {}  # task, model, outcome, status -> calls
        self.tokens: dict[tuple[str, str], int] = {}  # model, kind -> tokens
        self.durations: dict[str, list[float]] = {}  # task -> [count per bucket..., beyond, sum]

    async def __call__(self, call: Call, following: Next) -> None:
        reply = call.reply
        self.in_flight += 1

        def see(data: bytes) -> None:
            at = data.rfind(b'"usage":')
            if at >= 0 and data[at + 8 : at + 12] != b"null":
                reply.usage = read_usage(data, reply.stream) or reply.usage

        def settle(outcome: str) -> None:
            self.in_flight -= 1
            self._record(call, outcome)

        reply.tap(see)
        reply.on_close(settle)
        await following(call)

    def _record(self, call: Call, outcome: str) -> None:
        reply, target = call.reply, call.target
        nanoseconds = time.perf_counter_ns() - call.began
        model = target.model if target is not None else ""
        usage = reply.usage
        if usage is not None:
            self._count_tokens(model, usage)
        if usage is not None or outcome != "failed":
            self._ledger.append(self._entry(call, model, outcome, nanoseconds))
        key = (call.task.name, model, outcome, reply.status)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        self._observe(call.task.name, nanoseconds / 1e9)
        if self._log is not None:
            self._log.write(self._line(call, model, outcome, nanoseconds))

    def _entry(self, call: Call, model: str, outcome: str, nanoseconds: int) -> Entry:
        who, usage = call.principal, call.reply.usage or Usage()
        return Entry(
            call.id, int(time.time()), who.key_id, who.project, call.model, model, usage.prompt_tokens,
            usage.completion_tokens, usage.cached_tokens, self._prices.of(model, usage), nanoseconds // 1000,
            call.reply.status, outcome,
        )  # fmt: skip

    def _line(self, call: Call, model: str, outcome: str, nanoseconds: int) -> bytes:
        who, reply, usage = call.principal, call.reply, call.reply.usage
        return _encode(
            {
                "at": time.time(), "id": call.id, "client": call.client, "key": who.key_id, "project": who.project,
                "task": call.task.name, "asked": call.model, "model": model, "stream": call.stream,
                "status": reply.status, "outcome": outcome, "error": reply.error.code if reply.error else None,
                "retry": call.retry_count, "ms": nanoseconds // 10_000 / 100,
                "prompt_tokens": usage.prompt_tokens if usage else None,
                "completion_tokens": usage.completion_tokens if usage else None,
            }
        )  # fmt: skip

    def _count_tokens(self, model: str, usage: Usage) -> None:
        for kind, count in (("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)):
            self.tokens[model, kind] = self.tokens.get((model, kind), 0) + count

    def _observe(self, task: str, seconds: float) -> None:
        counts = self.durations.get(task)
        if counts is None:
            counts = self.durations[task] = [0.0] * (len(BUCKETS) + 2)
        at = 0
        while at < len(BUCKETS) and seconds > BUCKETS[at]:
            at += 1
        counts[at] += 1
        counts[-1] += seconds

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        lines = ["# TYPE tertulia_calls_in_flight gauge", f"tertulia_calls_in_flight {self.in_flight}"]
        lines.append("# TYPE tertulia_calls_total counter")
        for (task, model, outcome, status), count in self.outcomes.items():
            labels = f'task="{task}",model="{_label(model)}",outcome="{outcome}",status="{status}"'
            lines.append(f"tertulia_calls_total{{{labels}}} {count}")
        lines.append("# TYPE tertulia_tokens_total counter")
        for (model, kind), count in self.tokens.items():
            lines.append(f'tertulia_tokens_total{{model="{_label(model)}",kind="{kind}"}} {count}')
        lines.append("# TYPE tertulia_call_seconds histogram")
        for task, counts in self.durations.items():
            below = 0
            for bound, inside in zip((*BUCKETS, "+Inf"), counts, strict=False):
                below += int(inside)
                lines.append(f'tertulia_call_seconds_bucket{{task="{task}",le="{bound}"}} {below}')
            lines.append(f'tertulia_call_seconds_sum{{task="{task}"}} {counts[-1]:.6f}')
            lines.append(f'tertulia_call_seconds_count{{task="{task}"}} {below}')
        return ("\n".join(lines) + "\n").encode()


def read_usage(data: bytes, stream: bool) -> Usage | None:
    """The usage in an answer's body, or in the last event of a piece that has one."""
    for line in reversed(data.splitlines()) if stream else (data,):  # whichever line ends an upstream uses
        if b'"usage":' not in line:
            continue
        try:
            usage = _decoder.decode(line.partition(b"data:")[2] if stream else line).usage
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        if usage is not None:
            details, more = usage.prompt_tokens_details, usage.completion_tokens_details
            return Usage(
                usage.prompt_tokens,
                usage.completion_tokens or 0,
                (details.cached_tokens or 0) if details else 0,
                (more.reasoning_tokens or 0) if more else 0,
            )
    return None


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class AccessLog:
    """Lines of JSON to a file or standard error, gathered and written every quarter of a second, off the hot path."""

    def __init__(self, path: str) -> None:
        self._lines: list[bytes] = []
        self._file: IO[bytes] = sys.stderr.buffer if path == "-" else open(path, "ab", opener=_private)  # noqa: SIM115
        self._timer: asyncio.TimerHandle | None = None

    def write(self, line: bytes) -> None:
        self._lines.append(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(0.25, self.flush)

    def flush(self) -> None:
        """Writes what has gathered; an error is told on standard error and ends nothing."""
        self._timer = None
        lines, self._lines = self._lines, []
        try:
            self._file.write(b"\n".join(lines) + b"\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end a call; what happened goes to standard error
            print(f"tertulia: the access log cannot be written ({error.strerror})", file=sys.stderr)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self.flush()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
