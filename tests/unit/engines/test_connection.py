"""The HTTP client of engines: what it keeps alive, what it does not trust, how it connects, and how that fails."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from far import ANSWER, CHAT, STREAM, Setup, far_side, run, stream, whole
from mission.front import CERTIFICATE, KEY, openai_address
from tertulia import config
from tertulia.core import FAILED, FINISHED
from tertulia.engines.connection import Connection, Pool
from tertulia.engines.proxy import Proxy, proxy_for
from tertulia.engines.upstream import Upstream
from tertulia.errors import EngineFailed, SettingsError, TertuliaError, UpstreamTimeout


class Heard:
    """A receiver that writes down what it is told."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.said: list[Any] = []
        self.fault = fault

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.said.append(status)

    def piece(self, data: bytes) -> None:
        if self.fault is not None:
            raise self.fault
        self.said.append(data)

    def end(self) -> None:
        self.said.append("end")

    def broken(self, error: TertuliaError) -> None:
        self.said.append(error)


class Wire:
    """A transport that sends to nowhere."""

    def __init__(self) -> None:
        self.closed = False
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> None:
        return None

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


def connected() -> tuple[Pool, Connection, Wire]:
    pool, wire = Pool("http://far.example/v1"), Wire()
    connection = Connection(pool)
    connection.connection_made(wire)  # type: ignore[arg-type]
    return pool, connection, wire


def on_loop(test: Callable[[], None]) -> None:
    async def inside() -> None:
        test()

    run(inside)


@pytest.mark.parametrize(
    "extra", [b"H", b"HTTP/1.1 200", whole(b'{"poison":1}'), b"\r\n\r\nHTTP/1.1 ", b"garbage", b"\x00"]
)
def test_what_follows_an_answer_is_never_taken_for_the_next_one(extra: bytes) -> None:
    def test() -> None:
        pool, connection, wire = connected()
        heard = Heard()
        connection.send(b"", heard)
        connection.data_received(whole(ANSWER) + extra)
        assert heard.said == [200, ANSWER, "end"]
        assert wire.closed and pool.take() is None

    on_loop(test)


def test_what_comes_while_a_connection_is_idle_closes_it() -> None:
    def test() -> None:
        pool, connection, wire = connected()
        connection.send(b"", Heard())
        connection.data_received(whole(ANSWER))
        assert not wire.closed
        connection.data_received(whole(b'{"poison":1}'))
        assert wire.closed and pool.take() is None

    on_loop(test)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_interim_answers_are_passed_over(size: int) -> None:
    def test() -> None:
        pool, connection, _ = connected()
        for _ in range(3):  # the parser is reused
            heard = Heard()
            connection.send(b"", heard)
            wire = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + whole(ANSWER)
            for at in range(0, len(wire), size):
                connection.data_received(wire[at : at + size])
            assert heard.said[0] == 200 and heard.said[-1] == "end" and b"".join(heard.said[1:-1]) == ANSWER
            assert pool.take() is connection

    on_loop(test)


@pytest.mark.parametrize(
    "wire",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnot hex\r\n",
        b"HTTP/1.1 101 Switching\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
    ],
)
def test_what_is_not_http_breaks_the_connection(wire: bytes) -> None:
    def test() -> None:
        pool, connection, transport = connected()
        heard = Heard()
        connection.send(b"", heard)
        connection.data_received(wire)
        assert isinstance(heard.said[-1], EngineFailed) and transport.closed and pool.take() is None

    on_loop(test)


def test_a_defect_of_a_receiver_is_heard_and_not_taken_for_the_other_sides(caplog: pytest.LogCaptureFixture) -> None:
    def test() -> None:
        _, connection, wire = connected()
        heard = Heard(ZeroDivisionError("ours"))
        connection.send(b"", heard)
        connection.data_received(whole(ANSWER))
        assert type(heard.said[-1]) is TertuliaError and wire.closed

    on_loop(test)
    assert "ours" in caplog.text


def test_idle_connections_are_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tertulia.engines.connection.IDLE_SECONDS", 0.2)

    async def test() -> None:
        async with far_side() as side:
            pool = side.upstream.pool
            await side.ask()
            await asyncio.sleep(0.1)
            await side.ask()
            await asyncio.sleep(0.15)
            assert pool.open_connections == 1 and side.far.connections == 1
            await asyncio.sleep(0.3)
            assert pool.open_connections == 0

    run(test)


def test_only_so_many_idle_connections_are_kept() -> None:
    async def test() -> None:
        async with far_side(connections=2) as side:
            await asyncio.gather(*(side.ask() for _ in range(6)))
            await asyncio.sleep(0.05)
            assert side.upstream.pool.open_connections == 2

    run(test)


def test_a_paused_connection_reads_again_for_the_next_call() -> None:
    async def test() -> None:
        async with far_side() as side:
            pool = side.upstream.pool
            connection = await pool.connect()
            connection.pause_reading()
            pool.give_back(connection)
            assert (await side.ask())[1] == ANSWER and side.far.connections == 1

    run(test)


# connecting


async def failure(upstream: Upstream) -> tuple[TertuliaError, float]:
    side = Setup(None, upstream)  # type: ignore[arg-type]
    call, sink = side.call(CHAT)
    began = asyncio.get_running_loop().time()
    await side.go(call)
    await sink.done()
    await upstream.close()
    assert call.reply.outcome == FAILED and call.reply.error is not None
    assert "sk-" not in call.reply.error.message and "http" not in call.reply.error.message
    return call.reply.error, asyncio.get_running_loop().time() - began


def upstream(base: str, environment: dict[str, str] | None = None, **more: Any) -> Upstream:
    return Upstream("u", config.Upstream(base_url=base, models={"far": "x"}, **more), "sk-far", environment or {})


def test_nobody_there_an_unknown_name_and_silence_are_told_apart() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        error, _ = await failure(upstream(f"http://127.0.0.1:{port}/v1"))
        assert error.status == 502 and "refused the connection" in error.message
        error, _ = await failure(upstream("http://no-such-host.invalid/v1"))
        assert error.status == 502 and "could not be resolved" in error.message
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never speaks TLS
            base = f"https://127.0.0.1:{silent.getsockname()[1]}/v1"
            error, took = await failure(upstream(base, connect_timeout=0.3))
        assert (error.status, error.code) == (504, "upstream_timeout") and took < 2
        assert "was not made within 0.3 seconds" in error.message

    run(test)


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, KEY)
    return context


def test_a_certificate_is_verified_and_the_key_not_sent_without() -> None:
    async def test() -> None:
        for ca, why in ((None, "self-signed"), (str(CERTIFICATE), "IP address mismatch")):
            async with far_side(tls=server_tls(), base="https://127.0.0.1:{port}/v1", tls_ca=ca) as side:
                reply, _ = await side.ask()
                assert reply.error is not None and reply.error.status == 502
                assert "certificate was not accepted" in reply.error.message
                assert why in reply.error.message.replace("self signed", "self-signed")
                assert side.far.requests == []

    run(test)


def test_what_does_not_speak_tls_is_told() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(plain, "127.0.0.1", 0)
        error, _ = await failure(upstream(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"))
        assert error.status == 502 and "TLS" in error.message
        server.close()

    run(test)


# the proxy


def test_https_goes_through_the_proxys_tunnel_and_is_verified() -> None:
    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(*STREAM)
            with openai_address(f"http://127.0.0.1:{side.far.port}") as environment:
                for ca in (str(CERTIFICATE), None):
                    far = upstream("https://api.openai.com/v1", environment, tls_ca=ca)
                    call, sink = Setup(side.far, far).call({**CHAT, "stream": True})
                    await Setup(side.far, far).go(call)
                    body = await sink.done()
                    if ca is not None:
                        assert (body, call.reply.outcome) == (b"".join(STREAM), FINISHED)
                        assert side.far.requests[-1].startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: api.op")
                        assert b"proxy" not in side.far.requests[-1]
                    else:
                        assert b"certificate was not accepted" in body
                    await far.close()
                error, _ = await failure(upstream("https://elsewhere.example/v1", environment))
                assert error.message == "The proxy answered with status 403."

    run(test)


def test_http_goes_through_the_proxy_with_the_whole_address() -> None:
    async def test() -> None:
        async with far_side() as side:  # far plays the proxy
            proxy = f"http://me:pass%20word@127.0.0.1:{side.far.port}"
            far = upstream("http://far.example:81/v1", {"HTTP_PROXY": proxy})
            other = Setup(side.far, far)
            for _ in range(2):
                assert (await other.ask())[1] == ANSWER
            head = side.far.requests[-1].partition(b"\r\n\r\n")[0]
            assert head.startswith(
                b"POST http://far.example:81/v1/chat/completions HTTP/1.1\r\nhost: far.example:81\r\n"
            )
            assert b"proxy-authorization: Basic bWU6cGFzcyB3b3Jk" in head and side.far.connections == 1
            await far.close()

    run(test)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 407 No\r\n\r\n", b"SSH-2.0\r\n\r\n", b"", b"x" * 20_000, b"HTTP/1.1 200 OK"]
)
def test_a_proxy_that_opens_no_tunnel_is_a_typed_error(answer: bytes) -> None:
    async def bad(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await asyncio.sleep(0.05)
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(bad, "127.0.0.1", 0)
        proxy = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        error, _ = await failure(upstream("https://far.example/v1", {"https_proxy": proxy}))
        assert error.status == 502 and error.message.startswith("The proxy")
        server.close()

    run(test)


def test_this_machine_is_reached_directly() -> None:
    async def test() -> None:
        async with far_side(
            environment={"HTTP_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "http://127.0.0.1:1"}
        ) as side:
            assert (await side.ask())[1] == ANSWER

    run(test)


PROXY = {"HTTPS_PROXY": "http://proxy.example:3128"}


@pytest.mark.parametrize(
    ("environment", "host", "port", "used"),
    [
        (PROXY, "far.example", 443, True),
        ({"https_proxy": "proxy.example:3128"}, "far.example", 443, True),
        ({"ALL_PROXY": "http://proxy.example:3128/"}, "far.example", 443, True),
        ({"HTTP_PROXY": "http://proxy.example:3128"}, "far.example", 443, False),
        ({}, "far.example", 443, False),
        ({"HTTPS_PROXY": " "}, "far.example", 443, False),
        (PROXY, "127.0.0.1", 443, False),
        (PROXY, "::1", 443, False),
        (PROXY, "localhost", 443, False),
        ({**PROXY, "NO_PROXY": "*"}, "far.example", 443, False),
        ({**PROXY, "NO_PROXY": "other.example, far.example"}, "far.example", 443, False),
        ({**PROXY, "no_proxy": "example"}, "far.example", 443, False),
        ({**PROXY, "no_proxy": ".example"}, "far.example", 443, False),
        ({**PROXY, "no_proxy": "*.example"}, "far.example", 443, False),
        ({**PROXY, "no_proxy": "ar.example"}, "far.example", 443, True),
        ({**PROXY, "no_proxy": "FAR.example:443"}, "far.example", 443, False),
        ({**PROXY, "no_proxy": "far.example:8443"}, "far.example", 443, True),
        ({**PROXY, "no_proxy": "10.0.0.0/8"}, "10.1.2.3", 443, False),
        ({**PROXY, "no_proxy": "10.0.0.0/8"}, "11.1.2.3", 443, True),
        ({**PROXY, "no_proxy": "10.1.2.3"}, "10.1.2.3", 443, False),
        ({**PROXY, "no_proxy": "[fd00::1]"}, "fd00::1", 443, False),
    ],
)
def test_when_a_proxy_is_used(environment: dict[str, str], host: str, port: int, used: bool) -> None:
    assert proxy_for("https", host, port, environment) == (Proxy("proxy.example", 3128) if used else None)


@pytest.mark.parametrize(
    "url", ["socks5://u:secret@proxy.example", "https://proxy.example", "http://", "http://x:secret"]
)
def test_a_proxy_we_cannot_speak_to_is_not_gone_around(url: str) -> None:
    with pytest.raises(SettingsError, match="ALL_PROXY") as caught:
        proxy_for("https", "far.example", 443, {"ALL_PROXY": url})
    assert "secret" not in str(caught.value)


def test_fetch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tertulia.engines.connection.BODY_LIMIT", 1000)

    async def fails(side: Setup, kind: type[TertuliaError], words: str) -> None:
        with pytest.raises(kind, match=words):
            await side.upstream.pool.fetch("GET", "/x", timeout=0.3)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def test() -> None:
        async with far_side() as side:
            side.far.script = whole(b"x" * 2000)
            await fails(side, EngineFailed, "too long")
            side.far.script = hang
            await fails(side, UpstreamTimeout, "within 0.3 seconds")
            await asyncio.sleep(0.05)
            assert side.upstream.pool.open_connections == 0

    run(test)


def test_a_closed_pool_makes_no_connections() -> None:
    async def test() -> None:
        async with far_side() as side:
            waiting: Awaitable[Any] = side.upstream.pool.connect()
            side.upstream.pool.close()
            with pytest.raises(EngineFailed, match="stopped"):
                await waiting

    run(test)


HEADS = [
    b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\ndate: today\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length:%d \r\ndate: today\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ndate: tomorrow\r\ncontent-length:   %d\r\n\r\n",
]
NOT_AT_ONCE = [
    b"HTTP/1.1 500 No\r\ncontent-length: %d\r\ndate: today\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\ndate: today\r\nconnection: close\r\n\r\n",
]


def test_answers_that_come_at_once_are_taken_whole_whatever_came_before() -> None:
    """A head as the last one is not looked at again: no other may be taken for it."""

    def test() -> None:
        pool, connection, wire = connected()
        for head in [*HEADS, *HEADS[::-1], *NOT_AT_ONCE[:1], HEADS[0], HEADS[0], NOT_AT_ONCE[1]]:
            for body in (b"{}", b"x" * 12_345, b"", b"y"):
                if wire.closed:
                    return
                told, heard = Heard(), []
                connection.send(b"", told, whole=heard.append)
                connection.data_received(head % len(body) + body)
                connection.work()
                if head in HEADS:
                    assert (heard, told.said) == ([body], [])
                else:
                    assert heard == [] and told.said == [int(head[9:12]), *([body] if body else []), "end"]
                pool.take()
        raise AssertionError("the last answer closes the connection")

    on_loop(test)


@pytest.mark.parametrize("wrong", [b"+5", b"5_0", b"05", b"4", b"6", b"", b"9999999999999", b" 5"])
def test_a_length_that_does_not_fit_is_the_parsers_to_judge(wrong: bytes) -> None:
    def test() -> None:
        _, connection, wire = connected()
        for value in (b"5", wrong):
            told, heard = Heard(), []
            connection.send(b"", told, whole=heard.append)
            connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: %b\r\ndate: today\r\n\r\nhello" % value)
            connection.work()
            assert bool(heard) == (value in (b"5", b"05", b" 5"))
        if wrong == b"4":
            assert told.said == [200, b"hell", "end"] and wire.closed

    on_loop(test)
