"""What was used is there after a kill; what it cost is arithmetic in integers."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tertulia.accounts.entry import Entry
from tertulia.accounts.ledger import Ledger
from tertulia.accounts.prices import NANO, Prices
from tertulia.core import ModelCard, Target, Usage
from tertulia.errors import SettingsError


def entry(id: str = "req_1", project: str = "proj_1", cost: int = 5, at: float | None = None) -> Entry:
    return Entry(
        id, at or time.time(), "key_1", project, "chat", "gpt-4o", "mock", 200, "finished", 1.5, False, 3, 4, cost=cost
    )


def target(model: str, engine: str = "u") -> Target:
    return Target(SimpleNamespace(name=engine), model, ModelCard(id=model, kind="chat", source="test:"))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def test_entries_are_there_for_a_new_process_without_closing(ledger: Ledger, tmp_path: Path) -> None:
    given = [entry(f"req_{at}", f"proj_{at % 2}", at) for at in range(10)]
    for one in given:
        ledger.append(one)
    assert Ledger(tmp_path).entries() == given
    assert Ledger(tmp_path).spent() == {"proj_0": 0 + 2 + 4 + 6 + 8, "proj_1": 1 + 3 + 5 + 7 + 9}


def test_only_this_month_counts(ledger: Ledger) -> None:
    ledger.append(entry(cost=1))
    ledger.append(entry(cost=2, at=time.time() - 32 * 86400))
    assert ledger.spent() == {"proj_1": 1}


def test_a_cut_last_line_is_ignored(ledger: Ledger, tmp_path: Path) -> None:
    ledger.append(entry(cost=1))
    ledger.close()
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(b'{"id":"req_2",')
    assert Ledger(tmp_path).spent() == {"proj_1": 1}


def test_a_damaged_line_is_told_and_keeps_nobody_from_starting(
    ledger: Ledger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.append(entry(cost=1))
    ledger.close()
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(b'{"id":"req_2"{"id":\n\xff\n')
    ledger = Ledger(tmp_path)
    ledger.append(entry(cost=2))
    with caplog.at_level(logging.WARNING):
        assert ledger.spent() == {"proj_1": 3}
        with open(tmp_path / "ledger.jsonl", "wb") as file:
            file.write(b"x\n" * 1000)
        assert ledger.spent() == {}
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["2, 3", "1, 2, 3 and 997 more"]


def test_prices_are_integers_of_a_billionth_dollar() -> None:
    prices = Prices({"far": {"input": 2.5, "output": 10}, "half": {"input": 0.15}})
    far, half, local = target("far"), target("half"), target("local")
    assert prices.cost(far, 1_000_000, 0) == 2.5 * NANO and prices.cost(far, 0, 1_000_000) == 10 * NANO
    assert prices.of(far, Usage(3, 4)) == 3 * 2500 + 4 * 10_000
    assert prices.cost(half, 1, 1) == 150 and prices.cost(local, 10**9, 10**9) == 0


def test_upstreams_that_share_a_name_have_their_own_prices_unless_all_have_one() -> None:
    upstreams = {"a": {"m": {"input": 1.0}, "n": {"input": 1.0}}, "b": {"m": {"input": 3.0}}, "c": {}}
    prices = Prices({"n": {"input": 7.0}}, upstreams)
    assert [prices.cost(target("m", name), 1, 0) for name in "abc"] == [1000, 3000, 0]
    assert [prices.cost(target("n", name), 1, 0) for name in "abc"] == [7000] * 3


@pytest.mark.parametrize(
    ("price", "said"),
    [({"inptu": 1}, "prices.m.inptu: there is no such price; known are input and output"),
     ({"output": -1}, "prices.m.output: must not be negative")],
)  # fmt: skip
def test_wrong_prices(price: dict[str, float], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        Prices({"m": price})
    assert error.value.message == said
