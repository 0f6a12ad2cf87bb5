"""What a large history costs: seeds keys and rows of the ledger into a new data directory, and measures

    python bench/ledger.py DATA [--keys 100000] [--rows 10000000] [--fold 100000] [--rounds 5]

the start until the first answer (beside that of an empty directory), a month's usage grouped by project and model and
other queries over HTTP, the CPU time that moving an entry from the journal into the database takes, and that of a
request, beside a server with 1,000 keys of the same 200 projects and no rows: the server has one processor, who asks
and who answers another; 64 connections, of which each takes another of 1,000 keys, drawn from all there are, with each
request; what the server does with the entries afterwards counts. The rows are of the last 30 days, of 200 projects and
12 models; SQLite writes them itself, with the sums that go with them. What DATA has been seeded with is used again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import secrets
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from stand import Stand, connect, standing

from tertulia.accounts.entry import Entry
from tertulia.accounts.fold import FIGURES, month_of
from tertulia.accounts.keys import digest, pepper
from tertulia.accounts.ledger import Ledger, writer_name
from tertulia.config import load
from tertulia.server import Server
from tertulia.store.database import open_database
from tertulia.store.journal import PLACE

DAYS, PROJECTS, MODELS = 30, 200, 12
DAY, HOUR = 86400, 3600
CONFIG = 'chat_model = "mock"\nembedding_model = "mock-embedding"\nport = 0\n'
ADMIN = "sk-admin-bench-0123456789abcdef"
LENT, CONNECTIONS, REQUESTS = 1000, 64, 60_000


def seed(data: Path, keys: int, rows: int) -> None:
    """One key of each project makes most of the calls; the rest are of its other keys."""
    server = Server(load({"data": str(data), "admin_key": ADMIN}, {}))
    organization, project = server.directory.home()
    server.database.dispose()
    with sqlite3.connect(data / "tertulia.db") as connection:
        connection.execute("PRAGMA cache_size = -400000")
        first = connection.execute("SELECT owner_id FROM api_keys WHERE project_id = ?", (project,)).fetchone()
        connection.executemany(
            "INSERT INTO records SELECT ?, kind, parent, NULL, created_at, NULL, 1, body FROM records WHERE id = ?",
            [(f"proj_{at:024x}", project) for at in range(PROJECTS)],
        )
        connection.executemany(
            "INSERT INTO api_keys VALUES (?,'project',?,?,?,?,?,'sk-...',NULL,0,NULL,NULL,NULL,1)",
            (
                (f"key_{at:024x}", organization, f"proj_{at % PROJECTS:024x}", *first, f"key {at}", os.urandom(32))
                for at in range(keys)
            ),
        )
        began = time.monotonic()
        if rows:
            seed_rows(connection, writer_name(data), keys, rows)
    with sqlite3.connect(data / "tertulia.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if rows:
        print(f"{rows:,} rows and {keys:,} keys seeded in {time.monotonic() - began:.0f} s")
    (data / "seeded").touch()


def seed_rows(connection: sqlite3.Connection, writer: str, keys: int, rows: int) -> None:
    """As if this writer, and no other, had folded all of them."""
    now = int(time.time())
    connection.execute("INSERT INTO writers VALUES (1, ?, ?)", (writer, (rows * 400 >> PLACE) + 1 << PLACE))
    connection.execute(
        f"""
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}),
        drawn AS MATERIALIZED (
            SELECT i, abs(random() % {PROJECTS}) p, abs(random() % {MODELS}) m, abs(random() % 10) k,
                abs(random() % {max(1, keys // PROJECTS)}) other, abs(random() % 1000) tokens FROM n
        )
        INSERT INTO ledger
        SELECT (1 << 52) | i * 400, {now - DAYS * DAY} + i * {DAYS * DAY} / {rows}, printf('req_%032x', i), 1,
            printf('key_%024x', p + {PROJECTS} * (CASE WHEN k = 0 THEN other ELSE 0 END)), printf('proj_%024x', p),
            'chat', 'model-' || m, 'model-' || m, 'far', 200, 'finished', 500, 1000 + tokens, tokens, 0, 0,
            150000 + tokens * 750, 'stream', NULL
        FROM drawn
        """
    )
    sums = "count(*), sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(reasoning_tokens), sum(cost)"
    figures = ", ".join(FIGURES)
    connection.execute(
        f"INSERT INTO usage_hours (hour, project_id, key_id, kind, model, {figures}) "
        f"SELECT at - at % {HOUR}, project_id, key_id, 'completions', model, {sums} FROM ledger GROUP BY 1, 2, 3, 4, 5"
    )
    sums = ", ".join(f"sum({name})" for name in FIGURES)
    connection.execute(
        f"INSERT INTO usage_days (day, project_id, kind, model, {figures}) "
        f"SELECT hour - hour % {DAY}, project_id, kind, model, {sums} FROM usage_hours GROUP BY 1, 2, 3, 4"
    )


class Running:
    """`tertulia serve` on a data directory; seconds: from its start to its first answer."""

    def __init__(self, data: Path) -> None:
        data.mkdir(parents=True, exist_ok=True)
        (data / "bench.toml").write_text(CONFIG)
        began = time.monotonic()
        command = [sys.executable, "-m", "tertulia", "serve", "--config", str(data / "bench.toml"), "--data", str(data)]
        environment = {**os.environ, "TERTULIA_ADMIN_KEY": ADMIN}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.url = next(line.split()[-1] for line in self.process.stdout if "answers on http" in line)
        urllib.request.urlopen(self.url.removesuffix("/v1") + "/healthz").read()
        self.seconds = time.monotonic() - began

    def ask(self, path: str) -> tuple[float, bytes]:
        """Seconds, and the answer."""
        asked = urllib.request.Request(self.url + path, headers={"authorization": f"Bearer {ADMIN}"})
        began = time.perf_counter()
        with urllib.request.urlopen(asked) as answer:
            data = answer.read()
        return time.perf_counter() - began, data

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def measure(data: Path) -> None:
    with tempfile.TemporaryDirectory() as empty:
        Running(Path(empty)).stop()  # makes the tables
        show_start("empty", Path(empty)).stop()
    running = show_start("seeded", data)
    month, now = int(time.time()) - DAYS * DAY, int(time.time())
    by = "group_by[]=project_id&group_by[]=model"
    for name, path in (
        ("month by project and model", f"/organization/usage/completions?start_time={month}&limit=31&{by}"),
        ("month, sum", f"/organization/usage/completions?start_time={month}&limit=31"),
        ("month's costs by project", f"/organization/costs?start_time={month}&limit=31&group_by[]=project_id"),
        ("week by the hour", f"/organization/usage/completions?start_time={now - 7 * DAY}&bucket_width=1h&limit=168"),
        ("month by key", f"/organization/usage/completions?start_time={month}&limit=31&group_by[]=api_key_id"),
        ("day by the minute", f"/organization/usage/completions?start_time={now - DAY}&bucket_width=1m&limit=1440"),
    ):
        times = sorted(running.ask(path)[0] for _ in range(5))
        answer = running.ask(path)[1]
        results = answer.count(b'.result"')
        print(f"{name:28} {times[2] * 1000:8.0f} ms (median of 5), {results:,} results, {len(answer) / 1e6:.1f} MB")
    running.stop()


def show_start(name: str, data: Path) -> Running:
    """The median of five; the last one goes on running."""
    seconds = []
    for at in range(5):
        running = Running(data)
        seconds.append(running.seconds)
        if at < 4:
            running.stop()
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    print(
        f"{f'start, {name} directory':28} {statistics.median(seconds):8.2f} s (median of 5), {max(seconds):.2f} s at "
        f"worst, {int(resident) / 1024:.0f} MB resident"
    )
    return running


def fold(data: Path, count: int) -> None:
    """In a process that is as the server is: what is loaded is frozen."""
    chance, now = random.Random(1), time.time() - 5 * DAY  # a start counts what was asked in the last minute
    with contextlib.closing(Ledger(data, open_database(data))) as ledger:
        assert ledger.fold is not None
        for at in range(count):
            key = chance.randrange(1000)
            entry = Entry(
                f"req_{secrets.token_hex(16)}", 1, now + at / 2000, f"key_{key:024x}", f"proj_{key % PROJECTS:024x}",
                "chat", "model-1", "model-1", 200, "finished", 12.34, True, 25, 10, cost=12345, cache="miss",
                client="127.0.0.1", target="far",
            )  # fmt: skip
            intent = ledger.intend(
                entry.id, 1, entry.key, entry.project, "chat", "model-1", "model-1", "far", 25, 12345
            )
            ledger.append(entry, intent)
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        began, cpu = time.monotonic(), time.process_time()
        ledger.catch_up()
        cpu, seconds = time.process_time() - cpu, time.monotonic() - began
        print(
            f"fold                         {cpu / count * 1e6:8.2f} us of CPU an entry, {seconds / count * 1e6:.2f} us"
        )
        began = time.monotonic()
        spent = ledger.spent()
        took = (time.monotonic() - began) * 1000
        print(f"spent since {time.strftime('%Y-%m-%d', time.gmtime(month_of(now)))}       {took:8.0f} ms, "
              f"{len(spent)} projects")  # fmt: skip


def lent(data: Path) -> list[str]:
    """Keys that we know, in the place of some that were seeded, drawn from all of them."""
    found = data / "lent.txt"
    if not found.exists():
        keys, secret = [f"sk-proj-{secrets.token_urlsafe(32)}" for _ in range(LENT)], pepper(data / "secret")
        with sqlite3.connect(data / "tertulia.db") as connection:
            ids = connection.execute("SELECT id FROM api_keys WHERE name LIKE 'key %' ORDER BY id").fetchall()
            rows = [
                (digest(key.encode(), secret), id) for key, (id,) in zip(keys, random.sample(ids, LENT), strict=True)
            ]
            connection.executemany("UPDATE api_keys SET hash = ? WHERE id = ?", rows)
        found.write_text("\n".join(keys))
    return found.read_text().split()


async def ask(stand: Stand, keys: list[str], count: int) -> None:
    body = {"model": "far", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 20}
    sent = [stand.request("chat", body, key=key) for key in keys]

    async def ask_on(first: int) -> None:
        client = await connect(stand)
        for at in range(first, count, CONNECTIONS):
            if await client.ask(sent[at * 7 % len(sent)]) != 200:
                raise SystemExit(f"an answer that was not expected: {client.tail!r}")
        client.transport.close()

    await asyncio.gather(*[ask_on(first) for first in range(CONNECTIONS)])


def cpu_per_request(data: Path) -> float:
    """Microseconds."""
    keys = lent(data)
    with standing({"far": "far"}, [], "fold_seconds = 1.0", seeded=data) as stand:
        for task in Path(f"/proc/{stand.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended, or there is only one processor
                os.sched_setaffinity(int(task.name), {0})
        asyncio.run(ask(stand, keys, 4 * LENT))
        time.sleep(3)
        before = stand.cpu_seconds()
        asyncio.run(ask(stand, keys, REQUESTS))
        time.sleep(3)  # until all is in the database
        return (stand.cpu_seconds() - before) / REQUESTS * 1e6


def side_by_side(data: Path, rounds: int) -> None:
    """One after the other, again and again: what else the machine does changes meanwhile."""
    few, many = [], []
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {1})
    with tempfile.TemporaryDirectory() as place:
        seed(Path(place), LENT, 0)
        for _ in range(rounds):
            few.append(cpu_per_request(Path(place)))
            many.append(cpu_per_request(data))
            print(f"  {few[-1]:6.1f} {many[-1]:6.1f} us of CPU a request", flush=True)
    for name, found in ((f"{LENT:,} keys, no rows", few), ("seeded directory", many)):
        print(f"{'request, ' + name:38} {statistics.median(found):6.1f} us of CPU (median), {min(found):.1f} at best")
    print(f"ratio {statistics.median(many) / statistics.median(few):.2f}, of the best {min(many) / min(few):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--fold", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not (options.data / "seeded").exists():
        seed(options.data, options.keys, options.rows)
    measure(options.data)
    fold(options.data, options.fold)
    side_by_side(options.data, options.rounds)


if __name__ == "__main__":
    main()
