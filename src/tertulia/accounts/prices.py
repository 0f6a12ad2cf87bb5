"""What tokens cost. Prices are integer pico-dollars a token, costs integer nano-dollars, rounded up.

a price is looked for in    [prices], by our name for the model, whoever answers: it has the last word
                            [upstreams.NAME.prices], by our name
                            prices.toml of this package, OpenAI's list prices on a date, by the upstream's own name
a model of this machine     costs nothing unless one of the first two prices it
an upstream's without any   is unknown: find() is None, and whoever asks decides what that means
one that says not all       has the rest from the list; if the model is not there, it is a mistake: what nobody has said
                            is not free
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from ..core import Target, Usage
from ..errors import SettingsError

NANO: Final = 10**9  # nano-dollars in a dollar
PICO: Final = 1000  # pico-dollars in a nano-dollar
LONG: Final = 272_000  # tokens of a prompt above which some models cost more
MOST: Final = 1_000_000.0  # US dollars a million tokens; more is a slip of the pen
KINDS: Final = ("input", "cached_input", "output")
DATED: Final = re.compile(r"-20\d\d-\d\d-\d\d$")
FASTER: Final = frozenset(("priority", "fast"))  # tiers of service that cost twice the list price


class Price:
    """Of one model. context and max_output are in tokens, 0 if not known; listed: it is from prices.toml."""

    __slots__ = ("cached", "context", "input", "listed", "long", "max_output", "output", "written")

    def __init__(self, input: int, cached: int, output: int, written: int = 0) -> None:
        """Pico-dollars a token; written is what input costs that is put into the upstream's prompt cache."""
        self.input, self.cached, self.output = input, cached, output
        self.written = written or input
        self.long = self.listed = False
        self.context = self.max_output = 0

    def most(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Nano-dollars that so many tokens can cost at most."""
        dearest = self.written if self.written > self.input else self.input
        if self.long and prompt_tokens > LONG:
            return (2 * dearest * prompt_tokens + 3 * self.output * completion_tokens // 2 + 999) // PICO
        return (dearest * prompt_tokens + self.output * completion_tokens + 999) // PICO

    def cost(self, prompt: int, cached: int, completion: int, written: int = 0) -> int:
        """Nano-dollars for tokens; cached and written are among those of the prompt."""
        read = self.input * (prompt - cached - written) + self.cached * cached + self.written * written
        if self.long and prompt > LONG:
            return (2 * read + 3 * self.output * completion // 2 + 999) // PICO
        return (read + self.output * completion + 999) // PICO


FREE: Final = Price(0, 0, 0)


def dearest(prices: Iterable[Price]) -> Price:
    """What costs as much as the dearest of them in everything: any of them may answer."""
    found = Price(0, 0, 0)
    for price in prices:
        found.input = max(found.input, price.input)
        found.written = max(found.written, price.written)
        found.cached = max(found.cached, price.cached)
        found.output = max(found.output, price.output)
        found.long = found.long or price.long
        found.listed = found.listed or price.listed
    return found


class Prices:
    """The prices of one server."""

    def __init__(
        self,
        given: Mapping[str, Mapping[str, float]],
        upstreams: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
        shipped: Mapping[str, Price] | None = None,
        theirs: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """given: by model; upstreams: by upstream and model; US dollars per million tokens. shipped: of the package, if
        others are wanted than its own. theirs: by upstream and our name for a model, its own name. Raises
        SettingsError."""
        self._shipped = list_prices() if shipped is None else shipped
        self._given: dict[str, dict[str, int]] = {}
        self._far: dict[tuple[str, str], dict[str, int]] = {}
        known = theirs or {}
        for model, price in given.items():
            own = [names[model] for names in known.values() if model in names]  # whoever answers
            self._given[model] = self._read(price, model, own, f"prices.{model}")
        for name, models in (upstreams or {}).items():
            for model, price in models.items():
                own = [known[name][model]] if model in known.get(name, {}) else []
                self._far[name, model] = self._read(price, model, own, f"upstreams.{name}.prices.{model}")
        self._found: dict[tuple[str, str], Price | None] = {}

    def _read(self, price: Mapping[str, float], model: str, own: list[str], where: str) -> dict[str, int]:
        """What it says of a model by our name; own: what it is called by those who have it. Raises SettingsError, also
        if it does not say enough."""
        given = read_price(price, where)
        listed = [find_listed(self._shipped, name) is not None for name in own]
        if find_listed(self._shipped, model) is None and not (listed and all(listed)):
            kind = missing(given, [model, *own])
            if kind:
                raise SettingsError(f"{where}.{kind}: missing, and no list has that model; write 0 if it is free")
        return given

    def find(self, target: Target) -> Price | None:
        """What its tokens cost; None if nobody has said."""
        key: tuple[str, str] = (target.engine.name, target.model)
        try:
            return self._found[key]
        except KeyError:
            found = self._found[key] = self._find(target)
            return found

    def _find(self, target: Target) -> Price | None:
        model: str = target.model
        name: str = target.engine.name
        listed, own = None, model
        if target.card.source.startswith("upstream:"):
            identity = getattr(target.engine, "theirs", None)
            own = model if identity is None else identity(model)
            listed = find_listed(self._shipped, own)
        given = self._given.get(model)
        if given is None:
            given = self._far.get((name, model))
        if given is None:
            return listed if target.card.source.startswith("upstream:") else FREE
        rest = listed or find_listed(self._shipped, model)
        if rest is None and missing(given, [model, own]):  # of an upstream that had not said yet that it has the model
            return None
        return complete(given, rest, listed)

    def known(self, target: Target) -> Price | None:
        """What is listed of an upstream's model, whatever it costs here; None for a model of this machine."""
        return self.find(target) if target.card.source.startswith("upstream:") else None

    def of(self, target: Target, usage: Usage, tier: str | None = None) -> int:
        """Nano-dollars; nothing where the price is not known. tier: the service_tier that was asked for."""
        price = self.find(target)
        if price is None:
            return 0
        cached: int = usage.cached_tokens
        prompt: int = usage.prompt_tokens
        written: int = usage.cache_write_tokens
        if cached + written > prompt:  # whoever says so contradicts himself: no less than the prompt is paid
            cached = written = 0
        cost = price.cost(prompt, cached, usage.completion_tokens, written)
        return 2 * cost if tier in FASTER and price.listed else cost


def read_price(price: Mapping[str, float], where: str) -> dict[str, int]:
    """Pico-dollars a token by kind, as far as it says, from US dollars per million tokens as they stand in the
    configuration. Raises SettingsError that names the value."""
    picos: dict[str, int] = {}
    for name, value in price.items():
        if name not in KINDS:
            raise SettingsError(f"{where}.{name}: there is no such price; known are {', '.join(KINDS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SettingsError(f"{where}.{name}: expected a number of US dollars, got {value!r}")
        if value < 0:
            raise SettingsError(f"{where}.{name}: must not be negative")
        if value > MOST:
            raise SettingsError(f"{where}.{name}: more than a dollar a token; prices are per million tokens")
        picos[name] = picos_of(value)
    return picos


def missing(given: Mapping[str, int], names: Iterable[str]) -> str:
    """What a price does not say of a model that no list has, if that is not free; names: what the model is called."""
    embeds = any("embed" in name.lower() for name in names)  # which has no output
    for kind in ("input",) if embeds else ("input", "output"):
        if kind not in given:
            return kind
    return ""


def complete(given: Mapping[str, int], rest: Price | None, same: Price | None = None) -> Price:
    """The price, and what it does not say from rest. same: what is listed of the very model, which another price does
    not change: what it holds and answers at most is as it was."""
    base = FREE if rest is None else rest  # only of an embedding model, which has no output
    paid = given.get("input", base.input)
    cached = given.get("cached_input", paid if "input" in given else base.cached)
    found = Price(paid, cached, given.get("output", base.output), 0 if "input" in given else base.written)
    if "input" not in given or "output" not in given:  # what is from the list costs more when the list says so
        found.long, found.listed = base.long, base.listed
    if same is not None:
        found.context, found.max_output = same.context, same.max_output
    return found


def picos_of(dollars: float) -> int:
    """Pico-dollars a token from US dollars a million tokens, rounded up."""
    return math.ceil(round(dollars * 1e6, 3))


# the list that ships with the package
@cache
def _shipped() -> tuple[str, dict[str, Price]]:
    with Path(__file__).with_name("prices.toml").open("rb") as file:
        read = tomllib.load(file)
    return str(read["date"]), {name: _listed(row) for name, row in read["models"].items()}


def _listed(row: Mapping[str, Any]) -> Price:
    paid = picos_of(row["input"])
    price = Price(paid, picos_of(row.get("cached_input", row["input"])), picos_of(row["output"]))
    if row.get("write"):
        price.written = paid * 5 // 4
    price.long, price.listed = bool(row.get("long")), True
    price.context, price.max_output = int(row["context"]), int(row.get("max_output", 0))
    return price


def list_prices() -> Mapping[str, Price]:
    """OpenAI's list prices, by model."""
    return _shipped()[1]


def list_date() -> str:
    """When they were looked up, as 2026-11-23."""
    return _shipped()[0]


def find_listed(prices: Mapping[str, Price], model: str) -> Price | None:
    """By exact name, or by that of which it is a dated or a fine-tuned one; OpenRouter's `openai/` is no part of it."""
    name = model.removeprefix("openai/")
    tuned = name.startswith("ft:")
    if tuned:
        name = name.split(":")[1]
    for one in (name, DATED.sub("", name)):
        found = prices.get("ft:" + one if tuned else one)
        if found is not None:
            return found
    return None
