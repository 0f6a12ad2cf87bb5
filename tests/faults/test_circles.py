"""What is over is gone: when a call has ended and its connections are closed, nothing of them refers to itself, so that
memory comes back at once and not when the collector of garbage, which has been made calm, finds the time.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any

import pytest

import mock_upstream
from tertulia.inprocess import Background, start
from wire_client import HEALTH, ask, body_of, request

TIMES = 5
MODELS = (
    "tokens:5", "tokens:40", "fault:500@before", "fault:429@before", "fault:cut@2", "fault:cut@before", "fault:stall@2",
    "fault:garbage@2", "fault:hang@before",
)  # fmt: skip
OURS = ("tertulia", "uvicorn", "httptools", "uvloop")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    """A server of this process, whose objects can be looked at; its upstream is another one."""
    with mock_upstream.started("--gap", "0.01") as mock:
        far = {"base_url": mock.base_url, "models": {name: name for name in MODELS}}
        gone = {"base_url": "http://127.0.0.1:1/v1", "models": {"refused": "x"}}
        routes = {
            "on": {"targets": [{"model": "fault:cut@2"}], "fallback": ["tokens:5"], "on_break": "continue"},
            "elsewhere": {"targets": [{"model": "fault:500@before"}], "fallback": ["tokens:5"]},
        }
        settings = {
            "chat_model": "mock", "embedding_model": "mock-embedding", "upstreams": {"far": far, "gone": gone},
            "routes": routes, "request_timeout": 1.0, "breaker_failures": 10**6, "retries": 1, "retry_budget": 1.0,
            "heartbeat": 0.2,
        }  # fmt: skip
        with start(data=str(tmp_path_factory.mktemp("circles")), **settings) as background:
            yield background


class Calls:
    """Clients of the server, as raw bytes; nothing they hold is the server's."""

    def __init__(self, server: Background) -> None:
        self.port, self.key = int(server.base_url.rpartition(":")[2].partition("/")[0]), server.api_key

    def sent(self, model: str, stream: bool = False, task: str = "chat", *headers: str, **more: Any) -> bytes:
        return request(self.key, task, body_of(task, model, stream, **more), *headers)

    async def kept(self, sent: bytes, times: int = 3) -> None:
        """The same request again and again on one connection, then a good-bye."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for _ in range(times):
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            if b"chunked" in head:
                await reader.readuntil(b"0\r\n\r\n")
            else:
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        writer.close()

    async def left(self, sent: bytes, after: bytes = b"tok1") -> None:
        """A client that leaves in the middle; after: what it waits for."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        if after:
            await reader.readuntil(after)
        else:
            await asyncio.sleep(0.05)
        writer.transport.abort()


async def kept_alive(calls: Calls) -> None:
    for stream in (False, True):
        for model in ("mock", "tokens:5"):
            await calls.kept(calls.sent(model, stream))
    await calls.kept(calls.sent("mock-embedding", task="embeddings"))
    await calls.kept(calls.sent("tokens:5", task="completions", stream=True))


async def refused(calls: Calls) -> None:
    await calls.kept(calls.sent("nobody"))
    await calls.kept(calls.sent("tokens:5", temperature="warm"))
    await calls.kept(calls.sent("tokens:5").replace(calls.key.encode(), b"sk-wrong"))
    await ask(calls.port, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
    await calls.left(b"BAD\r\n\r\n", b"\r\n\r\n")


async def broken(calls: Calls) -> None:
    for model in ("fault:500@before", "fault:429@before", "fault:cut@before", "refused"):
        await calls.kept(calls.sent(model), 1)
        await calls.kept(calls.sent(model, True), 1)
    for model in ("fault:cut@2", "fault:garbage@2"):
        await calls.kept(calls.sent(model, True), 2)


async def late(calls: Calls) -> None:
    await calls.kept(calls.sent("fault:hang@before"), 1)
    await calls.kept(calls.sent("fault:stall@2", True), 1)


async def client_left(calls: Calls) -> None:
    await calls.left(calls.sent("tokens:40", True))
    await calls.left(calls.sent("fault:stall@2", True))
    await calls.left(calls.sent("fault:hang@before"), b"")
    await calls.left(calls.sent("tokens:40", True) * 3)  # those behind it were waiting for their turn
    await calls.left(calls.sent("tokens:5")[:-5], b"")
    await calls.left(b"", b"")


async def shared(calls: Calls) -> None:
    sent = calls.sent("tokens:40", True, temperature=0)
    await asyncio.gather(*(calls.kept(sent, 2) for _ in range(4)), calls.left(sent))
    await asyncio.gather(*(calls.kept(calls.sent("tokens:40", temperature=0), 2) for _ in range(4)))


async def routed(calls: Calls) -> None:
    for model in ("on", "elsewhere"):
        await calls.kept(calls.sent(model, True), 2)
        await calls.left(calls.sent(model, True), b"data:")
    await calls.kept(calls.sent("elsewhere"), 2)


async def cold(calls: Calls) -> None:
    for _ in range(3):
        await ask(calls.port, HEALTH)
    await calls.kept(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    await calls.left(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n\r\n")


def settled(server: Background) -> bool:
    inner = server._server
    return not (inner.front.connections or inner.meter.in_flight)


def what(found: Any) -> str | None:
    """What of ours a piece of garbage is."""
    if isinstance(found, FrameType):
        return f"frame {found.f_code.co_qualname}" if "/tertulia/" in found.f_code.co_filename else None
    kind = type(found)
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__module__.startswith(OURS) else None


@pytest.mark.parametrize("scenario", [kept_alive, refused, broken, late, client_left, shared, routed, cold])
def test_nothing_refers_to_itself(server: Background, scenario: Callable[[Calls], Coroutine[Any, Any, None]]) -> None:
    async def go(times: int) -> None:
        for _ in range(times):
            await scenario(Calls(server))
        until = time.monotonic() + 5
        while not settled(server) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)  # closed sockets are let go a turn of the loop later

    asyncio.run(go(1))  # what is made once, and stays
    assert settled(server)
    gc.collect()
    gc.disable()
    try:
        asyncio.run(go(2 if scenario in (late, broken, routed) else TIMES))
        assert settled(server)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = Counter(name for name in map(what, gc.garbage) if name)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found, found.most_common()
