"""The HTTP proxy that the environment names: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in either case.

Loopback never goes through a proxy: what listens there is this machine's own. Only http:// proxies are known; another
one is an error and not ignored, since going around it may be what it was set to prevent.
"""

from __future__ import annotations

import asyncio
import ipaddress
from base64 import b64encode
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ..errors import EngineFailed, SettingsError

HEAD_LIMIT = 16384  # bytes of a proxy's answer to CONNECT


class Proxy(NamedTuple):
    """Where the proxy is; authorization is a header line ending in CRLF, or empty."""

    host: str
    port: int
    authorization: bytes = b""


def proxy_for(scheme: str, host: str, port: int, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy for a server, None if it is reached directly. Raises SettingsError for one that cannot be used."""
    if _is_loopback(host):
        return None
    for variable in (f"{scheme}_proxy", "all_proxy"):
        url = _variable(environment, variable)
        if url:
            return None if _exempt(host, port, _variable(environment, "no_proxy")) else _parse(url, variable.upper())
    return None


def _variable(environment: Mapping[str, str], name: str) -> str:
    return (environment.get(name) or environment.get(name.upper()) or "").strip()


def _parse(url: str, variable: str) -> Proxy:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if host is None or parts.scheme != "http":  # what it says may hold a password: it is not repeated
        raise SettingsError(f"The environment variable {variable} does not hold the URL of an http:// proxy.")
    if parts.username is None:
        return Proxy(host, port)
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return Proxy(host, port, b"proxy-authorization: Basic %s\r\n" % b64encode(pair))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _exempt(host: str, port: int, rules: str) -> bool:
    """Whether NO_PROXY names the server: by name, by a domain above it, by address or network, or all with *."""
    return any(_matches(host.lower(), port, rule.strip().lower()) for rule in rules.split(","))


def _matches(host: str, port: int, rule: str) -> bool:
    if rule in ("", "*"):
        return rule == "*"
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(rule.strip("[]"), strict=False)
    except ValueError:  # one of the two is a name
        pass
    name, _, wanted = rule.rpartition(":")
    if name and wanted.isdigit():
        if int(wanted) != port:
            return False
        rule = name
    rule = rule.strip("[]").removeprefix("*").removeprefix(".")
    return host == rule or host.endswith("." + rule)


class Tunnel(asyncio.Protocol):
    """Asks a proxy for a connection to a server; await opened, then speak to the server on transport."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def ask(self, host: str, port: int, authorization: bytes) -> None:
        assert self.transport is not None
        where = b"%s:%d" % (f"[{host}]".encode() if ":" in host else host.encode("idna"), port)
        self.transport.write(b"CONNECT %s HTTP/1.1\r\nhost: %s\r\n%s\r\n" % (where, where, authorization))

    def data_received(self, data: bytes) -> None:
        if self.opened.done():
            return
        self._got += data
        head, end, rest = self._got.partition(b"\r\n\r\n")
        if not end:
            if len(self._got) > HEAD_LIMIT:
                self._refuse("The proxy's answer is not HTTP.")
            return
        words = head.split(b"\r\n", 1)[0].split(b" ", 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit() or rest:
            self._refuse("The proxy's answer is not HTTP.")
        elif not words[1].startswith(b"2"):
            self._refuse(f"The proxy answered with status {int(words[1])}.")
        else:
            self.opened.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._refuse("The proxy closed the connection.")

    def _refuse(self, why: str) -> None:
        if not self.opened.done():
            self.opened.set_exception(EngineFailed(why))
