"""Sums over any span, by anything, are those of the entries in it. On both databases."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from tertulia.accounts import usage
from tertulia.accounts.entry import Entry
from tertulia.accounts.fold import DAY, FIGURES, HOUR, KINDS
from tertulia.accounts.ledger import Ledger
from tertulia.accounts.usage import BY, MINUTE, Wanted, sums
from tertulia.store.database import Database, open_database
from tertulia.store.schema import api_keys
from unit.accounts.entries import NOON, put, some

GIVEN = some(2000)
OWNERS = {"key_0": "user_a", "key_1": "user_b"}  # key_2 is not known any more


@pytest.fixture
def filled(tmp_path: Path, database: str) -> Iterator[Database]:
    store = open_database(tmp_path, database)
    ledger = Ledger(tmp_path, store)
    put(ledger, GIVEN)
    ledger.catch_up()
    with store.begin() as connection:
        for key, owner in OWNERS.items():
            row = {
                "id": key, "kind": "project", "organization_id": "o", "project_id": "p", "name": "", "hint": "",
                "owner_id": owner, "hash": key.encode().ljust(32), "created_at": 0, "revision": 1,
            }  # fmt: skip
            connection.execute(insert(api_keys), row)
    yield store
    ledger.close()
    store.dispose()


def within(one: Entry, wanted: Wanted) -> bool:
    return (
        one.attempt > 0
        and wanted.start <= int(one.at) < wanted.end
        and (wanted.kind is None or KINDS[one.task] == wanted.kind)
        and (wanted.projects is None or one.project in wanted.projects)
        and (wanted.keys is None or one.key in wanted.keys)
        and (wanted.users is None or OWNERS.get(one.key) in wanted.users)
        and (wanted.models is None or (one.model or one.asked) in wanted.models)
    )


def expected(wanted: Wanted) -> list[tuple[Any, ...]]:
    found: dict[tuple[Any, ...], Counter[str]] = {}
    for one in filter(lambda one: within(one, wanted), GIVEN):
        names = {
            "project_id": one.project, "user_id": OWNERS.get(one.key), "api_key_id": one.key,
            "model": one.model or one.asked,
        }  # fmt: skip
        at = int(one.at)
        key = (at - at % wanted.width, *(names[name] for name in wanted.by))
        figures = {name: getattr(one, name, 1) for name in FIGURES}
        found.setdefault(key, Counter()).update(figures)
    return [
        (*key, *(found[key][name] for name in wanted.figures))
        for key in sorted(found, key=lambda key: tuple(each or "" for each in key))
    ]


def test_sums_are_those_of_the_entries(filled: Database) -> None:
    chance = random.Random(5)

    def maybe(*names: str) -> tuple[str, ...] | None:
        return tuple(chance.sample(names, chance.randrange(1, len(names) + 1))) if chance.random() < 0.3 else None

    ready = [("project_id", "model"), ("model", "project_id"), ("model", "api_key_id", "project_id")]
    rows = 0
    for turn in range(200):
        width = chance.choice((MINUTE, HOUR, DAY, DAY))
        start = NOON - chance.randrange(5 * DAY)
        if chance.random() < 0.3:
            start -= start % width
        end = start + chance.randrange(1, 40) * width + chance.choice((0, 0, 1, 12_345))
        wanted = Wanted(
            start, end, width,
            ready[turn % 3] if turn < 60 else tuple(chance.sample(BY, chance.randrange(len(BY) + 1))),
            tuple(chance.sample(FIGURES, chance.randrange(1, 7))), chance.choice(("completions", "embeddings", None)),
            maybe("proj_0", "proj_1", "nobody"), maybe("user_a", "user_b"), maybe("key_0", "key_2"),
            maybe("m", "asked"),
        )  # fmt: skip
        found = sums(filled, wanted)
        missing = {None: ""}
        key = slice(0, 1 + len(wanted.by))
        found = sorted(found, key=lambda row: tuple(missing.get(each, each) for each in row[key]))
        assert found == expected(wanted), wanted
        assert all(type(each) is int for row in found for each in row[1 + len(wanted.by) :])
        rows += len(found)
    assert rows > 1000


def test_whole_days_are_read_from_the_sums_by_day_and_edges_from_what_is_finer() -> None:
    day = NOON - NOON % DAY
    parts = [(source.table.name, start - day, end - day) for source, start, end in usage._parts(day, day + 9 * DAY, 0)]
    assert parts == [("usage_days", 0, 9 * DAY)]
    odd = usage._parts(day + 90_001, day + 3 * DAY + 7201, 0)
    assert [(source.table.name, start - day, end - day) for source, start, end in odd] == [
        ("ledger", 90_001, 93_600), ("usage_hours", 93_600, 2 * DAY), ("usage_days", 2 * DAY, 3 * DAY),
        ("usage_hours", 3 * DAY, 3 * DAY + 7200), ("ledger", 3 * DAY + 7200, 3 * DAY + 7201),
    ]  # fmt: skip
    assert [(s.table.name, a, b) for s, a, b in usage._parts(5, 50, 0)] == [("ledger", 5, 50)]
