"""Many streams at once: what they cost in memory, and whether it comes back.

    python bench/crowd.py [--streams 2000] [--seconds 60] [--length 10] [--gap 0.25]

So many clients each ask for a stream of --length seconds, read it to its end and ask for the next, until --seconds are
over. Every stream must be whole. Printed are the server's resident memory before (after a warm-up of 300 streams), at
its highest, and after all have left and idle connections to the upstream have been closed, which takes a minute; exit
code 1 if a stream failed or the memory after is more than 10 % above that before.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter

import uvloop
from stand import Stand, Told, clock, connect, metric, standing

WARM_UP = 300  # streams: more than the connections that are kept open to an upstream
REST = 8.0  # seconds between the last stream of the warm-up and the first look at the memory
LONG_REST = 80.0  # and between the last stream and the last look: idle connections to an upstream are kept for 60


class Crowd:
    """The clients, and what became of their streams."""

    def __init__(self, stand: Stand, tokens: int) -> None:
        self.stand = stand
        self.last = f" tok{tokens - 1}".encode()
        self.finished = self.running = self.bytes = 0
        self.errors: Counter[str] = Counter()

    async def client(self, number: int, until: float, spread: float) -> None:
        """Streams until the time is over; starts are spread, so that not all begin and end at once."""
        await asyncio.sleep(random.random() * spread)
        asked = {"model": "far", "messages": [{"role": "user", "content": f"{number}"}], "stream": True}
        connection = None
        while time.monotonic() < until:
            if connection is None or connection.transport.is_closing():
                connection = await connect(self.stand)
            self.running += 1
            try:
                status = await connection.ask(self.stand.request("chat", asked))
                self.bytes += connection.size
                if status != 200 or b"[DONE]" not in connection.tail:
                    raise Told(f"status {status}: {connection.tail[-200:]!r}")
                self.finished += 1
            except (Told, OSError) as error:
                self.errors[str(error)] += 1
            finally:
                self.running -= 1
        if connection is not None:
            connection.transport.close()

    async def watch(self, began: float, until: float) -> float:
        """Says how it goes every five seconds; the highest memory."""
        highest, said = 0.0, 0.0
        while time.monotonic() < until or self.running:
            highest = max(highest, self.stand.resident_mb())
            if time.monotonic() - said >= 5:
                said = time.monotonic()
                print(
                    f"{clock(began)}  {self.running:5} streams, {self.finished:6} finished, "
                    f"{sum(self.errors.values())} errors, {self.stand.resident_mb():7.1f} MB", flush=True,
                )  # fmt: skip
            await asyncio.sleep(0.5)
        return highest


async def crowd(stand: Stand, streams: int, seconds: float, spread: float, tokens: int) -> tuple[Crowd, float]:
    people, began = Crowd(stand, tokens), time.monotonic()
    until = began + seconds
    highest, *_ = await asyncio.gather(
        people.watch(began, until), *(people.client(number, until, spread) for number in range(streams))
    )
    return people, highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000, help="streams at the same time")
    parser.add_argument("--seconds", type=float, default=60, help="how long new ones are begun")
    parser.add_argument("--length", type=float, default=10, help="seconds a stream takes")
    parser.add_argument("--gap", type=float, default=0.25, help="seconds between two pieces of a stream")
    options = parser.parse_args()
    tokens = max(1, round(options.length / options.gap))
    with standing({"far": "far"}, ["--chunks", str(tokens), "--gap", str(options.gap)]) as stand:
        print("warming up", flush=True)
        uvloop.run(crowd(stand, WARM_UP, 1.0, 0.5, tokens))
        time.sleep(REST)
        before, used = stand.resident_mb(), stand.cpu_seconds()
        people, highest = uvloop.run(
            crowd(stand, options.streams, options.seconds, min(options.length, options.seconds) / 2, tokens)
        )
        used = stand.cpu_seconds() - used
        time.sleep(LONG_REST)
        after, open_calls = stand.resident_mb(), metric(stand, "tertulia_calls_in_flight")
    failed, grown = sum(people.errors.values()), after / before - 1
    print(f"streams: {people.finished} whole, {failed} failed, {people.bytes / 1e6:.0f} MB, {used:.1f} s of CPU")
    print(f"resident memory: before {before:.1f} MB, highest {highest:.1f} MB, after {after:.1f} MB ({grown:+.1%})")
    print(f"calls in flight afterwards: {open_calls:.0f}")
    for text, count in people.errors.most_common(5):
        print(f"  {count} x {text}")
    sys.exit(1 if failed or grown > 0.10 or open_calls else 0)


main()
