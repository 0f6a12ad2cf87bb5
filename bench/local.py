"""What Tertulia costs in front of its own local engine: the same llama.cpp child, through the gateway and directly.

    python bench/local.py [--seconds 12] [--rounds 3] [--out FILE]

One gateway with its children is started; a load generator in a process of its own then speaks in turn to the gateway
and to the child itself (same requests, same sampling), at 1, 4 and 8 concurrent streams, and with embeddings. Printed
are medians over the rounds: tokens/s, time to first token, the ratio gateway/direct; then the gateway's resident memory
without its children, and the time from exec to the first answer of a new server, the model's own load time beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tertulia.engines.connection import Pool
from tertulia.engines.local import Local
from tertulia.inprocess import Background, start

STREAMS = (1, 4, 8)
ANSWER_TOKENS = 96
PROMPT = "Write a long story about a lighthouse keeper who finds a letter. Describe the sea, the storm and the letter."
TEXT = "The lighthouse stood on the last rock before the open sea, and nobody had visited it for a year."


def request(kind: str, number: int, direct: bool) -> tuple[str, dict[str, object]]:
    """The path and body of one request; the direct one says the same in llama.cpp's words."""
    if kind == "embeddings":
        return "/v1/embeddings", {"model": "all-minilm-l6-v2", "input": [f"{number} {i} {TEXT}" for i in range(16)]}
    body: dict[str, object] = {
        "model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": f"{number}. {PROMPT}"}],
        "max_tokens": ANSWER_TOKENS, "temperature": 0.8, "top_p": 0.9, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if direct:
        body |= {"top_k": 0, "min_p": 0}
    return "/v1/chat/completions", body


async def one(pool, headers: bytes, kind: str, number: int, direct: bool) -> tuple[int, float]:
    """(tokens, seconds to the first of them) of one request."""
    path, body = request(kind, number, direct)
    watch = Watch(asyncio.get_running_loop().create_future())
    await pool.send(b"POST", path.encode(), headers, json.dumps(body).encode(), watch)
    data = await watch.done
    found = re.findall(rb'"(?:completion_tokens|prompt_tokens)":\s*(\d+)', data)
    if not found:
        raise SystemExit(f"no usage in the answer: {data[:300]!r}")
    counts = dict(re.findall(rb'"(completion_tokens|prompt_tokens)":\s*(\d+)', data))
    return int(counts[b"completion_tokens" if kind == "chat" else b"prompt_tokens"]), watch.first - watch.began


class Watch:
    """Receives one answer, noting when its first content came."""

    def __init__(self, done: asyncio.Future[bytes]) -> None:
        self.done, self.began, self.first, self.pieces = done, time.perf_counter(), 0.0, []

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if status != 200:
            print("status", status, file=sys.stderr)

    def piece(self, data: bytes) -> None:
        if not self.first and ((b'"content":"' in data and b'"content":""' not in data) or b"embedding" in data):
            self.first = time.perf_counter()
        self.pieces.append(data)

    def end(self) -> None:
        self.done.set_result(b"".join(self.pieces))

    def broken(self, error: Exception) -> None:
        self.done.set_exception(error)


async def load(base: str, key: str, kind: str, streams: int, seconds: float, direct: bool) -> dict[str, float]:
    pool = Pool(base, idle_limit=0)  # llama.cpp closes after a stream, whatever it says: a new connection each
    headers = f"authorization: Bearer {key}\r\ncontent-type: application/json\r\n".encode()
    await one(pool, headers, kind, 0, direct)
    stop, tokens, firsts = time.perf_counter() + seconds, 0, []
    began = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal tokens
        while time.perf_counter() < stop:
            number += 1000
            count, first = await one(pool, headers, kind, number, direct)
            tokens += count
            firsts.append(first)

    await asyncio.gather(*(client(number) for number in range(streams)))
    return {"tokens_per_s": tokens / (time.perf_counter() - began), "first_ms": statistics.median(firsts) * 1000}


async def first_answer(base: str, key: str) -> None:
    await one(
        Pool(base), f"authorization: Bearer {key}\r\ncontent-type: application/json\r\n".encode(), "chat", 0, False
    )


def measure(base: str, key: str, kind: str, streams: int, seconds: float, direct: bool) -> dict[str, float]:
    """One load from a process of its own."""
    command = [sys.executable, __file__, "--load", json.dumps([base, kind, streams, seconds, direct])]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "BENCH_TOKEN": key}, check=True
    )
    return json.loads(done.stdout)


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def compare(options: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as data, start(**with_models(data, options)) as server:
        for kind, streams in [*(("chat", n) for n in STREAMS), ("embeddings", 1), ("embeddings", 4)]:
            if options.only not in (None, kind):
                continue
            model = "smollm2-135m-instruct" if kind == "chat" else "all-minilm-l6-v2"
            warm_up(server, kind)
            child_base, child_key = child_of(server, model)
            seen: dict[bool, list[dict[str, float]]] = {True: [], False: []}
            for turn in range(options.rounds):
                for direct in (True, False) if turn % 2 else (False, True):
                    base, key = (child_base, child_key) if direct else (server.base_url[:-3], server.api_key)
                    seen[direct].append(measure(base, key, kind, streams, options.seconds, direct))
            row: dict[str, object] = {"kind": kind, "streams": streams}
            for name in ("tokens_per_s", "first_ms"):
                for direct, label in ((False, "tertulia"), (True, "direct")):
                    row[f"{label}_{name}"] = round(statistics.median(run[name] for run in seen[direct]), 1)
            pairs = zip(seen[False], seen[True], strict=True)
            row["ratio"] = round(statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs), 3)
            rows.append(row)
            print(
                f"{kind:11}{streams:8}{row['tertulia_tokens_per_s']:12}{row['direct_tokens_per_s']:12}{row['ratio']:8}"
                f"{row['tertulia_first_ms']:14}{row['direct_first_ms']:12}",
                flush=True,
            )
    return rows


def warm_up(server: Background, kind: str) -> None:
    """Loads the model."""
    path, body = request(kind, 0, False)
    asking = urllib.request.Request(
        server.base_url[:-3] + path, json.dumps(body).encode(), {"authorization": f"Bearer {server.api_key}"}
    )
    urllib.request.urlopen(asking, timeout=120).read()


def child_of(server: Background, model: str) -> tuple[str, str]:
    """(base URL, secret) of the engine child behind a model: private to the server, which a benchmark may know."""
    local = next(engine for engine in server._server.engines if isinstance(engine, Local))
    child = next(child for child in local._children.loaded() if child.card.id == model)
    return f"http://{child.pool.host}:{child.pool.port}", child.headers.split(b"Bearer ")[1].split(b"\r\n")[0].decode()


def with_models(data: str, options: argparse.Namespace) -> dict[str, object]:
    source = Path(options.data).expanduser().absolute()
    (Path(data) / "models").symlink_to(source / "models")
    return {"data": data, "preload": True}


def cold(options: argparse.Namespace) -> dict[str, float]:
    """A new server: seconds from exec to the first answer, to the first health check, and its memory."""
    with tempfile.TemporaryDirectory() as data:
        with_models(data, options)
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "tertulia", "serve", "--data", data, "--port", "0"],
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TERTULIA_API_KEY": "sk-bench-0123456789abcdef"},
        )  # fmt: skip
        try:
            base = ""
            while not base:
                found = re.search(r"http://\S+(?=/v1)", process.stdout.readline())
                base = found[0] if found else ""
            listens = time.perf_counter() - began
            asyncio.run(first_answer(base, "sk-bench-0123456789abcdef"))
            answered = time.perf_counter() - began
            asyncio.run(load(base, "sk-bench-0123456789abcdef", "embeddings", 4, 5, False))
            asyncio.run(load(base, "sk-bench-0123456789abcdef", "chat", 8, 5, False))
            return {"listens_s": listens, "first_answer_s": answered, "gateway_rss_mb": resident_mb(process.pid)}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def engine_alone(options: argparse.Namespace) -> float:
    """The model's own load time: seconds from exec of the engine child to its first answer of the same request."""
    from tertulia.config import load as load_settings
    from tertulia.engines.children import Children
    from tertulia.server import LocalModels, shelf_of

    async def work() -> float:
        settings = load_settings({"data": options.data})
        models = LocalModels(settings, shelf_of(settings))
        children = Children(settings, models.path)
        began = time.perf_counter()
        child = await children.running(models.cards["smollm2-135m-instruct"])
        path, body = request("chat", 0, True)
        await child.pool.fetch("POST", path, child.headers, json.dumps(body).encode(), 120)
        took = time.perf_counter() - began
        await children.close()
        return took

    return asyncio.run(work())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12, help="length of one load")
    parser.add_argument("--only", help="measure only this: chat or embeddings")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each kind, of which the median counts")
    parser.add_argument(
        "--data", default="~/.local/share/tertulia", help="directory whose models/ has the default models"
    )
    parser.add_argument("--out", help="file for the figures as JSON")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        base, kind, streams, seconds, direct = json.loads(options.load)
        print(json.dumps(asyncio.run(load(base, os.environ["BENCH_TOKEN"], kind, streams, seconds, direct))))
        return
    print(f"{'':11}{'streams':>8}{'tertulia/s':>12}{'direct/s':>12}{'ratio':>8}{'first ms':>14}{'direct ms':>12}")
    rows = compare(options)
    starts = [{**cold(options), "engine_alone_s": engine_alone(options)} for _ in range(options.rounds)]
    start = {name: statistics.median(each[name] for each in starts) for name in starts[0]}
    print({name: round(value, 2) for name, value in start.items()})
    if options.out:
        Path(options.out).write_text(json.dumps({"rows": rows, "start": start}, indent=1))


main()
