"""A thin HTTP/1.1 client for engines: connections on asyncio.Protocol and httptools, kept alive and reused.

It knows how to send one request on one connection and hand the pieces of the answer to a Receiver as plain function
calls; it knows nothing of models, SSE or retries. Redirects are not followed: a key never travels to another address.
Limits: head 64 KiB, and whatever the receiver bears; TLS is the loop's, with verification.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from time import monotonic
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import httptools

from .. import direct
from ..direct import OUTBOX
from ..errors import EngineFailed, TertuliaError, UpstreamTimeout
from ..turns import CLOCK, Turns
from .proxy import Proxy, Tunnel
from .timeouts import Timeouts

log = logging.getLogger("tertulia.engines")
HEAD_LIMIT = 65536  # bytes of status line and headers we accept from an engine
BODY_LIMIT = 64 * 2**20  # bytes of an answer that is collected
IDLE_SECONDS = 60.0  # an idle connection older than this is closed: servers close theirs after a minute or so
REST_SECONDS = 1.0  # for the end of an answer of which nobody waits for the rest
REST_LIMIT = 4096  # bytes of such a rest
INTERIM = (100, 102, 103)  # statuses after which the answer itself follows
# The headers that somebody here acts on; the others are not kept.
WANTED = frozenset(
    (b"content-length", b"content-type", b"retry-after", b"retry-after-ms", b"transfer-encoding", b"x-should-retry")
)


OK: Final = b"HTTP/1.1 200 "
LENGTH: Final = b"\r\ncontent-length:"
TRANSFER: Final = b"\r\ntransfer-encoding:"
CONNECTION: Final = b"\r\nconnection:"


class Receiver(Protocol):
    """Who is told of an answer, in this order: head, piece*, then end or broken (which may come at any time, once).

    A piece is all of the body that came in one read.
    """

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    def piece(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def broken(self, error: TertuliaError) -> None: ...


class Stale(EngineFailed):
    """A kept-alive connection was closed by the other side just as it was used: nothing of an answer had come."""


class Connection(asyncio.Protocol):
    """One socket to an engine; one request at a time. cancel() closes it, which is how an engine learns to stop.

    An answer is handed on when the parser has read all that came, never from within it: whatever follows an answer in
    the same read was not asked for, and must not be taken for the answer to the next request.
    """

    __slots__ = (
        "_answered", "_chunk_over", "_even", "_extra", "_file", "_headers", "_keep", "_late", "_parser", "_paused",
        "_pieces", "_pool", "_receiver", "_size", "_whole", "complete", "idle_since", "transport", "used",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._whole: Callable[[bytes], None] | None = None
        self._late = b""  # what has come and waits for our turn
        self._parser: Any = None  # while the connection lasts: it refers to us
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._size = 0  # bytes of a head that is not complete yet
        self._file = -1
        self._answered = self._extra = self._keep = self._paused = False
        self._chunk_over = False  # the last that the parser saw is the end of a chunk
        self._even = False  # and nothing came after it: the next read begins with a chunk
        self.complete = False  # the last byte of the answer has come; end() follows at once
        self.idle_since = 0.0
        self.used = False  # has carried a request before: the other side may have closed it meanwhile

    # towards the engine
    def send(
        self, request: bytes, receiver: Receiver, body: bytes = b"", whole: Callable[[bytes], None] | None = None
    ) -> None:
        """Sends a request; body is what of it is too large to be joined to the head. An answer with status 200 that
        comes in one read is given to whole, if there is one, and the receiver is told nothing."""
        assert self.transport is not None
        self._receiver, self._whole = receiver, whole
        if self._headers:
            self._headers = []
        self._size, self._answered = 0, False
        if body:
            direct.write_both(self.transport, self._file, request, body)
        else:
            OUTBOX.put(self.transport, self._file, request)

    def cancel(self) -> None:
        """Gives the call up: nothing more reaches the receiver, and the engine sees the connection close."""
        self._receiver, self._late = None, b""
        if self.transport is not None:
            self.transport.abort()

    def let_finish(self) -> None:
        """Nobody waits for the rest of the answer. If it ends soon, and properly, we carry another request after it."""
        if self._paused:
            self.resume_reading()
        self._receiver = rest = Rest(self, self._pool.rests)
        self._pool.rests.add(rest)

    def pause_reading(self) -> None:
        self._paused = True
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        self._paused = False
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    # from the transport
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._file = direct.descriptor(transport)
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        if self._whole is None:
            self._take(data)
        elif self._late:
            self._late += data
        else:
            self._late = data
            self._pool.turns.add(self)

    def work(self) -> None:
        """It is our turn: what has come of an answer in one piece."""
        data, self._late = self._late, b""
        if data:
            self._take(data)

    def _take(self, data: bytes) -> None:
        if self._receiver is None:
            self.cancel()  # bytes nobody asked for
            return
        try:
            whole = self._whole
            if whole is not None and (at := self._ends_at_once(data)):
                self._receiver = self._whole = None
                self._pool.give_back(self)
                whole(data[at:])
                return
            if self._even and self._one_chunk(data):
                return
            self._whole = None  # it comes in more than one read
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                if isinstance(error, httptools.HttpParserCallbackError) and error.__context__ is not None:
                    raise error.__context__ from None
                if not self.complete or isinstance(error, httptools.HttpParserUpgrade):
                    self._deliver()
                    self._break(f"The {self._pool.who}'s answer is not HTTP.")
                    return
                self._extra = True  # the answer is whole, and something else came after it
            self._even = self._chunk_over and data.endswith(b"\r\n")
            if self._pieces:
                self._deliver()
            if self.complete:
                self._finish()
            elif not self._answered:
                self._size += len(data)
                if self._size > HEAD_LIMIT:
                    self._break(f"The {self._pool.who}'s answer has too long a head.")
        except Exception as error:  # a defect of ours in whoever receives: the loop would swallow it, the call hang
            self._defect(error)

    def _ends_at_once(self, data: bytes) -> int:
        """An answer with status 200 that is all here, by its length to the byte, needs no parser: where its body
        begins; 0 if it is none. Most heads are as the last one was, but for the length."""
        before, behind = self._pool.before, self._pool.behind
        at = len(before)
        if at and data.startswith(before):
            end = data.find(b"\r", at, at + 10)
            value = data[at:end]
            if end > 0 and value.isdigit() and data.startswith(behind, end):
                end += len(behind)
                return end if int(value) == len(data) - end else 0
        end = data.find(b"\r\n\r\n")
        if end < 0 or not data.startswith(OK):
            return 0
        head = data[: end + 2].lower()
        at = head.find(LENGTH) + 17
        if at < 17 or TRANSFER in head or CONNECTION in head or head.find(LENGTH, at) > 0:
            return 0
        while head.startswith(b" ", at):
            at += 1
        last = head.find(b"\r", at)
        value = head[at:last].rstrip(b" ")
        end += 4
        if not value.isdigit() or int(value) != len(data) - end:
            return 0
        self._pool.before, self._pool.behind = data[:at], data[at + len(value) : end]
        return end

    def _one_chunk(self, data: bytes) -> bool:
        """A read that is one chunk to the byte, where a chunk may begin, needs no parser, whose state is the same after
        it. Most of what comes of a stream is such."""
        at = data.find(b"\r\n", 0, 10)
        digits = data[:at]
        if at < 1 or not digits.isalnum():
            return False
        try:
            size = int(digits, 16)
        except ValueError:
            return False
        if not size or len(data) != at + size + 4 or not data.endswith(b"\r\n"):
            return False
        self._receiver.piece(data[at + 2 : -2])  # type: ignore[union-attr]
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.work()
        self._pool.forget(self)
        self._parser = None
        if self._receiver is None:
            return
        if error is None and self._answered and self._until_close():
            self._keep = False
            try:
                self._finish()
            except Exception as defect:  # as above
                self._defect(defect)
            return
        stale = self.used and not self._answered and not self._size
        self._pool.broke |= not stale
        self._break(
            f"The {self._pool.who} closed the connection before its answer was complete.",
            Stale if stale else EngineFailed,
        )

    def _until_close(self) -> bool:
        return not any(name in (b"content-length", b"transfer-encoding") for name, _ in self._headers)

    def _deliver(self) -> None:
        pieces = self._pieces
        if pieces:
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            if self._receiver is not None:
                self._receiver.piece(data)

    def _break(self, why: str, kind: type[EngineFailed] = EngineFailed) -> None:
        receiver, self._receiver = self._receiver, None
        if self.transport is not None:
            self.transport.abort()
        if receiver is not None:
            receiver.broken(kind(why))

    def _defect(self, error: Exception) -> None:
        log.error("unexpected error while an answer came in", exc_info=error)
        receiver, self._receiver = self._receiver, None
        if self.transport is not None:
            self.transport.abort()
        if receiver is not None:
            receiver.broken(TertuliaError())

    def _finish(self) -> None:
        receiver, self._receiver, self.complete = self._receiver, None, False
        if receiver is None:  # given up meanwhile
            return
        if self._keep and not self._extra:
            self._pool.give_back(self)
        elif self.transport is not None:
            self.transport.close()
        receiver.end()

    # from the parser
    def on_message_begin(self) -> None:
        if self.complete:
            self._extra = True

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in WANTED:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.complete or self._receiver is None:
            return
        status = self._parser.get_status_code()
        if status not in INTERIM:
            self._answered = True
            self._receiver.head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self._pieces.append(data)

    def on_chunk_header(self) -> None:
        self._chunk_over = False

    def on_chunk_complete(self) -> None:
        self._chunk_over = True

    def on_message_complete(self) -> None:
        self._chunk_over = False
        if self._answered:
            self._keep = not self.complete and self._parser.should_keep_alive()
            self.complete = True
        else:
            self._headers, self._size = [], 1


class Rest:
    """The receiver of what nobody waits for: the end of an answer, and little else."""

    __slots__ = ("_connection", "_rests", "_size")

    def __init__(self, connection: Connection, rests: Timeouts[Rest]) -> None:
        self._connection, self._rests = connection, rests
        self._size = 0

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """There is none: it came before."""

    def piece(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > REST_LIMIT:
            self._rests.remove(self)
            self.give_up()

    def end(self) -> None:
        self._rests.remove(self)

    def broken(self, error: TertuliaError) -> None:
        self._rests.remove(self)

    def give_up(self) -> None:
        self._connection.cancel()


class Pool:
    """Connections to one base URL, http or https. open_connections counts busy and idle ones."""

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout: float = 5.0,
        idle_limit: int = 256,
        tls_ca: str | None = None,
        proxy: Proxy | None = None,
        who: str = "engine",
    ) -> None:
        """base_url: `http(s)://HOST[:PORT][/PREFIX]`; connect_timeout in seconds; tls_ca: a file of certificates to
        trust instead of the system's, read at once; who: what messages call the other side. Raises ValueError for a
        URL, OSError for a file that cannot be used."""
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http(s) URL: {base_url!r}")
        self.who = who
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.host_header = parts.netloc.rpartition("@")[2].encode("idna" if not parts.netloc.isascii() else "ascii")
        self.prefix = parts.path.rstrip("/").encode()
        self.proxy = proxy
        self.proxy_line = b""
        self._tls = parts.scheme == "https"
        self._ssl = tls_context(tls_ca) if self._tls and tls_ca else None
        if proxy is not None and not self._tls:  # the proxy reads the requests: it is told the whole address
            self.prefix = b"http://" + self.host_header + self.prefix
            self.proxy_line = proxy.authorization
        self._connect_timeout = connect_timeout
        self._idle_limit = idle_limit
        self.before = self.behind = b""  # of the last head of an answer that came at once, around its length
        self._idle: dict[Connection, None] = {}  # oldest first
        self.rests: Timeouts[Rest] = Timeouts(REST_SECONDS, lambda rest: rest.give_up())
        self._all: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._turns: Turns | None = None
        self._closed = False
        self.broke = False  # a connection was lost while somebody waited for an answer; for whom it concerns to unset

    @property
    def turns(self) -> Turns:
        """When the answers on our connections are worked on."""
        if self._turns is None:
            self._turns = Turns(asyncio.get_running_loop())
        return self._turns

    @property
    def open_connections(self) -> int:
        return len(self._all)

    def head(self, method: bytes, path: bytes, headers: bytes) -> bytes:
        """A request up to the value of content-length, its last header; headers are complete lines ending in CRLF."""
        return b"%s %s%s HTTP/1.1\r\nhost: %s\r\n%s%scontent-length: " % (
            method, self.prefix, path, self.host_header, self.proxy_line, headers,
        )  # fmt: skip

    def request(self, method: bytes, path: bytes, headers: bytes, body: bytes) -> bytes:
        """The bytes of a request; headers are complete lines, each ending in CRLF."""
        return b"%s%d\r\n\r\n%s" % (self.head(method, path, headers), len(body), body)

    def take(self) -> Connection | None:
        """An idle connection, without waiting: the one used last."""
        idle = self._idle
        while idle:
            connection, _ = idle.popitem()
            if not connection.transport.is_closing():  # type: ignore[union-attr]
                return connection
        return None

    async def connect(self) -> Connection:
        """A new connection. Raises EngineFailed when there is none to be had within the timeout."""
        try:
            async with asyncio.timeout(self._connect_timeout):
                connection = await self._open()
        except TimeoutError:
            raise UpstreamTimeout(
                f"The connection to the {self.who} was not made within {self._connect_timeout:g} seconds."
            ) from None
        except (OSError, UnicodeError) as error:  # UnicodeError: a host name that cannot be one
            raise EngineFailed(self._unreachable(error)) from None
        self._all.add(connection)
        if self._closed:
            connection.cancel()
            raise EngineFailed(f"The {self.who} is being stopped.")
        return connection

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        if self._tls and self._ssl is None:
            self._ssl = tls_context(None)
        if self.proxy is None:
            _, connection = await loop.create_connection(lambda: Connection(self), self.host, self.port, ssl=self._ssl)
            return connection
        if not self._tls:
            _, connection = await loop.create_connection(lambda: Connection(self), self.proxy.host, self.proxy.port)
            return connection
        raw, tunnel = await loop.create_connection(Tunnel, self.proxy.host, self.proxy.port)
        try:
            tunnel.ask(self.host, self.port, self.proxy.authorization)
            await tunnel.opened
            connection = Connection(self)
            assert self._ssl is not None
            secure = await loop.start_tls(raw, connection, self._ssl, server_hostname=self.host)
            assert secure is not None
        except BaseException:  # whatever went wrong, cancellation too, the socket must not stay
            raw.abort()
            raise
        connection.connection_made(secure)
        return connection

    def _unreachable(self, error: OSError | UnicodeError) -> str:
        """What went wrong, without the address: callers read it."""
        proxied = " through the proxy" if self.proxy is not None else ""
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"The {self.who}'s certificate was not accepted: {error.verify_message}."
        if isinstance(error, ssl.SSLError):
            return f"The {self.who} and we could not agree on TLS ({error.reason or 'handshake failed'})."
        if isinstance(error, socket.gaierror | UnicodeError):
            return f"The {self.who}'s host name could not be resolved{proxied}."
        # of several addresses that all failed the loop makes one error without a number
        if error.errno == errno.ECONNREFUSED or f"[Errno {errno.ECONNREFUSED}]" in str(error):
            return f"The {self.who} refused the connection{proxied}: nothing listens there."
        return f"The {self.who} cannot be reached{proxied} ({type(error).__name__})."

    async def send(self, method: bytes, path: bytes, headers: bytes, body: bytes, receiver: Receiver) -> Connection:
        """Sends a request on an idle connection, or a new one. Raises EngineFailed if none can be made."""
        connection = self.take() or await self.connect()
        connection.send(self.request(method, path, headers, body), receiver)
        return connection

    async def fetch(
        self, method: str, path: str, headers: bytes = b"", body: bytes = b"", timeout: float = 30.0
    ) -> tuple[int, bytes]:
        """The whole answer at once, for small requests: (status, body). Raises EngineFailed."""
        try:
            return await self._fetch(method, path, headers, body, timeout)
        except Stale:  # as if it had never been sent
            return await self._fetch(method, path, headers, body, timeout)

    async def _fetch(self, method: str, path: str, headers: bytes, body: bytes, timeout: float) -> tuple[int, bytes]:
        waiter = _Whole(asyncio.get_running_loop().create_future())
        connection = await self.send(method.encode(), path.encode(), headers, body, waiter)
        try:
            async with asyncio.timeout(timeout):
                return await waiter.future
        except TimeoutError:
            raise UpstreamTimeout(f"The {self.who} did not answer within {timeout:g} seconds.") from None
        finally:
            if not waiter.finished:
                connection.cancel()

    def give_back(self, connection: Connection) -> None:
        """The connection may carry another request."""
        connection.used = True
        if self._closed or len(self._idle) >= self._idle_limit:
            if connection.transport is not None:
                connection.transport.close()
            return
        if connection._paused:  # its client reads slowly; the next one may not
            connection.resume_reading()
        connection.idle_since = CLOCK.monotonic()
        self._idle[connection] = None
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Closes what has been idle too long; runs only while something is idle."""
        self._sweeper = None
        now = monotonic()
        while self._idle:
            oldest = next(iter(self._idle))
            wait = oldest.idle_since + IDLE_SECONDS - now
            if wait > 0.01:
                self._sweeper = asyncio.get_running_loop().call_later(wait, self._sweep)
                return
            del self._idle[oldest]
            if oldest.transport is not None:
                oldest.transport.close()

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        self._idle.pop(connection, None)

    def retire(self) -> None:
        """Keeps no connection from now on: calls in flight go on, and each takes its connection along when it ends."""
        self._idle_limit = 0
        while (connection := self.take()) is not None:
            connection.transport.close()  # type: ignore[union-attr]  # an idle one has been made

    def close(self) -> None:
        """Closes every connection; calls in flight on them break."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self.rests.close()
        for connection in list(self._all):
            if connection.transport is not None:
                connection.transport.abort()


def tls_context(ca: str | None) -> ssl.SSLContext:
    """What verifies a server: by the certificates in the file ca, or the system's. Raises OSError."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["http/1.1"])
    return context


class _Whole:
    """A receiver that collects."""

    def __init__(self, future: asyncio.Future[tuple[int, bytes]]) -> None:
        self.future = future
        self.finished = False
        self._status = 0
        self._size = 0
        self._pieces: list[bytes] = []

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status

    def piece(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= BODY_LIMIT:
            self._pieces.append(data)
        elif not self.future.done():  # whoever waits cancels the connection
            self.future.set_exception(EngineFailed("The answer is too long."))

    def end(self) -> None:
        self.finished = True
        if not self.future.done():
            self.future.set_result((self._status, b"".join(self._pieces)))

    def broken(self, error: TertuliaError) -> None:
        self.finished = True
        if not self.future.done():
            self.future.set_exception(error)
