"""From the journal into the database, each entry once, whatever happens on the way. On both databases."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import exc, func, select

from tertulia.accounts import fold as module
from tertulia.accounts.entry import Entry
from tertulia.accounts.fold import DAY, HOUR, KINDS, month_of
from tertulia.accounts.ledger import Ledger, writer_name
from tertulia.store import journal
from tertulia.store.database import FAILURES, Database, open_database
from tertulia.store.schema import ledger as rows
from tertulia.store.schema import usage_days, usage_hours, writers
from unit.accounts.entries import NOON, put, some

FIGURES = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost")


@pytest.fixture
def store(tmp_path: Path, database: str) -> Iterator[Database]:
    opened = open_database(tmp_path, database)
    yield opened
    opened.dispose()


@pytest.fixture
def it(tmp_path: Path, store: Database) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path, store)
    yield ledger
    ledger.close()


def fold(ledger: Ledger) -> int:
    assert ledger.fold is not None
    return ledger.fold.now()


def check(store: Database, entries: list[Entry]) -> None:
    """The database has these, each once, and the sums are theirs."""
    with store.connect() as connection:
        found = connection.execute(select(rows.c.call, rows.c.attempt, rows.c.cost).order_by(rows.c.id)).all()
        hours = connection.execute(select(usage_hours)).all()
        days = connection.execute(select(usage_days)).all()
    assert Counter(map(tuple, found)) == Counter((one.id, one.attempt, one.cost) for one in entries)
    expected: dict[str, Counter[Any]] = {"hour": Counter(), "day": Counter()}
    for one in entries:
        if not one.attempt:
            continue
        at, model, kind = int(one.at), one.model or one.asked, KINDS[one.task]
        figures = (1, one.prompt_tokens, one.completion_tokens, one.cached_tokens, one.reasoning_tokens, one.cost)
        for name, figure in zip(FIGURES, figures, strict=True):
            expected["hour"][at - at % HOUR, one.project, one.key, kind, model, name] += figure
            expected["day"][at - at % DAY, one.project, kind, model, name] += figure
    assert expected["hour"] == Counter({
        (row.hour, row.project_id, row.key_id, row.kind, row.model, name): getattr(row, name)
        for row in hours for name in FIGURES
    })  # fmt: skip
    assert expected["day"] == Counter({
        (row.day, row.project_id, row.kind, row.model, name): getattr(row, name) for row in days for name in FIGURES
    })  # fmt: skip


def test_every_entry_becomes_one_row_and_part_of_its_sums(it: Ledger, store: Database) -> None:
    given = some(3000)
    put(it, given[:1234])
    assert fold(it) == 1234 and fold(it) == 0
    check(store, given[:1234])
    put(it, given[1234:])
    assert fold(it) == 3000 - 1234
    check(store, given)


def test_a_row_has_all_there_is(it: Ledger, store: Database) -> None:
    entry = Entry(
        "req_1", 2, NOON + 0.75, "key_1", "proj_1", "chat", "asked", "m", 502, "failed", 12.9, True, 1, 2, 3, 4, 5,
        "miss", 1, "engine_failed", True, "::1", "far", True, "tokens", True,
    )  # fmt: skip
    it.append(entry)
    fold(it)
    with store.connect() as connection:
        [row] = connection.execute(select(rows)).all()
    assert row._asdict() | {"id": 0} == {
        "id": 0, "at": NOON, "call": "req_1", "attempt": 2, "key_id": "key_1", "project_id": "proj_1", "task": "chat",
        "asked": "asked", "model": "m", "target": "far", "status": 502, "outcome": "failed", "milliseconds": 12,
        "prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 3, "reasoning_tokens": 4, "cost": 5,
        "marks": "stream miss retry=1 estimated fallback observed=tokens unpriced", "error": "engine_failed",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["nul\0l", "x" * 5000, "né 模型 \U0001f600", "'; DROP TABLE ledger; --", "%s?:x", ""])
def test_whatever_a_model_was_called(it: Ledger, store: Database, name: str) -> None:
    it.append(
        Entry("req_1", 1, NOON, "k", "p", "chat", name, name, 200, "finished", 1.0, error=name or None, target=name)
    )
    assert fold(it) == 1
    with store.connect() as connection:
        [row] = connection.execute(select(rows)).all()
    assert row.asked == name.replace("\0", "\ufffd")[:256]


def test_a_fold_that_fails_halfway_leaves_nothing_behind(
    it: Ledger, store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = some(2000)
    put(it, given)
    insert, calls = module._insert, 0

    def failing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        insert(*arguments)
        if calls in (1, 3, 5):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_insert", failing)
    monkeypatch.setattr(module, "LINES", 500)
    for _ in range(3):
        with pytest.raises(OSError):
            fold(it)
    fold(it)
    check(store, given)


def test_the_database_never_knows_what_is_not_on_disk_in_the_journal(
    it: Ledger, store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(it, some(10))
    with monkeypatch.context() as patch:

        def broken(self: journal.Journal) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(journal.Journal, "flush", broken)
        with pytest.raises(OSError):
            fold(it)
    check(store, [])
    fold(it)
    check(store, some(10))


def test_damaged_lines_are_told_and_left_out(it: Ledger, store: Database, caplog: pytest.LogCaptureFixture) -> None:
    given = some(2)
    put(it, given[:1])
    for line in (b'{"id":"req_2"{"id":', b"\xff", b'{"id":"req_3"}'):
        it._journal.append(line)
    put(it, given[1:])
    with caplog.at_level(logging.WARNING):
        fold(it)
    check(store, given)
    assert [record.getMessage() for record in caplog.records] == [
        "3 damaged lines of the ledger's journal were left out"
    ]


def test_several_gateways_fold_into_one_database_at_the_same_time(tmp_path: Path, store: Database) -> None:
    given = [some(1500, seed) for seed in range(3)]
    ledgers = []
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        ledgers.append(Ledger(tmp_path / str(seed), store))
        put(ledgers[-1], given[seed])
    failed: list[BaseException] = []

    def work(ledger: Ledger) -> None:
        try:
            fold(ledger)
        except BaseException as error:  # told in the main thread
            failed.append(error)

    threads = [threading.Thread(target=work, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ledger in ledgers:
        if failed:  # both were the first: who lost has it done at its next turn
            fold(ledger)
        ledger.close()
    assert all(isinstance(error, FAILURES) for error in failed), failed
    check(store, [entry for each in given for entry in each])
    with store.connect() as connection:
        assert connection.execute(select(func.count()).select_from(writers)).scalar() == 3


def test_what_was_spent_is_the_same_before_and_after_folding(it: Ledger, tmp_path: Path, store: Database) -> None:
    month = month_of(time.time())
    given = some(400)
    put(it, given)
    spent: Counter[str] = Counter()
    for one in given:
        if one.at >= month and one.attempt:
            spent[one.project] += one.cost
    given = [one for one in given if one.attempt or not one.cost]
    free = [one for one in it.entries() if not one.attempt and one.cost]
    before = it.spent()
    assert fold(it) == 400
    assert it.spent() == spent
    for one in free:  # what cost something reached an engine; these were made up
        if one.at >= month:
            before[one.project] -= one.cost
    assert before == spent
    more = Entry("req_x", 1, time.time(), "k", "proj_1", "chat", "a", "m", 200, "finished", 1.0, cost=9)
    it.append(more)
    assert it.spent() == spent + Counter(proj_1=9)


# for limits that count over a restart
@pytest.mark.parametrize("seconds", [60.0, 86_400.0])
def test_what_was_admitted_is_told_in_few_rows_and_never_as_older_than_it_is(
    it: Ledger, tmp_path: Path, store: Database, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    chance, now = random.Random(5), int(time.time()) + 0.7
    monkeypatch.setattr(time, "time", lambda: now)
    given = [
        Entry(
            f"req_{at}", chance.choice((0, 1, 1, 2)), now - min(chance.expovariate(1 / 60), 2000.0), "k",
            chance.choice(("proj_1", "proj_2")), "chat", "a", "m", 200, "finished", chance.uniform(0, 90_000),
            prompt_tokens=chance.randrange(100), completion_tokens=chance.randrange(100),
        )
        for at in range(4000)
    ]  # fmt: skip
    given.sort(key=lambda one: one.at)
    put(it, given[:3900])
    (tmp_path / "other").mkdir()
    other = Ledger(tmp_path / "other", store)
    put(other, given[:100])
    for each in (other, it):
        fold(each)
    other.close()
    put(it, given[3900:])  # in the journal alone
    told = it.admitted(seconds)
    assert told == sorted(told) and len(told) < 900
    for project in ("proj_1", "proj_2"):
        mine = [one for one in told if one.project == project]
        entries = [(one.at - one.ms / 1000, one) for one in given if one.project == project]
        for age in (1, 5, 20, 40, 59.9):
            least, most = now - age, now - age - 2.1
            requests = sum(one.requests for one in mine if one.began > least)
            assert sum(one.attempt <= 1 for began, one in entries if began > least) <= requests
            assert requests <= sum(one.attempt <= 1 for began, one in entries if began > most)
            tokens = sum(one.tokens for one in mine if one.began > least)
            used = [(began, one.prompt_tokens + one.completion_tokens) for began, one in entries if one.attempt]
            assert sum(each for began, each in used if began > least) <= tokens
            assert tokens <= sum(each for began, each in used if began > most)
        if seconds > 60:
            assert sum(one.requests for one in mine) == sum(one.attempt <= 1 for _, one in entries)


# several gateways and their money
class Gateway:
    """As far as money goes: what it has spent itself, and what it hears of others."""

    def __init__(self, data: Path, store: Database) -> None:
        data.mkdir(exist_ok=True)
        self.data, self.store = data, store
        self.start()

    def start(self) -> None:
        self.ledger = Ledger(self.data, self.store)
        self.own = Counter(self.ledger.spent())
        self.others: dict[str, int] = {}
        assert self.ledger.fold is not None
        self.fold = self.ledger.fold
        self.fold.heard = self._heard

    def _heard(self, month: int, spent: dict[str, int]) -> None:
        assert month == month_of(time.time()) and all(cost >= 0 for cost in spent.values())
        self.others = spent

    def spend(self, cost: int, project: str = "proj_1", at: float | None = None) -> None:
        self.ledger.append(
            Entry("req_1", 1, at or time.time(), "k", project, "chat", "a", "m", 200, "finished", 1.0, cost=cost)
        )
        if at is None:
            self.own[project] += cost

    @property
    def spent(self) -> Counter[str]:
        return +(self.own + Counter(self.others))


@pytest.fixture
def gateways(tmp_path: Path, store: Database) -> Iterator[list[Gateway]]:
    made = [Gateway(tmp_path / str(at), store) for at in range(3)]
    yield made
    for one in made:
        one.ledger.close()


def test_every_gateway_knows_what_all_have_spent_and_counts_nothing_twice(gateways: list[Gateway]) -> None:
    """Whatever is spent, folded, heard and restarted, in whatever order."""
    chance, all = random.Random(4), Counter[str]()
    for _ in range(300):
        one, project, cost = chance.choice(gateways), chance.choice(("proj_1", "proj_2")), chance.randrange(1000)
        match chance.choice(("spend", "spend", "spend", "fold", "hear", "restart")):
            case "spend":
                one.spend(cost, project)
                all[project] += cost
            case "fold":
                one.fold.now()
            case "hear":
                one.fold._hear()
            case "restart" if chance.random() < 0.5:
                one.ledger.close()
                one.start()
            case _:
                one.start()  # it was killed, and what it had not folded is in its journal
        assert all >= one.spent >= one.own
    for one in gateways:
        one.fold.now()
    for one in gateways:
        one.fold._hear()
        assert one.spent == all


def test_a_commit_whose_answer_is_lost_is_not_somebody_elses(
    gateways: list[Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, _ = gateways
    begin, lost = Database.begin, [True, False, True]

    @contextlib.contextmanager
    def losing(self: Database) -> Iterator[Any]:
        with begin(self) as connection:
            yield connection
        if lost and lost.pop(0):
            raise exc.OperationalError("x", {}, sqlite3.OperationalError("the connection broke"))

    one.fold.now()
    one.spend(5)
    monkeypatch.setattr(Database, "begin", losing)
    with pytest.raises(FAILURES):
        one.fold.now()
    one.fold._hear()
    assert one.spent == Counter(proj_1=5)
    one.spend(7)
    assert one.fold.now() == 1  # not the first one again
    one.spend(9)
    with pytest.raises(FAILURES):
        one.fold.now()
    other.spend(100)
    other.fold.now()
    one.fold.now()
    one.fold._hear()
    other.fold._hear()
    assert one.spent == other.spent == Counter(proj_1=121)


def test_nothing_is_added_up_as_long_as_nobody_else_has_folded(
    gateways: list[Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, _ = gateways
    asked = []
    add_up = module._sums_of
    monkeypatch.setattr(module, "_sums_of", lambda *given: asked.append(given) or add_up(*given))
    one.fold.now()
    one.fold._hear()
    assert not asked and not one.fold._shared  # it is alone
    other.spend(1)
    other.spend(2, at=time.time() - 40 * DAY)  # of another month
    other.fold.now()
    for _ in range(3):
        one.spend(1)
        one.fold.now()
        one.fold._hear()
    assert len(asked) == 1 and one.fold._shared and one.spent == Counter(proj_1=4)


def test_a_new_month_begins_with_what_is_spent_in_it(gateways: list[Gateway], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, _ = gateways
    one.spend(1)
    other.spend(10)
    for each in (one, other):
        each.fold.now()
        each.fold._hear()
    later = month_of(time.time()) + 40 * DAY
    for each in (one, other):
        each.own.clear()
    monkeypatch.setattr(time, "time", lambda: later)
    one.spend(100)
    other.spend(1000)
    for each in (one, other):
        each.fold.now()
    for each in (one, other):
        each.fold._hear()
        assert each.spent == Counter(proj_1=1100)


def test_rows_go_after_their_days_and_sums_stay(
    tmp_path: Path, store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINES", 100)
    it = Ledger(tmp_path, store, days=2)
    given = some(1000)
    put(it, given)
    fold(it)
    assert it.fold is not None
    it.fold._sweep(threading.Event())
    with store.connect() as connection:
        left = connection.execute(select(rows.c.call)).scalars().all()
        requests = connection.execute(select(func.sum(usage_days.c.requests))).scalar()
    late = int(time.time()) - 2 * DAY
    assert sorted(left) == sorted(one.id for one in given if int(one.at) >= late) and 0 < len(left) < 1000
    assert requests == sum(1 for one in given if one.attempt)
    it.close()


def test_what_else_is_to_go_is_swept_once_an_hour(it: Ledger) -> None:
    fold, swept = it.fold, list[threading.Event]()
    assert fold is not None
    fold.sweeps.append(swept.append)
    stop = threading.Event()
    for _ in range(3):
        fold._try(stop)
    assert swept == [stop]
    fold._swept -= HOUR + 1
    fold._try(None)  # the last one, as the server stops: there is no time for that
    assert swept == [stop]


def test_nothing_is_missed_when_the_journal_is_younger_than_the_database(tmp_path: Path, store: Database) -> None:
    it = Ledger(tmp_path, store)
    given = some(300)
    put(it, given)
    fold(it)
    it.close()
    shutil.rmtree(tmp_path / "ledger")  # a disk that is gone; `writer` and the database are kept
    it, more = Ledger(tmp_path, store), some(10, 2)
    fold(it)
    put(it, more)
    assert fold(it) == 10
    check(store, given + more)
    it.close()


def test_a_thread_folds_now_and_then_and_at_the_end(tmp_path: Path, store: Database) -> None:
    it, given = Ledger(tmp_path, store, fold_seconds=0.05), some(500)
    it.start()
    put(it, given[:400])
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with store.connect() as connection:
            if connection.execute(select(func.count()).select_from(rows)).scalar() == 400:
                break
        time.sleep(0.02)
    check(store, given[:400])
    it.fold._seconds = 3600  # type: ignore[union-attr]
    put(it, given[400:])
    it.close()
    check(store, given)


def test_a_database_that_fails_only_delays_it(
    tmp_path: Path, store: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    it, given = Ledger(tmp_path, store, fold_seconds=0.01), some(100)
    gone = threading.Event()
    gone.set()
    begin = Database.begin

    def failing(self: Database) -> Any:
        if gone.is_set():
            raise exc.OperationalError("x", {}, sqlite3.OperationalError("database is locked"))
        return begin(self)

    monkeypatch.setattr(Database, "begin", failing)
    it.start()
    with caplog.at_level(logging.ERROR):
        put(it, given)
        time.sleep(0.3)
        with pytest.raises(FAILURES):
            fold(it)
    assert [record.getMessage() for record in caplog.records] == [
        "the ledger stays in the journal, the database does not take it: database is locked"
    ]
    gone.clear()
    it.close()
    check(store, given)


def test_a_rush_is_let_pass(it: Ledger) -> None:
    assert it.fold is not None
    it.fold._seen, it.fold._seen_at = it._journal.end, time.monotonic() - 1
    it._journal.append(b"x" * 900_000)
    assert not it.fold._busy()
    it.fold._seen_at -= 1
    for _ in range(30):
        it._journal.append(b"x" * 300_000)
    assert it.fold._busy() and not it.fold._busy()  # and later it is quiet
    for _ in range(300):
        it._journal.append(b"x" * 300_000)
    assert not it.fold._busy()  # too much waits


def test_the_writer_has_one_name_for_good(tmp_path: Path) -> None:
    assert writer_name(tmp_path) == writer_name(tmp_path) != writer_name(tmp_path / "..")
    (tmp_path / ".." / "writer").unlink()


KILLED = """
import sys
import time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tertulia.accounts import fold
from tertulia.accounts.ledger import Ledger
from tertulia.store import journal
from tertulia.store.database import open_database
from unit.accounts.entries import some
data = Path(sys.argv[1])
journal.SEGMENT, fold.LINES = 2**20, 200
ledger = Ledger(data, open_database(data), fold_seconds=0.001)
ledger.start()
entries = some(30_000, int(sys.argv[2]))
print("ready", flush=True)
for entry in entries:
    ledger.append(entry)
time.sleep(60)
"""


def test_a_fold_that_is_killed_is_gone_on_with(tmp_path: Path) -> None:
    chance = random.Random(3)
    for at in range(5):
        arguments = [sys.executable, "-c", KILLED, str(tmp_path), str(at), str(Path(__file__).parents[2])]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.05, 0.8))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -9
        process.stdout.close()
    store = open_database(tmp_path)
    it = Ledger(tmp_path, store)
    fold(it)
    with store.connect() as connection:
        found = connection.execute(select(rows.c.call)).scalars().all()
        days = connection.execute(select(func.sum(usage_days.c.requests))).scalar()
        attempts = connection.execute(select(func.count()).where(rows.c.attempt > 0)).scalar()
    assert len(found) == len(set(found)) and days == attempts
    for seed in range(5):  # from the first one on, without a gap
        of = [int(one.split("_")[2]) for one in found if one.startswith(f"req_{seed}_")]
        assert sorted(of) == list(range(len(of)))
    assert len(found) > 1000 and len(journal.segments(tmp_path / "ledger")) < 10
    it.close()
