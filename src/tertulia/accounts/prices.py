"""What tokens cost, in integer nano-dollars. Local models cost nothing unless the configuration prices them."""

from __future__ import annotations

from collections.abc import Mapping

from ..core import Usage
from ..errors import SettingsError

NANO = 10**9


class Prices:
    """Prices by model name; US dollars per million tokens in the configuration are nano-dollars a token times 1,000."""

    def __init__(self, given: Mapping[str, Mapping[str, float]], where: str = "prices") -> None:
        """where: the setting's name, for messages. Raises SettingsError."""
        self._prices: dict[str, tuple[int, int]] = {}
        for model, price in given.items():
            for name, value in price.items():
                if name not in ("input", "output"):
                    raise SettingsError(f"{where}.{model}.{name}: there is no such price; known are input and output")
                if value < 0:
                    raise SettingsError(f"{where}.{model}.{name}: must not be negative")
            self._prices[model] = (round(price.get("input", 0) * 1000), round(price.get("output", 0) * 1000))

    def cost(self, model: str, prompt_tokens: int, completion_tokens: int) -> int:
        """Nano-dollars."""
        price = self._prices.get(model)
        return price[0] * prompt_tokens + price[1] * completion_tokens if price else 0

    def of(self, model: str, usage: Usage) -> int:
        return self.cost(model, usage.prompt_tokens, usage.completion_tokens)
