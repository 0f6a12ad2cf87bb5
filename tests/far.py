"""A scripted HTTP server in the test's own loop, and calls to an Upstream of it without a gateway in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvloop

from tertulia import config
from tertulia.api import chat, completions, embeddings
from tertulia.core import NOBODY, Call, Reply, Target
from tertulia.engines.base import Collector
from tertulia.engines.upstream import Upstream
from tertulia.errors import TertuliaError

ANSWER = b'{"id":"x",  "object":"chat.completion","odd":[1, 2 ,3],"usage":{"prompt_tokens":3,"completion_tokens":4}}'
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHAT = {"model": "far", "messages": [{"role": "user", "content": "hi"}]}


def event(text: str | None = "x", finish: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    chunk = {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}
    return b"data: %s\n\n" % json.dumps(chunk, separators=(",", ":")).encode()


USAGE = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = [event("one"), event("two"), event(None, "stop"), DONE]


def whole(body: bytes, status: str = "200 OK", extra: bytes = b"") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n".encode()
    return head + extra + b"\r\n" + body


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece)


def stream(*pieces: bytes, end: bool = True) -> bytes:
    return SSE + b"transfer-encoding: chunked\r\n\r\n" + chunked(*pieces) + (b"0\r\n\r\n" if end else b"")


class Far:
    """Reads one request after another and answers each with `script`: bytes, or a function of the connection."""

    def __init__(self) -> None:
        self.script: bytes | Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] = whole(ANSWER)
        self.requests: list[bytes] = []
        self.connections = 0
        self.left = asyncio.Event()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                self.requests.append(head + await reader.readexactly(length))
                if callable(self.script):
                    await self.script(reader, writer)
                else:
                    writer.write(self.script)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, RuntimeError):  # RuntimeError: uvloop, on a closed one
            pass
        finally:
            self.left.set()
            writer.close()

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].partition(b"\r\n\r\n")[2])


class Setup:
    """An upstream server, the engine that asks it, and calls."""

    def __init__(self, far: Far, upstream: Upstream) -> None:
        self.far, self.upstream = far, upstream

    def call(self, body: dict[str, Any], task: str = "chat", raw: bytes | None = None) -> tuple[Call, Collector]:
        def resolve(call: Call, model: str) -> None:
            card = next(card for card in self.upstream.models() if card.id == model)
            call.target = Target(self.upstream, model, card)

        tasks = {"chat": chat, "completion": completions, "embedding": embeddings}
        sink = Collector()
        reply = Reply(sink)
        call = Call("req_1", NOBODY, tasks[task].task(resolve), raw or json.dumps(body).encode(), reply, 0)
        call.prompt_tokens = len(call.body) // 4  # as admit estimates
        call.task.check(call)
        reply.stream = call.stream
        return call, sink

    async def go(self, call: Call) -> None:
        """As the pipeline does: an error that is raised ends in the reply."""
        try:
            rest = self.upstream.answer(call)
            if rest is not None:
                await rest
        except TertuliaError as error:
            call.reply.fail(error)

    async def ask(self, task: str = "chat", **more: Any) -> tuple[Reply, bytes]:
        call, sink = self.call({**CHAT, **more} if task == "chat" else {"model": "far", **more}, task)
        await self.go(call)
        async with asyncio.timeout(10):
            return call.reply, await sink.done()


@contextlib.asynccontextmanager
async def far_side(
    key: str | None = "sk-far", tls: ssl.SSLContext | None = None, base: str = "http://127.0.0.1:{port}/v1",
    environment: dict[str, str] | None = None, **settings: Any,
) -> AsyncIterator[Setup]:  # fmt: skip
    far = Far()
    server = await asyncio.start_server(far.serve, "127.0.0.1", 0, ssl=tls)
    far.port = server.sockets[0].getsockname()[1]
    settings = {"models": {"far": "theirs"}, **settings}
    upstream = Upstream("u", config.Upstream(base_url=base.format(port=far.port), **settings), key, environment or {})
    try:
        yield Setup(far, upstream)
    finally:
        await upstream.close()
        server.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    uvloop.run(bounded())
