"""What tokens cost, in integer nano-dollars. Local models cost nothing unless the configuration prices them."""

from __future__ import annotations

from collections.abc import Mapping

from ..core import Target, Usage
from ..errors import SettingsError

NANO = 10**9


class Prices:
    """Prices of models: those of upstreams, which may share the name of a model and not its price, and those that hold
    for a name whoever answers, which have the last word."""

    def __init__(
        self,
        given: Mapping[str, Mapping[str, float]],
        upstreams: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    ) -> None:
        """given: by model; upstreams: by upstream and model; US dollars per million tokens. Raises SettingsError."""
        self._given = {model: _pair(price, f"prices.{model}") for model, price in given.items()}
        self._far: dict[tuple[str, str], tuple[int, int]] = {}
        for name, models in (upstreams or {}).items():
            for model, price in models.items():
                self._far[name, model] = _pair(price, f"upstreams.{name}.prices.{model}")

    def cost(self, target: Target, prompt_tokens: int, completion_tokens: int) -> int:
        """Nano-dollars."""
        model: str = target.model
        price = self._given.get(model)
        if price is None and self._far:
            name: str = target.engine.name
            price = self._far.get((name, model))
        return price[0] * prompt_tokens + price[1] * completion_tokens if price is not None else 0

    def of(self, target: Target, usage: Usage) -> int:
        return self.cost(target, usage.prompt_tokens, usage.completion_tokens)


def _pair(price: Mapping[str, float], where: str) -> tuple[int, int]:
    """Nano-dollars a token, in and out: US dollars per million tokens times 1,000. Raises SettingsError."""
    for name, value in price.items():
        if name not in ("input", "output"):
            raise SettingsError(f"{where}.{name}: there is no such price; known are input and output")
        if value < 0:
            raise SettingsError(f"{where}.{name}: must not be negative")
    return round(price.get("input", 0) * 1000), round(price.get("output", 0) * 1000)
