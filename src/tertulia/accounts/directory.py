"""Who may come in: projects, users and API keys, as far as calls need to know them: in memory, whatever becomes of the
database. What is administered changes in the database (change), and every process looks twice a second for what is new.

All keys are here as keyed hashes; a key itself is shown once, when it is made, and kept nowhere.
"""

from __future__ import annotations

import contextlib
import gc
import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, Row, bindparam, insert, or_, select, update

from ..core import Principal
from ..errors import BadRequest, Conflict, Forbidden, SettingsError, TertuliaError, Unauthorized, Unavailable
from ..store.database import reason
from ..store.schema import api_keys, counters, facts, organizations, records
from . import keys
from .audit import Actor, AuditLog, itself
from .change import KEEP, Change, forgotten
from .keys import KEY_LIMIT, checked, mask
from .memory import KINDS, KeyRow, Memory
from .projects import Organization, Project
from .records import Record, Records, absent, new_id, paged, reading, record_of, writing
from .roles import Roles

log = logging.getLogger("tertulia.accounts")

LOOK_SECONDS = 0.5  # between two looks for what other processes have changed
OWNER = "owner@localhost"  # until somebody gives the first user another address
HANGS_SECONDS = 4 * LOOK_SECONDS  # after which a look that has no answer yet is one that failed
USED_SECONDS = 60.0  # between two times that it is written when keys were used last
STOP_SECONDS = 3.0  # for a database that does not answer, when the server stops
AT_ONCE = 2000  # keys looked through, or rows written, without a pause
GONE_DAYS = 90  # how long who has a key that was revoked or expired is told so, and not that it is unknown
NOBODY = (bytes(32), None)  # what a hash is compared with that is none of a key
GONE = {"revoked": "has been revoked", "expired": "has expired"}


class Directory:
    """Keys to principals. authenticate is on the hot path: one hash and one dictionary look-up."""

    def __init__(self, database: Engine, data: Path, grace: float = float("inf")) -> None:
        """grace: seconds that calls are answered from memory when the database cannot be reached. Raises SettingsError
        if the keys in the database were made with another secret than DATA/secret."""
        self._database, self._grace = database, grace
        self._pepper = keys.pepper(data / "secret")
        self._memory = Memory()
        self.records = Records(self.connect)
        self.audit_log = AuditLog(self.connect, self._name_of)
        self.on_change: list[Callable[[], None]] = []
        self.version = 0  # rises with every change of who may come in
        self._seen = -1  # the revision up to which memory is up to date
        self._looking = threading.Lock()  # one look at a time
        self._changing = threading.Lock()  # held while memory is changed, and never while waiting for the database
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._reached = time.monotonic()  # when the database was seen last
        self._failed = False  # the last look
        self._asked: float | None = None  # when the look began that is under way
        self._shut = False  # it has been out of reach for too long
        self._used_since = int(time.time())  # when it was written last which keys were used
        self._prepare(data)
        self.look()

    def _prepare(self, data: Path) -> None:
        """A new database gets its counter and the fingerprint of our secret; in another, that must be ours."""
        ours = keys.fingerprint(self._pepper)
        counted = select(counters.c.value).where(counters.c.name == "directory")
        theirs = select(facts.c.value).where(facts.c.name == "secret")
        for query, row in (
            (counted, insert(counters).values(name="directory", value=0)),
            (theirs, insert(facts).values(name="secret", value=ours)),
        ):
            with contextlib.suppress(Conflict), self.connect() as connection:
                if connection.scalar(query) is None:
                    with writing(self._database) as writer:  # in conflict if another process is as fast
                        writer.execute(row)
        with self.connect() as connection:
            found = connection.scalar(theirs)
        if found != ours:
            raise SettingsError(
                f"The keys in the database were made with another secret than {data / 'secret'}, so none of them would "
                "be known. Put the file `secret` there that belongs to the database, or choose another database."
            )

    # What is in memory

    @property
    def organization(self) -> Organization:
        return self._memory.organization

    @property
    def projects(self) -> dict[str, Project]:
        return self._memory.projects

    @property
    def roles(self) -> Roles:
        return self._memory.roles

    def __len__(self) -> int:
        return len(self._memory.keys)

    def ids(self) -> set[str]:
        """The ids of the keys there are."""
        return {who.key_id for _, who in list(self._memory.keys.values())}

    def home(self) -> tuple[str, str]:
        """The organization, and the oldest of its projects that is not archived."""
        projects = list(self.projects.values())
        alive = [project for project in projects if project.archived_at is None]
        return self.organization.id, (alive or projects)[0].id

    def _name_of(self, project: str) -> str | None:
        found = self.projects.get(project)
        return found.name if found is not None else None

    def authenticate(self, key: bytes) -> Principal:
        """Whose key it is. Raises Unauthorized; Unavailable for a key that is unknown while the database is out of
        reach, and after too long for every key."""
        who = self._find(key)
        if who is None or self._shut or (who.expires_at is not None and who.expires_at <= time.time()):
            raise self._refusal(key)
        project: Project | None = who.account
        if project is not None:
            if project.archived_at is not None:
                raise Unauthorized(
                    "The project you are requesting has been archived and is no longer accessible.",
                    code="not_authorized_invalid_project",
                )
            owner = who.owner_id
            if owner is not None and owner.startswith("user-") and not self.roles.may_enter(owner, project.id):
                raise Unauthorized(
                    "The owner of this API key has no access to its project any more.",
                    code="not_authorized_invalid_project",
                )
        return who

    def _find(self, key: bytes) -> Principal | None:
        """Looked up by full keyed hash, and compared in constant time: how long it takes tells nothing about keys."""
        if not 0 < len(key) <= KEY_LIMIT:
            return None
        hash = keys.digest(key, self._pepper)
        found, who = self._memory.keys.get(hash, NOBODY)
        return who if hmac.compare_digest(found, hash) else None

    def id_of(self, key: str) -> str | None:
        """The id of a key that is known, whether it would be let in or not."""
        who = self._find(key.encode())
        return who.key_id if who is not None else None

    def _refusal(self, key: bytes) -> TertuliaError:
        shown, hash = mask(key[: KEY_LIMIT + 1].decode("latin-1")), keys.digest(key[: KEY_LIMIT + 1], self._pepper)
        gone = "expired" if hash in self._memory.keys else self._memory.gone.get(hash)
        if self._shut or (gone is None and self._blind):  # it may have been made elsewhere
            return Unavailable("Who may come in cannot be checked at the moment. Please try again later.")
        if gone is None:
            said = f"Incorrect API key provided: {shown}."
        else:
            said = f"The API key provided {GONE[gone]}: {shown}."
        return Unauthorized(
            f"{said} You can find your API key at https://platform.openai.com/account/api-keys.", code="invalid_api_key"
        )

    # What is in the database

    def connect(self) -> AbstractContextManager[Connection]:
        """A connection to read with. Raises Unavailable if the database cannot be used."""
        return reading(self._database)

    @contextlib.contextmanager
    def change(self, actor: Actor) -> Iterator[Change]:
        """A change of records and keys, all of it or nothing; it is in force here when the block has ended. Waits for
        the database. Raises Unavailable if that cannot be used."""
        with writing(self._database) as connection:
            change = Change(connection, self.organization.id, actor)
            yield change
            change.write()
        try:
            self.look()
        except Unavailable:  # what was changed is kept, and is seen with the next look that succeeds
            log.warning("a change is kept, but could not be read back yet")

    def look(self) -> None:
        """Brings memory up to date with the database, if that has changed. Raises Unavailable."""
        with self._looking:
            self._asked = time.monotonic()
            try:
                changed = self._take_what_is_new()
            except Exception:  # whatever it was, what is new has not been seen
                self._failed = True
                raise
            finally:
                self._asked = None
            self._failed = False
        if changed:
            for tell in self.on_change:
                tell()

    def _take_what_is_new(self) -> bool:
        """Whether there was anything."""
        with self.connect() as connection:
            revision = connection.scalar(select(counters.c.value).where(counters.c.name == "directory")) or 0
            whole = revision < self._seen or self._seen < 0  # less than before: an older database was restored
            if revision != self._seen:
                since = -1 if whole else self._seen
                organization = connection.execute(select(organizations)).first()
                found, rows = read_records(connection, since), read_keys(connection, since)
                if not whole and forgotten(connection) > since:  # of what was deleted since, rows are gone already
                    whole, found, rows = True, read_records(connection, -1), read_keys(connection, -1)
        self._reached = time.monotonic()
        if revision == self._seen:
            return False
        with self._changing, no_collector():
            if organization is not None:
                self.organization.id, self.organization.name = organization.id, organization.name
            self._memory.take_records(found, whole)
            self._memory.take_keys(rows, whole, time.time())
            self.version += 1
        self._seen = revision
        return True

    # Keys

    def create_key(
        self, change: Change, kind: str, project_id: str | None, owner_id: str | None, name: str,
        scopes: Sequence[str] | None = None, expires_at: int | None = None, secret: str | None = None,
    ) -> tuple[dict[str, Any], str]:  # fmt: skip
        """(the new key as key() has it, the secret that is shown once). kind: project or admin; scopes as
        scopes.checked has them. Raises Conflict if that very secret is a key already."""
        secret, id = secret or keys.make(kind, owner_id), new_id("key")
        row = {
            "id": id, "kind": kind, "organization_id": change.organization, "project_id": project_id,
            "owner_id": owner_id, "name": name, "hash": keys.digest(secret.encode(), self._pepper),
            "hint": mask(secret), "scopes": _json(scopes), "created_at": change.now, "expires_at": expires_at,
        }  # fmt: skip
        change.add_key(row)
        change.audit("api_key.created", id, {"id": id, "data": {"scopes": list(scopes or ())}}, project_id)
        shown = {name: value for name, value in row.items() if name != "hash"}
        return {**shown, "scopes": list(scopes) if scopes else None, "last_used_at": None}, secret

    def update_key(
        self,
        change: Change,
        id: str,
        scopes: Sequence[str] | None = KEEP,
        expires_at: int | None = KEEP,
    ) -> dict[str, Any]:
        """Other scopes (None: all) or another end; what is not given stays. Raises NotFound, and BadRequest for a key
        that has expired."""
        row = self._changeable(change, id)
        requested: dict[str, Any] = {}
        values: dict[str, Any] = {}
        if scopes is not KEEP:
            values["scopes"], row["scopes"] = _json(scopes), scopes
            requested["scopes"] = list(scopes or ())
        if expires_at is not KEEP:
            values["expires_at"] = row["expires_at"] = expires_at
            if expires_at is not None:
                requested["expires_in_seconds"] = max(0, expires_at - change.now)
        change.set_key(id, **values)
        change.audit("api_key.updated", id, {"id": id, "changes_requested": requested}, row["project_id"])
        return row

    def rotate_key(self, change: Change, id: str, grace_seconds: int) -> tuple[dict[str, Any], str]:
        """A new key in the place of another, which goes on working for grace_seconds: (the new one, its secret). A key
        that was to live for a time has a successor that lives as long. Raises NotFound, or BadRequest if expired."""
        row = self._changeable(change, id)
        end = None if row["expires_at"] is None else change.now + row["expires_at"] - row["created_at"]
        made = self.create_key(change, row["kind"], row["project_id"], row["owner_id"], row["name"], row["scopes"], end)
        if grace_seconds > 0:
            self.update_key(change, id, expires_at=min(change.now + grace_seconds, row["expires_at"] or 2**62))
        else:
            self.revoke_key(change, id)
        return made

    def revoke_key(self, change: Change, id: str) -> dict[str, Any]:
        """It is refused from now on. Raises NotFound."""
        change.write()
        row = key_of(change.connection, id)
        change.set_key(id, revoked_at=change.now)
        change.audit("api_key.deleted", id, {"id": id}, row["project_id"])
        return row

    def revoke_keys_of(self, change: Change, owner_id: str, project_id: str | None = None) -> list[str]:
        """Revokes every key of an owner who is going, in one project or everywhere; their ids."""
        where = [api_keys.c.owner_id == owner_id, api_keys.c.revoked_at.is_(None)]
        if project_id is not None:
            where.append(api_keys.c.project_id == project_id)
        ids = list(change.connection.scalars(select(api_keys.c.id).where(*where)))
        for id in ids:
            self.revoke_key(change, id)
        return ids

    def _changeable(self, change: Change, id: str) -> dict[str, Any]:
        change.write()
        row = key_of(change.connection, id)
        if row["expires_at"] is not None and row["expires_at"] <= change.now:
            raise BadRequest("An expired key cannot be changed.", code="api_key_expired")
        return row

    def key(self, id: str, kind: str | None = None, project_id: str | None = None) -> dict[str, Any]:
        """A key that is not revoked: id, kind, project_id, owner_id, name, hint, scopes (a list, or None for all),
        created_at, expires_at, last_used_at. Raises NotFound, also if it is of another kind or project."""
        with self.connect() as connection:
            row = key_of(connection, id)
        if (kind is not None and row["kind"] != kind) or (project_id is not None and row["project_id"] != project_id):
            raise absent("API key", id)
        return self._with_use(row)

    def key_page(
        self, kind: str | None, project_id: str | None, after: str | None, limit: int, order: str = "asc",
        owners: Sequence[str] | None = None,
    ) -> tuple[list[dict[str, Any]], bool]:  # fmt: skip
        """As records.page, of keys that are not revoked; owners: only theirs."""
        query = select(*KEY_COLUMNS).where(api_keys.c.revoked_at.is_(None))
        if kind is not None:
            query = query.where(api_keys.c.kind == kind)
        if project_id is not None:
            query = query.where(api_keys.c.project_id == project_id)
        if owners is not None:
            query = query.where(api_keys.c.owner_id.in_(owners))
        with self.connect() as connection:
            rows = connection.execute(paged(query, api_keys, connection, after, limit + 1, order)).all()
        return [self._with_use(_key(row)) for row in rows[:limit]], len(rows) > limit

    def _with_use(self, row: dict[str, Any]) -> dict[str, Any]:
        """With the use that has not been written yet, as far as it was here."""
        _, who = self._memory.keys.get(row.pop("hash"), NOBODY)
        if who is not None and who.used > (row["last_used_at"] or 0):
            row["last_used_at"] = who.used
        return row

    def add_keys(self, secrets: list[str], kind: str, organization: str, project: str | None, name: str) -> list[str]:
        """Lets given keys in, in one transaction; their ids. For whoever sets a server up."""
        assert organization == self.organization.id
        owner = next(iter(self.roles.owners()), None)
        with self.change(itself("set up")) as change:
            made = [self.create_key(change, kind, project, owner, name, secret=secret) for secret in secrets]
        return [str(row["id"]) for row, _ in made]

    def add_key(self, secret: str, kind: str, organization: str, project: str | None, name: str) -> str:
        """The same for one."""
        return self.add_keys([secret], kind, organization, project, name)[0]

    def first_start(self, api_key: str | None, admin_key: str | None) -> tuple[str, str] | None:
        """In an empty database makes an organization, its owner, a project, and two keys: (project key, admin key).

        None if there is an organization already. Raises SettingsError for a given key that is too weak. All or nothing:
        a start that fails or is killed here leaves the database empty.
        """
        given = (checked(api_key, "api_key"), checked(admin_key, "admin_key"))
        if given[0] is not None and given[0] == given[1]:
            raise SettingsError("api_key and admin_key must differ.")
        if self.organization.id:
            return None
        with self.change(itself("first start")) as change:
            if change.connection.execute(select(organizations.c.id)).first() is not None:  # another one was as fast
                return None
            change.organization = new_id("organization")
            values = {"id": change.organization, "name": "Personal", "created_at": change.now}
            change.connection.execute(insert(organizations).values(values))
            owner = self._make_owner(change)
            project = change.create("project", change.organization, {"name": "Default project", "archived_at": None})
            change.audit("project.created", project.id, {"id": project.id, "data": {"name": "Default project"}})
            _, secret = self.create_key(change, "project", project.id, owner, "Default key", secret=given[0])
            _, admin = self.create_key(change, "admin", None, owner, "Default admin key", secret=given[1])
        return secret, admin

    def ensure_owner(self) -> None:
        """A database of an older Tertulia knows no users: somebody must own the organization."""
        if not self.roles.owners():
            with self.change(itself("first start")) as change:
                if not any(user.body.get("role") == "owner" for user in change.records.all("user")):
                    self._make_owner(change)

    def _make_owner(self, change: Change) -> str:
        body = {"email": OWNER, "name": "Owner", "role": "owner"}
        owner = change.create("user", change.organization, body, natural=OWNER)
        change.audit("user.added", owner.id, {"id": owner.id, "data": {"role": "owner"}})
        return owner.id

    # As long as the server runs

    def start(self) -> None:
        """Looks for changes of others from now on, takes out keys that expire, and writes when keys were used: in
        threads, until stop(). Each has its own, so that none waits for what another one does."""
        for run in (self._keep_looking, self._keep_time, self._keep_writing):
            thread = threading.Thread(target=run, name="directory", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Ends the threads, and writes when keys were used last. Waits for the database, if it can be used."""
        self._stopping.set()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._threads and not any(thread.is_alive() for thread in self._threads):
            self._write_use()

    @property
    def unreachable(self) -> float:
        """Seconds since the database was reached last, 0 if it is within reach. Known while the threads run."""
        seconds = time.monotonic() - self._reached
        return seconds if seconds > HANGS_SECONDS else 0.0

    @property
    def _blind(self) -> bool:
        """What is new cannot be seen: the last look failed, or this one has hung for too long."""
        asked = self._asked
        return self._failed or (asked is not None and time.monotonic() - asked > HANGS_SECONDS)

    def _keep_looking(self) -> None:
        told = False
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception as error:  # whatever it is, the next look must come: else no revocation would be seen
                if not told:
                    why = reason(error.__cause__ or error)
                    log.warning("the database cannot be used, calls are answered from memory: %s", why)
                told = True
                continue
            if told:
                log.warning("the database can be used again")
            told = False

    def _keep_writing(self) -> None:
        """There may be a hundred thousand rows, and a lock that somebody else holds: no revocation waits for that."""
        while not self._stopping.wait(USED_SECONDS):
            self._write_use()

    def _keep_time(self) -> None:
        """What becomes due by itself; a database that hangs does not keep it from that."""
        while not self._stopping.wait(LOOK_SECONDS):
            self._judge()

    def _judge(self) -> None:
        shut = self.unreachable > self._grace
        with self._changing:
            if self._memory.expire(time.time()) or shut is not self._shut:
                self._shut = shut
                self.version += 1

    def _write_use(self) -> None:
        """Writes of the keys that were used since the last time when that was. It is no change of the directory."""
        since, now = self._used_since, int(time.time())
        everyone, used = list(self._memory.keys.values()), []
        for at in range(0, len(everyone), AT_ONCE):
            some = everyone[at : at + AT_ONCE]
            used += [{"this": who.key_id, "at": who.used} for _, who in some if who.used >= since]
            time.sleep(0)  # calls come first
        last = api_keys.c.last_used_at
        newer = or_(last.is_(None), last < bindparam("at"))
        write = update(api_keys).where(api_keys.c.id == bindparam("this"), newer).values(last_used_at=bindparam("at"))
        try:
            for first in range(0, len(used), AT_ONCE):
                with writing(self._database) as connection:
                    connection.execute(write, used[first : first + AT_ONCE])
        except Unavailable:
            log.warning("when keys were used last could not be written; it is tried again")
        else:
            self._used_since = now


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """A hundred thousand objects that are here to stay: looking through them again and again triples what they cost."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def read_records(connection: Connection, since: int) -> list[tuple[Record, bool]]:
    """(record, whether it is deleted), oldest first, for what memory holds of them and was changed since a revision;
    since -1 all that there are."""
    c = records.c
    query = select(c.id, c.kind, c.parent, c.natural, c.created_at, c.body, c.deleted_at)
    query = query.where(c.revision > since, c.kind.in_(KINDS)).order_by(c.created_at, c.id)
    if since < 0:
        query = query.where(c.deleted_at.is_(None))
    return [(record_of(row), row.deleted_at is not None) for row in connection.execute(query)]


def read_keys(connection: Connection, since: int) -> list[KeyRow]:
    """The same of keys, by the driver's own cursor: there may be a hundred thousand."""
    where = f"revision > {since:d}"
    if since < 0:
        horizon = int(time.time()) - GONE_DAYS * 86400
        where = f"COALESCE(revoked_at, expires_at, {horizon:d}) >= {horizon:d}"
    columns = "hash, id, kind, project_id, owner_id, scopes, expires_at, revoked_at, last_used_at"
    cursor = connection.connection.cursor()
    try:
        cursor.execute(f"SELECT {columns} FROM api_keys WHERE {where}")
        return cursor.fetchall()  # type: ignore[return-value]
    finally:
        cursor.close()


KEY_COLUMNS = [column for column in api_keys.c if column.name not in ("revoked_at", "revision")]


def key_of(connection: Connection, id: str) -> dict[str, Any]:
    """A key that is not revoked. Raises NotFound."""
    row = connection.execute(select(*KEY_COLUMNS).where(api_keys.c.id == id, api_keys.c.revoked_at.is_(None))).first()
    if row is None:
        raise absent("API key", id)
    return _key(row)


def _key(row: Row[Any]) -> dict[str, Any]:
    key = dict(row._mapping)
    return {**key, "scopes": None if key["scopes"] is None else msgspec.json.decode(key["scopes"])}


def _json(scopes: Sequence[str] | None) -> str | None:
    return msgspec.json.encode(sorted(scopes)).decode() if scopes else None


def check_headers(who: Principal, organization: bytes | None, project: bytes | None) -> None:
    """OpenAI-Organization and OpenAI-Project, if sent, must be those of the key. Raises Unauthorized."""
    if organization and organization.decode("latin-1") != who.organization:
        raise Unauthorized(
            "OpenAI-Organization header should match organization for API key", code="mismatched_organization"
        )
    if project and who.kind == "project" and project.decode("latin-1") != who.project:
        raise Unauthorized("OpenAI-Project header should match project for API key", code="mismatched_project")


def check_kind(who: Principal, kind: str) -> None:
    """Admin keys administer, project keys ask models. Raises Forbidden."""
    if who.kind != kind:
        raise Forbidden(
            "You have insufficient permissions for this operation. "
            f"This endpoint needs {'an admin' if kind == 'admin' else 'a project'} key."
        )
