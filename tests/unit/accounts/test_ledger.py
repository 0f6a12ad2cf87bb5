"""What was used is there after a kill; what it cost is arithmetic in integers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tertulia.accounts.entry import Entry
from tertulia.accounts.ledger import Ledger
from tertulia.store import journal, slots
from tertulia.store.database import open_database


def entry(
    id: str = "req_1", project: str = "proj_1", cost: int = 5, at: float | None = None, attempt: int = 1
) -> Entry:
    return Entry(
        id,
        attempt,
        at or time.time(),
        "key_1",
        project,
        "chat",
        "gpt-4o",
        "mock",
        200,
        "finished",
        1.5,
        False,
        3,
        4,
        cost=cost,
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def intend(ledger: Ledger, id: str = "req_1", attempt: int = 1, hold: int = 1000) -> None:
    ledger.intend(id, attempt, "key_1", "proj_1", "chat", 'a "model"\n', "m", "far", 25, hold)


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


def test_damaged_lines_keep_nobody_from_starting(ledger: Ledger, tmp_path: Path) -> None:
    ledger.append(entry(cost=1))
    ledger.close()
    with open(tmp_path / "ledger" / "000001.jsonl", "ab") as file:
        file.write(b'{"id":"req_2"{"id":\n\xff\n{"id":"req_4",')
    ledger = Ledger(tmp_path)
    ledger.append(entry(cost=2))
    assert ledger.spent() == {"proj_1": 3} and ledger.interrupted == 0


def test_the_ledger_of_an_older_release_is_read(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(
        b'{"id":"req_1","at":1.5,"key":"k","project":"p","task":"chat","asked":"a","model":"m","status":200,'
        b'"outcome":"finished","ms":2.5,"cost":7,"attempts":2,"cache":"miss"}\n'
    )
    [old] = Ledger(tmp_path).entries()
    assert (old.id, old.attempt, old.cost, old.cache, old.observed) == ("req_1", 2, 7, "miss", "")


# what was under way when the process ended
def test_an_intent_with_an_entry_is_nothing_more(ledger: Ledger, tmp_path: Path) -> None:
    intend(ledger)
    ledger.append(entry())
    assert Ledger(tmp_path).interrupted == 0 and len(Ledger(tmp_path).entries()) == 1


def test_an_intent_without_one_becomes_one_that_costs_what_was_reserved(ledger: Ledger, tmp_path: Path) -> None:
    intend(ledger, "req_1", 1)
    ledger.append(entry("req_1"))
    intend(ledger, "req_1", 2, hold=77)
    intend(ledger, "req_2", hold=8)
    again = Ledger(tmp_path)
    assert again.interrupted == 2 and again.spent() == {"proj_1": 5 + 77 + 8}
    _, second, other = again.entries()
    assert (second.id, second.attempt, second.cost) == ("req_1", 2, 77)
    assert (other.id, other.outcome, other.estimated, other.prompt_tokens) == ("req_2", "interrupted", True, 25)
    assert (other.asked, other.model, other.target, other.status) == ('a "model"\n', "m", "far", 0)
    assert abs(other.at - time.time()) < 5  # when it left
    assert Ledger(tmp_path).interrupted == 0 and len(Ledger(tmp_path).entries()) == 3


def test_a_power_loss_is_told_with_what_it_may_have_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Ledger(tmp_path, flush_seconds=2.5)  # and the machine stops
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(journal, "BOOT", tmp_path / "boot")
    Ledger(tmp_path).close()
    assert [record.getMessage() for record in caplog.records] == [
        "the machine stopped under the ledger: entries of its last 2.5 s (flush_seconds) may be missing"
    ]
    Ledger(tmp_path).close()
    assert len(caplog.records) == 1


def test_recovery_that_is_killed_is_gone_on_with(tmp_path: Path) -> None:
    """A killed recovery has written some of its lines and perhaps a part of one more."""
    ledger = Ledger(tmp_path)
    for at in range(5):
        intend(ledger, f"req_{at}")
    ledger.close()
    file, intents = tmp_path / "ledger" / "000001.jsonl", tmp_path / "ledger" / "intents"
    before, standing = file.read_bytes(), intents.read_bytes()
    Ledger(tmp_path).close()
    after = file.read_bytes()
    for cut in [*range(len(before), len(after), 37), len(after)]:
        file.write_bytes(after[:cut])
        intents.write_bytes(standing)
        again = Ledger(tmp_path)
        assert sorted(entry.id for entry in again.entries()) == [f"req_{at}" for at in range(5)]
        again.close()


def test_who_is_killed_between_an_entry_and_the_end_of_its_intent_is_charged_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    intend(ledger)
    ledger.append(entry())  # and not: ledger.append(entry(), intent)
    again = Ledger(tmp_path)
    assert again.interrupted == 0 and len(again.entries()) == 1


def test_names_too_long_for_an_intent_are_cut(ledger: Ledger, tmp_path: Path) -> None:
    ledger.intend("req_1", 1, "key_1", "proj_1", "chat", "\0" * 9000, "m" * 9000, "far" * 9000, 25, 10**18)
    [one] = Ledger(tmp_path).entries()
    assert (one.asked, one.model, one.cost) == ("\0" * 32, "m" * 32, 10**18) and one.target.startswith("farfar")


def test_places_of_intents_are_used_again(ledger: Ledger, tmp_path: Path) -> None:
    for at in range(5000):
        ledger.append(entry(f"req_{at}"), ledger.intend(f"req_{at}", 1, "k", "p", "chat", "a", "m", "far", 1, 1))
    assert (tmp_path / "ledger" / "intents").stat().st_size == slots.STEP
    held = [ledger.intend(f"req_{at}", 2, "k", "p", "chat", "a", "m", "far", 1, at) for at in range(3000)]
    assert len({*held}) == 3000 and (tmp_path / "ledger" / "intents").stat().st_size == 3 * slots.STEP
    for at in held[:2990]:
        ledger.append(entry(attempt=2), at)
    again = Ledger(tmp_path)
    assert again.interrupted == 10 and again.entries()[-1].cost == 2999


def test_segments_go_when_they_are_folded_whatever_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT", 2**20)
    ledger = Ledger(tmp_path, open_database(tmp_path))
    assert ledger.fold is not None
    intend(ledger, "req_long")
    while ledger._journal.segment < 4:
        ledger.append(entry("req_short"))
    assert ledger.fold.now() > 10_000 and journal.segments(tmp_path / "ledger") == [4]
    found = Ledger(tmp_path)  # as after a kill
    assert found.interrupted == 1 and found.entries()[-1].id == "req_long"
    found.close()
