"""What one call says to a child, and how the child's answers come back: as plain function calls, a piece at a time.

It knows how requests are spread over the child's slots, paused, cancelled and, when a kept-alive connection turns out
to be dead, sent again; and what the child's errors mean. It knows nothing of prompts or of OpenAI's shapes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from ...core import Call
from ...errors import BadRequest, ContextLengthExceeded, EngineFailed, Overloaded, TertuliaError
from ..connection import Connection, Pool

MEMORY_FULL = "Context size has been exceeded"  # what all calls of a child hear when their common memory is full
AT_ONCE = 0.25  # seconds
EVENT_LIMIT = 16 * 2**20  # bytes of one event, or of one answer that is not a stream


class Child(Protocol):
    """What is needed of a child process; engines.children has the real one."""

    pool: Pool
    headers: bytes
    pool_tokens: int
    slots: int
    context_length: int
    template_knows_tools: bool
    control_tokens: tuple[str, ...]
    longest_token: int


class Listener(Protocol):
    """Who is told of the body of one good answer. Both may raise a TertuliaError, which ends the call."""

    def piece(self, data: bytes) -> None: ...
    def end(self) -> None: ...


class Request(NamedTuple):
    path: bytes
    body: bytes
    listener: Listener
    slots: int = 1  # how many of the child's it takes while it is answered


class _Said(msgspec.Struct):
    message: str = ""
    type: str = ""
    n_prompt_tokens: int = 0
    n_ctx: int = 0


class _Refusal(msgspec.Struct):
    error: _Said


class Refused(Exception):
    """The child gave up in the middle of a stream; the argument is what it said, as JSON."""


_refusal = msgspec.json.Decoder(_Refusal)
_TOO_LARGE = re.compile(
    r"input \((\d+) tokens\) is too large to process.*batch size: (\d+)"
)  # an encoder's, status 500
TooLong = Callable[[int, int], ContextLengthExceeded]  # from (tokens in the prompt, tokens the context holds)


def translate(status: int, body: bytes, param: str, too_long: TooLong) -> TertuliaError:
    """What a child's refusal means to the caller; param is where in the request the prompt is."""
    try:
        said = _refusal.decode(body).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return EngineFailed(f"The engine answered with status {status}.")
    if said.type == "exceed_context_size_error":
        return too_long(said.n_prompt_tokens, said.n_ctx)
    if large := _TOO_LARGE.search(said.message):
        return too_long(int(large[1]), int(large[2]))
    if said.message.startswith(MEMORY_FULL):
        return Overloaded(
            "The model has no memory left for so many long conversations at once. Please try again.", retry_after=1
        )
    if status == 400:
        return BadRequest(said.message, param=param, code="invalid_value")
    if status == 503:
        return Overloaded("The model is still loading. Please try again.", retry_after=1)
    return EngineFailed(f"The engine answered with status {status}.")


class Exchange:
    """The requests of one call. `prompt` names the parameter that holds the prompt, for errors."""

    def __init__(self, call: Call, child: Child, prompt: str, too_long: TooLong) -> None:
        self.call, self.reply = call, call.reply
        self.child = child
        self.over = False
        self.heard = False  # whether the child has answered anything
        self._sent = 0.0
        self._prompt, self._too_long = prompt, too_long
        self._open: set[_Receiver] = set()
        self._left = 0
        self._busy = 0
        self._room = asyncio.Event()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reply.source = self
        self.reply.on_close(self._reply_closed)

    async def run(self, requests: Sequence[Request], finish: Callable[[], None]) -> None:
        """Sends the requests, as many at a time as the child has slots, and returns when all is over, one way or the
        other. finish is called as soon as the last answer is complete, and not at all if the call ended before."""
        self._left, self._finish = len(requests), finish
        try:
            for request in requests:
                while self._busy and self._busy + request.slots > self.child.slots and not self.over:
                    self._room.clear()
                    await self._room.wait()
                if self.over:
                    break
                self._busy += request.slots
                try:
                    await self._send(_Receiver(self, request))
                except EngineFailed as error:
                    if request is requests[0]:
                        raise  # nothing has been asked yet: the caller may try another child
                    self.fail(error)
            await self._ended
        finally:
            self._stop()  # the caller was cancelled, or there was nobody to ask

    async def ask(self, path: bytes, body: bytes) -> bytes:
        """One small question on the way (token counts and the like). Raises the error the child's refusal means."""
        try:
            status, answer = await self.child.pool.fetch("POST", path.decode(), self.child.headers, body)
        except EngineFailed:
            # most likely a kept-alive connection that had just been closed; a question can be repeated
            status, answer = await self.child.pool.fetch("POST", path.decode(), self.child.headers, body)
        if status != 200:
            raise translate(status, answer, self._prompt, self._too_long)
        return answer

    async def _send(self, receiver: _Receiver) -> None:
        pool = self.child.pool
        connection = (None if receiver.again else pool.take()) or await pool.connect()
        if self.over:  # the client left while we connected
            pool.give_back(connection)
            return
        receiver.connection = connection
        self._open.add(receiver)
        if self.reply.paused:
            connection.pause_reading()
        request = receiver.request
        self._sent = asyncio.get_running_loop().time()
        if not self.call.open:  # the first request of an attempt
            self.call.sending()
        connection.send(pool.request(b"POST", request.path, self.child.headers, request.body), receiver)

    def _resend(self, receiver: _Receiver) -> None:
        async def again() -> None:
            try:
                await self._send(receiver)
            except TertuliaError as error:
                self.broken(error)

        self._retry = asyncio.get_running_loop().create_task(again())

    def complete(self, receiver: _Receiver) -> None:
        """One answer is whole."""
        self._open.discard(receiver)
        self._left -= 1
        self._busy -= receiver.request.slots
        if receiver.connection is not None:
            if isinstance(receiver.request.listener, Events):
                receiver.connection.cancel()  # llama.cpp closes it after a stream, whatever its headers say
            else:
                receiver.connection.resume_reading()  # it may serve another call next
        if self._left:
            self._room.set()
            return
        self.over = True
        try:
            self._finish()
        except TertuliaError as error:
            self.reply.fail(error)
        except Exception as error:  # the socket would swallow it, and the call would hang
            self.crash(error)
        if not self._ended.done():
            self._ended.set_result(None)

    def fail(self, error: TertuliaError) -> None:
        """The call cannot be answered: everything still running for it stops, and the reply is told."""
        if not self.over:
            self._stop()
            self.reply.fail(error)

    def broken(self, error: TertuliaError) -> None:
        """A connection ended too early. If that was at once, the child was dying when we asked: run() raises it, and
        another child may be asked. Otherwise it was answering us."""
        if not self.heard and asyncio.get_running_loop().time() - self._sent < AT_ONCE:
            self.crash(error)
        else:
            self.fail(error)

    def refused(self, status: int, said: bytes) -> None:
        self.fail(translate(status, said, self._prompt, self._too_long))

    def crash(self, error: Exception) -> None:
        """Something found in a socket's callback (as a rule a bug of ours) that run() raises, where it is heard."""
        if not self._ended.done():
            self._ended.set_exception(error)
        self._stop()

    def _reply_closed(self, outcome: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.over:
            return
        self.over = True
        for receiver in self._open:
            if receiver.connection is not None:
                receiver.connection.cancel()  # a closed connection is what makes the child stop generating
        self._open.clear()
        self._room.set()
        if not self._ended.done():
            self._ended.set_result(None)

    # flow control: the reply pauses us when its client reads slowly
    def pause_reading(self) -> None:
        for receiver in self._open:
            if receiver.connection is not None:
                receiver.connection.pause_reading()

    def resume_reading(self) -> None:
        for receiver in self._open:
            if receiver.connection is not None:
                receiver.connection.resume_reading()


class _Receiver:
    """Receives the answer to one request."""

    __slots__ = ("_refused", "_status", "again", "connection", "exchange", "request")

    def __init__(self, exchange: Exchange, request: Request) -> None:
        self.exchange, self.request = exchange, request
        self.connection: Connection | None = None
        self.again = False
        self._status = 0
        self._refused = b""

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status
        self.exchange.heard = True

    def piece(self, data: bytes) -> None:
        if self.exchange.over:
            return
        if self._status != 200:
            self._refused = (self._refused + data)[:65536]
            return
        self._tell(self.request.listener.piece, data)

    def _tell(self, what: Callable[..., None], *data: bytes) -> bool:
        try:
            what(*data)
        except TertuliaError as error:
            self.exchange.fail(error)
        except Refused as error:
            self.exchange.refused(500, error.args[0])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.exchange.fail(EngineFailed("The engine's answer was not understood."))
        except Exception as error:  # the socket would swallow it, and the call would hang
            self.exchange.crash(error)
        else:
            return True
        return False

    def end(self) -> None:
        exchange = self.exchange
        if exchange.over:
            return
        if self._status != 200:
            exchange.refused(self._status, self._refused)
            return
        if self._tell(self.request.listener.end):
            exchange.complete(self)

    def broken(self, error: TertuliaError) -> None:
        exchange = self.exchange
        if exchange.over:
            return
        if self._status == 0 and not self.again and self.connection is not None and self.connection.used:
            self.again = True  # the child closed an idle connection just as we took it: that is no failure of the call
            exchange._open.discard(self)
            exchange._resend(self)
        else:
            exchange.broken(EngineFailed())


class Events:
    """A listener that cuts a stream into events; subclasses see() the JSON of each, then flush() once a piece."""

    _rest = b""

    def piece(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        events = data.split(b"\n\n")
        self._rest = events.pop()
        if len(self._rest) > EVENT_LIMIT:
            raise EngineFailed("The engine sent too long an event.")
        for event in events:
            if not event.startswith(b"data: ") or event == b"data: [DONE]":
                continue  # comments keep the connection alive
            if event.startswith(b'data: {"error"'):
                raise Refused(event[6:])
            self.see(event[6:])
        self.flush()

    def see(self, event: bytes) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        if self._rest.strip():
            raise EngineFailed("The engine's stream broke off in the middle of an event.")


class Body:
    """A listener that keeps an answer whole."""

    def __init__(self, then: Callable[[bytes], None]) -> None:
        self._then = then
        self._pieces: list[bytes] = []
        self._size = 0

    def piece(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > EVENT_LIMIT:
            raise EngineFailed("The engine's answer is too long.")
        self._pieces.append(data)

    def end(self) -> None:
        self._then(b"".join(self._pieces))
