"""One request on a hot path and its answer: what its head says, the Call made of it, and the bytes of the Reply. How
requests come in is http's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic, perf_counter_ns
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from .. import direct
from ..accounts import scopes
from ..accounts.directory import Directory, check_kind
from ..core import CLIENT_LEFT, FAILED, FINISHED, NO_WISHES, NOBODY, STOPPED, Call, Principal, Reply, Task
from ..direct import OUTBOX
from ..errors import BadRequest, TertuliaError, TooLarge
from ..gateway.pipeline import Pipeline
from ..gateway.shared import NOWHERE
from ..turns import CLOCK, Turns
from .edge import WISHES, identify, request_id, standard_headers, wishes

IDLE: Final = "idle"  # what a connection is doing
READING: Final = "reading"
ANSWERING: Final = "answering"
LEAVING: Final = "leaving"


class Line:
    """What each request on a connection looks at; the rest is its Protocol's. more: something is to be done when the
    answer under way has ended, other than to wait for the next request; paused: the client reads more slowly than we
    write."""

    __slots__ = (
        "directory", "file", "known", "max_body", "more", "paused", "peer", "phase", "pipeline", "protocol", "since",
        "transport", "turns",
    )  # fmt: skip

    def __init__(self, protocol: Any, pipeline: Pipeline, directory: Directory, turns: Turns, max_body: int) -> None:
        """max_body in bytes."""
        self.protocol, self.pipeline, self.directory = protocol, pipeline, directory
        self.turns, self.max_body = turns, max_body
        self.transport: Any = None
        self.file = -1  # the socket's, where bytes can be written past the transport
        self.peer = ""
        self.phase = READING  # a new connection owes us a request
        self.since = monotonic()  # when that began
        self.more, self.paused = True, False
        self.known: Repeated | None = None  # the head that came last

    def read(self, data: bytes) -> None:
        """What the transport has received."""
        if self.phase != IDLE or self.known is None or not take_repeated(self, self.known, data):
            self.protocol.take(data)


class Head:
    """What the request line and headers of a message say, as far as a hot path goes by it."""

    __slots__ = ("headers", "keep_alive", "length", "old", "refusal", "task", "version", "who", "wishes")

    def __init__(self, task: Task, headers: list[tuple[bytes, bytes]], old: bool, keep_alive: bool) -> None:
        """old: HTTP/1.0."""
        self.task, self.headers, self.old, self.keep_alive = task, headers, old, keep_alive
        self.wishes = NO_WISHES
        self.refusal: TertuliaError | None = None
        self.length: int | None = None
        self.who = NOBODY  # whose key it is, and the version of the directory that said so
        self.version = 0
        for name, value in headers:
            if name == b"content-length" and value.isdigit():
                self.length = int(value)
            elif name in WISHES:
                self.wishes = wishes(headers)
            elif name == b"content-encoding" and value.lower() != b"identity":
                self.refusal = BadRequest("Compressed request bodies are not supported.")

    def identify(self, directory: Directory) -> Principal:
        """Whose key it is; who and version remember it for when the same head comes again. Raises Unauthorized,
        Forbidden, or Unavailable."""
        version: int = directory.version  # before it is asked: a change meanwhile must not count as seen
        who = identify(directory, self.headers)
        check_kind(who, "project")
        scopes.check(who, "POST", self.task.path)
        directory.roles.check_use(who, "POST", self.task.path)
        self.who, self.version = who, version
        return who


class Repeated:
    """A head in its bytes, as its sender will most likely send it again on the same connection: everything but the
    number in Content-Length is the same. Such a message needs no parser; what the bytes mean is known already."""

    __slots__ = ("at", "head", "prefix", "suffix", "suffix_size")

    def __init__(self, head: Head, prefix: bytes, suffix: bytes) -> None:
        self.head, self.prefix, self.at, self.suffix, self.suffix_size = head, prefix, len(prefix), suffix, len(suffix)


ONLY_ONCE = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"content-encoding"})  # heads with them are parsed


def repeated(raw: bytes, head: Head) -> Repeated | None:
    """The head as it may come again, or None if it holds what must be looked at each time. raw ends in the empty line
    and was found valid by the parser."""
    lengths = 0
    for name, value in head.headers:
        if name in ONLY_ONCE or (name == b"connection" and value.lower() != b"keep-alive"):
            return None
        lengths += name == b"content-length"
    if lengths != 1 or head.old or not head.keep_alive or head.refusal is not None:
        return None
    at = raw.lower().find(b"\r\ncontent-length:") + 17
    end = raw.find(b"\r\n", at)
    value = raw[at:end].lstrip(b" ")
    if not value.isdigit():
        return None
    return Repeated(head, raw[: end - len(value)], raw[end:])


class Exchange:
    """One request on a hot path and its answer; the Sink of its Reply, and to uvicorn a cycle like its own."""

    __slots__ = (
        "_answer",
        "_body",
        "_due",
        "_lines",
        "_size",
        "_status",
        "arrived",
        "began",
        "current",
        "disconnected",
        "head",
        "id",
        "keep_alive",
        "line",
        "reply",
        "response_complete",
        "started",
        "who",
    )  # fmt: skip

    def __init__(self, line: Line, head: Head, began: int) -> None:
        self.line, self.head, self.began = line, head, began
        self.id, self.who, self.keep_alive = request_id(), NOBODY, head.keep_alive
        self.reply = Reply(self)
        self.current = self.arrived = self.started = self.response_complete = self.disconnected = False
        self._body: list[bytes] | None = None
        self._size = 0
        self._due = False  # the status line and headers have yet to be written
        self._answer: bytes | None = None

    @property
    def message_event(self) -> type[_NoEvent]:
        return _NoEvent

    def look_at_size(self) -> None:
        """Refuses what is announced to be too large; lets a careful client send the rest."""
        line, head = self.line, self.head
        if head.length is not None and head.length > line.max_body:
            self._too_large()
            return
        for name, value in head.headers:
            if name == b"expect" and value.lower() == b"100-continue" and head.refusal is None:
                line.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _too_large(self) -> None:
        """Refuses at once, without waiting for the rest of the body, and closes."""
        limit = self.line.max_body
        self.head.refusal = TooLarge(f"The request body is too large: at most {limit // 2**20} MB are accepted.")
        self.keep_alive = False
        self._body = None
        if self.current and not self.response_complete:
            self.start(b"")

    def take(self, body: bytes) -> None:
        if self.response_complete or self.head.refusal is not None:
            return
        self._size += len(body)
        if self._size > self.line.max_body:
            self._too_large()
        elif self._body is None:
            self._body = [body]
        else:
            self._body.append(body)

    def complete(self) -> None:
        """The request is here, piece by piece."""
        self.arrived = True
        if self.current:
            self.turn()

    def turn(self) -> None:
        """It is this exchange's turn on its connection."""
        if not self.current:
            self.current = True
            self.look_at_size()
        if self.head.refusal is not None and not self.keep_alive and not self.started:  # too large already
            self.start(b"")
        if self.arrived and not self.started and not self.disconnected:
            body, self._body = self._body, None
            self.start(b"" if body is None else body[0] if len(body) == 1 else b"".join(body))

    def work(self) -> None:
        """It is our turn: the request came in one read, and its body waits here."""
        body, self._body = self._body, None
        if body is not None and not self.reply.closed:
            self.start(body[0])

    def start(self, body: bytes) -> None:
        """Makes a Call of the request and lets it through the one door."""
        line, head = self.line, self.head
        line.phase = ANSWERING
        self.started = True
        call = Call(self.id, NOBODY, head.task, body, self.reply, self.began)
        if head.refusal is not None:
            call.refusal = head.refusal
        else:
            self.arrived = True
            if head.version == line.directory.version:  # a head that was seen before
                call.principal = self.who = head.who
            else:
                try:
                    call.principal = self.who = head.identify(line.directory)
                except TertuliaError as error:
                    call.refusal = error
        call.wishes = head.wishes
        call.client = line.peer
        if line.paused:  # what it was told before has not been read yet
            self.reply.pause()
        rest = line.pipeline.run(call)
        if rest is not None:
            protocol = line.protocol
            task: asyncio.Task[None] = protocol.loop.create_task(rest)
            protocol.tasks.add(task)
            task.add_done_callback(protocol.tasks.discard)

    def abandon(self, outcome: str) -> None:
        """The client has left, or the server stops."""
        if outcome == CLIENT_LEFT:
            self.disconnected = True
        self.reply.close(outcome)

    # the Sink
    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        self._status, self._lines = status, headers
        self._due, self._answer = True, None

    def write(self, data: bytes) -> None:
        if not self.reply.stream:
            self._answer = data if self._answer is None else self._answer + data
            return
        if not self.head.old:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._due:  # the head travels with the first event, in one packet
            data = self._stream_head() + data
        if not self.disconnected:
            direct.write(self.line.transport, self.line.file, data)

    def _stream_head(self) -> bytes:
        self._due = False
        ending = b"connection: close\r\n\r\n" if self.head.old else b"transfer-encoding: chunked\r\n\r\n"
        if not self.keep_alive and not self.head.old:
            ending = b"connection: close\r\n" + ending
        return b"%b%b%bcontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n%b" % (
            STATUS_LINE[self._status], standard_headers(self.id, self.who, self.began), b"".join(self._lines), ending,
        )  # fmt: skip

    def _is_last(self) -> bool:
        """The answer ends: True if that has not been said before, and somebody is there to be told."""
        if self.response_complete:
            return False
        self.response_complete = True
        self.reply.sink = NOWHERE  # a circle of the two would wait for the collector
        return not (self.disconnected or self.line.transport.is_closing())

    def whole(self, headers: Sequence[bytes], data: bytes) -> None:
        if not self._is_last():
            return
        line = self.line
        self._status, self._lines, self._answer = 200, headers, data
        if self.keep_alive and line.phase == ANSWERING and not line.more:
            OUTBOX.put(line.transport, line.file, self._whole())
            line.phase, line.since = IDLE, CLOCK.monotonic()  # as on_response_complete would do
            return
        direct.write(line.transport, line.file, self._whole())
        if not self.keep_alive:
            line.transport.close()
        line.protocol.on_response_complete()

    def end(self, outcome: str) -> None:
        if not self._is_last():
            return
        protocol, transport = self.line.protocol, self.line.transport
        stream = self.reply.stream
        if outcome != FINISHED:
            cut = outcome == STOPPED or (outcome == FAILED and self.reply.error is None)
            if cut or (not self._due and not stream):
                transport.close()  # nothing, or no whole answer, to give: the client sees a cut connection
                return
        transport.write(self._last(stream))
        if not self.arrived:
            protocol.leave()
        elif not self.keep_alive:
            transport.close()
        protocol.on_response_complete()

    def _last(self, stream: bool) -> bytes:
        if stream:
            last = b"" if self.head.old else b"0\r\n\r\n"
            return self._stream_head() + last if self._due else last
        return self._whole()

    def _whole(self) -> bytes:
        body = self._answer or b""
        return b"%b%b%bcontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n%b" % (
            STATUS_LINE[self._status], standard_headers(self.id, self.who, self.began), b"".join(self._lines),
            b"" if self.keep_alive else b"connection: close\r\n", len(body), body,
        )  # fmt: skip


def take_repeated(line: Line, known: Repeated, data: bytes) -> bool:
    """Takes a message whose head is known, if this is one, and at least all of its head."""
    if not data.startswith(known.prefix):
        return False
    end = data.find(b"\r", known.at, known.at + 10)
    if end < 0 or not data.startswith(known.suffix, end):
        return False
    length = data[known.at : end]
    if not length.isdigit():
        return False
    at = end + known.suffix_size
    size = int(length)
    missing = size - len(data) + at
    if missing < 0 or size > line.max_body:
        return False
    exchange = Exchange(line, known.head, perf_counter_ns())
    exchange.current = True
    protocol = line.protocol
    protocol.cycle = exchange
    if missing:
        protocol.filling, protocol.missing = [data[at:]], missing
        line.phase, line.since = READING, monotonic()
    else:
        exchange.take(data[at:])
        line.phase = ANSWERING
        line.turns.add(exchange)
    return True


class _NoEvent:
    """uvicorn wakes its cycles through an event; nobody sleeps in ours."""

    @staticmethod
    def set() -> None:
        pass
