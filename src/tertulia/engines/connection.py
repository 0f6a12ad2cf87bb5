"""A thin HTTP/1.1 client for engines: connections on asyncio.Protocol and httptools, kept alive and reused.

It knows how to send one request on one connection and hand the pieces of the answer to a Receiver as plain function
calls; it knows nothing of models, SSE or retries. Redirects are not followed: a key never travels to another address.
Limits: head 64 KiB, and whatever the receiver bears; TLS is the loop's, with verification.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Protocol
from urllib.parse import urlsplit

import httptools

from ..errors import EngineFailed, TertuliaError

HEAD_LIMIT = 65536  # bytes of status line and headers we accept from an engine


class Receiver(Protocol):
    """Who is told of an answer, in this order: head, piece*, then end or broken (which may come at any time, once)."""

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    def piece(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def broken(self, error: TertuliaError) -> None: ...


class Stale(EngineFailed):
    """A kept-alive connection was closed by the other side just as it was used: nothing of an answer had come."""


class Connection(asyncio.Protocol):
    """One socket to an engine; one request at a time. cancel() closes it, which is how an engine learns to stop."""

    __slots__ = ("_answered", "_headers", "_parser", "_pool", "_receiver", "_size", "transport", "used")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._size = 0
        self._answered = False
        self.used = False  # has carried a request before: the other side may have closed it meanwhile

    # towards the engine
    def send(self, request: bytes, receiver: Receiver) -> None:
        assert self.transport is not None
        self._receiver, self._parser = receiver, httptools.HttpResponseParser(self)
        self._headers, self._size, self._answered = [], 0, False
        self.transport.write(request)

    def cancel(self) -> None:
        """Gives the call up: nothing more reaches the receiver, and the engine sees the connection close."""
        self._receiver = None
        if self.transport is not None:
            self.transport.abort()

    def pause_reading(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    # from the transport
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._receiver is None:
            self.cancel()  # bytes nobody asked for
            return
        if not self._answered:
            self._size += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._break("The engine's answer is not HTTP.")
        if not self._answered and self._size > HEAD_LIMIT:  # after parsing: a body may come in the same packet
            self._break("The engine's answer has too long a head.")

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.forget(self)
        if self._receiver is None:
            return
        if self._answered and self._parser is not None and self._until_close():
            self._finish()
            return
        stale = self.used and not self._size
        self._break(
            "The engine closed the connection before its answer was complete.", Stale if stale else EngineFailed
        )

    def _until_close(self) -> bool:
        return not any(name in (b"content-length", b"transfer-encoding") for name, _ in self._headers)

    def _break(self, why: str, kind: type[EngineFailed] = EngineFailed) -> None:
        receiver, self._receiver = self._receiver, None
        if self.transport is not None:
            self.transport.abort()
        if receiver is not None:
            receiver.broken(kind(why))

    def _finish(self) -> None:
        receiver, self._receiver, self._parser = self._receiver, None, None
        if receiver is not None:
            receiver.end()

    # from the parser
    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._answered = True
        if self._receiver is not None and self._parser is not None:
            self._receiver.head(self._parser.get_status_code(), self._headers)

    def on_body(self, data: bytes) -> None:
        if self._receiver is not None:
            self._receiver.piece(data)

    def on_message_complete(self) -> None:
        parser = self._parser
        if self._receiver is None or parser is None:
            return
        if parser.get_status_code() in (100, 102, 103):  # interim: the answer itself follows
            self._headers, self._answered = [], False
            return
        keep = parser.should_keep_alive()
        if keep:
            self._pool.give_back(self)
        self._finish()
        if not keep and self.transport is not None:
            self.transport.close()


class Pool:
    """Connections to one base URL, http or https. open_connections counts busy and idle ones."""

    def __init__(self, base_url: str, *, connect_timeout: float = 5.0, idle_limit: int = 256) -> None:
        """base_url: `http(s)://HOST[:PORT][/PREFIX]`; connect_timeout in seconds."""
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http(s) URL: {base_url!r}")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.prefix = parts.path.rstrip("/").encode()
        self.host_header = parts.netloc.rpartition("@")[2].encode()
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._connect_timeout = connect_timeout
        self._idle_limit = idle_limit
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()
        self._closed = False

    @property
    def open_connections(self) -> int:
        return len(self._all)

    def request(self, method: bytes, path: bytes, headers: bytes, body: bytes) -> bytes:
        """The bytes of a request; headers are complete lines, each ending in CRLF."""
        return b"%s %s%s HTTP/1.1\r\nhost: %s\r\n%scontent-length: %d\r\n\r\n%s" % (
            method, self.prefix, path, self.host_header, headers, len(body), body,
        )  # fmt: skip

    def take(self) -> Connection | None:
        """An idle connection, without waiting."""
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    async def connect(self) -> Connection:
        """A new connection. Raises EngineFailed when there is none to be had within the timeout."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self.host, self.port, ssl=self._ssl
                )
        except TimeoutError:
            raise EngineFailed("The connection to the engine timed out.") from None
        except (OSError, ssl.SSLError) as error:
            raise EngineFailed(f"The engine cannot be reached ({type(error).__name__}).") from None
        self._all.add(connection)
        return connection

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
            raise EngineFailed("The engine did not answer in time.") from None
        finally:
            if not waiter.finished:
                connection.cancel()

    def give_back(self, connection: Connection) -> None:
        connection.used = True
        if self._closed or len(self._idle) >= self._idle_limit:
            if connection.transport is not None:
                connection.transport.close()
            return
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        try:
            self._idle.remove(connection)
        except ValueError:
            pass

    def close(self) -> None:
        """Closes every connection; calls in flight on them break."""
        self._closed = True
        for connection in list(self._all):
            if connection.transport is not None:
                connection.transport.abort()


class _Whole:
    """A receiver that collects."""

    def __init__(self, future: asyncio.Future[tuple[int, bytes]]) -> None:
        self.future = future
        self.finished = False
        self._status = 0
        self._pieces: list[bytes] = []

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status

    def piece(self, data: bytes) -> None:
        self._pieces.append(data)

    def end(self) -> None:
        self.finished = True
        if not self.future.done():
            self.future.set_result((self._status, b"".join(self._pieces)))

    def broken(self, error: TertuliaError) -> None:
        self.finished = True
        if not self.future.done():
            self.future.set_exception(error)
