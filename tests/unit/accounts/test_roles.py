"""Who may administer what."""

from __future__ import annotations

import itertools

import pytest

from tertulia.accounts.records import Record
from tertulia.accounts.roles import NONE, PERMISSIONS, READING, Roles, checked, needed
from tertulia.core import Principal
from tertulia.errors import BadRequest, Forbidden

_numbers = itertools.count()
KEYS = "api.organization.projects.api_keys"


def record(kind: str, parent: str, natural: str | None, id: str | None = None, **body: object) -> Record:
    return Record(id or f"{kind}-{next(_numbers)}", kind, parent, natural, 0, body)


def admin(owner: str | None) -> Principal:
    who = Principal("key_1", "org-1", "", "admin")
    who.owner_id = owner
    return who


@pytest.fixture
def roles() -> Roles:
    roles = Roles()
    for role in ("owner", "reader", "member"):
        roles.put(record("user", "org-1", f"{role}@x", f"user-{role}", role=role))
    return roles


@pytest.mark.parametrize(
    ("method", "path", "permission", "project"),
    [
        ("GET", "/v1/organization/projects", "api.organization.projects.read", None),
        ("POST", "/v1/organization/projects", "api.organization.projects.write", None),
        ("GET", "/v1/organization/projects/p", "api.organization.projects.read", "p"),
        ("POST", "/v1/organization/projects/p/archive", "api.organization.projects.write", "p"),
        ("DELETE", "/v1/organization/projects/p/api_keys/k", KEYS + ".write", "p"),
        ("POST", "/v1/organization/projects/p/service_accounts/s/api_keys",
         "api.organization.projects.service_accounts.write", "p"),
        ("GET", "/v1/projects/p/users/u/roles", "api.organization.projects.roles.read", "p"),
        ("GET", "/v1/organization/usage/completions", "api.organization.usage.read", None),
        ("GET", "/v1/organization/costs", "api.organization.usage.read", None),
        ("POST", "/v1/organization/users/u/roles", "api.roles.write", None),
        ("POST", "/v1/organization/groups/g/users", "api.groups.write", None),
        ("DELETE", "/v1/organization/admin_api_keys/k", "api.organization.admin_api_keys.write", None),
    ],
)  # fmt: skip
def test_the_path_says_what_is_needed(method: str, path: str, permission: str, project: str | None) -> None:
    assert needed(method, path) == (permission, project) and permission in PERMISSIONS


def test_an_owner_may_everything_a_reader_reads_a_member_nothing(roles: Roles) -> None:
    for path in ("/v1/organization/projects", "/v1/organization/audit_logs", "/v1/projects/p/roles"):
        for method in ("GET", "POST", "DELETE"):
            roles.check(admin("user-owner"), method, path)
            roles.check(admin(None), method, path)
            with pytest.raises(Forbidden, match="Missing scopes: api"):
                roles.check(admin("user-member"), method, path)
            with pytest.raises(Forbidden):
                roles.check(admin("user-who-was-deleted"), method, path)
            if method == "GET":
                roles.check(admin("user-reader"), method, path)
            else:
                with pytest.raises(Forbidden, match="write"):
                    roles.check(admin("user-reader"), method, path)


def test_what_does_not_exist_is_told_to_those_who_may_everything(roles: Roles) -> None:
    roles.check(admin("user-owner"), "POST", "/v1/organization/nothing")
    roles.check(admin("user-reader"), "GET", "/v1/organization/nothing")
    for who, method in (("user-reader", "POST"), ("user-member", "GET")):
        with pytest.raises(Forbidden):
            roles.check(admin(who), method, "/v1/organization/nothing")


def test_the_owner_of_a_project_administers_that_project(roles: Roles) -> None:
    link = record("project_user", "p1", "user-member", role="owner")
    roles.put(link)
    roles.check(admin("user-member"), "POST", "/v1/organization/projects/p1/rate_limits/r")
    roles.check(admin("user-member"), "POST", "/v1/organization/projects/p1")
    for path in ("/v1/organization/projects/p2/rate_limits/r", "/v1/organization/projects", "/v1/organization/users"):
        with pytest.raises(Forbidden):
            roles.check(admin("user-member"), "POST", path)
    roles.remove(link)
    assert roles.permissions("user-member", "p1") == NONE


def test_roles_of_ones_own_reach_users_and_groups_where_they_are_assigned(roles: Roles) -> None:
    roles.put(record("role", "org-1", "auditor", "role_1", name="auditor", permissions=[KEYS + ".read"]))
    here = record("role_assignment", "user-member", "role_1/p1", role_id="role_1", project_id="p1")
    roles.put(here)
    assert roles.permissions("user-member") == NONE
    assert roles.permissions("user-member", "p1") == {KEYS + ".read"}
    roles.remove(here)
    roles.put(record("group_user", "group_1", "user-member", "gu"))
    roles.put(record("role_assignment", "group_1", "role_1/", role_id="role_1", project_id=None))
    assert roles.permissions("user-member") == roles.permissions("user-member", "p2") == {KEYS + ".read"}
    roles.put(record("role", "org-1", "auditor", "role_1", name="auditor", permissions=[KEYS + ".write"]))
    assert roles.permissions("user-member") == {KEYS + ".write"}
    roles.remove(record("role", "org-1", None, "role_1"))  # as a deletion comes: without its natural name
    assert roles.permissions("user-member") == NONE


def test_who_has_access_to_a_project(roles: Roles) -> None:
    assert roles.may_enter("user-owner", "p1") and not roles.may_enter("user-reader", "p1")
    roles.put(record("project_user", "p1", "user-member", "pu", role="member"))
    assert roles.may_enter("user-member", "p1") and not roles.may_enter("user-member", "p2")
    roles.put(record("project_group", "p2", "group_1", role="member"))
    roles.put(record("group_user", "group_1", "user-member", "gu"))
    assert roles.may_enter("user-member", "p2")
    roles.remove(record("group_user", "group_1", None, "gu"))
    roles.remove(record("project_user", "p1", None, "pu"))
    assert not roles.may_enter("user-member", "p1") and not roles.may_enter("user-member", "p2")
    assert roles.owners() == ["user-owner"] and READING < PERMISSIONS


def test_an_unknown_permission_is_named() -> None:
    assert checked(["api.roles.read", "api.groups.read", "api.roles.read"]) == ["api.groups.read", "api.roles.read"]
    with pytest.raises(BadRequest) as error:
        checked(["api.roles.read", "api.roles.own"])
    assert error.value.param == "permissions" and "api.roles.own" in error.value.message
