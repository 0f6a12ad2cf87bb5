"""The route table: which path is whose. Hot paths are found by dictionary in api/http.py, in front of this; every other
path comes through Starlette here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from ..accounts.directory import Directory
from ..core import Task, retry_headers
from ..errors import MethodNotAllowed, NotFound, TertuliaError
from .edge import App, authorize, guarded, identify

USAGE = "/v1/organization/usage"  # who may read that may read the figures, which name projects and what they spend


def build(
    tasks: Sequence[Task],
    routes: Sequence[BaseRoute],
    directory: Directory,
    states: Callable[[], dict[str, str]],
    metrics: Callable[[], bytes],
    metrics_open: bool = True,
) -> App:
    """The ASGI app. states() says of each default model ready, or why not; metrics() is Prometheus' text, for everybody
    or for who may read what was used."""

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        models = states()
        fine = all(state == "ready" for state in models.values())
        found = set(models.values())
        status = next((state for state in ("failed", "missing", "loading") if state in found), "ready")
        return JSONResponse({"status": status, "models": models}, 200 if fine else 503)

    async def show_metrics(request: Request) -> Response:
        if not metrics_open:
            who = identify(directory, request.scope["headers"])
            who.used = int(time.time())
            authorize(directory, who, "GET", USAGE)
        return PlainTextResponse(metrics(), media_type="text/plain; version=0.0.4")

    async def only_post(request: Request) -> Response:
        raise HTTPException(405, headers={"allow": "POST"})  # POST itself is hot and never gets here

    table: list[BaseRoute] = [
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
        *(Route(task.path, only_post, methods=["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"]) for task in tasks),
        *routes,
    ]
    app = Starlette(
        routes=table, exception_handlers={TertuliaError: _refused, HTTPException: _no_route, Exception: _broken}
    )
    app.router.redirect_slashes = False
    return guarded(app, directory)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, TertuliaError)
    return Response(error.body(), error.status, dict(retry_headers(error)), "application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        answer = await _refused(request, MethodNotAllowed(f"Not allowed to {request.method} on {request.url.path}."))
        answer.headers.update(error.headers or {})
        return answer
    if error.status_code == 404:
        return await _refused(request, NotFound(f"Invalid URL ({where})"))
    refusal = TertuliaError(error.detail, type="invalid_request_error")
    refusal.status = error.status_code
    return await _refused(request, refusal)


async def _broken(request: Request, error: Exception) -> Response:
    return await _refused(request, TertuliaError())  # Starlette raises it again afterwards, so it is logged
