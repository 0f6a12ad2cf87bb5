"""The audit log, on both kinds of database, and in the types of the SDK."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.admin.organization import AuditLogListResponse
from sqlalchemy import update

from tertulia.accounts.audit import Actor, caller, local, printable, prune
from tertulia.accounts.directory import Directory
from tertulia.accounts.records import Record
from tertulia.config import Settings
from tertulia.core import Principal
from tertulia.errors import NotFound
from tertulia.server import open_ledger
from tertulia.store.database import open_database
from tertulia.store.schema import audit_logs

EVE = Record("user-eve", "user", "org", "eve@example.com", 0, {"email": "eve@example.com"})


@pytest.fixture
def directory(tmp_path: Path, database: str) -> Iterator[Directory]:
    engine = open_database(tmp_path, database)
    directory = Directory(engine, tmp_path)
    directory.first_start(None, None)
    yield directory
    engine.dispose()


def tell(directory: Directory, actor: Actor, type: str, resource: str, **details: Any) -> None:
    with directory.change(actor) as change:
        change.audit(type, resource, {"id": resource, **details}, directory.home()[1])


def ids(page: tuple[list[dict[str, Any]], bool]) -> list[str]:
    return [entry["id"] for entry in page[0]]


def test_who_what_and_from_where(directory: Directory) -> None:
    actor = caller(Principal("key_7", "org", "", "admin"), EVE, "10.0.0.9", "curl/8\r\nx: y")
    tell(directory, actor, "api_key.created", "key_8", data={"scopes": ["api.all.read"]})
    entry = directory.audit_log.page(1)[0][0]
    read = AuditLogListResponse.model_validate(entry, strict=True)
    assert read.api_key_created is not None and read.api_key_created.id == "key_8"
    assert read.api_key_created.data is not None and read.api_key_created.data.scopes == ["api.all.read"]
    assert read.actor is not None and read.actor.type == "api_key" and read.actor.api_key is not None
    assert read.actor.api_key.id == "key_7" and read.actor.api_key.user is not None
    assert (read.actor.api_key.user.id, read.actor.api_key.user.email) == ("user-eve", "eve@example.com")
    assert read.actor.session is not None and read.actor.session.ip_address == "10.0.0.9"
    assert entry["actor"]["session"]["user_agent"] == "curl/8  x: y"
    assert read.project is not None and read.project.name == "Default project"


def test_the_command_line_says_whose_it_is(directory: Directory) -> None:
    tell(directory, local("ada"), "project.archived", "proj_x")
    actor = directory.audit_log.page(1)[0][0]["actor"]
    assert actor["type"] == "session" and actor["session"]["user_agent"] == "from the command line of user ada"


def test_the_first_start_is_in_it(directory: Directory) -> None:
    types = sorted(entry["type"] for entry in directory.audit_log.page(10)[0])
    assert types == ["api_key.created", "api_key.created", "project.created", "user.added"]


def test_pages_forward_and_back(directory: Directory) -> None:
    for n in range(5):
        tell(directory, local("ada"), "project.updated", f"proj_{n}")
    everything = ids(directory.audit_log.page(100))
    found, after, more = [], None, True
    while more:
        page = directory.audit_log.page(2, after=after)
        more, found, after = page[1], [*found, *ids(page)], ids(page)[-1]
    assert found == everything and len(found) == 9
    assert directory.audit_log.page(2, before=everything[4])[0] == directory.audit_log.page(4)[0][2:]
    assert directory.audit_log.page(2, before=everything[4])[1] is True
    assert ids(directory.audit_log.page(10, before=everything[1])) == everything[:1]
    assert ids(directory.audit_log.page(10, after=everything[2], before=everything[5])) == everything[3:5]
    for name in ("after", "before"):
        with pytest.raises(NotFound) as error:
            directory.audit_log.page(2, **{name: "audit_log-none"})
        assert error.value.param == name


def test_filters(directory: Directory) -> None:
    eve = caller(Principal("key_7", "org", "", "admin"), EVE, "::1", "")
    tell(directory, eve, "role.created", "role_1")
    tell(directory, local('x","id":"user-eve"'), "role.deleted", "role_2")  # who looks like eve, and is not
    page, project = directory.audit_log.page, directory.home()[1]
    newest = page(2)[0]
    assert page(9, event_types=["role.created"])[0] == newest[1:]
    assert page(9, event_types=["role.created", "role.deleted"])[0] == newest
    assert page(9, resource_ids=["role_2"])[0] == newest[:1] and page(9, actor_ids=["key_7"])[0] == newest[1:]
    assert page(9, actor_ids=["user-eve"])[0] == newest[1:] == page(9, actor_emails=["eve@example.com"])[0]
    assert page(9, actor_ids=["user-e%"])[0] == page(9, actor_ids=["user_eve"])[0] == []
    assert {entry["project"]["id"] for entry in page(9, project_ids=[project])[0]} == {project}
    assert page(9, project_ids=["proj_other"]) == ([], False)
    with directory._database.begin() as connection:
        connection.execute(update(audit_logs).where(audit_logs.c.resource_id == "role_1").values(at=1000))
    for bounds, there in (({"lt": 1001}, True), ({"lte": 1000, "gte": 1000}, True), ({"gt": 1000, "lt": 2000}, False)):
        assert [entry["effective_at"] for entry in page(9, effective_at=bounds)[0]] == [1000] * there


def test_what_callers_say_of_themselves_is_one_short_line() -> None:
    assert printable("a\x1b[31m\nb\u2028c") == "a [31m b c" and len(printable("x" * 9999)) == 256


def test_entries_go_after_their_days(directory: Directory) -> None:
    for number in range(5):
        tell(directory, local("ada"), "project.updated", f"proj_{number}")
    kept = ids(directory.audit_log.page(100))
    database = directory._database
    prune(database, 30, threading.Event())  # nothing is as old as that
    assert ids(directory.audit_log.page(100)) == kept
    with database.begin() as connection:
        old = update(audit_logs).where(audit_logs.c.id.in_(kept[2:])).values(at=int(time.time()) - 31 * 86400)
        connection.execute(old)
    prune(database, 0, threading.Event())  # for good
    assert len(ids(directory.audit_log.page(100))) == len(kept)
    prune(database, 30, threading.Event())
    assert ids(directory.audit_log.page(100)) == kept[:2]


def test_the_setting_says_for_how_long(directory: Directory, tmp_path: Path) -> None:
    with directory._database.begin() as connection:
        connection.execute(update(audit_logs).values(at=int(time.time()) - 31 * 86400))
    for days, left in ((0, True), (32, True), (30, False)):
        ledger = open_ledger(Settings(audit_days=days), tmp_path, directory._database)
        assert ledger.fold is not None
        ledger.fold._try(threading.Event())
        assert bool(ids(directory.audit_log.page(1))) is left
        ledger.close()
