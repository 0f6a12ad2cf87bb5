"""From the journal into the database: entries become rows of `ledger` and are added to the sums by hour and by day.

Exactly once: how far a writer's journal is folded moves in the transaction that folds it. Nothing is folded that is not
on disk in the journal, so the database never knows more than the journal does. A database that is busy, full or gone
only delays it; the journal keeps what waits. A thread folds now and then, when calls come slowly enough; who wants to
know what was used has it done first.

Where several writers fold into one database, the thread also looks what the others have folded, and tells what they
have spent: what the sums have gained since spent() was asked, but for what this writer has added to them itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from sqlalchemy import Column, Connection, Table, case, delete, func, insert, select

from ..store.database import FAILURES, reason
from ..store.journal import PLACE, SEGMENT, Journal, batches, segments
from ..store.schema import ledger, usage_days, usage_hours, writers
from .entry import Entry, read_line

if TYPE_CHECKING:
    from ..store.database import Database

log = logging.getLogger("tertulia.accounts")

ROWS = 500  # of one statement: SQLite takes 32,766 values in one
LINES = 10_000  # folded in one transaction, about: the more, the fewer sums are written twice
BUSY = 2**20  # bytes a second that the journal grows by while the thread lets it be ...
BACKLOG = 2**26  # ... until so many wait
HEAR_SECONDS = 2.0  # how often it is asked whether other writers have folded anything, where there are any
AGAIN = 60.0  # seconds between two complaints, and between a failure to stop and giving up
LEAVE_SECONDS = 10.0  # what a database is given to take the last entries when the server stops
HOUR, DAY, QUARTER = 3600, 86400, 900
FRESH_SECONDS = 62  # of which every second is told by itself: a minute, and what is lost in rounding
NEVER = 2**52  # seconds
PARTS = 4  # of a window that are added up at the same time: SQLite uses one processor for each
LEDGER = tuple(column.name for column in ledger.columns)
KINDS = {"chat": "completions", "completion": "completions", "embedding": "embeddings"}  # of usage, by task
FIGURES = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost")
Row = tuple[Any, ...]
Spent = dict[int, dict[str, int]]  # nano-dollars by month (when it begins, in unix seconds) and project


class Admitted(NamedTuple):
    """Requests of a project for a model by the name it asked for, that began at about the same time (unix seconds)."""

    began: float
    project: str
    asked: str
    requests: int
    tokens: int


class Fold:
    """Folds the journal of one writer."""

    def __init__(
        self, journal: Journal, database: Database, name: str, seconds: float, days: int, folded: Callable[[int], None]
    ) -> None:
        """name is the writer's; days are how long rows of the ledger are kept (0: for good); folded(position) is told
        how far the journal is not needed any more."""
        self._journal, self._database, self._name = journal, database, name
        self._seconds, self._days, self._folded = seconds, days, folded
        self._writer = -1
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self._told = -AGAIN
        self._seen, self._seen_at = 0, 0.0
        self._swept = -HOUR * 1.0
        self.heard: Callable[[int, dict[str, int]], None] | None = None  # told a month, and what others spent in it
        self._shared = False  # there are other writers
        self._moved: list[tuple[int, int]] = []  # how far they were when they were heard last, and in which month
        self._before: Spent = {}  # of all writers, when spent() was asked
        self._own: Spent = {}  # of this one, folded since
        self._unsure: dict[int, Spent] = {}  # the same by position, of a commit that failed and may have been made
        self.sweeps: list[Callable[[threading.Event], None]] = []  # what else is to go in time, until the event is set

    # the thread
    def start(self) -> None:
        self._seen, self._seen_at = self._journal.end, time.monotonic()
        self._worker = threading.Thread(target=self._work, name="tertulia-fold", daemon=True)
        self._worker.start()

    def _work(self) -> None:
        due = time.monotonic() + self._seconds
        while not self._stop.wait(max(0.0, min(due - time.monotonic(), HEAR_SECONDS if self._shared else DAY))):
            if time.monotonic() >= due:
                due = time.monotonic() + self._seconds
                if not self._busy() or self._shared:  # for others, what is spent here is so when it is folded
                    self._try(self._stop)
            self._safely(self._hear)
        self._try(None)

    def _busy(self) -> bool:
        """Whether calls come so fast that folding had better wait for a quieter moment."""
        end, now = self._journal.end, time.monotonic()
        grown, seconds = _bytes(self._seen, end), now - self._seen_at
        self._seen, self._seen_at = end, now
        return grown > BUSY * seconds and len(segments(self._journal.path)) * SEGMENT < BACKLOG

    def _try(self, stop: threading.Event | None) -> None:
        def work() -> None:
            self.now(stop)
            if stop is not None and time.monotonic() - self._swept > HOUR:
                self._sweep(stop)

        self._safely(work)

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (*FAILURES, OSError) as error:
            if time.monotonic() - self._told >= AGAIN:
                self._told = time.monotonic()
                log.error("the ledger stays in the journal, the database does not take it: %s", reason(error))
        except Exception as error:  # a defect of ours: the thread goes on, and nothing leaves the journal
            if time.monotonic() - self._told >= AGAIN:
                self._told = time.monotonic()
                log.error("the ledger stays in the journal", exc_info=error)

    def stop(self) -> None:
        """Folds what is left and ends the thread; a database that does not answer is waited for some seconds."""
        self._stop.set()
        if self._worker is None:
            self._try(None)
        else:
            self._worker.join(LEAVE_SECONDS)

    # folding
    def now(self, stop: threading.Event | None = None) -> int:
        """Folds all there is at this moment, or until stop is set; how many entries. Raises what the database raises
        (store.database.FAILURES), or OSError."""
        count = 0
        with self._lock:
            end = self._journal.end
            self._journal.flush()
            position = self._position()
            self._journal.begin_after(position)
            lines: list[tuple[int, list[bytes]]] = []
            size, last = 0, position
            for first, some, last in batches(self._journal.path, position, end):
                lines.append((first, some))
                size += len(some)
                if size >= LINES:
                    count += self._put(lines, position, last)
                    lines, size, position = [], 0, last
                    if stop is not None and stop.is_set():
                        break
            if lines:
                count += self._put(lines, position, last)
                position = last
            self._folded(position)
        return count

    def _position(self) -> int:
        """How far it is folded. A writer that the database does not know yet is made."""
        with self._database.connect() as connection:
            row = connection.execute(select(writers).where(writers.c.name == self._name)).first()
        if row is None:
            with self._database.begin() as connection:
                newest = connection.execute(select(func.max(writers.c.id))).scalar()
                number = 1 if newest is None else newest + 1
                connection.execute(insert(writers).values(id=number, name=self._name, position=0))
            self._writer = number
            return 0
        self._writer = row.id
        if row.position in self._unsure:
            self._add(self._unsure[row.position])
        return int(row.position)

    def _add(self, spent: Spent) -> None:
        """So much of this writer is in the sums; what else was tried is not."""
        self._unsure.clear()
        for month, by_project in spent.items():
            own = self._own.setdefault(month, {})
            for project, cost in by_project.items():
                own[project] = own.get(project, 0) + cost

    def _put(self, lines: list[tuple[int, list[bytes]]], before: int, after: int) -> int:
        values: list[Any] = []
        sums: dict[Row, list[int]] = {}
        damaged = 0
        for first, some in lines:
            damaged += read_rows(some, self._writer << 52 | first, values, sums)
        self._unsure[after] = spent = spent_of(sums)
        with self._database.begin() as connection:
            mark = _placeholder(connection)
            moved = connection.exec_driver_sql(
                f"UPDATE writers SET position = {mark} WHERE id = {mark} AND position = {mark}",
                (after, self._writer, before),
            )
            if moved.rowcount != 1:
                raise OSError(None, f"somebody else folds the journal of {self._name}")
            _insert(connection, ledger, LEDGER, values)
            hours, days = _by_time(sums)
            _insert(connection, usage_hours, ("hour", "project_id", "key_id", "kind", "model", *FIGURES), hours)
            _insert(connection, usage_days, ("day", "project_id", "kind", "model", *FIGURES), days)
        self._add(spent)
        if damaged:
            log.warning("%d damaged lines of the ledger's journal were left out", damaged)
        return len(values) // len(LEDGER)

    def _sweep(self, stop: threading.Event) -> None:
        """Deletes rows that are older than they are kept for; the sums stay."""
        self._swept = time.monotonic()
        if self._days:
            before = int(time.time()) - self._days * DAY
            sweep(self._database, ledger.c.id, ledger.c.at, before, stop)
        for also in self.sweeps:
            also(stop)

    def admitted(self, now: float, seconds: float) -> tuple[int, list[Admitted]]:
        """How far this journal is folded, and what of it began in the last so many seconds: what ended in the last
        minute by the second, what ended before by the quarter of an hour and without tokens. Nothing is told to have
        begun earlier than it did, so that a limit counts it long enough. Raises what the database raises."""
        since, edge = int(now - seconds) - 1, int(now) - FRESH_SECONDS
        spans = [(first, last, 1) for first, last in _parts(edge, int(now))]
        spans[-1] = (spans[-1][0], NEVER, 1)
        if since < edge:
            spans += [(first, last, QUARTER) for first, last in _parts(since, edge)]
        with self._lock:
            with self._database.connect() as connection:
                row = connection.execute(select(writers).where(writers.c.name == self._name)).first()
            if row is None:
                return 0, []
            with ThreadPoolExecutor(PARTS) as pool:
                parts = list(pool.map(lambda span: self._admitted(row.id, *span), spans))
        return row.position, [one for part in parts for one in part if one.began > now - seconds]

    def _admitted(self, writer: int, first: int, last: int, grain: int) -> list[Admitted]:
        """The same of what ended after first until last, in groups of so many seconds."""
        c = ledger.c
        began = c.at * 1000 - c.milliseconds
        requests = func.sum(case((c.attempt <= 1, 1), else_=0))
        tokens = func.sum(case((c.attempt > 0, c.prompt_tokens + c.completion_tokens), else_=0))
        query = select(func.max(began), c.project_id, c.asked, requests, tokens)
        query = query.where(c.at > first, c.at <= last, c.id // 2**52 == writer)
        query = query.group_by(c.project_id, c.asked, began // (1000 * grain))
        with self._database.connect() as connection:
            rows = connection.execute(query).all()
        return [  # the fraction of a second that a row does not have of its end is added
            Admitted(began / 1000 + 1, project, asked, int(requests), int(tokens) if grain < QUARTER else 0)
            for began, project, asked, requests, tokens in rows
        ]

    def spent(self, month: int) -> tuple[int, dict[str, int]]:
        """How far this journal is folded, and nano-dollars by project that all writers have spent by then, since month
        began. Raises what the database raises."""
        with self._lock, self._database.connect() as connection:
            position = connection.execute(select(writers.c.position).where(writers.c.name == self._name)).scalar()
            spent = _sums_of(connection, month)
            self._before, self._own = {month: spent}, {}
            self._unsure.clear()
        return position or 0, dict(spent)

    def _hear(self) -> None:
        """Tells what other writers have spent this month, if they have folded anything since it was told last."""
        if self.heard is None:
            return
        month = month_of(time.time())
        others = select(writers.c.id, writers.c.position).where(writers.c.name != self._name).order_by(writers.c.id)
        with self._lock, self._database.connect() as connection:
            moved = [(month, 0), *((row.id, row.position) for row in connection.execute(others))]
            self._shared = len(moved) > 1
            if not self._shared or moved == self._moved or self._unsure:
                return
            spent = _sums_of(connection, month)  # after how far they are: what they fold meanwhile is heard again
            before, own = self._before.get(month, {}), self._own.get(month, {})
            self._before, self._own = {month: before}, {month: own}  # other months are over
            self._moved = moved
        found = {project: cost - before.get(project, 0) - own.get(project, 0) for project, cost in spent.items()}
        self.heard(month, found)


def sweep(database: Database, id: Column[Any], at: Column[Any], before: int, stop: threading.Event) -> None:
    """Deletes the rows of a table whose time `at` is before that one, some at a time, until stop is set. Raises what
    the database raises."""
    old = select(id).where(at < before).order_by(at).limit(LINES)
    while not stop.is_set():
        with database.begin() as connection:
            gone = connection.execute(delete(id.table).where(id.in_(old))).rowcount
        if gone < LINES:
            return
        stop.wait(0.05)  # others want to write, too


def month_of(at: float) -> int:
    """When the calendar month (UTC) of a time begins, in unix seconds."""
    return int(datetime.fromtimestamp(at, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp())


def _parts(first: int, last: int) -> list[tuple[int, int]]:
    """From first to last, in some pieces."""
    edges = [first + (last - first) * at // PARTS for at in range(PARTS + 1)]
    return list(pairwise(edges))


def _sums_of(connection: Connection, month: int) -> dict[str, int]:
    """Nano-dollars by project that all writers have spent since month began, as far as they have folded it."""
    c = usage_days.c
    rows = connection.execute(select(c.project_id, func.sum(c.cost)).where(c.day >= month).group_by(c.project_id))
    return {project: int(cost) for project, cost in rows if cost}


def spent_of(sums: dict[Row, list[int]]) -> Spent:
    """The money in them."""
    spent: Spent = {}
    for (hour, project, *_), sum in sums.items():
        if sum[-1]:
            month = spent.setdefault(month_of(hour), {})
            month[project] = month.get(project, 0) + sum[-1]
    return spent


# lines to rows
def read_rows(lines: list[bytes], id: int, values: list[Any], sums: dict[Row, list[int]]) -> int:
    """Adds the entries among lines to the values of rows, one after the other, and to sums; id is that of the first
    line. Returns how many lines were damaged."""
    damaged = 0
    for line in lines:
        try:
            entry = read_line(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            damaged += 1
        else:
            key, project, task, attempt, at = entry.key, entry.project, entry.task, entry.attempt, int(entry.at)
            prompt, completion, cached = entry.prompt_tokens, entry.completion_tokens, entry.cached_tokens
            reasoning, cost = entry.reasoning_tokens, entry.cost
            error: str | None = entry.error
            asked = _short(entry.asked)
            model = _short(entry.model) or asked
            values += (
                id, at, entry.id, attempt, key, project, task, asked, model, _short(entry.target)[:128],
                entry.status, entry.outcome, int(entry.ms), prompt, completion, cached, reasoning, cost,
                _marks(entry), error if error is None else _short(error)[:64],
            )  # fmt: skip
            if attempt:  # what was answered without an engine cost nothing, and is counted where it was made
                which = (at - at % HOUR, project, key, KINDS.get(task, task), model)
                sum = sums.get(which)
                if sum is None:
                    sums[which] = [1, prompt, completion, cached, reasoning, cost]
                else:
                    sum[0] += 1
                    sum[1] += prompt
                    sum[2] += completion
                    sum[3] += cached
                    sum[4] += reasoning
                    sum[5] += cost
        id += len(line) + 1
    return damaged


def _by_time(sums: dict[Row, list[int]]) -> tuple[list[Any], list[Any]]:
    """The values of the sums by hour and by day, in order: who locks rows in the same order as all others may have to
    wait for them, but they never for him as well."""
    days: dict[Row, list[int]] = {}
    for (hour, project, _, kind, model), sum in sums.items():
        key = (hour - hour % DAY, project, kind, model)
        day = days.get(key)
        days[key] = sum if day is None else [one + other for one, other in zip(day, sum, strict=True)]
    hours: list[Any] = []
    for key in sorted(sums):
        hours += (*key, *sums[key])
    whole: list[Any] = []
    for key in sorted(days):
        whole += (*key, *days[key])
    return hours, whole


def _short(name: str) -> str:
    """A model's name as a column takes it; a caller may have asked for anything."""
    return name[:256] if "\0" not in name else name[:256].replace("\0", "\ufffd")


_known_marks: dict[Row, str] = {}


def _marks(entry: Entry) -> str:
    key = (entry.stream, entry.cache, entry.retry, entry.estimated, entry.fallback, entry.observed, entry.unpriced)
    marks = _known_marks.get(key)
    if marks is None:
        stream, cache, retry, estimated, fallback, observed, unpriced = key
        words = [
            "stream" if stream else "", cache, f"retry={retry}" if retry else "", "estimated" if estimated else "",
            "fallback" if fallback else "", f"observed={observed}" if observed else "", "unpriced" if unpriced else "",
        ]  # fmt: skip
        marks = " ".join(word for word in words if word)[:128]
        if len(_known_marks) < 1000:
            _known_marks[key] = marks
    return marks


# rows to the database
def _insert(connection: Connection, table: Table, columns: Sequence[str], values: list[Any]) -> None:
    """Many rows by few statements: each is one step of the driver, in which the interpreter is free for others. A row
    of sums is added to the one that is there. values: those of all rows, one after the other."""
    names, width = ", ".join(columns), len(columns)
    rest = ""
    if table is not ledger:
        keys = columns[: -len(FIGURES)]
        added = ", ".join(f"{name} = {table.name}.{name} + excluded.{name}" for name in FIGURES)
        rest = f" ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {added}"
    if connection.dialect.name == "postgresql":
        rows = [dict(zip(columns, values[at : at + width], strict=True)) for at in range(0, len(values), width)]
        if rows:
            given = f"SELECT {names} FROM json_populate_recordset(NULL::{table.name}, %s)"
            text = msgspec.json.encode(rows).decode()
            connection.exec_driver_sql(f"INSERT INTO {table.name} ({names}) {given}{rest}", (text,))
        return
    row = f"({', '.join('?' * width)})"
    at = 0
    for rows_at_once in (ROWS, 20, 1):  # few statements, which the driver keeps prepared
        statement = f"INSERT INTO {table.name} ({names}) VALUES {', '.join([row] * rows_at_once)}{rest}"
        size = rows_at_once * width
        while at + size <= len(values):
            connection.exec_driver_sql(statement, tuple(values[at : at + size]))
            at += size


def _placeholder(connection: Connection) -> str:
    return "%s" if connection.dialect.name == "postgresql" else "?"


def _bytes(first: int, last: int) -> int:
    """From one position to another, about: a segment that was full had 16 MB."""
    return ((last >> PLACE) - (first >> PLACE)) * SEGMENT + last % (1 << PLACE) - first % (1 << PLACE)
