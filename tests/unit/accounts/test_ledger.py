"""What was used is there after a kill; what it cost is arithmetic in integers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tertulia.accounts.entry import Entry
from tertulia.accounts.ledger import Ledger
from tertulia.store import journal
from tertulia.store.database import open_database


def entry(id: str = "req_1", project: str = "proj_1", cost: int = 5, at: float | None = None) -> Entry:
    return Entry(
        id,
        1,
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
        file.write(b'{"id":"req_2"{"id":\n\xff\n{"open":"req_3"\n{"id":"req_4",')
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
    file = tmp_path / "ledger" / "000001.jsonl"
    before = file.read_bytes()
    Ledger(tmp_path).close()
    after = file.read_bytes()
    for cut in [*range(len(before), len(after), 37), len(after)]:
        file.write_bytes(after[:cut])
        again = Ledger(tmp_path)
        assert sorted(entry.id for entry in again.entries()) == [f"req_{at}" for at in range(5)]
        again.close()


def test_segments_are_kept_until_they_are_folded_and_nothing_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT", 2**20)
    ledger = Ledger(tmp_path, open_database(tmp_path))
    assert ledger.fold is not None

    def fill(segment: int) -> None:
        while ledger._journal.segment < segment:
            intend(ledger, "req_short")
            ledger.append(entry("req_short"))

    intend(ledger, "req_long")
    fill(3)
    intend(ledger, "req_longer", 2)
    fill(6)
    assert ledger.fold.now() > 10_000 and journal.segments(tmp_path / "ledger") == [1, 2, 3, 4, 5, 6]
    ledger.append(entry("req_long"))
    ledger.fold.now()
    assert journal.segments(tmp_path / "ledger") == [3, 4, 5, 6]
    found = Ledger(tmp_path)  # as after a kill
    assert found.interrupted == 1 and found.entries()[-1].id == "req_longer"
    found.close()
