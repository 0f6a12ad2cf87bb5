"""Backups: one tar file with every table as lines of JSON, whatever database they are in, and with the small files and
the journal of the data directory. So what one kind of database held can be restored into another.

All of it is as of one moment, even while a server writes: the tables come from one transaction that sees nothing of
what is changed meanwhile; the journal is taken up to where it was when that began. Positions in the journal and in the
database fit together then: what was not yet folded is folded after the restore, and nothing twice.

manifest.json, the last member, names every other one with its size and SHA-256. Nothing is unpacked by the names in the
file: what is not expected is refused.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import re
import secrets
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
from sqlalchemy import Connection, LargeBinary, MetaData, Table, delete, inspect, select, text

from .. import __version__
from ..errors import SettingsError, TertuliaError
from .database import (
    FAILURES,
    HEAD,
    Database,
    connect,
    exclusive,
    file_of,
    found_version,
    make_tables,
    migrate,
    name_of,
    reason,
    unhurried,
)  # fmt: skip
from .journal import segment_file, segments
from .schema import metadata

FORMAT = 1  # of the file; one with a higher one was written by a newer Tertulia
FILES = ("secret", "client.env", "writer")  # of the data directory, beside the database and the journal
JOURNAL = "ledger"
INTENTS = "ledger/intents"  # beside the journal
OLD_JOURNAL = "ledger.jsonl"  # of Tertulia 0.1
FORMER = ("projects",)  # tables that older releases had
CHUNK = 2**22  # bytes of rows in one member of the tar file, about
ROWS = 2000  # fetched, or written, at once
TABLE = re.compile(r"tables/([a-z_]+)/\d{6}\.jsonl")
KEPT = re.compile(rf"files/({'|'.join(map(re.escape, (*FILES, INTENTS, OLD_JOURNAL)))}|{JOURNAL}/\d{{6,}}\.jsonl)")
Tell = Callable[[str], None]
encode = msgspec.json.Encoder().encode
decode_row = msgspec.json.Decoder(list[Any]).decode


class BackupFailed(TertuliaError):
    """The backup could not be made or read."""


class Member(msgspec.Struct, frozen=True):
    """A file within the backup. size in bytes."""

    size: int
    sha256: str


class Columns(msgspec.Struct, frozen=True):
    """What the rows of a table hold. binary: those that are base64."""

    names: list[str]
    binary: list[str]
    rows: int


class Manifest(msgspec.Struct, frozen=True):
    """What is in a backup, and whose it is. made_at in unix seconds."""

    format: int
    tertulia: str
    schema: str
    made_at: int
    tables: dict[str, Columns]
    members: dict[str, Member]


# making one
def backup(data: Path, url: str | None, target: Path, tell: Tell = lambda _: None) -> Manifest:
    """Writes what is in data and the database to the file target, all of it or nothing; a server may be at work.

    Raises SettingsError where there is nothing to back up or target exists, and BackupFailed.
    """
    if target.exists():
        raise SettingsError(f"{target} exists; a backup replaces nothing.")
    engine = connect(data, url)
    if engine.dialect.name == "sqlite" and not file_of(engine).exists():
        raise SettingsError(f"There is nothing to back up: {file_of(engine)} does not exist.")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with contextlib.ExitStack() as closing:
            file = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            with os.fdopen(file, "wb") as out:
                with gzip.GzipFile("", "wb", 1, out) as zipped, tarfile.open(fileobj=zipped, mode="w|") as tar:
                    manifest = _write(_Writer(tar), engine, data, closing, tell)
                out.flush()
                os.fsync(out.fileno())
            tell("verifying")
            if verify(partial) != manifest:
                raise BackupFailed(f"{target} could not be written: it reads other than it was written.")
            os.rename(partial, target)
            _flush(target.parent)
    except FAILURES as error:
        raise BackupFailed(f"{name_of(engine)} could not be read: {reason(error)}") from None
    except OSError as error:
        raise BackupFailed(f"{target} could not be written: {error.strerror or error}") from None
    finally:
        engine.dispose()
        partial.unlink(missing_ok=True)
    return manifest


class _Writer:
    """The tar file, and what the manifest will say of it."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar, self._now = tar, int(time.time())
        self.tables: dict[str, Columns] = {}
        self.members: dict[str, Member] = {}

    def add(self, name: str, source: IO[bytes], size: int) -> None:
        """size bytes of source. Raises OSError if it holds less."""
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = size, self._now, 0o600
        hashed = _Hashed(source)
        self._tar.addfile(info, hashed)
        self.members[name] = Member(size, hashed.sha256.hexdigest())

    def add_bytes(self, name: str, content: bytes) -> None:
        self.add(name, io.BytesIO(content), len(content))

    def finish(self, schema: str) -> Manifest:
        manifest = Manifest(FORMAT, __version__, schema, self._now, self.tables, self.members)
        self.add_bytes("manifest.json", msgspec.json.format(encode(manifest)))
        del self.members["manifest.json"]
        return manifest


class _Hashed(io.RawIOBase):
    def __init__(self, source: IO[bytes]) -> None:
        self._source, self.sha256 = source, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self.sha256.update(data)
        return data


def _write(
    writer: _Writer, engine: Database, data: Path, closing: contextlib.ExitStack, tell: Tell
) -> Manifest:  # fmt: skip
    # Files of the journal are opened before the transaction begins: what is removed from now on, as it is folded, may
    # not be folded yet for the transaction. How far they go is looked up after it has begun.
    journal = dict(_open_journal(data, closing))
    for name in (*FILES, INTENTS):  # what was under way has its entries in what is looked up later, or is interrupted
        with contextlib.suppress(FileNotFoundError):
            writer.add_bytes(f"files/{name}", (data / name).read_bytes().rstrip(b"\0"))
    with _snapshot(engine) as connection:
        found = found_version(connection)  # the first look: from here on, the transaction sees nothing new
        if found is None:
            raise SettingsError(f"There is nothing to back up: {name_of(engine)} is empty.")
        journal = {**dict(_open_journal(data, closing)), **journal}
        ends = {name: _end(file) for name, file in journal.items()}
        for name in sorted(journal):
            tell(f"journal {name}")
            writer.add(f"files/{name}", journal[name], ends[name])
        for table in _tables(connection):
            _write_table(writer, connection, table, tell)
    return writer.finish(found)


@contextlib.contextmanager
def _snapshot(engine: Database) -> Iterator[Connection]:
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execution_options(isolation_level="REPEATABLE READ")
            unhurried(connection)
        yield connection


def _open_journal(data: Path, closing: contextlib.ExitStack) -> Iterator[tuple[str, IO[bytes]]]:
    """(name in the data directory, open file) of every segment."""
    files = [segment_file(data / JOURNAL, number) for number in segments(data / JOURNAL)]
    for file in (*files, *(data / JOURNAL).glob("*.whole"), data / OLD_JOURNAL):
        if file.suffix == ".whole":
            raise SettingsError("The journal of Tertulia 0.1 is being taken over; start `tertulia serve` once.")
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile: it was used up
            source = open(file, "rb")  # noqa: SIM115
            yield str(file.relative_to(data)), closing.enter_context(source)


def _end(file: IO[bytes]) -> int:
    """Where the last whole line ends: behind it are zero bytes, or what is just being written."""
    end = os.fstat(file.fileno()).st_size
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(file.fileno(), end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _tables(connection: Connection) -> Iterable[Table]:
    """Ours, as they are there: they may be those of an older version."""
    there = MetaData()
    there.reflect(connection, only=lambda name, _: name in metadata.tables or name in FORMER)
    return there.sorted_tables


def _write_table(writer: _Writer, connection: Connection, table: Table, tell: Tell) -> None:
    name, rows, count, part = str(table.name), bytearray(), 0, 0
    found = connection.execution_options(yield_per=ROWS).execute(select(table))
    for some in found.partitions(ROWS):
        for row in some:
            rows += encode(tuple(row))
            rows.append(10)
        count += len(some)
        if len(rows) >= CHUNK:
            part += 1
            writer.add_bytes(f"tables/{name}/{part:06d}.jsonl", bytes(rows))
            rows.clear()
            tell(f"{name}: {count:,} rows")
    if rows:
        writer.add_bytes(f"tables/{name}/{part + 1:06d}.jsonl", bytes(rows))
    binary = [str(column.name) for column in table.columns if isinstance(column.type, LargeBinary)]
    writer.tables[name] = Columns([str(column.name) for column in table.columns], binary, count)


# reading one
def verify(source: Path) -> Manifest:
    """Reads all of it. Raises BackupFailed if it is damaged, and SettingsError if a newer Tertulia made it."""
    found: dict[str, Member] = {}
    manifest: Manifest | None = None
    try:
        with _damage(source):
            for name, content in _members(source):
                if manifest is not None:
                    raise BackupFailed(f"{source} is damaged: something follows its manifest.")
                if name == "manifest.json":
                    manifest = _manifest(source, content.read(2**26))
                elif name in found or not (KEPT.fullmatch(name) or TABLE.fullmatch(name)):
                    raise BackupFailed(f"{source} is damaged: {name[:96]!r} does not belong there.")
                else:
                    found[name] = _measured(content)
    except OSError as error:
        raise BackupFailed(f"{source} cannot be read: {error.strerror or error}") from None
    if manifest is None:
        raise BackupFailed(f"{source} is no backup of Tertulia, or was cut short: it has no manifest.")
    wrong = [name for name in {**found, **manifest.members} if found.get(name) != manifest.members.get(name)]
    if wrong:
        raise BackupFailed(f"{source} is damaged: {wrong[0]} is not what the manifest says.")
    return manifest


def _measured(member: IO[bytes]) -> Member:
    sha256, size = hashlib.sha256(), 0
    while data := member.read(2**20):
        sha256.update(data)
        size += len(data)
    return Member(size, sha256.hexdigest())


def _manifest(source: Path, content: bytes) -> Manifest:
    try:
        if msgspec.json.decode(content)["format"] > FORMAT:
            raise SettingsError(f"{source} was written by a newer Tertulia.")
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, KeyError, TypeError, UnicodeDecodeError):
        raise BackupFailed(f"{source} is damaged: its manifest cannot be read.") from None
    if manifest.schema > HEAD:
        raise SettingsError(
            f"{source} has tables of version {manifest.schema}, this program knows {HEAD}: it was written by a newer "
            "Tertulia."
        )
    return manifest


def _members(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Every member in its order: (name, its content). Raises what _damage turns into BackupFailed."""
    with gzip.open(source) as unzipped:
        with tarfile.open(fileobj=unzipped, mode="r|") as tar:
            for info in tar:
                content = tar.extractfile(info) if info.isfile() else None
                if content is None:
                    raise BackupFailed(f"{source} is damaged: {info.name[:96]!r} is no file.")
                yield info.name, content
        while unzipped.read(2**20):  # to the end, where its checksum is
            pass


@contextlib.contextmanager
def _damage(source: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BackupFailed(f"{source} is no backup of Tertulia, or was cut short ({error}).") from None


# putting it back
def restore(source: Path, data: Path, url: str | None, force: bool, tell: Tell = lambda _: None) -> Manifest:
    """Puts a backup into data and the database, which must be empty unless force is given; what files force replaces
    are kept beside the new ones, as NAME.before-TIME. The caller holds data's serve.lock.

    Raises SettingsError where something is in the way, and BackupFailed; nothing is changed then, but for a failure in
    the last step, in which files get their names: a second restore with force is complete.
    """
    tell("verifying")
    manifest = verify(source)
    engine = connect(data, url)
    places = {name: data / name for name in (*FILES, JOURNAL, OLD_JOURNAL)}
    if engine.dialect.name == "sqlite":
        places["database"] = file_of(engine)
    there = [path for path in places.values() if path.exists()]
    if there and not force:
        raise SettingsError(f"{there[0]} exists; --force moves aside what is there.")
    fresh = data / f"restoring-{secrets.token_hex(4)}"
    try:
        fresh.mkdir(mode=0o700)
        with _damage(source):  # it was whole a moment ago; but it may be on a disk that fails
            _read_files(source, fresh)
            if engine.dialect.name == "sqlite":
                _fill_file(places["database"].with_name(f"{fresh.name}.db"), source, manifest, tell)
            else:
                _fill(engine, source, manifest, force, tell)
        _put_in_place(places, fresh)
    except FAILURES as error:
        raise BackupFailed(f"{name_of(engine)} could not be written: {reason(error)}") from None
    except OSError as error:
        raise BackupFailed(f"{data} could not be written: {error.strerror or error}") from None
    finally:
        engine.dispose()
        _remove(fresh, places.get("database"))
    return manifest


def _read_files(source: Path, fresh: Path) -> None:
    """The small files and the journal."""
    (fresh / JOURNAL).mkdir(mode=0o700)
    for name, content in _members(source):
        kept = KEPT.fullmatch(name)
        if kept is None:
            continue
        file = os.open(fresh / kept[1], os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "wb") as out:
            while data := content.read(2**20):
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
    _flush(fresh / JOURNAL)
    _flush(fresh)


def _fill_file(file: Path, source: Path, manifest: Manifest, tell: Tell) -> None:
    """A new file of SQLite, whole and on disk when this returns."""
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    engine = connect(file.parent, f"sqlite:///{file}")
    _fill(engine, source, manifest, True, tell)
    engine.dispose()  # the last connection takes what is in the -wal with it


def _fill(engine: Database, source: Path, manifest: Manifest, force: bool, tell: Tell) -> None:
    """Makes the tables and their rows in one transaction; what was there is gone if that succeeds."""
    with engine.begin() as connection:
        exclusive(connection)
        _clear(connection, engine, force)
        if manifest.schema == HEAD:
            make_tables(connection)
        else:
            migrate(connection, None, manifest.schema)
        tables = {table.name: table for table in _tables(connection)}
        for name, columns in manifest.tables.items():
            if name not in tables or {column.name for column in tables[name].columns} != {*columns.names}:
                raise BackupFailed(f"{source} is damaged: its table {name[:64]!r} is not known.")
        for table in tables.values():
            connection.execute(delete(table))  # what a new database begins with
        counts = _read_tables(connection, source, manifest, tell)
        wrong = [name for name, columns in manifest.tables.items() if counts.get(name, 0) != columns.rows]
        if wrong:
            raise BackupFailed(f"{source} is damaged: rows of {wrong[0]} are missing.")
        if manifest.schema != HEAD:
            migrate(connection, manifest.schema, HEAD)


def _clear(connection: Connection, engine: Database, force: bool) -> None:
    """Drops what was there. Raises SettingsError if that holds something, or somebody uses it."""
    others = 0
    if connection.dialect.name == "postgresql":
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "AND application_name = 'tertulia'"
        )
        others = connection.execute(text(query)).scalar() or 0
    if others:
        raise SettingsError(f"{name_of(engine)} is in use by a running Tertulia ({others} connections). Stop it first.")
    if not force and found_version(connection) is not None and _holds(connection):
        raise SettingsError(f"{name_of(engine)} holds an organization already; --force replaces all that it holds.")
    for name in {*inspect(connection).get_table_names()} & {*metadata.tables, *FORMER, "alembic_version"}:
        connection.execute(text(f'DROP TABLE "{name}"'))


def _holds(connection: Connection) -> bool:
    return connection.execute(text("SELECT id FROM organizations LIMIT 1")).first() is not None


def _read_tables(connection: Connection, source: Path, manifest: Manifest, tell: Tell) -> dict[str, int]:
    counts: dict[str, int] = {}
    for member, content in _members(source):
        found = TABLE.fullmatch(member)
        if found is None:
            continue
        name, columns = found[1], manifest.tables.get(found[1])
        if columns is None:
            raise BackupFailed(f"{source} is damaged: it says nothing of its table {name}.")
        try:
            rows = [decode_row(line) for line in content.read().split(b"\n")[:-1]]
            for at in (columns.names.index(column) for column in columns.binary):
                for row in rows:
                    row[at] = None if row[at] is None else msgspec.convert(row[at], bytes)
        except (msgspec.MsgspecError, UnicodeDecodeError, IndexError, ValueError):
            raise BackupFailed(f"{source} is damaged: {member} holds what is no row.") from None
        _insert(connection, name, columns.names, rows)
        counts[name] = counts.get(name, 0) + len(rows)
        tell(f"{name}: {counts[name]:,} rows")
    return counts


def _insert(connection: Connection, table: str, names: list[str], rows: list[list[Any]]) -> None:
    """By the driver's own fast way. The names have been compared with those of the tables that are there."""
    columns = ", ".join(f'"{name}"' for name in names)
    cursor = connection.connection.cursor()
    try:
        if connection.dialect.name == "postgresql":
            with cursor.copy(f'COPY "{table}" ({columns}) FROM STDIN') as copy:
                for row in rows:
                    copy.write_row(row)
        else:
            cursor.executemany(f'INSERT INTO "{table}" ({columns}) VALUES ({", ".join("?" * len(names))})', rows)
    finally:
        cursor.close()


def _put_in_place(places: dict[str, Path], fresh: Path) -> None:
    """What is there is moved aside, and what is new gets its name: the database first, for without the rest of it a
    server refuses to start."""
    stamp = f".before-{int(time.time())}"
    for path in places.values():
        for ending in ("-wal", "-shm", "") if path == places.get("database") else ("",):
            old = path.with_name(path.name + ending)
            if old.exists():
                os.rename(old, path.with_name(path.name + stamp + ending))
    if "database" in places:
        file = places["database"]
        os.rename(file.with_name(f"{fresh.name}.db"), file)
        _flush(file.parent)
    for name in (*FILES, JOURNAL, OLD_JOURNAL):
        if (fresh / name).exists():
            os.rename(fresh / name, places[name])
    _flush(fresh.parent)


def _remove(fresh: Path, database: Path | None) -> None:
    """What is left of a restore that failed."""
    for path in (*fresh.glob(f"{JOURNAL}/*"), *fresh.glob("*")):
        path.unlink() if path.is_file() else path.rmdir()
    if fresh.exists():
        fresh.rmdir()
    if database is not None:
        for ending in ("", "-wal", "-shm"):
            database.with_name(f"{fresh.name}.db{ending}").unlink(missing_ok=True)


def _flush(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
