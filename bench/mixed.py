"""Half an hour of everything at once, and whether memory grows.

    python bench/mixed.py [--minutes 30] [--rate 100] [--clients 64] [--every 10]

Streams, whole answers, embeddings, cache hits, refusals, upstreams that fail, retries, fallbacks, streams that break
and are continued, clients that leave. Printed every few seconds: calls, surprises (an answer other than the kind of
call must have) and the resident memory; at the end the slope of its least-squares line, in MB an hour, over what
follows the warm-up (the first fifth). Exit code 1 if there was a surprise.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import uvloop
from stand import Client, Stand, Told, clock, connect, metric, standing

MODELS = {
    "far": "far", "fails": "fault:500@before", "busy": "fault:503@before", "cuts": "fault:cut@5", "spare": "spare",
    "stalls": "fault:stall@5",
}  # fmt: skip
# The cache is small, so that it is full before the measuring begins; no target is left alone, so that all keep failing.
SETTINGS = """
cache_memory = 2
retries = 1
retry_budget = 10.0
breaker_failures = 1000000
"""
ROUTES = """
stall_timeout = 2.0
[routes.falls-back]
targets = [{ model = "busy" }]
fallback = ["spare"]
[routes.goes-on]
targets = [{ model = "cuts" }]
fallback = ["spare"]
on_break = "continue"
"""


def say(model: str, text: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


class Mix:
    """The kinds of call, how often each is made, and what each must be answered with."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.calls: Counter[str] = Counter()
        self.surprises: Counter[str] = Counter()
        self.number = 0
        # kind: weight, task, body of the call with this number, status, what the end of the answer holds
        self.kinds: dict[str, tuple[int, str, Callable[[int], dict[str, Any]], int, bytes]] = {
            "stream": (25, "chat", lambda n: say("far", f"{n}", stream=True), 200, b"[DONE]"),
            "whole": (20, "chat", lambda n: say("far", f"{n}"), 200, b'"usage"'),
            "completion": (8, "completions", lambda n: {"model": "far", "prompt": f"{n}"}, 200, b'"usage"'),
            "embeddings": (12, "embeddings", lambda n: {"model": "far", "input": [f"{n}", "x"]}, 200, b'"usage"'),
            "cached": (10, "chat", lambda n: say("far", f"{n % 20}", temperature=0), 200, b'"usage"'),
            "to cache": (5, "chat", lambda n: say("far", f"{n}", temperature=0, stream=True), 200, b"[DONE]"),
            "refused": (3, "chat", lambda n: say("far", f"{n}", temperature=9), 400, b'"error"'),
            "no model": (2, "chat", lambda n: say(f"unknown-{n}", "x"), 404, b'"model_not_found"'),
            "fails": (3, "chat", lambda n: say("fails", f"{n}", stream=n % 2 == 0), 500, b'"error"'),
            "falls back": (4, "chat", lambda n: say("falls-back", f"{n}", stream=True), 200, b"[DONE]"),
            "breaks": (3, "chat", lambda n: say("cuts", f"{n}", stream=True), 200, b'"engine_failed"'),
            "goes on": (2, "chat", lambda n: say("goes-on", f"{n}", stream=True), 200, b"[DONE]"),
            "stalls": (1, "chat", lambda n: say("stalls", f"{n}", stream=True), 200, b'"upstream_timeout"'),
            "leaves": (5, "chat", lambda n: say("far", f"{n}", stream=True), 200, b""),
        }

    async def one(self, kind: str, connection: Client) -> None:
        _, task, body, wanted, end = self.kinds[kind]
        self.number += 1
        self.calls[kind] += 1
        try:
            sent = self.stand.request(task, body(self.number))
            status = await connection.ask(sent, 300 if kind == "leaves" else 0)
            if status != wanted or end not in connection.tail:
                raise Told(f"status {status}: {connection.tail[-160:]!r}")
        except (Told, OSError) as error:
            self.surprises[f"{kind}: {error}"] += 1
            connection.transport.close()
        if kind == "leaves":
            connection.transport.abort()

    async def client(self, until: float, pause: float) -> None:
        """One call after another, pause seconds from one's beginning to the next one's at least."""
        names, weights = list(self.kinds), [kind[0] for kind in self.kinds.values()]
        connection = None
        while (began := time.monotonic()) < until:
            if connection is None or connection.transport.is_closing():
                connection = await connect(self.stand)
            await self.one(random.choices(names, weights)[0], connection)
            rest = pause * (0.5 + random.random()) - (time.monotonic() - began)
            if rest > 0:
                await asyncio.sleep(rest)
        if connection is not None:
            connection.transport.close()

    async def watch(self, began: float, until: float, every: float) -> list[tuple[float, float]]:
        """(seconds, MB) every so often; reads /metrics as a monitor would."""
        seen = []
        while time.monotonic() < until:
            flying = await asyncio.to_thread(metric, self.stand, "tertulia_calls_in_flight")
            seen.append((time.monotonic() - began, self.stand.resident_mb()))
            print(
                f"{clock(began)}  {sum(self.calls.values()):8} calls, {flying:4.0f} in flight, "
                f"{sum(self.surprises.values())} surprises, {seen[-1][1]:7.1f} MB", flush=True,
            )  # fmt: skip
            await asyncio.sleep(min(every, max(0.0, until - time.monotonic())))
        return seen


def slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line through the points."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    across = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / across if across else 0.0


async def run(stand: Stand, options: argparse.Namespace) -> tuple[Mix, list[tuple[float, float]]]:
    mix, began = Mix(stand), time.monotonic()
    until = began + options.minutes * 60
    pause = options.clients / options.rate
    seen, *_ = await asyncio.gather(
        mix.watch(began, until, options.every), *(mix.client(until, pause) for _ in range(options.clients))
    )
    return mix, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long")
    parser.add_argument("--rate", type=float, default=100, help="calls a second, at most")
    parser.add_argument("--clients", type=int, default=64, help="connections")
    parser.add_argument("--every", type=float, default=10, help="seconds between two lines")
    options = parser.parse_args()
    with standing(MODELS, ["--chunks", "20", "--gap", "0.02"], SETTINGS, ROUTES) as stand:
        mix, seen = uvloop.run(run(stand, options))
        time.sleep(5)
        left, resident = metric(stand, "tertulia_calls_in_flight"), stand.resident_mb()
    for kind, count in sorted(mix.calls.items()):
        print(f"{count:8}  {kind}")
    for text, count in mix.surprises.most_common(10):
        print(f"  {count} x {text}")
    settled = seen[len(seen) // 5 :]
    print(
        f"resident memory: {seen[0][1]:.1f} MB at first, {settled[0][1]:.1f} MB warmed up, {resident:.1f} MB at the end"
    )
    print(f"slope after the warm-up: {slope(settled) * 3600:+.2f} MB an hour over {len(settled)} points")
    print(f"calls in flight afterwards: {left:.0f}")
    sys.exit(1 if mix.surprises or left else 0)


main()
