"""Crowds that press against a limit, and what came of it by the upstream's own count: for the tests of overshoot, and
for bench/overshoot.py with more of everything.

Each caller asks once, for a stream or not, and tries again when and if it is told to. Some leave in the middle, some
ask for a model that fails, and the gateway may be killed with SIGKILL and started again on the same data. What the
upstream answered is what it says it did: so many requests, so many tokens, times the price.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import Served, serve
from mock_upstream import PROMPT_TOKENS, Mock
from wire_client import Answer, read_body, read_head, request

TOKENS = 10
INPUT, OUTPUT = 10_000, 100_000  # nano-dollars a token
COST = PROMPT_TOKENS * INPUT + TOKENS * OUTPUT  # of one request
FAULTS = ("fault:503@before", "fault:cut@5", "fault:500@5", "fault:cut@before")
LEAST_PAUSE, LONGEST_PAUSE = 0.1, 1.0  # seconds between two tries, whatever a refusal says: tests have no minute
CONFIG = """
chat_model = "mock"
embedding_model = "mock-embedding"
cache = "off"
coalesce = false
max_connections = 4096
breaker_failures = 1000000
retry_budget = 10.0
{limits}
[upstreams.far]
base_url = "{url}"
connections = 2048
models = {{ "good" = "tokens:10", {faults} }}
[upstreams.far.prices]
good = {{ input = 10.0, output = 100.0 }}
{prices}
"""


def config(url: str, limits: str) -> str:
    return CONFIG.format(
        url=url, limits=limits, faults=", ".join(f'"bad{at}" = "{fault}"' for at, fault in enumerate(FAULTS)),
        prices="\n".join(f"bad{at} = {{ input = 10.0, output = 100.0 }}" for at in range(len(FAULTS))),
    )  # fmt: skip


@dataclass
class Crowd:
    """callers ask `served`; leaving and failing: shares of them that leave in the middle, or ask for what fails."""

    served: Served
    callers: int
    chance: random.Random
    leaving: float = 0.0
    failing: float = 0.0
    tries: int = 60
    statuses: Counter[int] = field(default_factory=Counter)
    answered: int = 0
    away: asyncio.Event = field(default_factory=asyncio.Event)  # set while there is nobody to ask

    async def press(self) -> None:
        """All of them at once; returns when each has been answered, or told that it is not worth another try."""
        await asyncio.gather(*(self.caller(number) for number in range(self.callers)))

    async def caller(self, number: int) -> None:
        model = f"bad{number % len(FAULTS)}" if self.chance.random() < self.failing else "good"
        leaves = TOKENS // 2 if self.chance.random() < self.leaving else None
        body: dict[str, Any] = {
            "model": model, "messages": [{"role": "user", "content": "Say the tokens."}], "max_tokens": TOKENS,
            "user": str(number),
        }  # fmt: skip
        if number % 2:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        for _ in range(self.tries):
            answer = await self.ask(body, leaves)
            if answer is None or answer.status != 429:
                return
            if answer.headers.get("x-should-retry") != "true":
                return
            wait = int(answer.headers["retry-after-ms"]) / 1000
            if wait > 2:  # a window is full: this test does not last that long
                return
            await asyncio.sleep(self.chance.uniform(LEAST_PAUSE, LONGEST_PAUSE))

    async def ask(self, body: dict[str, Any], leaves: int | None) -> Answer | None:
        """None if the caller left, or the gateway is gone."""
        port = int(self.served.base_url.rpartition(":")[2].partition("/")[0])
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return None
        try:
            writer.write(request(self.served.api_key, "chat", body, "connection: close"))
            if leaves is not None and not body.get("stream"):
                await asyncio.sleep(self.chance.uniform(0, 0.2))
                return None
            answer = await read_head(reader)
            self.statuses[answer.status] += 1
            if leaves is not None and answer.status == 200:
                await reader.readuntil(b"tok%d" % leaves)
                return None
            await read_body(reader, answer)
            self.answered += answer.status == 200
            return answer
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return None
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@dataclass
class Found:
    """What the upstream says it answered, and what the gateway says of it; money in nano-dollars."""

    requests: int
    tokens: int
    cost: int
    spent: int
    reserved: int
    statuses: dict[int, int]


def figures(served: Served) -> dict[str, float]:
    with urllib.request.urlopen(f"{served.root}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def of_project(found: dict[str, float], name: str) -> int:
    values = [value for key, value in found.items() if re.match(rf'{name}{{of="proj_', key)]
    assert len(values) <= 1
    return round(sum(values) * 1e9)


def answered(upstream: Mock) -> tuple[int, int, int]:
    """(requests, tokens, nano-dollars) that the upstream has answered by its own count: a refusal costs nothing, what
    was broken off or left as much as had been sent."""
    requests = tokens = cost = 0
    for record in upstream.requests():
        refused = record["tokens"] == 0  # or nothing of it was made before its end
        requests += 1
        if not refused:
            tokens += PROMPT_TOKENS + record["tokens"]
            cost += PROMPT_TOKENS * INPUT + record["tokens"] * OUTPUT
    return requests, tokens, cost


async def play(
    data: Path, upstream: Mock, limits: str, *, callers: int = 1000, seed: int = 1, leaving: float = 0.0,
    failing: float = 0.0, kill_after: Callable[[Crowd], Awaitable[None]] | None = None, rounds: int = 1,
) -> Found:  # fmt: skip
    """kill_after(crowd) returns when the gateway is to be killed; another crowd then asks the next one. rounds: crowds
    that come one after another."""
    text = config(upstream.base_url, limits)
    served = serve(data, text)
    chance = random.Random(seed)
    statuses: Counter[int] = Counter()
    try:
        for _ in range(rounds):
            crowd = Crowd(served, callers, chance, leaving, failing)
            pressing = asyncio.create_task(crowd.press())
            if kill_after is not None:
                await kill_after(crowd)
                served.process.send_signal(signal.SIGKILL)
                served.process.wait()
                await pressing
                statuses += crowd.statuses
                served = serve(data, text)
                crowd = Crowd(served, callers, chance, leaving, failing)
                pressing = asyncio.create_task(crowd.press())
                kill_after = None
            await pressing
            statuses += crowd.statuses
        for _ in range(100):  # who was left is told so
            found = figures(served)
            if not found["tertulia_calls_in_flight"]:
                break
            await asyncio.sleep(0.05)
        requests, tokens, cost = answered(upstream)
        return Found(
            requests, tokens, cost, of_project(found, "tertulia_spent_dollars"),
            of_project(found, "tertulia_reserved_dollars"), dict(statuses),
        )  # fmt: skip
    finally:
        served.stop()
