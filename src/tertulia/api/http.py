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
from ..core import CLIENT_LEFT, FAILED, NOBODY, STOPPED, Call, Reply, Task
from ..errors import BadRequest, Overloaded, TertuliaError, TooLarge
from ..gateway.pipeline import Pipeline
from .edge import identify, request_id, standard_headers

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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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
        if self.phase == LEAVING:
            self.unread += len(data)
            if self.unread > LEAVE_BYTES:
                self.transport.close()
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(BadRequest("The request is not valid HTTP."))
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self.front.connections.discard(self)
                self.handle_websocket_upgrade()

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
            self._cold()
            return
        existing = self.cycle
        self.cycle = exchange = Exchange(self, task)  # type: ignore[assignment]
        if existing is None or existing.response_complete:
            exchange.current = True
        else:  # pipelined: waits until the one before is answered
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, None))  # type: ignore[arg-type]

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
            cycle.arrived = True
            if cycle.current:
                cycle.start()
        else:
            super().on_message_complete()

    # between requests
    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Exchange):
            cycle.current = True
            if cycle.arrived:
                cycle.start()
        else:
            super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport is None or self.transport.is_closing():
            return
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
        "_body",
        "_head",
        "_pieces",
        "_refusal",
        "_size",
        "arrived",
        "began",
        "current",
        "disconnected",
        "front",
        "headers",
        "id",
        "keep_alive",
        "message_event",
        "old",
        "protocol",
        "reply",
        "response_complete",
        "retry_count",
        "started",
        "task",
        "who",
    )  # fmt: skip

    def __init__(self, protocol: Protocol, task: Task) -> None:
        self.protocol, self.front, self.task = protocol, protocol.front, task
        self.headers, self.began = protocol.headers, protocol.began
        self.id, self.who = request_id(), NOBODY
        self.reply = Reply(self)
        self.old = protocol.parser.get_http_version() == "1.0"
        self.keep_alive = not self.old and protocol.parser.should_keep_alive()
        self.current = self.arrived = self.started = self.response_complete = self.disconnected = False
        self.message_event = _NoEvent
        self._body: list[bytes] = []
        self._size = 0
        self._head: bytes | None = None
        self._pieces: list[bytes] = []
        self._refusal: TertuliaError | None = None
        self.retry_count = 0
        self._look_at_headers()

    def _look_at_headers(self) -> None:
        for name, value in self.headers:
            if name == b"content-length" and value.isdigit() and int(value) > self.front.max_body:
                self._too_large()
            elif name == b"expect" and value.lower() == b"100-continue" and self._refusal is None:
                self.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif name == b"x-stainless-retry-count" and value.isdigit():
                self.retry_count = int(value[:4])
            elif name == b"content-encoding" and value.lower() != b"identity":
                self._refusal = BadRequest("Compressed request bodies are not supported.")

    def _too_large(self) -> None:
        """Refuses at once, without waiting for the rest of the body, and closes."""
        limit = self.front.max_body
        self._refusal = TooLarge(f"The request body is too large: at most {limit // 2**20} MB are accepted.")
        self.keep_alive = False
        self._body.clear()
        if not self.response_complete:
            self.current = True
            self.start()

    def take(self, body: bytes) -> None:
        if self.response_complete or self._refusal is not None:
            return
        self._size += len(body)
        if self._size > self.front.max_body:
            self._too_large()
            return
        self._body.append(body)

    def start(self) -> None:
        """The request is here: make a Call of it and let it through the one door."""
        if self.started or self.disconnected:
            return
        self.started = True
        call = Call(self.id, NOBODY, self.task, b"".join(self._body), self.reply, self.began)
        self._body.clear()
        try:
            if self._refusal is not None:
                raise self._refusal
            call.principal = self.who = identify(self.front.directory, self.headers)
            check_kind(self.who, "project")
        except TertuliaError as error:
            call.refusal = error
        call.retry_count = self.retry_count
        client = self.protocol.client
        call.client = client[0] if client else ""
        task = self.protocol.loop.create_task(self.front.pipeline.run(call))
        self.protocol.tasks.add(task)
        task.add_done_callback(self.protocol.tasks.discard)

    def abandon(self, outcome: str) -> None:
        """The client has left, or the server stops."""
        if outcome == CLIENT_LEFT:
            self.disconnected = True
        self.reply.close(outcome)

    # the Sink
    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        self._pieces.clear()
        head = [STATUS_LINE[status], standard_headers(self.id, self.who, self.began), *headers]
        if self.reply.stream:
            head.append(b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n")
            head.append(b"connection: close\r\n" if self.old else b"transfer-encoding: chunked\r\n")
        else:
            head.append(b"content-type: application/json\r\n")
        if not self.keep_alive and not (self.old and self.reply.stream):
            head.append(b"connection: close\r\n")
        self._head = b"".join(head)

    def write(self, data: bytes) -> None:
        if not self.reply.stream:
            self._pieces.append(data)
            return
        if not self.old:
            data = b"%x\r\n%s\r\n" % (len(data), data)
        if self._head is not None:  # the head travels with the first event, in one packet
            data, self._head = self._head + b"\r\n" + data, None
        if not self.disconnected:
            self.protocol.transport.write(data)

    def end(self, outcome: str) -> None:
        if self.response_complete:
            return
        self.response_complete = True
        if self.disconnected or self.protocol.transport.is_closing():
            return
        cut = outcome == FAILED and self.reply.error is None
        if outcome == STOPPED or cut or (self._head is None and not self.reply.stream):
            self.protocol.transport.close()  # nothing, or no whole answer, to give: the client sees a cut connection
            return
        self.protocol.transport.write(self._last())
        if not self.arrived:
            self.protocol.leave()
        elif not self.keep_alive or self.old:
            self.protocol.transport.close()
        self.protocol.on_response_complete()

    def _last(self) -> bytes:
        if self.reply.stream:
            last = b"" if self.old else b"0\r\n\r\n"
            return self._head + b"\r\n" + last if self._head is not None else last
        body = b"".join(self._pieces)
        return b"%scontent-length: %d\r\n\r\n%s" % (self._head, len(body), body)


class _NoEvent:
    """uvicorn wakes its cycles through an event; nobody sleeps in ours."""

    @staticmethod
    def set() -> None:
        pass
