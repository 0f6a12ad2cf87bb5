"""The Admin API as the official SDK uses it, in strict mode: every method, sync and async, on both databases, and every
list to its last page. A server in a process of its own, over a real socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import Served, serve
from tertulia.api.admin.table import ELSEWHERE, ROWS

MODELS = ("--chat-model", "mock", "--embedding-model", "mock-embedding")
CHAT = [{"role": "user", "content": "Say it."}]
MONEY = {"currency": "USD", "interval": "month"}
CHANNEL = {"type": "email", "recipients": ["ada@example.org"], "subject_prefix": "Spent"}


class Admin:
    """A part of the client, sync or async; either way a call returns its result. called: names of methods."""

    def __init__(self, part: Any, run: Callable[[Any], Any], called: set[str], name: str = "") -> None:
        self._part, self._run, self._called, self._name = part, run, called, name

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        path = f"{self._name}.{name}".lstrip(".")
        if not inspect.ismethod(found):
            return Admin(found, self._run, self._called, path)

        def call(*arguments: Any, **options: Any) -> Any:
            self._called.add(path)
            return self._run(found(*arguments, **options))

        return call

    def every(self, list_some: Callable[..., Any], *arguments: Any, limit: int = 2, **options: Any) -> list[Any]:
        """All of a list, a page of limit at a time; each page but the last is full."""
        page = list_some(*arguments, limit=limit, **options)
        found = list(page.data)
        while page.has_next_page():
            assert len(page.data) == limit
            page = self._run(page.get_next_page())
            assert page.data, "a page that was promised is empty"
            found += page.data
        ids = [getattr(one, "id", None) or one.group_id for one in found]
        assert len(set(ids)) == len(ids), "something is on two pages"
        return found


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    data = tmp_path_factory.mktemp(f"admin-{request.param}")
    if request.param == "sqlite":
        server = serve(data, "", *MODELS)
        yield server
        server.stop()
        return
    with request.getfixturevalue("cluster").database() as url:
        server = serve(data, "", *MODELS, environment={"TERTULIA_DATABASE": url})
        yield server
        server.stop()


@pytest.fixture(params=["sync", "async"])
def admin(served: Served, request: pytest.FixtureRequest) -> Iterator[Admin]:
    if request.param == "sync":
        client = served.client(admin_api_key=served.admin_key)
        yield Admin(client.admin.organization, lambda result: result, set())
        client.close()
        return
    with asyncio.Runner() as runner:

        def run(result: Any) -> Any:
            async def wait() -> Any:
                return await result

            return runner.run(wait())

        later = served.async_client(admin_api_key=served.admin_key)
        yield Admin(later.admin.organization, run, set())
        runner.run(later.close())


@pytest.fixture
def organization(served: Served) -> Iterator[Any]:
    """The plain sync client's, for what does not depend on the client."""
    client = served.client(admin_api_key=served.admin_key)
    yield client.admin.organization
    client.close()


def names(what: str, count: int = 5) -> list[str]:
    """Names nobody has yet."""
    return [f"{what} {time.time_ns():x} {number}" for number in range(count)]


def user(organization: Any, role: str = "reader", **options: Any) -> str:
    """The id of a new user."""
    sent = organization.invites.create(email=f"u{time.time_ns():x}@example.org", role=role, projects=[], **options)
    return accept(organization, sent.id)


def accept(organization: Any, invite: str) -> str:
    part = organization._part if isinstance(organization, Admin) else organization
    answer = part._client.post(f"/organization/invites/{invite}/accept", body={"name": "Ada"}, cast_to=object,
                               options={"security": {"admin_api_key_auth": True}})  # fmt: skip
    if isinstance(organization, Admin):
        answer = organization._run(answer) if inspect.isawaitable(answer) else answer
    return str(answer["id"])


# What every method does. Each walk is given the organization of a client, and leaves behind what it has made.
def walk_projects(admin: Admin) -> None:
    made = [admin.projects.create(name=name) for name in names("project")]
    first = made[0]
    assert first.status == "active" and first.archived_at is None
    assert admin.projects.retrieve(first.id).name == first.name
    assert admin.projects.update(first.id, name="Renamed").name == "Renamed"
    assert admin.projects.archive(first.id).status == "archived"
    assert admin.projects.retrieve(first.id).archived_at is not None
    listed = [project.id for project in admin.every(admin.projects.list)]
    assert {project.id for project in made[1:]} <= set(listed) and first.id not in listed
    assert first.id in [project.id for project in admin.every(admin.projects.list, include_archived=True)]


def walk_service_accounts(admin: Admin) -> None:
    project = admin.projects.create(name="with accounts").id
    accounts = admin.projects.service_accounts
    made = [accounts.create(project, name=name) for name in names("account")]
    first = made[0]
    assert first.role == "member" and first.api_key.value.startswith("sk-svcacct-") and first.api_key.expires_at is None
    alone = accounts.create(project, name="alone", create_service_account_only=True)
    assert alone.role == "none" and alone.api_key is None
    assert accounts.retrieve(first.id, project_id=project).name == first.name
    changed = accounts.update(first.id, project_id=project, name="Other", role="owner")
    assert (changed.name, changed.role) == ("Other", "owner")
    key = accounts.api_keys.create(first.id, project_id=project, name="second", scopes=["api.model.request"],
                                   expires_in_seconds=60)  # fmt: skip
    assert key.value.startswith("sk-") and 0 < key.expires_at - time.time() <= 60
    listed = admin.every(accounts.list, project)
    assert {account.id for account in listed} == {account.id for account in [*made, alone]}
    assert accounts.delete(first.id, project_id=project).deleted
    assert first.id not in {account.id for account in admin.every(accounts.list, project)}


def walk_project_keys(admin: Admin) -> None:
    project = admin.projects.create(name="with keys").id
    account = admin.projects.service_accounts.create(project, name="holder")
    for name in names("key", 4):
        admin.projects.service_accounts.api_keys.create(account.id, project_id=project, name=name)
    api_keys = admin.projects.api_keys
    listed = admin.every(api_keys.list, project)
    assert len(listed) == 5 and all(key.owner.service_account.id == account.id for key in listed)
    assert len(admin.every(api_keys.list, project, owner_project_access="active")) == 5
    assert admin.every(api_keys.list, project, owner_project_access="inactive") == []
    key = api_keys.retrieve(listed[0].id, project_id=project)
    assert key.owner.type == "service_account" and key.owner_project_access == "active" and "*" in key.redacted_value
    changed = api_keys.update(key.id, project_id=project, scopes=["api.all.read"], expires_in_seconds=3600)
    assert 3500 < changed.expires_at - time.time() <= 3600 and changed.scopes == ["api.all.read"]
    assert api_keys.update(key.id, project_id=project, scopes=[]).scopes == []
    assert api_keys.delete(key.id, project_id=project).object == "organization.project.api_key.deleted"
    assert len(admin.every(api_keys.list, project)) == 4


def walk_admin_keys(admin: Admin) -> None:
    made = [admin.admin_api_keys.create(name=name) for name in names("admin key")]
    first = made[0]
    assert first.value.startswith("sk-admin-") and first.owner.role == "owner"
    assert admin.admin_api_keys.create(name="short", expires_in_seconds=60).expires_at - time.time() <= 60
    assert admin.admin_api_keys.retrieve(first.id).name == first.name
    listed = admin.every(admin.admin_api_keys.list)
    assert {key.id for key in made} < {key.id for key in listed}
    backward = admin.every(admin.admin_api_keys.list, order="desc")
    assert [key.id for key in backward] == [key.id for key in reversed(listed)]
    assert admin.admin_api_keys.delete(first.id).deleted


def walk_people(admin: Admin) -> None:
    project = admin.projects.create(name="with people").id
    sent = [admin.invites.create(email=f"i{time.time_ns():x}@example.org", role="reader") for _ in range(5)]
    assert sent[0].status == "pending" and [one.role for one in sent[0].projects] == ["member"]
    assert admin.invites.retrieve(sent[0].id).email == sent[0].email
    assert {invite.id for invite in sent} <= {invite.id for invite in admin.every(admin.invites.list)}
    assert admin.invites.delete(sent[0].id).object == "organization.invite.deleted"
    people = [accept(admin, invite.id) for invite in sent[1:]]
    ada = people[0]
    assert admin.users.retrieve(ada).role == "reader"
    assert admin.invites.retrieve(sent[1].id).status == "accepted"
    assert set(people) < {person.id for person in admin.every(admin.users.list)}
    renamed = admin.users.update(ada, extra_body={"name": "Ada L.", "email": sent[1].email.upper()})
    assert (renamed.name, renamed.email) == ("Ada L.", sent[1].email)
    found = admin.users.list(emails=[sent[1].email, sent[2].email, "nobody@example.org"])
    assert {person.id for person in found.data} == set(people[:2])
    assert admin.users.update(ada, role="owner", technical_level="high").role == "owner"
    members = admin.projects.users
    assert members.create(project, user_id=ada, role="member").role == "member"
    for invite in sent[2:]:
        members.create(project, email=invite.email, role="member")
    assert members.retrieve(ada, project_id=project).id == ada
    assert members.update(ada, project_id=project, role="owner").role == "owner"
    assert {member.id for member in admin.every(members.list, project)} == set(people)
    assert members.delete(ada, project_id=project).deleted
    assert admin.users.delete(people[1]).object == "organization.user.deleted"
    assert {member.id for member in admin.every(members.list, project)} == set(people[2:])


def walk_limits(admin: Admin) -> None:
    project = admin.projects.create(name="with limits").id
    limits = admin.projects.rate_limits
    listed = {limit.model: limit for limit in admin.every(limits.list_rate_limits, project, limit=1)}
    assert set(listed) == {"mock", "mock-embedding"} and listed["mock"].max_requests_per_1_minute > 0
    own = {"max_concurrent_requests": 4, "observe_only": True}
    changed = limits.update_rate_limit(listed["mock"].id, project_id=project, max_requests_per_1_minute=7,
                                       max_requests_per_1_day=90, extra_body=own)  # fmt: skip
    assert (changed.max_requests_per_1_minute, changed.max_requests_per_1_day) == (7, 90)
    assert changed.max_concurrent_requests == 4 and changed.observe_only is True
    some = {"observe_only": ["max_tokens_per_1_minute", "max_concurrent_requests"]}
    assert limits.update_rate_limit(listed["mock"].id, project_id=project, extra_body=some).observe_only == [
        "max_tokens_per_1_minute", "max_concurrent_requests",
    ]  # fmt: skip
    with pytest.raises(openai.BadRequestError) as wrong:
        limits.update_rate_limit(listed["mock"].id, project_id=project, extra_body={"observe_only": ["tokens"]})
    assert wrong.value.param == "observe_only[0]" and "'max_tokens_per_1_minute'" in str(wrong.value)
    with pytest.raises(openai.BadRequestError) as wrong:
        limits.update_rate_limit(listed["mock"].id, project_id=project, extra_body={"observe_only": "tokens"})
    assert wrong.value.param == "observe_only"
    again = limits.update_rate_limit(listed["mock"].id, project_id=project, max_tokens_per_1_minute=800)
    assert again.observe_only == some["observe_only"]
    assert (again.max_requests_per_1_minute, again.max_tokens_per_1_minute) == (7, 800)
    found = {limit.model: limit for limit in limits.list_rate_limits(project).data}
    assert found["mock"] == again and found["mock-embedding"] == listed["mock-embedding"]


def walk_spending(admin: Admin) -> None:
    project = admin.projects.create(name="with money").id
    walk_spend_limit(admin.spend_limit, ())
    walk_spend_limit(admin.projects.spend_limit, (project,))
    walk_alerts(admin, admin.spend_alerts, {}, ())
    walk_alerts(admin, admin.projects.spend_alerts, {"project_id": project}, (project,))


def walk_spend_limit(limit: Admin, of: tuple[str, ...]) -> None:
    with pytest.raises(openai.NotFoundError):
        limit.retrieve(*of)
    made = limit.update(*of, **MONEY, threshold_amount=12_345_678, extra_body={"observe_only": True})
    assert made.threshold_amount == 12_345_678 and made.enforcement.status == "inactive" and made.observe_only
    assert limit.update(*of, **MONEY, threshold_amount=23_456_789).observe_only is False
    assert limit.retrieve(*of).threshold_amount == 23_456_789
    assert limit.delete(*of).deleted


def walk_alerts(admin: Admin, alerts: Admin, of: dict[str, str], where: tuple[str, ...]) -> None:
    made = [
        alerts.create(*where, **MONEY, threshold_amount=amount, notification_channel=CHANNEL)
        for amount in range(100, 105)
    ]
    ids = [alert.id for alert in made]
    assert made[0].notification_channel.subject_prefix == "Spent"
    assert alerts.retrieve(ids[0], **of).threshold_amount == 100
    changed = alerts.update(ids[0], **of, **MONEY, threshold_amount=99, notification_channel=CHANNEL)
    assert changed.threshold_amount == 99
    assert [alert.id for alert in admin.every(alerts.list, *where)] == ids
    assert [alert.id for alert in admin.every(alerts.list, *where, order="desc")] == ids[::-1]
    before = alerts.list(*where, before=ids[3], limit=2)
    assert [alert.id for alert in before.data] == ids[1:3]
    for id in ids:
        assert alerts.delete(id, **of).deleted


def walk_model_permissions(admin: Admin) -> None:
    project = admin.projects.create(name="with models").id
    permissions = admin.projects.model_permissions
    with pytest.raises(openai.NotFoundError):
        permissions.retrieve(project)
    made = permissions.update(project, mode="allow_list", model_ids=["mock"])
    assert (made.mode, made.api_model_ids) == ("allow_list", ["mock"])
    assert permissions.update(project, mode="deny_list", model_ids=[]).mode == "deny_list"
    assert permissions.retrieve(project).api_model_ids == []
    assert permissions.delete(project).deleted


def walk_roles(admin: Admin) -> None:
    project = admin.projects.create(name="with roles").id
    wanted = ["api.organization.projects.users.read"]
    for roles, of, where in ((admin.roles, {}, ()), (admin.projects.roles, {"project_id": project}, (project,))):
        made = [roles.create(*where, role_name=name, permissions=wanted, description="x") for name in names("role")]
        first = made[0]
        assert first.permissions == wanted and not first.predefined_role
        assert roles.retrieve(first.id, **of).name == first.name
        changed = roles.update(first.id, **of, role_name=f"{first.name} changed", permissions=[])
        assert (changed.name, changed.permissions, changed.description) == (f"{first.name} changed", [], "x")
        listed = admin.every(roles.list, *where)
        assert {role.id for role in made} < {role.id for role in listed}
        assert {"owner", "member"} <= {role.name for role in listed if role.predefined_role}
        assert roles.delete(first.id, **of).deleted
        with pytest.raises(openai.NotFoundError):
            roles.retrieve(first.id, **of)


def walk_groups(admin: Admin) -> None:
    project = admin.projects.create(name="with groups").id
    made = [admin.groups.create(name=name) for name in names("group")]
    first = made[0].id
    assert admin.groups.retrieve(first).name == made[0].name
    assert admin.groups.update(first, name=f"{made[0].name} b").name.endswith(" b")
    assert {group.id for group in made} <= {group.id for group in admin.every(admin.groups.list)}
    people = [user(admin) for _ in range(5)]
    for person in people:
        assert admin.groups.users.create(first, user_id=person).user_id == person
    assert admin.groups.users.retrieve(people[0], group_id=first).user_type == "user"
    listed = [person.id for person in admin.every(admin.groups.users.list, first, order="asc")]
    assert listed == sorted(people)
    assert admin.groups.users.delete(people[0], group_id=first).deleted
    inside = admin.projects.groups
    for group in made:
        assert inside.create(project, group_id=group.id, role="role-project-member").group_id == group.id
    assert inside.retrieve(first, project_id=project).group_name.endswith(" b")
    assert {group.group_id for group in admin.every(inside.list, project)} == {group.id for group in made}
    assert inside.delete(made[4].id, project_id=project).deleted
    assert admin.groups.delete(first).object == "group.deleted"
    assert {group.group_id for group in inside.list(project).data} == {group.id for group in made[1:4]}


def walk_assignments(admin: Admin) -> None:
    project, person, group = admin.projects.create(name="with assignments").id, user(admin), None
    group = admin.groups.create(name=names("group")[0]).id
    admin.projects.users.create(project, user_id=person, role="member")
    admin.projects.groups.create(project, group_id=group, role="member")
    wanted = ["api.organization.projects.users.read"]
    own = [admin.roles.create(role_name=name, permissions=wanted).id for name in names("role")]
    there = [admin.projects.roles.create(project, role_name=name, permissions=wanted).id for name in names("role")]
    for given, of, holder, ids, more in (
        (admin.users.roles, {"user_id": person}, person, own, 1),
        (admin.groups.roles, {"group_id": group}, group, own, 0),
        (admin.projects.users.roles, {"user_id": person, "project_id": project}, person, there, 1),
        (admin.projects.groups.roles, {"group_id": group, "project_id": project}, group, there, 1),
    ):
        rest = {name: value for name, value in of.items() if name == "project_id"}
        for id in ids:
            made = given.create(holder, role_id=id, **rest)
            assert made.role.id == id and made.object in ("user.role", "group.role")
        assert given.retrieve(ids[0], **of).permissions == wanted
        listed = admin.every(given.list, holder, **rest)
        assert {role.id for role in listed if not role.predefined_role} == set(ids)
        assert len(listed) == len(ids) + more  # and the predefined one
        assert given.delete(ids[0], **of).deleted
        with pytest.raises(openai.NotFoundError):
            given.retrieve(ids[0], **of)


def walk_audit_logs(admin: Admin) -> None:
    began = int(time.time()) - 1
    project = admin.projects.create(name="watched").id
    for name in names("watched", 5):
        admin.projects.update(project, name=name)
    logs = admin.every(admin.audit_logs.list, project_ids=[project])
    assert [log.type for log in logs] == ["project.updated"] * 5 + ["project.created"]
    newest = logs[0]
    assert newest.project_updated.changes_requested.title == name and newest.project_updated.id == project
    assert newest.actor.type == "api_key" and newest.actor.session.ip_address == "127.0.0.1"
    key, person = newest.actor.api_key.id, newest.actor.api_key.user
    for filters, count in (
        ({"event_types": ["project.created"]}, 1), ({"event_types": ["project.created", "project.updated"]}, 6),
        ({"actor_ids": [key]}, 6), ({"actor_ids": [person.id]}, 6), ({"actor_ids": ["user-nobody"]}, 0),
        ({"actor_emails": [person.email]}, 6), ({"actor_emails": ["nobody@example.org"]}, 0),
        ({"resource_ids": [project]}, 6), ({"resource_ids": ["proj_other"]}, 0),
        ({"effective_at": {"gte": began}}, 6), ({"effective_at": {"lt": began}}, 0), ({"tenant_only": True}, 0),
        ({"effective_at": {"gt": began, "lte": int(time.time()) + 1}}, 6),
    ):  # fmt: skip
        assert len(admin.every(admin.audit_logs.list, project_ids=[project], **filters)) == count, filters
    types = {log.type for log in admin.every(admin.audit_logs.list, limit=100)}  # every shape there is, in strict mode
    assert {"api_key.created", "group.updated", "invite.accepted", "rate_limit.updated", "role.updated"} <= types
    before = admin.audit_logs.list(project_ids=[project], before=logs[3].id, limit=2)
    assert [log.id for log in before.data] == [log.id for log in logs[1:3]]


WALKS = (
    walk_projects, walk_service_accounts, walk_project_keys, walk_admin_keys, walk_people, walk_limits, walk_spending,
    walk_model_permissions, walk_roles, walk_groups, walk_assignments, walk_audit_logs,
)  # fmt: skip


def methods(part: Any, name: str = "") -> Iterator[str]:
    """Every method of a part of the SDK, by introspection."""
    for each in dir(part):
        if each.startswith("_") or each.startswith("with_"):
            continue
        found = getattr(part, each)
        path = f"{name}.{each}".lstrip(".")
        if inspect.ismethod(found):
            yield path
        else:
            yield from methods(found, path)


def test_every_method_works(admin: Admin) -> None:
    for walk in WALKS:
        walk(admin)
    every = {name for name in methods(admin._part) if not name.startswith((*MISSING, "usage."))}
    assert every == admin._called


def test_every_method_that_is_not_here_says_so(admin: Admin) -> None:
    absent = [name for name in methods(admin._part) if name.startswith(MISSING)]
    assert len(absent) > 30
    for name in absent:
        with pytest.raises(openai.NotFoundError) as caught:
            call_somehow(admin, name)
        assert caught.value.code == "not_available" and "not available on this server" in caught.value.message, name


POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
MISSING = tuple(f"{sdk}." for sdk, _, _ in ELSEWHERE)


def call_somehow(admin: Admin, name: str) -> None:
    """With something for every parameter that must be given."""
    found: Any = admin
    for step in name.split("."):
        found, part = getattr(found, step), found
    parameters = inspect.signature(getattr(part._part, step)).parameters.values()
    ours = [each for each in parameters if not each.name.startswith("extra_") and each.name != "timeout"]
    required = [each for each in ours if each.default is inspect.Parameter.empty]
    if name == "external_keys.create":  # its overloads require one set or another
        required = ours
    positional = ["x" for each in required if each.kind is POSITIONAL]
    found(*positional, **{each.name: "x" for each in required if each.kind is not POSITIONAL})


# Refusals, each in OpenAI's shape
def send(
    served: Served, method: str, path: str, key: str | None, body: Any = None, raw: bytes | None = None
) -> tuple[int, Any]:
    """Status and JSON of what is not the SDK's to send; every error has OpenAI's shape."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(served.base_url + path, data, method=method)
    if key is not None:
        asked.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        found = json.load(error)
        assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
        assert found["error"]["message"] and error.headers["x-request-id"]
        return error.code, found["error"]


def filled(path: str) -> str:
    return re.sub(r"\{\w+(?::path)?\}", "x", path)


EVERY = [(row.method, filled(row.path)) for row in ROWS]
NOT_HERE = [("GET", filled(path)) for _, path, _ in ELSEWHERE]


def test_an_api_key_never_administers(served: Served) -> None:
    for method, path in [*EVERY, *NOT_HERE]:
        status, error = send(served, method, path, served.api_key, {} if method == "POST" else None)
        assert (status, error["code"]) == (403, "insufficient_permissions"), path


@pytest.mark.parametrize("key", [None, "", "sk-admin-unknown-unknown-unknown"])
def test_who_has_no_key_is_told_nothing(served: Served, key: str | None) -> None:
    for method, path in [*EVERY[:3], *NOT_HERE[:1], ("GET", "/organization/nothing")]:
        assert send(served, method, path, key)[0] == 401


def test_an_admin_key_asks_no_model(served: Served) -> None:
    with pytest.raises(openai.PermissionDeniedError):
        served.client(api_key=served.admin_key).chat.completions.create(model="mock", messages=CHAT)


def test_a_reader_reads_and_changes_nothing(served: Served, organization: Any) -> None:
    key = organization.admin_api_keys.create(name="reader", extra_body={"owner_id": user(organization)})
    assert key.owner.role == "reader"
    for method, path in EVERY:
        status, error = send(served, method, path, key.value, {} if method == "POST" else None)
        if method == "GET":
            assert status in (200, 404), (path, error)
        else:
            assert (status, error["code"]) == (403, "insufficient_permissions"), path
    organization.users.update(key.owner.id, role="owner")
    assert send(served, "POST", "/organization/projects", key.value, {"name": "by an owner now"})[0] == 200
    organization.users.delete(key.owner.id)
    assert send(served, "GET", "/organization/projects", key.value)[0] == 401


def test_a_role_gives_what_it_says_and_no_more(served: Served, organization: Any) -> None:
    person = user(organization)
    organization.users.update(person, role="member")
    key = organization.admin_api_keys.create(name="groups", extra_body={"owner_id": person}).value
    assert send(served, "GET", "/organization/groups", key)[0] == 403
    wanted = ["api.groups.read", "api.groups.write", "api.roles.write"]
    role = organization.roles.create(role_name=names("groups")[0], permissions=wanted)
    organization.users.roles.create(person, role_id=role.id)
    status, group = send(served, "POST", "/organization/groups", key, {"name": names("theirs")[0]})
    assert status == 200
    assert send(served, "GET", "/organization/projects", key)[0] == 403
    # nobody gives, to himself or to others, what he has not
    more = {"role_name": names("more")[0], "permissions": ["api.organization.users.write"]}
    assert send(served, "POST", "/organization/roles", key, more)[0] == 403
    owner = {"role_id": "role-organization-owner"}
    assert send(served, "POST", f"/organization/users/{person}/roles", key, owner)[0] == 403
    strong = organization.roles.create(role_name=names("strong")[0], permissions=["api.organization.users.write"])
    assert send(served, "POST", f"/organization/users/{person}/roles", key, {"role_id": strong.id})[0] == 403
    assert send(served, "POST", f"/organization/roles/{strong.id}", key, {"permissions": []})[0] == 403
    powerful = organization.groups.create(name=names("powerful")[0])
    organization.groups.roles.create(powerful.id, role_id=strong.id)
    assert send(served, "POST", f"/organization/groups/{powerful.id}/users", key, {"user_id": person})[0] == 403
    organization.users.roles.delete(role.id, user_id=person)
    assert send(served, "GET", f"/organization/groups/{group['id']}", key)[0] == 403
    # through a group
    organization.groups.roles.create(group["id"], role_id=role.id)
    organization.groups.users.create(group["id"], user_id=person)
    assert send(served, "GET", f"/organization/groups/{group['id']}", key)[0] == 200
    inherited = organization.users.roles.retrieve(role.id, user_id=person)
    assert inherited.assignment_sources[0].principal_id == group["id"]
    organization.groups.delete(group["id"])
    assert send(served, "GET", "/organization/groups", key)[0] == 403


def test_an_owner_of_a_project_administers_that_project_alone(served: Served, organization: Any) -> None:
    mine, other = (organization.projects.create(name=name).id for name in ("mine", "other"))
    person = user(organization)
    organization.users.update(person, role="member")
    organization.projects.users.create(mine, user_id=person, role="owner")
    key = organization.admin_api_keys.create(name="mine", extra_body={"owner_id": person}).value
    account = send(served, "POST", f"/organization/projects/{mine}/service_accounts", key, {"name": "a"})
    assert account[0] == 200
    assert send(served, "POST", f"/organization/projects/{other}/service_accounts", key, {"name": "a"})[0] == 403
    assert send(served, "POST", "/organization/projects", key, {"name": "a"})[0] == 403
    organization.projects.users.roles.delete("role-project-owner", project_id=mine, user_id=person)
    assert organization.projects.users.retrieve(person, project_id=mine).role == "member"
    assert send(served, "GET", f"/organization/projects/{mine}/users", key)[0] == 403


def chat(served: Served, key: str) -> str:
    return str(served.client(api_key=key).chat.completions.create(model="mock", messages=CHAT).model)


def embed(served: Served, key: str) -> list[Any]:
    client = served.client(api_key=key)
    return list(client.embeddings.create(model="mock-embedding", input="a", encoding_format="float").data)


def test_keys_work_and_stop_working(served: Served, organization: Any) -> None:
    project = organization.projects.create(name="keys").id
    account = organization.projects.service_accounts.create(project, name="a")
    key = account.api_key.value
    assert chat(served, key) == "mock"
    shown = organization.projects.api_keys.retrieve(account.api_key.id, project_id=project)
    assert shown.last_used_at is not None and key not in str(shown)
    restrict(organization, project, account.api_key.id, ["api.model.embeddings.request"])
    with pytest.raises(openai.PermissionDeniedError) as refused:
        chat(served, key)
    assert refused.value.code == "insufficient_permissions"
    assert embed(served, key)
    restrict(organization, project, account.api_key.id, ["api.all.read"])
    with pytest.raises(openai.PermissionDeniedError):
        embed(served, key)
    assert served.client(api_key=key).models.list().data
    restrict(organization, project, account.api_key.id, [])
    assert chat(served, key) == "mock"
    organization.projects.api_keys.delete(account.api_key.id, project_id=project)
    with pytest.raises(openai.AuthenticationError) as revoked:
        chat(served, key)
    assert revoked.value.code == "invalid_api_key"
    accounts = organization.projects.service_accounts
    short = accounts.api_keys.create(account.id, project_id=project, expires_in_seconds=1)
    lasting = accounts.api_keys.create(account.id, project_id=project)
    time.sleep(2.1)
    with pytest.raises(openai.AuthenticationError):
        chat(served, short.value)
    with pytest.raises(openai.BadRequestError):
        organization.projects.api_keys.update(short.id, project_id=project, expires_in_seconds=9)
    assert chat(served, lasting.value) == "mock"
    accounts.delete(account.id, project_id=project)
    with pytest.raises(openai.AuthenticationError):
        chat(served, lasting.value)


def restrict(organization: Any, project: str, key: str, scopes: list[str]) -> None:
    organization.projects.api_keys.update(key, project_id=project, scopes=scopes)


def test_a_key_of_a_user_goes_with_the_access_of_its_owner(served: Served, organization: Any) -> None:
    project, person = organization.projects.create(name="theirs").id, user(organization)
    path = f"/organization/projects/{project}/api_keys"
    wanted = {"name": "of a user", "user_id": person}
    assert send(served, "POST", path, served.admin_key, wanted)[1]["param"] == "user_id"
    organization.projects.users.create(project, user_id=person, role="member")
    key = send(served, "POST", path, served.admin_key, wanted)[1]
    assert chat(served, key["value"]) == "mock"
    shown = organization.projects.api_keys.retrieve(key["id"], project_id=project)
    assert (shown.owner.user.id, shown.owner.user.role, shown.owner_project_access) == (person, "member", "active")
    organization.projects.users.roles.delete("role-project-member", project_id=project, user_id=person)
    assert organization.projects.users.list(project).data == []
    [shown] = organization.projects.api_keys.list(project, owner_project_access="inactive").data
    assert shown.owner_project_access == "inactive"
    with pytest.raises(openai.AuthenticationError):
        chat(served, key["value"])
    group = organization.groups.create(name=names("into")[0]).id
    organization.groups.users.create(group, user_id=person)
    organization.projects.groups.create(project, group_id=group, role="member")
    assert chat(served, key["value"]) == "mock"
    organization.projects.users.create(project, user_id=person, role="viewer")
    assert chat(served, key["value"]) == "mock"  # a member by its group
    organization.projects.groups.delete(group, project_id=project)
    with pytest.raises(openai.PermissionDeniedError) as refused:
        chat(served, key["value"])
    assert refused.value.code == "insufficient_permissions"
    assert served.client(api_key=key["value"]).models.list().data
    organization.projects.users.update(person, project_id=project, role="member")
    rotated = send(served, "POST", f"{path}/{key['id']}/rotate", served.admin_key, {"grace_seconds": 2})[1]
    assert chat(served, key["value"]) == chat(served, rotated["value"]) == "mock"
    time.sleep(2.6)
    with pytest.raises(openai.AuthenticationError):
        chat(served, key["value"])
    organization.users.delete(person)
    with pytest.raises(openai.AuthenticationError):
        chat(served, rotated["value"])


def test_an_archived_project_is_looked_at_and_not_touched(served: Served, organization: Any) -> None:
    project = organization.projects.create(name="old").id
    account = organization.projects.service_accounts.create(project, name="a")
    organization.projects.archive(project)
    with pytest.raises(openai.AuthenticationError):
        chat(served, account.api_key.value)
    for method, path in ((row.method, row.path) for row in ROWS if "{project_id}" in row.path):
        where = filled(path.replace("{project_id}", project))
        status, answer = send(served, method, where, served.admin_key, BODIES.get(path) if method == "POST" else None)
        assert status in (200, 404) if method == "GET" else status == 400, (where, answer)
    assert organization.projects.service_accounts.list(project).data[0].id == account.id


BODIES: dict[str, Any] = {}
ALERT = {**MONEY, "threshold_amount": 1, "notification_channel": CHANNEL}
for row in ROWS:
    if row.method == "POST":  # the least that each takes
        body = {"name": "a", "role_name": "a", "role": "member", "permissions": [], "role_id": "x", "user_id": "x",
                "group_id": "x", "email": "a@b.c", "mode": "deny_list", "model_ids": [], **ALERT}  # fmt: skip
        taken = row.kind.takes.get(row.verb, {})
        BODIES[row.path] = {name: value for name, value in body.items() if name in taken}


def test_unknown_ids_and_those_of_others_are_not_found(served: Served, organization: Any) -> None:
    for row in ROWS:
        if "{" in row.path:
            body = BODIES.get(row.path) if row.method == "POST" else None
            status, error = send(served, row.method, filled(row.path), served.admin_key, body)
            assert status == 404, (row.path, error)
    one, other = (organization.projects.create(name=name).id for name in ("one", "other"))
    account = organization.projects.service_accounts.create(one, name="a")
    alert = organization.projects.spend_alerts.create(one, **ALERT).id
    role = organization.projects.roles.create(one, role_name="r", permissions=[]).id
    for path in (
        f"/organization/projects/{other}/service_accounts/{account.id}", f"/projects/{other}/roles/{role}",
        f"/organization/projects/{other}/api_keys/{account.api_key.id}", f"/organization/spend_alerts/{alert}",
        f"/organization/projects/{other}/spend_alerts/{alert}", f"/organization/admin_api_keys/{account.api_key.id}",
        f"/organization/roles/{role}", f"/organization/users/{account.id}",
    ):  # fmt: skip
        for method in ("GET", "DELETE"):
            assert send(served, method, path, served.admin_key)[0] == 404, path
    assert organization.projects.service_accounts.retrieve(account.id, project_id=one).id == account.id


@pytest.mark.parametrize("id", ["a" * 10_000, "%00", "%0d%0aset-cookie:%20a=b", "..%2f..", "%27%20OR%201=1--", "a%20b"])
def test_odd_ids_are_not_found(served: Served, id: str) -> None:
    for path in (f"/organization/projects/{id}", f"/organization/users/{id}", f"/organization/roles/{id}"):
        began = time.monotonic()
        assert send(served, "GET", path, served.admin_key)[0] in (400, 404, 431)
        assert time.monotonic() - began < 1


WRONG: tuple[tuple[str, Any, str | None, str | None], ...] = (
    ("/projects", {}, "name", "missing_required_parameter"),
    ("/projects", {"name": None}, "name", "invalid_type"),
    ("/projects", {"name": 5}, "name", "invalid_type"),
    ("/projects", {"name": ""}, "name", "empty_string"),
    ("/projects", {"name": "a" * 256}, "name", "string_above_max_length"),
    ("/projects", {"name": "a\nb"}, "name", "invalid_value"),
    ("/projects", {"name": "a", "nonsense": 1}, "nonsense", "unknown_parameter"),
    ("/projects", {"name": "a", "residency": "GLOBAL"}, "residency", "unsupported_parameter"),
    ("/projects", [], None, "invalid_type"),
    ("/spend_limit", {**MONEY, "threshold_amount": -1}, "threshold_amount", "integer_below_min_value"),
    ("/spend_limit", {**MONEY, "threshold_amount": 10**12}, "threshold_amount", "integer_above_max_value"),
    ("/spend_limit", {**MONEY, "threshold_amount": 1.5}, "threshold_amount", "invalid_type"),
    ("/spend_limit", {**MONEY, "threshold_amount": 1, "currency": "EUR"}, "currency", "invalid_value"),
    ("/spend_alerts", {**ALERT, "notification_channel": {"type": "email", "recipients": []}},
     "notification_channel.recipients", "empty_array"),
    ("/spend_alerts", {**ALERT, "notification_channel": {**CHANNEL, "url": "x"}}, "notification_channel.url",
     "unknown_parameter"),
    ("/invites", {"email": "nobody", "role": "reader"}, "email", "invalid_value"),
    ("/invites", {"email": "a@b.c", "role": "king"}, "role", "invalid_value"),
    ("/invites", {"email": "a@b.c", "role": "reader", "projects": [{"id": "x", "role": "member"}]}, "projects[0].id",
     "invalid_value"),
    ("/users/{owner}", {"email": "nobody"}, "email", "invalid_value"),
    ("/invites", {"email": "a@b.c", "role": "reader", "projects": [{"id": "{home}", "role": "king"}]},
     "projects[0].role", "invalid_value"),
    ("/invites", {"email": "a@b.c", "role": "reader", "projects": [{"id": "{home}", "role": "member"},
     {"id": "{home}", "role": "owner"}]}, "projects[1].id", "invalid_value"),
    ("/roles", {"role_name": "a", "permissions": ["api.everything"]}, "permissions", "invalid_value"),
    ("/admin_api_keys", {"name": "a", "expires_in_seconds": 0}, "expires_in_seconds", "integer_below_min_value"),
    ("/admin_api_keys", {"name": "a", "owner_id": "user-nobody"}, "owner_id", "invalid_value"),
)  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "code"), WRONG)
def test_what_is_wrong_with_a_body_is_said(
    served: Served, organization: Any, path: str, body: Any, param: str | None, code: str | None
) -> None:
    """{home} and {owner} are the ids of the first project and user."""
    if "{" in path + (text := json.dumps(body)):
        ids = {"{home}": organization.projects.list().data[0].id, "{owner}": organization.users.list().data[0].id}
        for name, id in ids.items():
            path, text = path.replace(name, id), text.replace(name, id)
        body = json.loads(text)
    status, error = send(served, "POST", "/organization" + path, served.admin_key, body)
    assert (status, error["type"], error["param"], error["code"]) == (400, "invalid_request_error", param, code), error


@pytest.mark.parametrize("raw", [b"{", b"{} x", b"\xff", b'{"name": "\\ud800"}', b"null", b"[" * 100_000])
def test_what_is_no_json_is_refused(served: Served, raw: bytes) -> None:
    assert send(served, "POST", "/organization/projects", served.admin_key, raw=raw)[0] == 400


def test_a_body_that_is_too_large_is_refused(served: Served) -> None:
    status, _ = send(served, "POST", "/organization/projects", served.admin_key, raw=b" " * (5 * 2**20))
    assert status == 413


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("limit=0", "limit", "integer_below_min_value"), ("limit=101", "limit", "integer_above_max_value"),
        ("limit=ten", "limit", "invalid_type"), ("nonsense=1", "nonsense", "unknown_parameter"),
        ("include_archived=maybe", "include_archived", "invalid_value"),
        ("limit=1&limit=2", "limit", "invalid_value"), ("order=desc", "order", "unknown_parameter"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_query_is_said(served: Served, query: str, param: str, code: str | None) -> None:
    status, error = send(served, "GET", f"/organization/projects?{query}", served.admin_key)
    assert (status, error["param"], error["code"]) == (400, param, code)


def test_a_cursor_that_is_nothing_is_not_found(served: Served, organization: Any) -> None:
    """In every list that has cursors, whether it is read a page at a time or is in memory."""
    project, person = organization.projects.create(name="cursors").id, user(organization)
    organization.projects.users.create(project, user_id=person, role="member")
    group = organization.groups.create(name=names("cursors")[0]).id
    ids = {"project_id": project, "user_id": person, "group_id": group}
    seen = 0
    for row in ROWS:
        if row.verb != "list":
            continue
        path = row.path.format(**ids)
        for cursor in row.kind.paging.parameters:
            if cursor in ("after", "before"):
                status, error = send(served, "GET", f"{path}?{cursor}=nobody", served.admin_key)
                assert (status, error["param"]) == (404, cursor), (path, status, error)
                assert error["type"] == "invalid_request_error"
                seen += 1
    assert seen > 15


def test_a_cursor_that_is_gone_still_marks_its_place(served: Served, organization: Any) -> None:
    """So that whoever deletes what he pages through finds all of it."""
    project = organization.projects.create(name="gone").id
    people = sorted(user(organization) for _ in range(3))
    for person in people:
        organization.projects.users.create(project, user_id=person, role="member")
    path = f"/organization/projects/{project}/users?limit=2"
    page = send(served, "GET", path, served.admin_key)[1]
    for member in page["data"]:
        organization.projects.users.delete(member["id"], project_id=project)
    rest = send(served, "GET", f"{path}&after={page['last_id']}", served.admin_key)[1]
    assert [member["id"] for member in (*page["data"], *rest["data"])] in (people, people[::-1])


def test_arrays_may_be_spelled_in_both_ways(served: Served, organization: Any) -> None:
    project = organization.projects.create(name="spelled").id
    for spelled in ("project_ids[]=", "project_ids=", "project_ids%5B%5D="):
        found = send(served, "GET", f"/organization/audit_logs?{spelled}{project}", served.admin_key)[1]
        assert [entry["type"] for entry in found["data"]] == ["project.created"]


def test_what_is_there_already_is_a_conflict(served: Served, organization: Any) -> None:
    project, person = organization.projects.create(name="twice").id, user(organization)
    group = organization.groups.create(name=names("twice")[0])
    role = organization.roles.create(role_name=names("twice")[0], permissions=[])
    email = organization.users.retrieve(person).email
    pending = organization.invites.create(email=f"p{time.time_ns():x}@example.org", role="reader")
    organization.projects.users.create(project, user_id=person, role="member")
    organization.groups.users.create(group.id, user_id=person)
    organization.projects.groups.create(project, group_id=group.id, role="member")
    organization.users.roles.create(person, role_id=role.id)
    for path, body in (
        ("/organization/groups", {"name": group.name}),
        ("/organization/roles", {"role_name": role.name, "permissions": []}),
        ("/organization/roles", {"role_name": "owner", "permissions": []}),
        ("/organization/invites", {"email": email.upper(), "role": "reader"}),
        ("/organization/invites", {"email": pending.email, "role": "reader"}),
        (f"/organization/projects/{project}/users", {"user_id": person, "role": "member"}),
        (f"/organization/projects/{project}/groups", {"group_id": group.id, "role": "member"}),
        (f"/organization/groups/{group.id}/users", {"user_id": person}),
        (f"/organization/users/{person}/roles", {"role_id": role.id}),
        (f"/organization/users/{person}/roles", {"role_id": "role-organization-reader"}),
    ):
        assert send(served, "POST", path, served.admin_key, body)[0] == 409, path


def test_what_must_stay_stays(served: Served, organization: Any) -> None:
    [owner] = [one for one in organization.users.list(limit=100) if one.email == "owner@localhost"]
    others = [one.id for one in organization.users.list(limit=100) if one.role == "owner" and one.id != owner.id]
    for other in others:
        organization.users.update(other, role="reader")
    for method, path, body in (
        ("DELETE", f"/organization/users/{owner.id}", None),
        ("POST", f"/organization/users/{owner.id}", {"role": "reader"}),
        ("DELETE", f"/organization/users/{owner.id}/roles/role-organization-owner", None),
        ("DELETE", "/organization/roles/role-organization-owner", None),
        ("POST", "/organization/roles/role-organization-owner", {"permissions": []}),
        ("POST", f"/organization/projects/{organization.projects.list().data[0].id}/archive", None),
    ):
        assert send(served, method, path, served.admin_key, body)[0] == 400, path


def test_a_service_account_without_a_role_gets_no_key(organization: Any) -> None:
    project = organization.projects.create(name="none").id
    accounts = organization.projects.service_accounts
    account = accounts.create(project, name="a", create_service_account_only=True)
    with pytest.raises(openai.BadRequestError):
        accounts.api_keys.create(account.id, project_id=project)
    accounts.update(account.id, project_id=project, role="member")
    assert accounts.api_keys.create(account.id, project_id=project).value


def test_a_list_can_be_deleted_while_it_is_read(organization: Any) -> None:
    project = organization.projects.create(name="emptied").id
    people = [user(organization) for _ in range(4)]
    for person in people:
        organization.projects.users.create(project, user_id=person, role="member")
        organization.projects.service_accounts.create(project, name="a")
    for member in organization.projects.users.list(project, limit=2):
        organization.projects.users.delete(member.id, project_id=project)
    for account in organization.projects.service_accounts.list(project, limit=2):
        organization.projects.service_accounts.delete(account.id, project_id=project)
    assert organization.projects.users.list(project).data == []
    assert organization.projects.service_accounts.list(project).data == []


def test_models_that_may_not_be_asked_are_not_there(served: Served, organization: Any) -> None:
    project = organization.projects.create(name="some models").id
    client = served.client(api_key=organization.projects.service_accounts.create(project, name="a").api_key.value)
    assert {model.id for model in client.models.list()} == {"mock", "mock-embedding"}
    organization.projects.model_permissions.update(project, mode="allow_list", model_ids=["mock-embedding"])
    assert {model.id for model in client.models.list()} == {"mock-embedding"}
    assert [limit.model for limit in organization.projects.rate_limits.list_rate_limits(project)] == ["mock-embedding"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("mock")
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(model="mock", messages=CHAT)
    assert refused.value.status_code in (403, 404)
    organization.projects.model_permissions.delete(project)
    assert client.chat.completions.create(model="mock", messages=CHAT).model == "mock"


def test_a_spend_limit_says_whether_it_refuses_calls(served: Served, organization: Any) -> None:
    project = organization.projects.create(name="poor").id
    refusing = organization.projects.spend_limit.update(project, **MONEY, threshold_amount=0)
    assert refusing.enforcement.status == "enforcing"
    assert organization.projects.spend_limit.retrieve(project) == refusing
    watching = {"extra_body": {"observe_only": True}}
    watched = organization.projects.spend_limit.update(project, **MONEY, threshold_amount=0, **watching)
    assert watched.enforcement.status == "inactive"
    organization.projects.spend_limit.update(project, **MONEY, threshold_amount=100)
    assert organization.projects.spend_limit.retrieve(project).enforcement.status == "inactive"


def test_a_database_that_is_held_by_somebody_else_is_a_503(tmp_path: Path) -> None:
    server = serve(tmp_path / "held", "", *MODELS)
    try:
        with contextlib.closing(sqlite3.connect(server.data / "tertulia.db", isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            status, error = send(server, "POST", "/organization/projects", server.admin_key, {"name": "a"})
            assert (status, error["type"]) == (503, "service_unavailable_error")
            assert chat(server, server.api_key) == "mock"
            assert send(server, "GET", "/organization/projects", server.admin_key)[0] == 200
            holder.execute("ROLLBACK")
        assert send(server, "POST", "/organization/projects", server.admin_key, {"name": "a"})[0] == 200
    finally:
        server.stop()
