"""HTTP/1.1 on the hot paths, inside uvicorn's protocol: bytes in, a Call; a Reply, bytes out. No ASGI cycle is built
for a hot path; every other path is uvicorn's own business, and so are keep-alive, upgrades and shutdown.

It knows the paths that are hot and the edge's rules; it knows nothing of what a body says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from ..accounts.directory import Directory, check_kind
from ..core import CLIENT_LEFT, FAILED, FINISHED, NO_WISHES, NOBODY, STOPPED, Call, Principal, Reply, Task
from ..errors import BadRequest, Overloaded, TertuliaError, TooLarge
from ..gateway.pipeline import Pipeline
from .edge import WISHES, identify, request_id, standard_headers, wishes

HEAD_LIMIT = 65536  # bytes of request line and headers
SWEEP_SECONDS = 1.0  # how often silent connections are looked for


class Front:
    """What all connections of one server share."""

    def __init__(
        self, tasks: Mapping[bytes, Task], pipeline: Pipeline, directory: Directory, *,
        max_body: int, read_timeout: float, keep_alive: float, max_connections: int,
    ) -> None:  # fmt: skip
        """tasks by path; max_body in bytes; timeouts in seconds."""
        self.tasks, self.pipeline, self.directory = dict(tasks), pipeline, directory
        self.max_body, self.read_timeout, self.keep_alive = max_body, read_timeout, keep_alive
        self.max_connections = max_connections
        self.connections: set[Protocol] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    def __call__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None
    ) -> Protocol:
        """uvicorn asks for a protocol per connection."""
        return Protocol(self, config, server_state, app_state, _loop)

    def start(self) -> None:
        self.sweep()

    def sweep(self) -> None:
        """Closes connections that are silent for too long: while sending a request, or idle between two."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.connections):
            connection.check_silence(now)
        self._sweeper = loop.call_later(SWEEP_SECONDS, self.sweep)

    def stop(self) -> None:
        """Ends what is still being answered."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            if isinstance(connection.cycle, Exchange):
                connection.cycle.abandon(STOPPED)


IDLE, READING, ANSWERING, LEAVING = "idle", "reading", "answering", "leaving"
LEAVE_SECONDS = 2.0  # how long a refused body is read to nowhere, so that its sender gets to read the refusal
LEAVE_BYTES = 32 * 2**20  # and how much of it


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
        """Whose key it is; who and version remember it for when the same head comes again. Raises Unauthorized or
        Forbidden."""
        who = identify(directory, self.headers)
        check_kind(who, "project")
        self.who, self.version = who, directory.version
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


class Protocol(HttpToolsProtocol):
    """One client connection."""

    def __init__(
        self, front: Front, config: Config, server_state: ServerState, app_state: dict[str, Any], loop: Any
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.front = front
        self.phase = READING  # a new connection owes us a request
        self.since = self.loop.time()
        self.head_size = 0
        self.unread = 0
        self.began = 0
        self.access_log = False  # the meter writes ours
        self.known: Repeated | None = None
        self.raw: bytes | None = None  # the head now being parsed, if it came in one piece
        self.filling: list[bytes] | None = None  # pieces of the body of a repeated head
        self.missing = 0  # bytes of it still to come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.peer = self.client[0] if self.client else ""
        self.front.connections.add(self)
        if len(self.front.connections) > self.front.max_connections:
            self._refuse(Overloaded("Too many connections are open. Please try again later.", retry_after=1))

    def connection_lost(self, exc: Exception | None) -> None:
        self.front.connections.discard(self)
        cycle = self.cycle
        super().connection_lost(exc)
        if isinstance(cycle, Exchange):
            cycle.abandon(CLIENT_LEFT)
        for waiting, _ in self.pipeline:
            if isinstance(waiting, Exchange):
                waiting.abandon(CLIENT_LEFT)

    def check_silence(self, now: float) -> None:
        if self.pipeline:  # reading is paused by us, not by the client
            return
        limits = {IDLE: self.front.keep_alive, READING: self.front.read_timeout, LEAVING: LEAVE_SECONDS}
        limit = limits.get(self.phase)
        if limit is not None and now - self.since > limit:
            self.transport.close()

    def leave(self) -> None:
        """Says no more, and reads what is still on its way to nowhere: closing at once would reset the connection, and
        the answer with it."""
        self.phase, self.since = LEAVING, self.loop.time()
        self.transport.write_eof()

    def data_received(self, data: bytes) -> None:
        if self.filling is not None:
            self._fill(data)
            return
        if self.phase == IDLE:
            known = self.known
            if known is not None and data.startswith(known.prefix):
                end = data.find(b"\r", known.at, known.at + 10)
                length = data[known.at : end]
                if end > 0 and length.isdigit() and data.startswith(known.suffix, end):
                    at = end + known.suffix_size
                    missing = int(length) - len(data) + at
                    if missing == 0:
                        self._begin_repeated(known.head).start(data[at:])
                        return
                    if 0 < missing <= self.front.max_body:
                        self.filling, self.missing = [data[at:]], missing
                        self.phase, self.since = READING, self.loop.time()
                        self._begin_repeated(known.head)
                        return
            found = data.find(b"\r\n\r\n")
            self.raw = data[: found + 4] if found > 0 else None
        elif self.phase == LEAVING:
            self.unread += len(data)
            if self.unread > LEAVE_BYTES:
                self.transport.close()
            return
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(BadRequest("The request is not valid HTTP."))
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self.front.connections.discard(self)
                self.handle_websocket_upgrade()

    def _begin_repeated(self, head: Head) -> Exchange:
        exchange = Exchange(self, head, time.perf_counter_ns())
        exchange.current = True
        self.cycle = exchange  # type: ignore[assignment]
        return exchange

    def _fill(self, data: bytes) -> None:
        """More of the body of a repeated head."""
        assert self.filling is not None
        missing = self.missing
        self.missing -= len(data)
        self.filling.append(data if len(data) <= missing else data[:missing])
        if self.missing > 0:
            return
        pieces, self.filling = self.filling, None
        cycle = self.cycle
        assert isinstance(cycle, Exchange)
        cycle.start(b"".join(pieces))
        if self.missing < 0 and not self.transport.is_closing():  # the next request came with the end of this one
            self._parse(data[missing:])

    def _refuse(self, error: TertuliaError) -> None:
        """Answers what is not a request, and closes."""
        if self.transport.is_closing():
            return
        self.phase = ANSWERING
        body = error.body()
        head = standard_headers(request_id(), NOBODY, time.perf_counter_ns())
        self.transport.write(
            b"%s%scontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (STATUS_LINE[error.status], head, len(body), body)
        )
        self.transport.close()

    # from the parser
    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self.head_size = 0
        self.phase = READING
        self.since = self.loop.time()
        self.began = time.perf_counter_ns()

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > HEAD_LIMIT:
            self._refuse(TooLarge("The URL is too long."))

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head_size += len(name) + len(value)
        if self.head_size > HEAD_LIMIT:
            self._refuse(TooLarge("The request's headers are too large."))
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.transport.is_closing():
            return
        task = self.front.tasks.get(self.url) or self.front.tasks.get(self.url.partition(b"?")[0])
        parser = self.parser
        if task is None or parser.get_method() != b"POST":
            self.raw = None
            self._cold()
            return
        existing = self.cycle
        old = parser.get_http_version() == "1.0"
        head = Head(task, self.headers, old, not old and parser.should_keep_alive())
        self.cycle = exchange = Exchange(self, head, self.began)  # type: ignore[assignment]
        if existing is None or existing.response_complete:
            exchange.current = True
            exchange.look_at_size()
            raw, self.raw = self.raw, None
            self.known = repeated(raw, head) if raw is not None else None
        else:  # pipelined: waits until the one before is answered
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, None))  # type: ignore[arg-type]
            exchange.look_at_size()

    def _cold(self) -> None:
        """Not a hot path: build what uvicorn builds at the beginning of a message, and let it go on from there."""
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if isinstance(cycle, Exchange):
            cycle.take(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self.phase = ANSWERING
        cycle = self.cycle
        if isinstance(cycle, Exchange):
            cycle.complete()
        else:
            super().on_message_complete()

    # between requests
    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Exchange):
            cycle.turn()
        else:
            super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport is None or self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self.phase == ANSWERING:
            self.phase = IDLE
            self.since = self.loop.time()

    # flow control
    def pause_writing(self) -> None:
        super().pause_writing()
        if isinstance(self.cycle, Exchange):
            self.cycle.reply.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if isinstance(self.cycle, Exchange):
            self.cycle.reply.resume()


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
        "protocol",
        "reply",
        "response_complete",
        "started",
        "who",
    )  # fmt: skip

    def __init__(self, protocol: Protocol, head: Head, began: int) -> None:
        self.protocol, self.head, self.began = protocol, head, began
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
        protocol, head = self.protocol, self.head
        if head.length is not None and head.length > protocol.front.max_body:
            self._too_large()
            return
        for name, value in head.headers:
            if name == b"expect" and value.lower() == b"100-continue" and head.refusal is None:
                protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _too_large(self) -> None:
        """Refuses at once, without waiting for the rest of the body, and closes."""
        limit = self.protocol.front.max_body
        self.head.refusal = TooLarge(f"The request body is too large: at most {limit // 2**20} MB are accepted.")
        self.keep_alive = False
        self._body = None
        if not self.response_complete:
            self.current = True
            self.start(b"")

    def take(self, body: bytes) -> None:
        if self.response_complete or self.head.refusal is not None:
            return
        self._size += len(body)
        if self._size > self.protocol.front.max_body:
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
        self.current = True
        if self.arrived and not self.started and not self.disconnected:
            body, self._body = self._body, None
            self.start(b"" if body is None else body[0] if len(body) == 1 else b"".join(body))

    def start(self, body: bytes) -> None:
        """Makes a Call of the request and lets it through the one door."""
        protocol, head = self.protocol, self.head
        protocol.phase = ANSWERING
        self.started = True
        call = Call(self.id, NOBODY, head.task, body, self.reply, self.began)
        if head.refusal is not None:
            call.refusal = head.refusal
        else:
            self.arrived = True
            if head.version == protocol.front.directory.version:  # a head that was seen before
                call.principal = self.who = head.who
            else:
                try:
                    call.principal = self.who = head.identify(protocol.front.directory)
                except TertuliaError as error:
                    call.refusal = error
        call.wishes = head.wishes
        call.client = protocol.peer
        rest = protocol.front.pipeline.run(call)
        if rest is not None:
            task: asyncio.Task[None] = protocol.loop.create_task(rest)  # type: ignore[arg-type]
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
            self.protocol.transport.write(data)

    def _stream_head(self) -> bytes:
        self._due = False
        ending = b"connection: close\r\n\r\n" if self.head.old else b"transfer-encoding: chunked\r\n\r\n"
        if not self.keep_alive and not self.head.old:
            ending = b"connection: close\r\n" + ending
        return b"%b%b%bcontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n%b" % (
            STATUS_LINE[self._status], standard_headers(self.id, self.who, self.began), b"".join(self._lines), ending,
        )  # fmt: skip

    def whole(self, headers: Sequence[bytes], data: bytes) -> None:
        if self.response_complete:
            return
        self.response_complete = True
        protocol = self.protocol
        transport = protocol.transport
        if self.disconnected or transport.is_closing():
            return
        self._status, self._lines, self._answer = 200, headers, data
        transport.write(self._whole())
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()

    def end(self, outcome: str) -> None:
        if self.response_complete:
            return
        self.response_complete = True
        protocol = self.protocol
        transport = protocol.transport
        if self.disconnected or transport.is_closing():
            return
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


class _NoEvent:
    """uvicorn wakes its cycles through an event; nobody sleeps in ours."""

    @staticmethod
    def set() -> None:
        pass
