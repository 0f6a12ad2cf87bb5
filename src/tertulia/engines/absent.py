"""Stands where a default model should be that could not be fetched: whoever asks for it learns that, and not that
there is no such model.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core import Call, ModelCard
from ..errors import Overloaded


class NotFetched(Overloaded):
    """The model is not on this machine yet."""

    code = "model_not_fetched"
    retry = False

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model `{model}` is not on this machine yet. Its owner fetches it with `tertulia pull {model}` and "
            "starts the server again."
        )


class Absent:
    """An engine that has none of its models."""

    name = "local"

    def __init__(self, cards: Sequence[ModelCard]) -> None:
        self._cards = list(cards)

    def models(self) -> Sequence[ModelCard]:
        return self._cards

    async def ready(self, model: str) -> bool:
        return False

    async def answer(self, call: Call) -> None:
        assert call.target is not None
        raise NotFetched(call.target.model)

    async def close(self) -> None:
        pass
