"""What the load scripts stand on: a mock upstream, a server in front of it configured as bench/serve does (1,000 keys,
limits, ledger, access log, metrics), and a client on raw sockets that costs little. It knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MOCK = HERE.parent / "tests" / "mock_upstream.py"
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}
SETTINGS = """
chat_model = "mock"
embedding_model = "mock-embedding"
preload = false
requests_per_minute = 100_000_000
tokens_per_minute = 100_000_000_000
spend_limit = 1_000_000.0
access_log = "{data}/access.log"
{more}
[upstreams.far]
base_url = "http://127.0.0.1:{port}/v1"
models = {{ {models} }}
{after}
[prices.far]
input = 0.15
output = 0.60
"""


@dataclass
class Stand:
    """A running server: where, its key, and its process."""

    port: int
    key: str
    process: subprocess.Popen[str]

    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def request(self, task: str, body: dict[str, Any], *headers: str, key: str = "") -> bytes:
        data = json.dumps(body).encode()
        lines = [
            f"POST {PATHS[task]} HTTP/1.1", "host: bench", f"authorization: Bearer {key or self.key}",
            "content-type: application/json", f"content-length: {len(data)}", *headers, "", "",
        ]  # fmt: skip
        return "\r\n".join(lines).encode() + data


@contextlib.contextmanager
def standing(
    models: dict[str, str], mock: list[str], more: str = "", after: str = "", seeded: Path | None = None
) -> Iterator[Stand]:
    """models: our name to the mock's; mock: its arguments; more: plain settings; after: tables of settings; seeded: a
    data directory that is there, and whose keys the caller knows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        data = str(seeded) if seeded else stack.enter_context(tempfile.TemporaryDirectory())
        upstream = subprocess.Popen([sys.executable, str(MOCK), *mock], stdout=subprocess.PIPE, text=True)
        stack.callback(_end, upstream, signal.SIGKILL)
        assert upstream.stdout is not None
        port = int(upstream.stdout.readline().split()[-1])
        key = f"sk-bench-{secrets.token_hex(16)}"
        if seeded is None:
            environment = {**os.environ, "BENCH_KEY": key}
            subprocess.run([sys.executable, str(HERE / "seed.py"), data], env=environment, check=True)
        named = ", ".join(f'"{ours}" = "{theirs}"' for ours, theirs in models.items())
        config = Path(data) / "bench.toml"
        config.write_text(SETTINGS.format(data=data, port=port, models=named, more=more, after=after))
        server = subprocess.Popen(
            [sys.executable, "-m", "tertulia", "serve", "--data", data, "--port", "0", "--config", str(config)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(_end, server, signal.SIGTERM)
        assert server.stdout is not None
        found = None
        while found is None:
            line = server.stdout.readline()
            if not line:
                raise SystemExit("the server did not start")
            found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        yield Stand(int(found[1]), key, server)


def _end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    process.send_signal(how)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


class Told(Exception):
    """The answer is not what was expected; says what came."""


class Client(asyncio.Protocol):
    """A connection for one request after another; whoever asks waits for the whole answer, of which the end is kept."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.status = 0
        self.size = 0
        self.tail = b""
        self._head = b""
        self._left: int | None = None  # bytes of the body still to come; None: until the last chunk
        self._done: asyncio.Future[None] | None = None
        self._stop_at = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(Told(f"the connection was closed after {self.size} bytes: {self.tail[-200:]!r}"))

    def data_received(self, data: bytes) -> None:
        if not self.status:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self.status = int(head[9:12])
            length = re.search(rb"content-length: (\d+)", head)
            self._left = int(length[1]) if length else None
        self.size += len(data)
        self.tail = (self.tail + data)[-400:]
        if self._left is not None:
            self._left -= len(data)
            over = self._left <= 0
        else:
            over = self.tail.endswith(b"\r\n0\r\n\r\n")
        if self._done is not None and not self._done.done() and (over or self.size > self._stop_at > 0):
            self._done.set_result(None)

    async def ask(self, sent: bytes, stop_at: int = 0) -> int:
        """The status, when the answer is whole or has more than stop_at bytes. Raises Told if it is cut off."""
        if self.transport.is_closing():
            raise Told("the connection is closed")
        self.status, self.size, self.tail, self._head, self._stop_at = 0, 0, b"", b"", stop_at
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(sent)
        await self._done
        return self.status


async def connect(stand: Stand) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", stand.port)
    return client


def metric(stand: Stand, name: str) -> float:
    """The sum of a metric's samples."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{stand.port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def clock(began: float) -> str:
    return f"{time.monotonic() - began:6.0f} s"
