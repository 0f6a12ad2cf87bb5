"""GET /v1/models and /v1/models/{model}: what can be asked here, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ..core import ModelCard
from ..errors import ModelNotFound
from ..gateway.names import Names


def routes(names: Names) -> list[Route]:
    async def list_models(request: Request) -> JSONResponse:
        cards = [card for card in names.listed() if may_ask(request, card)]
        return JSONResponse({"object": "list", "data": [show(card) for card in cards]})

    async def retrieve(request: Request) -> JSONResponse:
        name = request.path_params["model"]
        card = names.card(name)
        if not may_ask(request, card):
            raise ModelNotFound(name)
        return JSONResponse(show(card))

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", retrieve, methods=["GET"]),
    ]


def may_ask(request: Request, card: ModelCard) -> bool:
    """Whether the model permissions of the key's project leave it that model."""
    account = request.scope["state"]["principal"].account  # an accounts.projects.Project; None for admin keys
    permitted = account.models if account is not None else None
    return permitted is None or permitted.permits(card.id)


def show(card: ModelCard) -> dict[str, Any]:
    """A card as the SDK's Model: ids may contain / and :."""
    return {"id": card.id, "object": "model", "created": card.created, "owned_by": card.owned_by}
