"""The ledger for others: every entry as CSV or Parquet, and whether rows, sums and journal agree. Reads only, while a
server runs, too: what it has not folded yet is read from the journal.
"""

from __future__ import annotations

import contextlib
import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import BigInteger, Connection, cast, func, select

from ..errors import BadRequest, NotFound, SettingsError
from ..store.database import Database
from ..store.journal import PLACE, batches, segments
from ..store.schema import ledger, usage_days, usage_hours, writers
from ..store.slots import standing
from .entry import read_name
from .fold import DAY, FIGURES, HOUR, LEDGER, read_rows
from .records import Records, chosen, reading

COLUMNS = LEDGER[1:]  # the id is the database's own business
NUMBERS = frozenset(column.name for column in ledger.columns if column.type.python_type is int)
AT_ONCE = 10_000  # rows
Row = Sequence[Any]


class Part(NamedTuple):
    """Which entries: by when they ended, since inclusive and until not, in unix seconds, and by project."""

    since: int | None = None
    until: int | None = None
    project: str | None = None

    def has(self, at: int, project: str) -> bool:
        return (
            (self.since is None or at >= self.since)
            and (self.until is None or at < self.until)
            and (self.project is None or project == self.project)
        )


def rows(database: Database, data: Path, part: Part) -> Iterator[list[Row]]:
    """COLUMNS of every entry of the database, and of those that this directory's journal has and the database not yet;
    some at a time, as they were written."""
    with _snapshot(database) as connection:
        tail = _tail(connection, data, part)
        last = -1
        query = select(ledger).order_by(ledger.c.id).limit(AT_ONCE)
        if part.since is not None:
            query = query.where(ledger.c.at >= part.since)
        if part.until is not None:
            query = query.where(ledger.c.at < part.until)
        if part.project is not None:
            query = query.where(ledger.c.project_id == part.project)
        while found := connection.execute(query.where(ledger.c.id > last)).all():
            last = found[-1].id
            yield [row[1:] for row in found]
    if tail:
        yield tail


def project_of(database: Database, text: str) -> str:
    """The id of the project of that id or name. Raises SettingsError if there is none, and Unavailable."""
    with reading(database) as connection:
        used = connection.scalar(select(usage_days.c.project_id).where(usage_days.c.project_id == text).limit(1))
        if used is not None:  # whatever has become of it
            return text
    projects = Records(lambda: reading(database)).all("project")
    known = [(one.id, str(one.body.get("name")), one.body.get("archived_at") is None) for one in projects]
    try:
        return chosen(text, known)
    except (NotFound, BadRequest) as error:
        raise SettingsError(f"--project: {error.message}") from None


@contextlib.contextmanager
def _snapshot(database: Database) -> Iterator[Connection]:
    """All that is read sees the same moment."""
    level = {} if database.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
    with database.connect() as connection:
        yield connection.execution_options(**level)


def _tail(connection: Connection, data: Path, part: Part) -> list[Row]:
    """What of the journal is not in the database at this moment."""
    values: list[Any] = []
    for first, lines, _ in batches(data / "ledger", _position(connection, data)):
        read_rows(lines, first, values, {})
    width, at, project = len(LEDGER), LEDGER.index("at"), LEDGER.index("project_id")
    found = (values[place : place + width] for place in range(0, len(values), width))
    return [row[1:] for row in found if part.has(row[at], row[project])]


def _position(connection: Connection, data: Path) -> int:
    """How far the journal of the directory is folded. Raises SettingsError when more of it is gone than that."""
    try:
        name = (data / "writer").read_text().strip()
    except FileNotFoundError:
        return 0
    position = connection.execute(select(writers.c.position).where(writers.c.name == name)).scalar() or 0
    kept = segments(data / "ledger")
    if kept and position and kept[0] > (position >> PLACE) + 1:
        raise SettingsError("The server folds its journal at this moment; try again.")
    return int(position)


# writing
def write_csv(batches: Iterator[list[Row]], path: Path | None) -> int:
    """To a new file, or to standard output; how many rows. Raises SettingsError."""
    count = 0
    with contextlib.ExitStack() as stack:
        file: Any = sys.stdout
        if path is not None:
            file = stack.enter_context(_new(path, "w", encoding="utf-8", newline=""))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for some in batches:
            writer.writerows(some)
            count += len(some)
        file.flush()
    return count


def write_parquet(batches: Iterator[list[Row]], path: Path) -> int:
    """To a new file; how many rows. Raises SettingsError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SettingsError("Parquet needs a package that is not installed: pip install 'tertulia[parquet]'") from None
    shape = pyarrow.schema(
        [(name, pyarrow.int64() if name in NUMBERS else pyarrow.string()) for name in COLUMNS],
        metadata={"cost": "nano-dollars", "at": "unix seconds"},
    )
    count = 0
    with _new(path, "wb") as file, pyarrow.parquet.ParquetWriter(file, shape, compression="zstd") as writer:
        for some in batches:
            columns = zip(*some, strict=True)
            arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, shape, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=shape))
            count += len(some)
    return count


@contextlib.contextmanager
def _new(path: Path, mode: str, **options: Any) -> Iterator[Any]:
    """A file that was not there, for its owner only, and is not there afterwards if it could not be finished. Raises
    SettingsError."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        with os.fdopen(number, mode, **options) as file:
            yield file
    except BaseException:  # Ctrl-C too
        path.unlink(missing_ok=True)
        raise


def day_of(text: str) -> int:
    """Unix seconds of a day (2026-11-30) or a moment (2026-11-30T12:00), in UTC unless it says otherwise. Raises
    ValueError."""
    found = datetime.fromisoformat(text)
    return int((found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp())


# verifying
def verify(database: Database, data: Path, tell: Callable[[str], None]) -> list[str]:
    """What is wrong, a line each; tell is given what was found. Whole days whose rows are all kept are added up again
    and compared with the sums."""
    wrong = _check_journal(data / "ledger", tell)
    with _snapshot(database) as connection:
        position = _position(connection, data)
        count, first = connection.execute(select(func.count(), func.min(ledger.c.at))).one()
        tell(f"database: {count} entries; the journal is folded up to segment {position >> PLACE}")
        twice = connection.execute(
            select(ledger.c.call, ledger.c.attempt).where(ledger.c.attempt > 0)
            .group_by(ledger.c.call, ledger.c.attempt).having(func.count() > 1).limit(3)
        ).all()  # fmt: skip
        wrong += [f"attempt {attempt} of {call} has more than one entry" for call, attempt in twice]
        if first is not None:
            begin = -(-first // DAY) * DAY if _older(connection, first) else first // DAY * DAY
            wrong += _check_sums(connection, begin)
    return wrong


def _older(connection: Connection, first: int) -> bool:
    """Whether rows of the oldest day have gone already: sums go further back."""
    oldest = connection.execute(select(func.min(usage_hours.c.hour))).scalar()
    return oldest is not None and int(oldest) < first // HOUR * HOUR


def _check_sums(connection: Connection, begin: int) -> list[str]:
    sums = [cast(func.sum(ledger.c[name]), BigInteger) for name in FIGURES[1:]]
    day = ledger.c.at - ledger.c.at % DAY
    query = select(day.label("day"), func.count(), *sums).where(ledger.c.attempt > 0, ledger.c.at >= begin)
    expected = {row[0]: tuple(row[1:]) for row in connection.execute(query.group_by("day"))}
    wrong = []
    for table, time in ((usage_days, "day"), (usage_hours, "hour")):
        at = table.c[time] - table.c[time] % DAY
        figures = [cast(func.sum(table.c[name]), BigInteger) for name in FIGURES]
        found_query = select(at.label("at"), *figures).where(table.c[time] >= begin).group_by("at")
        found = {row[0]: tuple(row[1:]) for row in connection.execute(found_query)}
        for each in sorted(expected.keys() | found.keys()):
            if expected.get(each) != found.get(each):
                date = datetime.fromtimestamp(each, UTC).date()
                wrong.append(f"{table.name}: the sums of {date} are not those of its entries")
    return wrong


def _check_journal(path: Path, tell: Callable[[str], None]) -> list[str]:
    entries, wrong = 0, []
    for position, lines, _ in batches(path):
        for line in lines:
            try:
                read_name(line)
                entries += 1
            except (msgspec.MsgspecError, UnicodeDecodeError):
                wrong.append(f"journal: segment {position >> PLACE} has a damaged line")
    kept = segments(path)
    tell(f"journal: {entries} entries in {len(kept)} segments")
    if intents := standing(path / "intents"):
        tell(f"journal: {len(intents)} attempts are under way, or were when the server was killed")
    return wrong
