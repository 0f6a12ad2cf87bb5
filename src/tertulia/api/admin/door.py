"""From an HTTP request to a verb of the table and back. Who may come in is decided at the edge, before anything
of the request is read; the database is asked in a thread.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ...accounts.audit import caller
from ...core import Principal
from ...errors import BadRequest, NotFound, TooLarge, encode
from ..pages import Query
from .kinds import ID, Ask, Row, World
from .table import ELSEWHERE, ROWS

LONGEST_BODY = 4 * 2**20  # bytes; ten thousand names of models fit


def routes(world: World) -> list[BaseRoute]:
    """The routes of the Admin API, but for its usage."""
    by_path: dict[str, dict[str, Row]] = {}
    for row in ROWS:
        by_path.setdefault("/v1" + row.path, {})[row.method] = row
    # those that take any rest of the path come last
    ordered = sorted(by_path.items(), key=lambda pair: ":path}" in pair[0])
    found: list[BaseRoute] = [
        Route(path, _endpoint(world, rows), methods=sorted(rows)) for path, rows in ordered
    ]  # fmt: skip
    for sdk, path, reason in ELSEWHERE:
        refuse = _refusing(sdk, reason)
        found += [Route("/v1" + path + rest, refuse, methods=METHODS) for rest in ("", "/{rest:path}")]
    return found


METHODS = ["GET", "POST", "DELETE"]


def _endpoint(world: World, rows: dict[str, Row]) -> Any:
    async def endpoint(request: Request) -> Response:
        row = rows["GET" if request.method == "HEAD" else request.method]
        who: Principal = request.scope["state"]["principal"]  # whose roles have been checked at the edge
        ids = {name: str(value) for name, value in request.path_params.items()}
        if not all(ID.match(id) for id in ids.values()):
            raise NotFound(f"Invalid URL ({request.method} {request.url.path[:128]})")
        query = Query(request.scope["query_string"], row.parameters)
        given = row.body.read(await body(request)) if row.method == "POST" else {}
        ask = Ask(world, row, who, ids, query, given)
        client = request.scope.get("client")
        answer = await asyncio.to_thread(run, ask, client[0] if client else "", request.headers.get("user-agent", ""))
        return Response(encode(answer), media_type="application/json")

    return endpoint


def run(ask: Ask, ip: str, user_agent: str) -> dict[str, Any]:
    """In a thread: the verb, and what it changes, all or nothing."""
    if not ask.row.writes:
        ask.enter()
        return ask.row.act(ask)
    user = ask.directory.roles.user(ask.who.owner_id)
    with ask.directory.change(caller(ask.who, user, ip, user_agent)) as change:
        ask.changing = change
        ask.enter()
        return ask.row.act(ask)


async def body(request: Request) -> bytes:
    """Raises TooLarge before all of it is in memory."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > LONGEST_BODY:
                raise TooLarge(f"The body of an administrative request has at most {LONGEST_BODY} bytes.")
            parts.append(part)
    except ClientDisconnect:
        raise BadRequest("The request broke off.") from None
    return b"".join(parts)


def _refusing(sdk: str, reason: str) -> Any:
    async def endpoint(request: Request) -> Response:
        name = sdk.removeprefix("projects.").replace("_", " ").capitalize()
        raise NotFound(f"{name} are not available on this server: {reason}.", code="not_available")

    return endpoint
