"""What becomes of one request to an upstream: the answer is checked and pushed, or there is a typed error.

Whole receives an answer in one piece, Stream one in server-sent events. Bytes pass as they came, in whole events; but
everything that passes has been read as JSON once (0.4 us an event, 1 ns a byte of an answer), so that what is not
an answer never reaches a caller as one. It knows nothing of keys, models or addresses.

Time is bounded three ways. Until an answer begins: its first event, or the first byte of its body (comments, heads and
white space, which servers send to keep a connection alive, are no beginning). Then between two events (comments are
none); for an answer in one piece, from its first byte to its last. And the whole attempt, where the upstream has such a
limit. While the caller reads too slowly to be sent more, the upstream's silence is not counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, Protocol

import msgspec

from ..core import FINISHED, Call, Usage
from ..errors import BadUpstreamAnswer, EngineFailed, TertuliaError, UpstreamTimeout
from . import sse
from .answers import (
    Answer,
    Choice,
    Chunk,
    Headers,
    WireUsage,
    parse_answer,
    parse_chunk,
    parse_object,
)
from .connection import BODY_LIMIT, Connection, Pool, Stale
from .timeouts import Timeouts

DONE = b"data: [DONE]\n\n"


class Limits(Protocol):
    """What of an upstream an attempt needs."""

    pool: Pool
    first: Timeouts[Any]
    stall: Timeouts[Any]
    total: Timeouts[Any] | None

    def refused(self, status: int, headers: Headers, body: bytes) -> TertuliaError: ...
    def reported(self, error: Any) -> TertuliaError: ...


class Attempt:
    """One request, and what Whole and Stream have in common: sending, time, failing. over: nothing of it matters any
    more; whoever sets it has taken it out of every limit of time."""

    __slots__ = (
        "again", "began", "body", "call", "connection", "headers", "limits", "over", "pieces", "reply", "request",
        "size", "status", "waiting",
    )  # fmt: skip

    def __init__(self, limits: Limits, call: Call, request: bytes, body: bytes) -> None:
        """body is what does not travel in request, being too large to join."""
        self.limits, self.call, self.reply, self.request, self.body = limits, call, call.reply, request, body
        self.connection: Connection | None = None
        self.waiting: Timeouts[Any] | None = None
        self.over = self.began = False
        self.status = self.size = 0
        self.headers: Headers = ()
        self.pieces: list[bytes] = []

    def start(self) -> Awaitable[None] | None:
        """Sends it at once, or, if a connection must be made first, in the awaitable, which may raise EngineFailed."""
        self.reply.on_close(self.stop)
        if self.limits.total is not None:
            self.limits.total.add(self)
        connection = self.limits.pool.take()
        if connection is None:
            return self._connect()
        self._send(connection)
        return None

    async def _connect(self) -> None:
        try:
            connection = await self.limits.pool.connect()
        except BaseException:  # cancellation too: nothing may expire afterwards
            self._release()
            raise
        if self.over:  # the client left while we connected
            self.limits.pool.give_back(connection)
        else:
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        reply = self.reply
        if self.over:  # it had ended when it came here
            self.limits.pool.give_back(connection)
            return
        try:
            self.call.sending()
        except BaseException:  # it cannot be accounted for, and is not sent
            self.limits.pool.give_back(connection)
            self._release()
            raise
        self.connection = reply.source = connection
        self.waiting = self.limits.first
        self.waiting.add(self)
        connection.send(self.request, self, self.body, self.taker())  # type: ignore[arg-type]
        if reply.paused:
            connection.pause_reading()

    def taker(self) -> Callable[[bytes], None] | None:
        """Who takes an answer that comes in one read."""
        return None

    def _release(self) -> None:
        self.over = True
        if self.waiting is not None:
            self.waiting.remove(self)
        if self.limits.total is not None:
            self.limits.total.remove(self)
        self.reply.source = None  # the connection may be another call's next

    def stop(self, outcome: str) -> None:
        """The call has ended; if that is not our doing the upstream stops working for it."""
        if not self.over:
            self._release()
            self._leave()
            self.account(cut=True)

    def fail(self, error: TertuliaError) -> None:
        if not self.over:
            self._release()
            self._leave()
            self.account()
            self.reply.fail(error)

    def _leave(self) -> None:
        if self.connection is not None:
            self.connection.cancel()
            self.connection = None

    def account(self, cut: bool = False) -> None:
        """Says what was used, where the upstream has not and something was. cut: it was we who broke the answer off,
        and the upstream may well have gone on."""

    # time
    def no_beginning(self) -> None:
        if self._excused(self.limits.first):
            return
        self.fail(
            UpstreamTimeout(f"The upstream did not begin its answer within {self.limits.first.seconds:g} seconds.")
        )

    def stalled(self) -> None:
        if not self._excused(self.limits.stall):
            self.fail(UpstreamTimeout(f"The upstream said nothing for {self.limits.stall.seconds:g} seconds."))

    def too_long(self) -> None:
        assert self.limits.total is not None
        seconds = self.limits.total.seconds
        self.fail(UpstreamTimeout(f"The upstream took longer than {seconds:g} seconds for its answer."))

    def _excused(self, limit: Timeouts[Any]) -> bool:
        """A client that reads slowly is not the upstream's silence."""
        if self.reply.paused:
            limit.add(self)
        return self.reply.paused

    def _begin(self) -> None:
        """The answer has begun: from now on it must not stall."""
        self.began = True
        self.limits.first.remove(self)
        self.waiting = self.limits.stall
        self.waiting.add(self)

    # from the connection
    def head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers

    def collect(self, data: bytes) -> None:
        """Keeps a piece of what is no stream."""
        self.size += len(data)
        if self.size > BODY_LIMIT:
            self.fail(BadUpstreamAnswer("The upstream's answer is too long."))
            return
        self.pieces.append(data)
        if not self.began and not self.connection.complete and not data.isspace():  # type: ignore[union-attr]
            self._begin()

    def broken(self, error: TertuliaError) -> None:
        self.connection = None
        if self.over:
            return
        if isinstance(error, Stale):
            self.limits.first.remove(self)
            if not self.call.lost(error):
                self.fail(error)
                return
            self.again = asyncio.get_running_loop().create_task(self._ask_again())
        else:
            self.fail(error)

    async def _ask_again(self) -> None:
        """On a new connection, once: only one that had carried a request before can be stale."""
        try:
            self._send(await self.limits.pool.connect())
        except TertuliaError as error:
            if self.over:  # it could not be accounted for
                self.reply.fail(error)
            else:
                self.fail(error)


class Whole(Attempt):
    """An answer in one piece."""

    __slots__ = ()

    def piece(self, data: bytes) -> None:
        self.collect(data)

    def taker(self) -> Callable[[bytes], None]:
        return self.whole

    def account(self, cut: bool = False) -> None:
        """What it would have said nobody knows, or whether it has. Where that costs money, it is what was reserved for
        it: at most."""
        call = self.call
        if call.open and ((cut and self.status in (0, 200)) or (self.status == 200 and call.hold)):
            output = call.output_tokens if call.hold else 0
            self.reply.usage = Usage(call.prompt_tokens, output, estimated=True)

    def end(self) -> None:
        if self.over:
            return
        body = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        if self.status == 200:
            self.whole(body)
            return
        self.connection = None
        self._release()
        self.reply.fail(self.limits.refused(self.status, self.headers, body))

    def whole(self, body: bytes) -> None:
        """All of an answer with status 200."""
        if self.over:
            return
        self.connection = None
        self._release()
        try:
            answer = read_answer(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.account()
            self.reply.fail(BadUpstreamAnswer("The upstream's answer is not JSON."))
            return
        if answer.error:
            self.reply.fail(self.limits.reported(answer.error))
            return
        reply = self.reply
        if answer.usage is not None:
            reply.usage = counted(answer.usage)
        reply.whole(body)


class Stream(Attempt):
    """An answer in server-sent events. hide: its usage was asked for by us, not by the caller, who must not see it;
    choices: how many of them must finish for the answer to be whole."""

    __slots__ = ("_finished", "_framer", "_said_done", "_sse", "_timer", "choices", "events", "hide", "known", "spoke")

    def __init__(self, limits: Limits, call: Call, request: bytes, body: bytes, hide: bool, choices: int) -> None:
        super().__init__(limits, call, request, body)
        self.hide, self.choices = hide, choices
        self.events = 0  # with something generated in them
        self.known = False  # whether the upstream has said its usage
        self.spoke = 0.0  # when its last event came; comments are none
        self._finished = 0
        self._framer = sse.Framer()
        self._sse = self._said_done = False
        self._timer: asyncio.TimerHandle | None = None

    def head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers
        self._sse = status == 200 and any(
            name == b"content-type" and value.lower().startswith(b"text/event-stream") for name, value in headers
        )

    def piece(self, data: bytes) -> None:
        if self.over:
            return
        if not self._sse:
            self.collect(data)
            return
        try:
            data = self._framer.feed(data)
        except BadUpstreamAnswer as error:
            self.fail(error)
            return
        if data:
            self._pass(data)

    def _pass(self, data: bytes) -> None:
        """Pushes whole events."""
        if data.startswith(b"data: {") and data.find(b"\n") == len(data) - 2:
            try:  # one event, as nearly every piece is
                chunk = parse_chunk(data[6:])
            except (msgspec.MsgspecError, UnicodeDecodeError):
                pass
            else:
                if not chunk.error and self._note(chunk):
                    self.reply.push(data)
                    return
        self._look(data)

    def _note(self, chunk: Chunk) -> bool:
        """Remembers what a chunk says; False if the caller must not see it."""
        self.spoke = monotonic()
        if not self.began:
            self._begin()
        if chunk.usage is not None:
            self.reply.usage = counted(chunk.usage)
            self.known = True
        if chunk.choices:
            self.events += 1
            for choice in chunk.choices:
                if choice.finish_reason is not None:
                    self._finished += 1
            return True
        return not (self.hide and chunk.usage is not None)

    def _look(self, data: bytes) -> None:
        """Several events, or odd ones: what is good before a bad one still passes."""
        if not self.began and data.startswith(sse.BOM):
            data = data[len(sse.BOM) :]
        kept: list[bytes] = []
        swallowed, error = False, None
        for event in sse.split(data):
            try:
                keep = self._event(event)
            except TertuliaError as found:
                error = found
                break
            if keep:
                kept.append(event)
            else:
                swallowed = True
        if swallowed or error is not None:
            data = b"".join(event + b"\n\n" for event in kept)
        if kept:
            if self.began:
                self.reply.push(data)
            else:
                self.reply.beat(data)  # comments: a sign of life that commits nobody
        if error is not None:
            self.fail(error)
        elif self._said_done and not self.over and self.connection is not None and not self.connection.complete:
            self._finish_early(self.connection)

    def _finish_early(self, connection: Connection) -> None:
        """The last event has come: whether the upstream ends its answer properly is not the caller's to wait for."""
        self.connection = None
        self._release()
        connection.let_finish()
        self.account()
        self.reply.close(FINISHED)

    def _event(self, event: bytes) -> bool:
        """Whether an event passes. Raises the error it is or tells of."""
        if self._said_done:
            return False  # the answer is over; whatever this is belongs to nobody
        try:
            data = sse.data_of(event)
            if data is None or data == b"[DONE]":
                if data is not None:
                    self._said_done = True
                    if not self.began:
                        self._begin()
                return True
            chunk = read_chunk(data)
        except (ValueError, msgspec.MsgspecError):  # UnicodeDecodeError is a ValueError
            raise BadUpstreamAnswer("The upstream sent an event that is not JSON.") from None
        if chunk.error:
            raise self.limits.reported(chunk.error)
        return self._note(chunk)

    def end(self) -> None:
        self.connection = None
        if self.over:
            return
        if not self._sse:
            self._release()
            self.reply.fail(self._no_stream())
            return
        rest = self._framer.rest()
        if rest.strip():
            self._look(rest + b"\n\n")
        if self.over:
            return
        if self._said_done or self._all_finished():
            self._release()
            self.account()
            if not self._said_done:
                self.reply.push(DONE)  # some servers leave it out
            self.reply.close(FINISHED)
        elif not self.events:
            self.fail(BadUpstreamAnswer("The upstream's stream ended without an answer."))
        else:
            self.fail(EngineFailed("The upstream ended its stream before the answer was complete."))

    def _all_finished(self) -> bool:
        return self._finished >= self.choices

    def _no_stream(self) -> TertuliaError:
        body = b"".join(self.pieces)
        if self.status != 200:
            return self.limits.refused(self.status, self.headers, body)
        try:
            error = parse_object(body).error
        except (msgspec.MsgspecError, UnicodeDecodeError):
            error = None
        if error:
            return self.limits.reported(error)
        return BadUpstreamAnswer("The upstream answered a stream with something else.")

    def account(self, cut: bool = False) -> None:
        if (self.events or (cut and self.call.open and self.status in (0, 200))) and not self.known:
            self.reply.usage = Usage(self.call.prompt_tokens, self.events, estimated=True)

    def _release(self) -> None:
        super()._release()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stalled(self) -> None:
        """Looks when the last event came. The rest of its time is waited for on a timer of its own, since the others in
        the limit have all of theirs before them; there is one for each stream that is longer than the limit."""
        self._timer = None
        if self.over:
            return
        if self.reply.paused:
            self.spoke = monotonic()
        left = self.spoke + self.limits.stall.seconds - monotonic()
        if left > 0.01:
            self._timer = asyncio.get_running_loop().call_later(left, self.stalled)
        else:
            super().stalled()


def read_chunk(data: bytes) -> Chunk:
    """One event's data. Raises DecodeError if it is no JSON object; of one in an unknown shape only `error` is read."""
    try:
        return parse_chunk(data)
    except msgspec.ValidationError:
        return Chunk([Choice()], None, parse_object(data).error)


def read_answer(data: bytes) -> Answer:
    """As read_chunk, for an answer in one piece."""
    try:
        return parse_answer(data)
    except msgspec.ValidationError:
        return Answer(None, parse_object(data).error)


def counted(usage: WireUsage) -> Usage:
    """Usage as we know it."""
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        usage.prompt_tokens or 0,
        usage.completion_tokens or 0,
        (prompt.cached_tokens or 0) if prompt is not None else 0,
        (completion.reasoning_tokens or 0) if completion is not None else 0,
        cache_write_tokens=(prompt.cache_write_tokens or 0) if prompt is not None else 0,
    )
