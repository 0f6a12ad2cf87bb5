"""The seam to whatever answers a call. An engine knows nothing of keys, limits, HTTP requests or storage: it is given
a Call whose body is decoded and checked, and pushes bytes into its Reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Protocol

from ..core import FINISHED, Call, ModelCard


class Engine(Protocol):
    """What answers calls for one or more models.

    answer(call) looks at call.target.model, call.asked and call.body. It returns None when the call is handed over or
    done, or, where it has to wait first, an awaitable that is (an async function does). Either way the answer arrives
    through call.reply (begin, push, close; fail on any error, or raise a TertuliaError before begin). When call.reply
    closes for another reason (client left, deadline), the engine's own on_close hook stops the work at once. Pieces of
    a stream are whole server-sent events in OpenAI's shape, the last of them `data: [DONE]`; another answer is one
    piece of JSON in OpenAI's shape.

    An engine that is an upstream has more, for the names: named, offer and identity (see Upstream).
    """

    name: str  # as the log has it: an upstream's own, else local or mock

    def answer(self, call: Call) -> Awaitable[None] | None: ...

    def models(self) -> Sequence[ModelCard]: ...

    async def ready(self, model: str) -> bool: ...

    async def close(self) -> None: ...


class Collector:
    """A Sink in memory, for callers that are not HTTP clients: await done(), then read status and body; or iterate."""

    def __init__(self) -> None:
        self.status = 0
        self.pieces: list[bytes] = []
        self.outcome: str | None = None
        self._news = asyncio.Event()

    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        self.status = status
        self.pieces.clear()

    def write(self, data: bytes) -> None:
        self.pieces.append(data)
        self._news.set()

    def end(self, outcome: str) -> None:
        self.outcome = outcome
        self._news.set()

    def whole(self, headers: Sequence[bytes], data: bytes) -> None:
        self.begin(200, headers)
        self.write(data)
        self.end(FINISHED)

    async def done(self) -> bytes:
        """Waits for the end and returns the whole body."""
        while self.outcome is None:
            self._news.clear()
            await self._news.wait()
        return b"".join(self.pieces)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at = 0
        while True:
            while at < len(self.pieces):
                at += 1
                yield self.pieces[at - 1]
            if self.outcome is not None:
                return
            self._news.clear()
            await self._news.wait()
