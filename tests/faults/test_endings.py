"""A call ended at each piece, in every way, through a real server to a real upstream: the upstream's connection is
closed at once, the ledger and the access log have one entry each, and it is true. Then clients that stop reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import mock_upstream
from conftest import Served, serve
from wire_client import body_of, request

TOKENS = 5  # of an answer
WAYS = {"finished": "finished", "broke": "failed", "left": "client_left", "deadline": "deadline", "stopped": "stopped"}
AT_ONCE = 0.2  # seconds from an end to the moment the upstream's connection is closed
PATIENCE = 1.2  # request_timeout where the deadline is what ends a call
WHOLE = -1  # an answer in one piece, ended before it


@dataclass(frozen=True)
class Case:
    """way: how it ends; at: after so many tokens."""

    way: str
    task: str
    at: int

    @property
    def name(self) -> str:
        return f"{self.way}-{self.task}-{'whole' if self.at == WHOLE else self.at}"

    @property
    def stream(self) -> bool:
        return self.at != WHOLE

    @property
    def theirs(self) -> str:
        """The model that makes the mock do what the case needs."""
        place = "before" if self.at == WHOLE else self.at
        if self.way == "finished":
            return f"tokens:{self.at if self.stream else TOKENS}/{self.name}"
        fault = "cut" if self.way == "broke" else "stall" if self.stream else "hang"
        return f"fault:{fault}@{place}/{self.name}"


CASES = [Case(way, task, at) for way in WAYS for task in ("chat", "completions") for at in range(WHOLE, TOKENS + 1)]
CASES += [Case(way, "embeddings", WHOLE) for way in WAYS]
SETTINGS = """
chat_model = "mock"
embedding_model = "mock-embedding"
access_log = "{data}/access.log"
request_timeout = {timeout}
retries = 0
breaker_failures = 100000
cache = "off"
coalesce = false
[upstreams.far]
base_url = "{url}"
models = {{ {models} }}
"""


def configuration(data: Path, url: str, timeout: float) -> str:
    models = ", ".join(f'"{case.name}" = "{case.theirs}"' for case in CASES)
    return SETTINGS.format(data=data, url=url, timeout=timeout, models=models)


class Client:
    """One call over a socket: what came, and when the last of it did."""

    def __init__(self, served: Served, case: Case) -> None:
        self.port, self.case = int(served.root.rpartition(":")[2]), case
        self.sent = request(served.api_key, case.task, body_of(case.task, case.name, case.stream))
        self.got = b""
        self.ended = 0.0

    async def begin(self) -> None:
        """Sends, and reads until the tokens are there after which the case ends."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(self.sent)
        if self.case.at > 0:
            while f" tok{self.case.at - 1}".encode() not in self.got:
                data = await asyncio.wait_for(self.reader.read(65536), 10)
                assert data, self.got
                self.got += data
        else:
            await asyncio.sleep(0.4)  # until it waits for its upstream

    async def read_on(self) -> None:
        """To the end of the answer."""
        with contextlib.suppress(ConnectionError):
            while not self.complete and (data := await asyncio.wait_for(self.reader.read(65536), 10)):
                self.got += data
        self.ended = time.monotonic()
        self.writer.close()

    @property
    def complete(self) -> bool:
        head, _, rest = self.got.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        return len(rest) >= int(length[1]) if length else self.got.endswith(b"0\r\n\r\n")

    def leave(self) -> None:
        self.ended = time.monotonic()
        self.writer.close()


@dataclass
class World:
    """What became of every case."""

    clients: dict[Case, Client]
    upstream: dict[str, list[dict[str, Any]]]  # the mock's records by model
    ledger: dict[str, list[dict[str, Any]]]  # by the model asked
    log: dict[str, list[dict[str, Any]]]

    def record(self, case: Case) -> dict[str, Any]:
        (record,) = self.upstream[case.theirs]
        return record


async def play(patient: Served, hurried: Served, clients: dict[Case, Client]) -> None:
    """All cases at once; those that a stop ends come last, with the stop."""
    first = [client for case, client in clients.items() if case.way != "stopped"]
    await asyncio.gather(*(client.begin() for client in first))
    for client in first:
        if client.case.way == "left":
            client.leave()
    await asyncio.gather(*(client.read_on() for client in first if client.case.way != "left"))
    last = [client for case, client in clients.items() if case.way == "stopped"]
    await asyncio.gather(*(client.begin() for client in last))
    stopped = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):  # the second one at once, without grace
        patient.process.send_signal(number)
        await asyncio.sleep(0.2)
    await asyncio.gather(*(client.read_on() for client in last))
    assert time.monotonic() - stopped < 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with mock_upstream.started("--chunks", str(TOKENS), "--gap", "0.005") as mock:
        directories = [tmp_path_factory.mktemp(name) for name in ("patient", "hurried")]
        patient, hurried = (
            serve(data, configuration(data, mock.base_url, timeout))
            for data, timeout in zip(directories, (60.0, PATIENCE), strict=True)
        )
        clients = {case: Client(hurried if case.way == "deadline" else patient, case) for case in CASES}
        try:
            asyncio.run(play(patient, hurried, clients))
            assert patient.process.wait(10) == 0
        finally:
            patient.stop()
            assert hurried.stop() == 0
        upstream: dict[str, list[dict[str, Any]]] = {}
        for record in mock.requests():
            upstream.setdefault(record["model"], []).append(record)
    written = [by_model([data / name for data in directories]) for name in ("ledger/000001.jsonl", "access.log")]
    yield World(clients, upstream, *written)


def by_model(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """The lines of ledgers or access logs, by the model asked."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry["asked"], []).append(entry)
    return found


each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each
def test_the_upstream_sees_the_end_at_once(world: World, case: Case) -> None:
    record = world.record(case)
    if case.way in ("finished", "broke"):
        assert record["end"] == ("finished" if case.way == "finished" else "broken")
        return
    assert record["end"] == "cancelled"
    assert record["ended"] - world.clients[case].ended < AT_ONCE
    if case.way == "deadline":
        assert record["ended"] - record["began"] < PATIENCE + AT_ONCE


@each
def test_the_client_sees_the_true_end(world: World, case: Case) -> None:
    got = world.clients[case].got
    if case.way == "finished":
        assert got.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" in got or not case.stream
    elif case.way in ("broke", "deadline"):
        code = b"engine_failed" if case.way == "broke" else b"deadline_exceeded"
        assert got.count(b'"error":') == got.count(code) == 1 and b"[DONE]" not in got
        status = b"200" if case.at > 0 else b"502" if case.way == "broke" else b"504"
        # a chat begins with a piece that has no token yet
        assert got[9:12] == (b"200" if case.at == 0 and case.task == "chat" else status)
    else:  # it sees the connection cut: an answer that is not whole must not look whole
        assert b"[DONE]" not in got and not got.endswith(b"0\r\n\r\n")
    if case.stream:
        assert len(re.findall(rb" tok\d", got)) == case.at


@each
def test_the_ledger_and_the_log_have_the_true_end_once(world: World, case: Case) -> None:
    (entry,), (line,) = world.ledger[case.name], world.log[case.name]
    for found in (entry, line):
        assert found["outcome"] == WAYS[case.way] and found.get("stream", False) == case.stream
    prompt, tokens = entry.get("prompt_tokens", 0), entry.get("completion_tokens", 0)
    if case.way == "finished":
        assert prompt == mock_upstream.PROMPT_TOKENS
        assert tokens == (0 if case.task == "embeddings" else case.at if case.stream else TOKENS)
    elif not case.stream and case.way != "broke":  # we cut it: its engine had read the prompt
        assert prompt > 0 and entry["estimated"] and tokens == 0
    elif case.at > 0:  # its engine has not said how many: they are counted by whoever passed them on
        assert max(1, case.at // 2) <= tokens <= 2 * case.at and prompt > 0
    else:
        assert tokens <= 1  # the piece a chat begins with holds none


# ---- clients that stop reading

CROWD, SIZE = 200, 10_000_000
BOUND = 100e6  # bytes the server may grow by: one read and what flow control lets pass, some 330 KB a stream


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settle(mock: mock_upstream.Mock, seconds: float = 30) -> int:
    """Waits until the upstream gets rid of no more; how many bytes it has sent."""
    deadline, before = time.monotonic() + seconds, -1
    while (now := mock.counts()["bytes"]) != before or now == 0:
        assert time.monotonic() < deadline, "the upstream goes on sending what nobody reads"
        before = now
        time.sleep(1)
    return int(now)


def until(true: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def read_to_the_end(wire: socket.socket) -> tuple[int, bytes]:
    wire.settimeout(30)
    size, last = 0, b""
    while not last.endswith(b"0\r\n\r\n"):
        data = wire.recv(2**20)
        assert data, "cut off"
        size, last = size + len(data), (last + data)[-200:]
    return size, last


def test_clients_that_stop_reading_pause_their_upstreams(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        mock = stack.enter_context(mock_upstream.started())
        text = SETTINGS.format(
            data=tmp_path, url=mock.base_url, timeout=120.0, models=f'flood = "flood:{SIZE}", a = "a"'
        )
        served = serve(tmp_path, text)
        stack.callback(served.stop)
        address = ("127.0.0.1", int(served.root.rpartition(":")[2]))
        before, wires = resident(served.process.pid), []
        for _ in range(CROWD):
            wire = stack.enter_context(socket.socket())
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.connect(address)
            wire.sendall(request(served.api_key, "chat", body_of("chat", "flood", True)))
            wires.append(wire)
        sent = settle(mock)
        grown = resident(served.process.pid) - before
        print(f"{CROWD} streams: {sent / 1e6:.0f} of {CROWD * SIZE / 1e6:.0f} MB sent, grown by {grown / 1e6:.1f} MB")
        assert sent < CROWD * SIZE * 0.9, "hardly paused"  # the system's own buffers hold megabytes a connection
        assert grown < BOUND
        began = time.monotonic()
        served.client().chat.completions.create(**body_of("chat", "a"))
        assert time.monotonic() - began < 2
        # what the system's buffers took whole of a stream is the upstream's no more: such a stream has finished early
        early = mock.counts()["ends"].get("finished", 0)
        assert early < CROWD / 2
        closed = time.monotonic()
        for wire in wires[10:]:
            wire.close()
        for wire in wires[:10]:  # who reads again gets everything
            size, last = read_to_the_end(wire)
            assert size > SIZE * 0.99 and b"[DONE]" in last
        assert until(lambda: "open" not in mock.counts()["ends"])
        records = mock.requests(f"flood:{SIZE}")
        ends = [record["end"] for record in records]
        cancelled = ends.count("cancelled")
        assert ends.count("finished") + cancelled == CROWD and cancelled >= CROWD - 10 - early
        assert all(record["ended"] - closed < 1 for record in records if record["end"] == "cancelled")
