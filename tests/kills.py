"""A gateway under load that is killed with SIGKILL at random moments and started again, over and over; and whether its
ledger then agrees with what the upstream says it was asked.

Every request has a label of its own: the upstream sees it as `user`, the ledger as the model asked for. An attempt
whose intent was written, and whose process was killed before its bytes had left, is in the ledger (as interrupted)
though the upstream never saw it: nobody who is dead can know. The other way round there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import create_engine, select

from conftest import Served, serve
from mock_upstream import Mock
from tertulia.store.schema import ledger
from wire_client import request

CLIENTS = 12
CONFIG = """
chat_model = "mock"
embedding_model = "mock-embedding"
cache = "off"
fold_seconds = 0.05
retry_budget = 10.0
breaker_failures = 1000000
[upstreams.far]
base_url = "{url}"
models = {{"good" = "tokens:5", "bad" = "fault:503@before"}}
[routes.both]
targets = [{{model = "bad", weight = 1.0}}, {{model = "good", weight = 1.0}}]
[aliases]
"m-*" = "good"
"r-*" = "both"
[prices.good]
input = 1.0
output = 1.0
[prices.bad]
input = 1.0
output = 1.0
"""


@dataclass
class Load:
    """Clients that ask as fast as they are answered until the gateway is gone; some leave early."""

    chance: random.Random
    name: str
    sent: int = 0
    answered: int = 0
    labels: list[str] = field(default_factory=list)

    async def run(self, served: Served, seconds: float) -> None:
        """Kills the gateway after so many seconds."""
        host, port = served.root.removeprefix("http://").split(":")
        clients = [asyncio.create_task(self._client(host, int(port), served.api_key)) for _ in range(CLIENTS)]
        await asyncio.sleep(seconds)
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
        await asyncio.gather(*clients)

    async def _client(self, host: str, port: int, key: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                await self._ask(host, port, key)

    async def _ask(self, host: str, port: int, key: str) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            self.sent += 1
            label = f"{self.name}-{self.sent}"
            model = f"r-{label}" if self.chance.random() < 0.2 else f"m-{label}"
            body = {"model": model, "user": label, "max_tokens": 20, "stream": self.chance.random() < 0.5,
                    "messages": [{"role": "user", "content": "Say the tokens."}]}  # fmt: skip
            writer.write(request(key, "chat", body, "connection: close"))
            if self.chance.random() < 0.1:
                await asyncio.sleep(self.chance.uniform(0, 0.03))
                return
            answer = await reader.read()
            if not answer:
                raise ConnectionError  # killed
            self.answered += answer.startswith(b"HTTP/1.1 200")
        finally:
            writer.transport.abort()


@dataclass
class Parity:
    """What the ledger and the upstream say. lost: asked of the upstream, and not in the ledger; twice: entries of an
    attempt that has one; unseen: in the ledger, and not seen by the upstream; of these, unexplained are not those of a
    killed process."""

    kills: int
    sent: int
    answered: int
    upstream: int
    entries: int
    interrupted: int
    lost: int
    twice: int
    unseen: int
    unexplained: int


def compare(data: Path, users: Counter[str], kills: int, loads: list[Load]) -> Parity:
    """The ledger of a server that has stopped, with the upstream's own count by label."""
    engine = create_engine(f"sqlite:///{data / 'tertulia.db'}")
    with engine.connect() as connection:
        columns = ledger.c.call, ledger.c.attempt, ledger.c.asked, ledger.c.outcome
        rows = connection.execute(select(*columns).where(ledger.c.attempt > 0)).all()
    engine.dispose()
    entries = Counter(row.asked[2:] for row in rows)
    interrupted = Counter(row.asked[2:] for row in rows if row.outcome == "interrupted")
    unseen = entries - users
    return Parity(
        kills, sum(load.sent for load in loads), sum(load.answered for load in loads), users.total(), len(rows),
        interrupted.total(), (users - entries).total(), len(rows) - len({(row.call, row.attempt) for row in rows}),
        unseen.total(), (unseen - interrupted).total(),
    )  # fmt: skip


def play(data: Path, upstream: Mock, kills: int, seed: int, longest: float = 0.6) -> Parity:
    """So many rounds of load and a kill; then a start and a stop in order."""
    chance, loads, config = random.Random(seed), [], CONFIG.format(url=upstream.base_url)
    for at in range(kills):
        served = serve(data, config)
        load = Load(chance, f"{seed}-{at}")
        loads.append(load)
        asyncio.run(load.run(served, chance.uniform(0.02, longest)))
    time.sleep(0.2)  # the upstream reads what was on its way
    served = serve(data, config)
    assert served.stop() == 0
    users = Counter(upstream.counts()["users"])
    return compare(data, users, kills, loads)
