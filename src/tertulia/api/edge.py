"""Where HTTP meets calls: who asks (headers to Principal), the headers every answer carries, and errors in OpenAI's
shape. The hot paths use it through api/http.py, all others through the ASGI wrapper at the end.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from ..accounts import scopes
from ..accounts.directory import Directory, check_headers, check_kind
from ..accounts.roles import ADMIN_PATHS
from ..core import Principal, Wishes, retry_headers
from ..errors import TertuliaError, Unauthorized

log = logging.getLogger("tertulia.api")

NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank username) if you're accessing the "
    "API from your browser and are prompted for a username and password."
)
_prefix = "req_" + secrets.token_hex(8)
_counter = 10**15  # 16 digits, as long as anybody counts


def request_id() -> str:
    """req_ and 32 hex digits: unique in this process by a counter, between processes by a random prefix."""
    global _counter
    _counter += 1
    return _prefix + str(_counter)  # decimal digits are hex digits too, and cost a third


def identify(directory: Directory, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
    """Who sent these headers (names in lower case). Raises Unauthorized."""
    token = organization = project = None
    for name, value in headers:
        if name == b"authorization":
            if token is not None:
                raise Unauthorized("More than one Authorization header was sent.")
            token = value
        elif name == b"openai-organization":
            organization = value
        elif name == b"openai-project":
            project = value
    if not token:
        raise Unauthorized(NO_KEY)
    if token[:7].lower() != b"bearer ":
        raise Unauthorized(NO_KEY)
    who = directory.authenticate(token[7:].strip())
    if organization is not None or project is not None:
        check_headers(who, organization, project)
    return who


def authorize(directory: Directory, who: Principal, method: str, path: str) -> None:
    """Whether they may do that: administration is for admin keys, as far as their owners' roles go; all else is for
    project keys, within their scopes. Raises Forbidden."""
    if path.startswith(ADMIN_PATHS):
        check_kind(who, "admin")
        directory.roles.check(who, method, path)
    elif path.startswith("/v1/"):
        check_kind(who, "project")
        scopes.check(who, method, path)
        directory.roles.check_use(who, method, path)


WISHES = frozenset(
    {b"x-stainless-retry-count", b"x-stainless-read-timeout", b"cache-control", b"idempotency-key", b"traceparent"}
)


def wishes(headers: Iterable[tuple[bytes, bytes]]) -> Wishes:
    """What these headers (names in lower case) ask of the gateway; what is not understood asks nothing."""
    given = {name.decode(): value.decode("latin-1").strip() for name, value in headers if name in WISHES}
    retries = given.get("x-stainless-retry-count", "")[:4]
    return Wishes(
        retry_count=int(retries) if retries.isdecimal() else 0,
        patience=_seconds(given.get("x-stainless-read-timeout", "")),
        cache_control=given.get("cache-control", "").lower()[:256],
        idempotency_key=given.get("idempotency-key", "")[:256],
        traceparent=given.get("traceparent", "")[:256],
    )


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 < seconds < 1e9 else None


def standard_headers(id: str, who: Principal, began: int) -> bytes:
    """The lines every answer carries; began in time.perf_counter_ns()."""
    lines = who.lines
    if lines is None:
        lines = who.lines = _own_lines(who)
    return b"x-request-id: %b\r\nopenai-processing-ms: %d\r\n%b" % (
        id.encode(), (time.perf_counter_ns() - began) // 1_000_000, lines,
    )  # fmt: skip


def _own_lines(who: Principal) -> bytes:
    """Those that are the same in every answer to one key."""
    head = "openai-version: 2020-10-01\r\naccess-control-expose-headers: X-Request-ID\r\n"
    if who.organization:
        head += f"openai-organization: {who.organization}\r\n"
    if who.project:
        head += f"openai-project: {who.project}\r\n"
    return head.encode("latin-1", "replace")


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics"})


def guarded(app: App, directory: Directory) -> App:
    """Around the routes that are not hot: authentication, standard headers, errors in OpenAI's shape."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        began, id = time.perf_counter_ns(), request_id()
        who = Principal("", "", "", "nobody")

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                lines = standard_headers(id, who, began).split(b"\r\n")[:-1]
                message["headers"] = [*message.get("headers", ()), *(tuple(line.split(b": ", 1)) for line in lines)]
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS:
                who = identify(directory, scope["headers"])
                who.used = int(time.time())
                authorize(directory, who, scope["method"], scope["path"])
            scope.setdefault("state", {})["principal"] = who
            await app(scope, receive, send_with_headers)
        except TertuliaError as error:
            await send_error(error, send_with_headers)

    return guard


async def send_error(error: TertuliaError, send: Send) -> None:
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.encode(), value.encode()) for name, value in retry_headers(error)]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
