"""GET /v1/models and /v1/models/{model}: what can be asked here, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ..core import ModelCard
from ..gateway.names import Names


def routes(names: Names) -> list[Route]:
    async def list_models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [show(card) for card in names.listed()]})

    async def retrieve(request: Request) -> JSONResponse:
        return JSONResponse(show(names.card(request.path_params["model"])))

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", retrieve, methods=["GET"]),
    ]


def show(card: ModelCard) -> dict[str, Any]:
    """A card as the SDK's Model: ids may contain / and :."""
    return {"id": card.id, "object": "model", "created": card.created, "owned_by": card.owned_by}
