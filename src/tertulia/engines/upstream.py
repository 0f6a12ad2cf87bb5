"""An engine that is another server: any base URL that speaks the OpenAI API. Bytes pass through untouched; only the
model name is rewritten, and only where the upstream calls the model something else.

Its key is sent to its own address alone; redirects are not followed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from ..core import FINISHED, Call, ModelCard, Reply
from ..errors import EngineFailed, TertuliaError
from .connection import Connection, Pool, Stale

ANSWER_LIMIT = 64 * 2**20  # bytes of an answer that is not a stream
EVENT_LIMIT = 4 * 2**20  # bytes of one server-sent event
_PATHS = {"chat": b"/chat/completions", "completion": b"/completions", "embedding": b"/embeddings"}
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode = msgspec.json.Encoder().encode


class _Error(msgspec.Struct):
    error: dict[str, object]


_error = msgspec.json.Decoder(_Error)


class UpstreamRefused(TertuliaError):
    """The upstream refused the request."""

    def __init__(self, status: int, answer: bytes, retry: tuple[tuple[str, str], ...]) -> None:
        super().__init__(headers=retry)
        self.status, self._answer = status, answer

    def body(self) -> bytes:
        return self._answer


class Upstream:
    """One upstream with its models: our name to its name."""

    def __init__(
        self,
        name: str,
        base_url: str,
        models: Mapping[str, str],
        key: str | None = None,
        organization: str | None = None,
        project: str | None = None,
        connect_timeout: float = 5.0,
        timeout: float = 600.0,
    ) -> None:
        """timeout: seconds without a byte of the answer after which a call is given up."""
        self.name = name
        self.pool = Pool(base_url, connect_timeout=connect_timeout)
        self._models = dict(models)
        self._timeout = timeout
        head = [("content-type", "application/json"), ("user-agent", "tertulia")]
        for header, value in (
            ("authorization", f"Bearer {key}" if key else None),
            ("openai-organization", organization),
            ("openai-project", project),
        ):
            if value:
                head.append((header, value))
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in head).encode("latin-1")

    def models(self) -> Sequence[ModelCard]:
        return [
            ModelCard(id=ours, kind="chat", source=f"upstream:{self.name}", owned_by=self.name) for ours in self._models
        ]

    async def ready(self, model: str) -> bool:
        return True  # an upstream is asked when it is needed

    async def close(self) -> None:
        self.pool.close()

    async def answer(self, call: Call) -> None:
        target = call.target
        assert target is not None
        theirs = self._models[target.model]
        body = call.body
        if theirs != call.asked.model:
            fields = _fields.decode(body)
            fields["model"] = msgspec.Raw(_encode(theirs))
            body = _encode(fields)
        request = self.pool.request(b"POST", _PATHS[call.task.name], self._headers, body)
        passing = _Passing(self.pool, request, call.reply, call.stream, self._timeout)
        call.reply.on_close(passing.stop)
        await passing.ask()


class _Passing:
    """Receives the upstream's answer and pushes it: a stream in whole events, anything else as one piece."""

    __slots__ = (
        "again", "connection", "done", "heard", "now", "pool", "reply", "request", "rest", "retry", "size", "status",
        "stream", "timeout", "timer",
    )  # fmt: skip

    def __init__(self, pool: Pool, request: bytes, reply: Reply, stream: bool, timeout: float) -> None:
        self.pool, self.request, self.reply, self.stream, self.timeout = pool, request, reply, stream, timeout
        self.status = 0
        self.rest: list[bytes] = []  # bytes after the last whole event, or the pieces of an answer so far
        self.size = 0
        self.connection: Connection | None = None
        self.retry: tuple[tuple[str, str], ...] = ()
        self.done = False  # the upstream has said all it will say
        loop = asyncio.get_running_loop()
        self.now = loop.time
        self.heard = self.now()
        self.timer = loop.call_at(self.heard + timeout, self.check_silence)

    async def ask(self, fresh: bool = False) -> None:
        """Sends the request, on a connection that is there unless fresh."""
        connection = (None if fresh else self.pool.take()) or await self.pool.connect()
        if self.reply.closed:  # the client left while we connected
            self.pool.give_back(connection)
            return
        self.reply.source = self.connection = connection
        connection.send(self.request, self)
        if self.reply.paused:
            connection.pause_reading()

    def stop(self, outcome: str) -> None:
        self.timer.cancel()
        if not self.done and self.connection is not None:
            self.connection.cancel()

    def check_silence(self) -> None:
        """Gives up when nothing has come for too long; a client that reads slowly is not the upstream's silence."""
        loop = asyncio.get_running_loop()
        if self.reply.paused:
            self.heard = loop.time()
        if loop.time() - self.heard < self.timeout:
            self.timer = loop.call_at(self.heard + self.timeout, self.check_silence)
            return
        self._give_up(EngineFailed(f"The upstream said nothing for {self.timeout:g} seconds."))

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.heard = self.now()
        if status == 200:
            if self.stream:
                self.stream = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
            if self.stream:
                self.reply.begin(200)
            return
        self.stream = False
        wanted = (b"retry-after", b"retry-after-ms", b"x-should-retry")
        self.retry = tuple((n.decode("latin-1"), v.decode("latin-1")) for n, v in headers if n in wanted)

    def piece(self, data: bytes) -> None:
        self.heard = self.now()
        if self.stream:
            if self.rest or not data.endswith(b"\n\n"):
                data = self._whole(data)
            if data:
                self.reply.push(data)
            return
        self.size += len(data)
        if self.size > ANSWER_LIMIT:
            self._give_up(EngineFailed("The upstream's answer is too long."))
            return
        self.rest.append(data)

    def _whole(self, data: bytes) -> bytes:
        """The whole events in what has come; the rest waits."""
        if self.rest:
            self.rest.append(data)
            data = b"".join(self.rest)
            self.rest.clear()
        cut = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4, data.rfind(b"\r\r") + 2)
        cut = 0 if cut < 5 else cut
        if cut < len(data):
            self.rest.append(data[cut:])
            if len(data) - cut > EVENT_LIMIT:
                self._give_up(EngineFailed("The upstream sent too long an event."))
                return b""
        return data[:cut]

    def _give_up(self, error: TertuliaError) -> None:
        self.done = True
        if self.connection is not None:
            self.connection.cancel()
        self.reply.fail(error)

    def end(self) -> None:
        self.done = True
        reply = self.reply
        if self.stream:
            if self.rest:
                reply.push(b"".join(self.rest) + b"\n\n")
            reply.close(FINISHED)
        elif self.status == 200:
            reply.stream = False
            reply.begin(200)
            reply.push(b"".join(self.rest))
            reply.close(FINISHED)
        else:
            reply.fail(self._refusal(b"".join(self.rest)))

    def _refusal(self, body: bytes) -> TertuliaError:
        if self.status in (401, 403) or not 400 <= self.status < 600:
            return EngineFailed(f"The upstream answered with status {self.status}.")
        try:
            _error.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return EngineFailed(f"The upstream answered with status {self.status}.")
        return UpstreamRefused(self.status, body, self.retry)

    def broken(self, error: TertuliaError) -> None:
        if isinstance(error, Stale) and not self.reply.closed:
            self.again = asyncio.get_running_loop().create_task(self._ask_again())
            return
        self.done = True
        self.reply.fail(error)

    async def _ask_again(self) -> None:
        """On a new connection, once: only one that had carried a request before can be stale."""
        try:
            await self.ask(fresh=True)
        except TertuliaError as error:
            self.reply.fail(error)
