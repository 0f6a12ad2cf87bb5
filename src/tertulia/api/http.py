"""HTTP/1.1 on the hot paths, inside uvicorn's protocol: bytes in, a Call; a Reply, bytes out. No ASGI cycle is built
for a hot path; every other path is uvicorn's own business, and so are keep-alive and shutdown.

It knows the paths that are hot and the edge's rules; it knows nothing of what a body says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from .. import direct
from ..accounts.directory import Directory
from ..core import CLIENT_LEFT, NOBODY, STOPPED, Task
from ..errors import BadRequest, Overloaded, TertuliaError, TooLarge
from ..gateway.pipeline import Pipeline
from ..turns import Turns
from .edge import request_id, standard_headers
from .exchange import ANSWERING, IDLE, LEAVING, READING, Exchange, Head, Line, repeated

HEAD_LIMIT = 65536  # bytes of request line and headers
VERSIONS = ("1.1", "1.0")
SWEEP_SECONDS = 1.0  # how often silent connections are looked for
CROWD = 200  # connections whose memory is worth the milliseconds it takes to give it back
AFTER_CROWD = (5.0, 65.0)  # seconds until the last have left, and until what they used upstream is closed


class Front:
    """What all connections of one server share."""

    def __init__(
        self, tasks: Mapping[bytes, Task], pipeline: Pipeline, directory: Directory, *,
        max_body: int, read_timeout: float, keep_alive: float, max_connections: int,
        crowd_left: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """tasks by path; max_body in bytes; timeouts in seconds; crowd_left is called when a crowd of
        connections is gone."""
        self.tasks, self.pipeline, self.directory = dict(tasks), pipeline, directory
        self.max_body, self.read_timeout, self.keep_alive = max_body, read_timeout, keep_alive
        self.max_connections = max_connections
        self.connections: set[Protocol] = set()
        self.turns = Turns(asyncio.get_running_loop())
        self._crowd_left = crowd_left
        self._most = 0  # connections there have been since the last crowd left
        self._due: list[float] = []  # when to say that one has
        self._sweeper: asyncio.TimerHandle | None = None

    def __call__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None
    ) -> Protocol:
        """uvicorn asks for a protocol per connection."""
        return Protocol(self, config, server_state, app_state, _loop)

    def limit(self, max_body: int, read_timeout: float, keep_alive: float) -> None:
        """Other limits, for the connections that are there too."""
        self.max_body, self.read_timeout, self.keep_alive = max_body, read_timeout, keep_alive
        for connection in self.connections:
            connection.line.max_body = max_body

    def start(self) -> None:
        self.sweep()

    def sweep(self) -> None:
        """Closes connections that are silent for too long: while sending a request, or idle between two."""
        now = monotonic()
        for connection in list(self.connections):
            connection.check_silence(now)
        self._look_for_crowds(now)
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self.sweep)

    def _look_for_crowds(self, now: float) -> None:
        here = len(self.connections)
        self._most = max(self._most, here)
        if self._most >= CROWD and here < self._most // 2:
            self._most, self._due = here, [now + wait for wait in AFTER_CROWD]
        if self._due and now >= self._due[0]:
            self._due.pop(0)
            if self._crowd_left is not None:
                self._crowd_left()

    def stop(self) -> None:
        """Ends what is still being answered."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            answering = connection.ahead or connection.cycle
            if isinstance(answering, Exchange):
                answering.abandon(STOPPED)


NO_UPGRADE = "This server does not upgrade connections: please send the request without Upgrade."
LEAVE_SECONDS = 2.0  # how long a refused body is read to nowhere, so that its sender gets to read the refusal
LEAVE_BYTES = 32 * 2**20  # and how much of it


class Protocol(HttpToolsProtocol):
    """One client connection."""

    def __init__(
        self, front: Front, config: Config, server_state: ServerState, app_state: dict[str, Any], loop: Any
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.front = front
        self.line = Line(self, front.pipeline, front.directory, front.turns, front.max_body)
        self.data_received = self.line.read  # type: ignore[method-assign]  # most of what comes is its to take
        self.head_size = 0
        self.unread = 0
        self.began = 0
        self.access_log = False  # the meter writes ours
        self.ahead: Any = None  # the cycle being answered, where that is not the one that came last
        self.raw: bytes | None = None  # the head now being parsed, if it came in one piece
        self.filling: list[bytes] | None = None  # pieces of the body of a repeated head
        self.missing = 0  # bytes of it still to come
        self.later: list[bytes] = []  # what came while an answer was under way: read when that has ended
        self.waiting = 0  # bytes of it
        self.heading = True  # the head of a message has begun, and not ended
        self.closing = 0.0  # when it was seen that the transport has been told to close

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        line = self.line
        line.transport, line.file = transport, direct.descriptor(transport)
        line.peer = self.client[0] if self.client else ""
        self.front.connections.add(self)
        if len(self.front.connections) > self.front.max_connections:
            self._refuse(Overloaded("Too many connections are open. Please try again later.", retry_after=1))

    def connection_lost(self, exc: Exception | None) -> None:
        self.front.connections.discard(self)
        cycles: list[Any] = [self.ahead, *[waiting for waiting, _ in self.pipeline], self.cycle]
        super().connection_lost(exc)
        self.cycle = self.ahead = self.line.known = None  # type: ignore[assignment]  # they refer to us
        self.pipeline.clear()
        for cycle in cycles:
            if isinstance(cycle, Exchange):
                cycle.abandon(CLIENT_LEFT)
            elif cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.line.protocol = None  # a circle of the two would wait for the collector

    def check_silence(self, now: float) -> None:
        if self.transport.is_closing():  # a client that reads nothing more keeps it from being flushed
            self.closing = self.closing or now
            if now - self.closing > LEAVE_SECONDS:
                self.transport.abort()
            return
        if self.pipeline or self.later:  # reading is paused by us, not by the client
            return
        limits = {IDLE: self.front.keep_alive, READING: self.front.read_timeout, LEAVING: LEAVE_SECONDS}
        limit = limits.get(self.line.phase)
        if limit is not None and now - self.line.since > limit:
            self.transport.close()

    def leave(self) -> None:
        """Says no more, and reads what is still on its way to nowhere: closing at once would reset the connection, and
        the answer with it."""
        self.line.phase, self.line.since = LEAVING, monotonic()
        self.transport.write_eof()

    def take(self, data: bytes) -> None:
        """What is not a message whose head is known, or not all of one."""
        if self.filling is not None:
            self._fill(data)
            return
        if self.line.phase == IDLE:
            found = data.find(b"\r\n\r\n")
            self.raw = data[: found + 4] if found > 0 else None
        elif self.line.phase == ANSWERING:  # whatever it is, its turn comes when this answer has ended
            self.line.more = True
            self.later.append(data)
            self.waiting += len(data)
            if self.waiting > HEAD_LIMIT:  # not before: who reads nothing does not see the client leave
                self.flow.pause_reading()
            return
        elif self.line.phase == LEAVING:
            self.unread += len(data)
            if self.unread > LEAVE_BYTES:
                self.transport.close()
            return
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(BadRequest(NO_UPGRADE))
        except httptools.HttpParserError:
            self._refuse(BadRequest("The request is not valid HTTP."))
        if self.heading:  # after parsing: a body may come in the same packet as its head
            self.head_size += len(data)
            if self.head_size > HEAD_LIMIT:
                self._refuse(TooLarge("The request's headers are too large."))

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
            self.data_received(data[missing:])

    def _refuse(self, error: TertuliaError) -> None:
        """Answers what is not a request, and closes; an answer under way is not disturbed, and is the last."""
        if self.transport.is_closing():
            return
        active = self.ahead or self.cycle
        if active is not None and not active.response_complete and getattr(active, "started", True):
            active.keep_alive = False
            self.line.more = True
            self.flow.pause_reading()
            if not isinstance(active, Exchange):  # it may be waiting for the body that is broken
                self.transport.close()
            return
        self.line.phase = ANSWERING
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
        self.heading = self.line.more = True
        if self.line.phase != ANSWERING:
            self.line.phase, self.line.since = READING, monotonic()
        self.began = time.perf_counter_ns()

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > HEAD_LIMIT:
            self._refuse(TooLarge("The URL is too long."))

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head_size += len(name) + len(value)
        if self.head_size > HEAD_LIMIT:
            self._refuse(TooLarge("The request's headers are too large."))
        if not self.heading:
            return  # what comes after a body is no header: whoever stands in front has not looked at it
        name = name.lower()
        if name == b"transfer-encoding" and value.lower() != b"chunked":
            self._refuse(BadRequest("Transfer-Encoding: only chunked is supported."))
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.heading = False
        if self.parser.should_upgrade():  # what would follow is no HTTP, or a body that the parser does not see
            self._refuse(BadRequest(NO_UPGRADE))
        if self.transport.is_closing():
            return
        version = self.parser.get_http_version()
        if version not in VERSIONS:
            self._refuse(BadRequest("The request is neither HTTP/1.1 nor HTTP/1.0."))
            return
        task = self.front.tasks.get(self.url) or self.front.tasks.get(self.url.partition(b"?")[0])
        parser = self.parser
        if task is None or parser.get_method() != b"POST":
            self.raw = None
            self._cold()
            return
        existing = self.cycle
        old = version == "1.0"
        head = Head(task, self.headers, old, not old and parser.should_keep_alive())
        self.cycle = exchange = Exchange(self.line, head, self.began)  # type: ignore[assignment]
        if existing is None or existing.response_complete:
            exchange.current = True
            exchange.look_at_size()
            raw, self.raw = self.raw, None
            self.line.known = repeated(raw, head) if raw is not None else None
        else:  # pipelined: waits until the one before is answered
            self.flow.pause_reading()
            self.ahead = self.ahead or existing
            self.pipeline.appendleft((exchange, None))  # type: ignore[arg-type]

    def _cold(self) -> None:
        """Not a hot path: build what uvicorn builds at the beginning of a message, and let it go on from there."""
        url, headers, existing = self.url, self.headers, self.cycle
        super().on_message_begin()
        self.url = url
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()
        if self.pipeline:
            self.ahead = self.ahead or existing

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if isinstance(cycle, Exchange):
            cycle.take(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self.line.phase, self.heading, self.head_size = ANSWERING, False, 0
        cycle = self.cycle
        if isinstance(cycle, Exchange):
            cycle.complete()
        else:
            super().on_message_complete()
            if cycle.response_complete and not self.pipeline:  # it was refused before its body had come
                self.line.phase, self.line.since = IDLE, monotonic()

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
        self.line.since = monotonic()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self.ahead = cycle if self.pipeline else None
            self.line.phase = ANSWERING if _whole(cycle) else READING
            self._start_asgi_task(cycle, app)
        elif self.line.phase == ANSWERING:
            self.line.phase = READING if self.heading else IDLE  # a head has begun in the same read
        if self.later and self.line.phase != ANSWERING and not self.transport.is_closing():
            data = b"".join(self.later)
            self.later.clear()
            self.waiting = 0
            self.data_received(data)
        if self.flow.read_paused and not self.later and not self.pipeline:
            self.flow.resume_reading()
        line = self.line
        line.more = line.phase != IDLE or self.heading or bool(self.later or self.pipeline) or self.flow.read_paused

    # flow control
    def pause_writing(self) -> None:
        super().pause_writing()
        self.line.paused = True
        answering = self.ahead or self.cycle
        if isinstance(answering, Exchange):
            answering.reply.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.line.paused = False
        answering = self.ahead or self.cycle
        if isinstance(answering, Exchange):
            answering.reply.resume()


def _whole(cycle: Any) -> bool:
    """Whether all of a request has come, ours or uvicorn's."""
    return bool(cycle.arrived) if isinstance(cycle, Exchange) else not cycle.more_body
