"""What tokens cost: who has the last word, to the last nano-dollar, and never silently nothing."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from tertulia.accounts.prices import FREE, Price, Prices, dearest, find_listed, list_date, list_prices, picos_of
from tertulia.config import Route, RouteTarget, Settings, Upstream
from tertulia.core import ModelCard, Target, Usage
from tertulia.errors import SettingsError
from tertulia.server import prices_of


class Far:
    name = "far"

    def __init__(self, **theirs: str) -> None:
        self._theirs = theirs

    def theirs(self, model: str) -> str:
        return self._theirs.get(model, model)


def target(model: str, engine: Any = None, source: str = "upstream:far") -> Target:
    return Target(engine or Far(), model, ModelCard(id=model, kind="chat", source=source))


def test_configured_prices_have_the_last_word_then_the_upstream_s_then_the_list() -> None:
    it = Prices(
        {"a": {"input": 1, "output": 2}}, {"far": {"a": {"input": 9, "output": 9}, "b": {"input": 3, "output": 4}}}
    )
    usage = Usage(1000, 1000)
    assert it.of(target("a"), usage) == 3_000_000
    assert it.of(target("b"), usage) == 7_000_000
    assert it.of(target("gpt-4o"), usage) == 12_500_000
    assert it.of(target("mine", Far(mine="gpt-4o-mini-2024-07-18")), usage) == 750_000


def test_an_unknown_price_is_known_to_be_unknown_and_a_model_of_this_machine_is_free() -> None:
    it = Prices({"priced": {"input": 0, "output": 5}})
    assert it.find(target("llama-99")) is None
    assert it.find(target("gpt-4o", source="file:/m.gguf")) is FREE
    near = it.find(target("priced", source="file:/m.gguf"))
    assert near is not None and near.output == 5_000_000


def test_cached_tokens_and_those_written_to_the_cache_have_prices_of_their_own() -> None:
    it = Prices({"m": {"input": 4, "cached_input": 1, "output": 8}})
    assert it.of(target("m"), Usage(1000, 10, cached_tokens=600)) == 400 * 4000 + 600 * 1000 + 10 * 8000
    listed = Prices({})
    sol = target("gpt-6.2-sol")
    assert listed.of(sol, Usage(1000, 0)) == 2_000_000
    assert listed.of(sol, Usage(1000, 0, cached_tokens=1000)) == 100_000
    assert listed.of(sol, Usage(1000, 0, cache_write_tokens=1000)) == 2_500_000
    assert listed.of(sol, Usage(1000, 0, cached_tokens=900, cache_write_tokens=900)) == 2_000_000  # a contradiction
    assert listed.of(sol, Usage(1000, 0), "priority") == 4_000_000
    assert listed.of(sol, Usage(300_000, 1000)) == 300_000 * 4000 + 1000 * 15_000
    assert it.of(target("m"), Usage(1000, 0), "priority") == 4_000_000  # what is configured is meant


@given(
    some.integers(0, 10**7), some.integers(0, 10**7), some.integers(0, 10**7), some.integers(0, 400_000),
    some.integers(0, 10**6), some.floats(0, 1), some.floats(0, 1), some.booleans(),
)  # fmt: skip
def test_the_worst_case_is_the_worst_case(
    input: int, written: int, output: int, prompt: int, completion: int, cached: float, put: float, long: bool
) -> None:
    price = Price(input, input // 2, output, max(input, written))
    price.long = long
    read = int(prompt * cached)
    write = int((prompt - read) * put)
    assert 0 <= price.cost(prompt, read, completion, write) <= price.most(prompt, completion)


def test_the_dearest_is_so_in_everything() -> None:
    one, other = Price(1, 1, 9), Price(5, 2, 3, 7)
    found = dearest([one, other])
    assert (found.input, found.cached, found.output, found.written) == (5, 2, 9, 7)
    assert dearest([]).most(10**6, 10**6) == 0


def test_fractions_of_nano_dollars_are_rounded_up_once() -> None:
    it = Prices({"m": {"input": 0.0375, "output": 0}})
    assert it.of(target("m"), Usage(1, 0)) == 38
    assert it.of(target("m"), Usage(1_000_000, 0)) == 37_500_000
    assert Prices({"m": {"input": 1e-6, "output": 0}}).of(target("m"), Usage(1_000_000, 0)) == 1000


@pytest.mark.parametrize("kind", ["given", "far"])
def test_what_a_price_does_not_say_is_from_the_list(kind: str) -> None:
    def found(model: str, price: dict[str, float], ours: str = "") -> Price:
        prices = {ours or model: price}
        it = Prices(prices) if kind == "given" else Prices({}, {"far": prices})
        price_found = it.find(target(ours or model, Far(**{ours: model}) if ours else None))
        assert price_found is not None
        return price_found

    listed = list_prices()["gpt-6.2-sol"]
    some = found("gpt-6.2-sol", {"input": 5})
    assert (some.input, some.cached, some.output, some.written) == (5_000_000, 5_000_000, listed.output, 5_000_000)
    some = found("gpt-6.2-sol", {"output": 1})
    assert (some.input, some.cached, some.output, some.written) == (
        listed.input, listed.cached, 1_000_000, listed.written,
    )  # fmt: skip
    for price in ({}, {"cached_input": 0.5}):
        some = found("gpt-6.2-sol", price)
        assert (some.input, some.output, some.long, some.listed) == (listed.input, listed.output, True, True)
        assert some.cached == (500_000 if price else listed.cached)
        assert (some.context, some.max_output) == (listed.context, listed.max_output)
    said = found("gpt-6.2-sol", {"input": 5, "output": 1})
    assert (said.output, said.long, said.listed) == (1_000_000, False, False)
    # the model that answers counts, not the name it has here
    assert found("gpt-4o-mini", {"input": 5}, "gpt-4o").output == list_prices()["gpt-4o-mini"].output


@pytest.mark.parametrize(
    ("model", "price", "missing"),
    [
        ("m", {}, "input"), ("m", {"cached_input": 1}, "input"), ("m", {"output": 1}, "input"),
        ("m", {"input": 1}, "output"), ("m", {"input": 1, "cached_input": 1}, "output"),
        ("nomic-embed-text", {}, "input"), ("nomic-embed-text", {"input": 1}, None),
        ("BGE-Embedding", {"input": 1}, None), ("text-embedding-3-small", {"input": 1}, None),
        ("m", {"input": 0, "output": 0}, None),
    ],
)  # fmt: skip
def test_what_nobody_says_is_not_free(model: str, price: dict[str, float], missing: str | None) -> None:
    if missing is None:
        found = Prices({model: price}).find(target(model))
        assert found is not None and (found.input, found.output) == (picos_of(price["input"]), 0)
        assert Prices({}, {"far": {model: price}}).find(target(model)) is not None
        return
    for ours, theirs, where in (
        ({model: price}, {}, "prices."),
        ({}, {"far": {model: price}}, "upstreams.far.prices."),
    ):
        with pytest.raises(SettingsError) as error:
            Prices(ours, theirs)
        assert error.value.message.startswith(f"{where}{model}.{missing}: missing, ")
        assert error.value.message.endswith("write 0 if it is free")


@pytest.mark.parametrize(
    ("price", "said"),
    [
        ({"input": float("nan")}, "prices.m.input: expected a number of US dollars, got nan"),
        ({"output": float("inf")}, "prices.m.output: expected a number of US dollars, got inf"),
        ({"cached_input": -0.1}, "prices.m.cached_input: must not be negative"),
        ({"input": 5_000_000}, "prices.m.input: more than a dollar a token; prices are per million tokens"),
        ({"request": 1}, "prices.m.request: there is no such price; known are input, cached_input, output"),
    ],
)
def test_a_wrong_price_is_a_mistake_of_the_settings(price: dict[str, float], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        Prices({"m": price})
    assert error.value.message == said
    with pytest.raises(SettingsError, match=r"upstreams\.far\."):
        Prices({}, {"far": {"m": price}})


def test_the_list_has_a_date_and_sensible_rows() -> None:
    assert datetime.date.fromisoformat(list_date()) >= datetime.date(2026, 11, 1)
    page = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "limits.md"
    assert f"as of {list_date()}" in page.read_text(encoding="utf-8")
    prices = list_prices()
    assert len(prices) > 80
    for name, price in prices.items():
        assert 0 < price.input <= 150_000_000 and price.cached <= price.input <= price.written, name
        assert price.output >= price.input or name.startswith("text-embedding-"), name
        assert price.context and price.max_output <= price.context, name


def test_dated_and_fine_tuned_names_are_found() -> None:
    prices = list_prices()
    assert find_listed(prices, "gpt-4o-2024-08-06") is prices["gpt-4o"]
    assert find_listed(prices, "gpt-4o-2024-05-13") is prices["gpt-4o-2024-05-13"]
    assert find_listed(prices, "ft:gpt-4o-mini-2024-07-18:acme::x1") is prices["ft:gpt-4o-mini"]
    assert find_listed(prices, "openai/gpt-5.4-mini") is prices["gpt-5.4-mini"]
    assert find_listed(prices, "gpt-4o-turbo-max") is None
    assert find_listed(prices, "ft:gpt-4:acme::x1") is None


def settings(**given: Any) -> Settings:
    return Settings(upstreams={"far": Upstream(base_url="http://h/v1", **given.pop("far", {}))}, **given)


def test_what_a_price_does_not_say_is_from_the_list_by_the_upstreams_own_name() -> None:
    """An upstream's model has our name; the list knows the other one."""
    far: dict[str, Any] = {"models": {"ours": "gpt-4o"}}
    price, output = {"ours": {"input": 1.0}}, list_prices()["gpt-4o"].output
    for it in (settings(far={**far, "prices": price}), settings(far=far, prices=price)):
        found = prices_of(it).find(target("ours", Far(ours="gpt-4o")))
        assert found is not None and (found.input, found.output) == (1_000_000, output)
    routed = Route(targets=[RouteTarget(model="gpt-4o", upstream="far")])
    found = prices_of(
        settings(far={"prices": {"far/gpt-4o": {"input": 1.0}}}, routes={"house": routed})
    ).find(target("far/gpt-4o", Far(**{"far/gpt-4o": "gpt-4o"})))  # fmt: skip
    assert found is not None and found.output == output
    listed = {"discover": True, "prefix": "east/"}
    found = prices_of(settings(far=listed, prices={"east/gpt-4o": {"input": 1.0}})).find(
        target("east/gpt-4o", Far(**{"east/gpt-4o": "gpt-4o"}))
    )
    assert found is not None and found.output == output


def test_it_is_refused_where_the_list_does_not_know_the_upstreams_name_either() -> None:
    price = {"ours": {"input": 1.0}}
    for it in (
        settings(far={"models": {"ours": "house-brew"}, "prices": price}),
        settings(far={"models": {"ours": "house-brew"}}, prices=price),
        settings(prices=price),
    ):
        with pytest.raises(SettingsError, match=r"prices\.ours\.output: missing"):
            prices_of(it)
    two = {name: Upstream(base_url="http://h/v1", models={"ours": own}) for name, own in (("a", "gpt-4o"), ("b", "x"))}
    with pytest.raises(SettingsError, match=r"^prices\.ours\.output: missing"):  # b's would cost nothing
        prices_of(Settings(upstreams=two, prices=price))


def test_a_price_that_says_too_little_of_what_was_only_listed_later_is_none() -> None:
    it = Prices({"ours": {"input": 1.0}}, theirs={"far": {"ours": "gpt-4o"}})
    assert it.find(target("ours", Far(ours="gpt-4o"))) is not None
    other = Far(ours="house-brew")
    other.name = "other"
    assert it.find(target("ours", other)) is None
