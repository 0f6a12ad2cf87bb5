"""From the journal into the database: entries become rows of `ledger` and are added to the sums by hour and by day.

Exactly once: how far a writer's journal is folded moves in the transaction that folds it. Nothing is folded that is not
on disk in the journal, so the database never knows more than the journal does. A database that is busy, full or gone
only delays it; the journal keeps what waits. A thread folds now and then, when calls come slowly enough; who wants to
know what was used has it done first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from sqlalchemy import Connection, Table, delete, func, insert, literal, select

from ..store.database import FAILURES, reason
from ..store.journal import PLACE, SEGMENT, Journal, batches, segments
from ..store.schema import ledger, usage_days, usage_hours, writers
from .entry import OPEN, Entry, read_line

if TYPE_CHECKING:
    from ..store.database import Database

log = logging.getLogger("tertulia.accounts")

ROWS = 500  # of one statement: SQLite takes 32,766 values in one
LINES = 10_000  # folded in one transaction, about: the more, the fewer sums are written twice
BUSY = 2**20  # bytes a second that the journal grows by while the thread lets it be ...
BACKLOG = 2**26  # ... until so many wait
AGAIN = 60.0  # seconds between two complaints, and between a failure to stop and giving up
LEAVE_SECONDS = 10.0  # what a database is given to take the last entries when the server stops
HOUR, DAY = 3600, 86400
LEDGER = tuple(column.name for column in ledger.columns)
KINDS = {"chat": "completions", "completion": "completions", "embedding": "embeddings"}  # of usage, by task
FIGURES = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost")
Row = tuple[Any, ...]


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

    # the thread
    def start(self) -> None:
        self._seen, self._seen_at = self._journal.end, time.monotonic()
        self._worker = threading.Thread(target=self._work, name="tertulia-fold", daemon=True)
        self._worker.start()

    def _work(self) -> None:
        while not self._stop.wait(self._seconds):
            if not self._busy():
                self._try(self._stop)
        self._try(None)

    def _busy(self) -> bool:
        """Whether calls come so fast that folding had better wait for a quieter moment."""
        end, now = self._journal.end, time.monotonic()
        grown, seconds = _bytes(self._seen, end), now - self._seen_at
        self._seen, self._seen_at = end, now
        return grown > BUSY * seconds and len(segments(self._journal.path)) * SEGMENT < BACKLOG

    def _try(self, stop: threading.Event | None) -> None:
        try:
            self.now(stop)
            if self._days and time.monotonic() - self._swept > HOUR:
                self._sweep(stop)
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
        return int(row.position)

    def _put(self, lines: list[tuple[int, list[bytes]]], before: int, after: int) -> int:
        values: list[Any] = []
        sums: dict[Row, list[int]] = {}
        damaged = 0
        for first, some in lines:
            damaged += read_rows(some, self._writer << 52 | first, values, sums)
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
        if damaged:
            log.warning("%d damaged lines of the ledger's journal were left out", damaged)
        return len(values) // len(LEDGER)

    def _sweep(self, stop: threading.Event | None) -> None:
        """Deletes rows that are older than they are kept for, some at a time; the sums stay."""
        self._swept = time.monotonic()
        before = int(time.time()) - self._days * DAY
        old = select(ledger.c.id).where(ledger.c.at < before).order_by(ledger.c.at).limit(LINES)
        while stop is not None and not stop.is_set():
            with self._database.begin() as connection:
                gone = connection.execute(delete(ledger).where(ledger.c.id.in_(old))).rowcount
            if gone < LINES:
                return
            time.sleep(0.05)  # others want to write, too

    def admitted(self, since: float, coarse: bool) -> tuple[int, list[Admitted]]:
        """How far this journal is folded, and what calls began since then; coarse: by the quarter of an hour, without
        tokens. Raises what the database raises."""
        c = ledger.c
        tokens_used = c.prompt_tokens + c.completion_tokens
        query = select(c.at - c.milliseconds / 1000.0, c.project_id, c.asked, c.attempt, tokens_used)
        query = query.where(c.at > since)
        if coarse:
            quarter = c.at - c.at % 900
            query = select(quarter, c.project_id, c.asked, literal(1), func.count())
            query = query.where(c.at > since, c.attempt <= 1).group_by(quarter, c.project_id, c.asked)
        with self._lock, self._database.connect() as connection:
            position = connection.execute(select(writers.c.position).where(writers.c.name == self._name)).scalar()
            rows = connection.execute(query).all()
        found = [
            Admitted(float(began), project, asked, tokens, 0) if coarse
            else Admitted(float(began), project, asked, 1 if attempt <= 1 else 0, tokens if attempt else 0)
            for began, project, asked, attempt, tokens in rows
            if began > since
        ]  # fmt: skip
        return position or 0, found

    def spent(self, month: int) -> tuple[int, dict[str, int]]:
        """How far this journal is folded, and nano-dollars by project that all writers have spent by then, since month
        began. Raises what the database raises."""
        with self._lock, self._database.connect() as connection:
            position = connection.execute(select(writers.c.position).where(writers.c.name == self._name)).scalar()
            rows = connection.execute(
                select(usage_days.c.project_id, func.sum(usage_days.c.cost))
                .where(usage_days.c.day >= month)
                .group_by(usage_days.c.project_id)
            ).all()
        return position or 0, {project: int(cost) for project, cost in rows if cost}


def month_of(at: float) -> int:
    """When the calendar month (UTC) of a time begins, in unix seconds."""
    return int(datetime.fromtimestamp(at, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp())


# lines to rows
def read_rows(lines: list[bytes], id: int, values: list[Any], sums: dict[Row, list[int]]) -> int:
    """Adds the entries among lines to the values of rows, one after the other, and to sums; id is that of the first
    line. Returns how many lines were damaged."""
    damaged = 0
    for line in lines:
        if not line.startswith(OPEN):
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
