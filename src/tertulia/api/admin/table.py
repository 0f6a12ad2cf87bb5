"""The table: every kind of record, where it is, what can be done with it, and what a body may hold. What OpenAI has and
this server has not is in a list of its own, so that it is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ...accounts.projects import FIELDS
from ..pages import NEXT, Paging
from . import keys, limits, people, roles, shapes, verbs
from .kinds import NO_NULL, VISIBLE, Absent, Ask, Email, Id, Kind, Lifetime, Name, Row, Scopes, Text
from .verbs import CRUD, SINGLE

Amount = Annotated[int, Meta(ge=0, le=100_000_000_000)]  # cents
Limit = Annotated[int, Meta(ge=1, le=10**15)]
Observed = bool | list[Literal[*FIELDS]]  # type: ignore[valid-type]  # the limits that refuse nothing: all, none or these
Models = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\x00]*$", description=NO_NULL)]],
    Meta(max_length=10_000),
]
Permissions = Annotated[list[Annotated[str, Meta(max_length=128)]], Meta(max_length=256)]
Word = Annotated[str, Meta(min_length=1, max_length=128)]


Prefix = Annotated[str, Meta(max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$", description=VISIBLE)]


class Channel(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["email"]
    recipients: Annotated[list[Email], Meta(min_length=1, max_length=100)]
    subject_prefix: Prefix | None = None


class InvitedTo(msgspec.Struct, forbid_unknown_fields=True):
    id: Id
    role: Word


PROJECT = {"external_key_id": Absent, "geography": Absent}
MONEY = {"currency": Literal["USD"], "interval": Literal["month"], "threshold_amount": Amount}
SPEND_LIMIT = {**MONEY, "observe_only": bool | None}
ALERT = {**MONEY, "notification_channel": Channel}
ROLE = {"role_name": Name, "permissions": Permissions, "description": Text | None}
ROLE_CHANGES = {"role_name": Name | None, "permissions": Permissions | None, "description": Text | None}
ASSIGNED = {"role_id": Id}
GRACE = {"grace_seconds": Annotated[int, Meta(ge=0, le=31_536_000)] | None}

MANY = Paging(NEXT, default=100, least=0, most=1000, ordered=True)
ROLES = Paging(NEXT, default=1000, least=0, most=1000, ordered=True)
ALERTS = Paging(ordered=True, backward=True)
GIVEN = {
    "create": roles.give_role,
    "retrieve": roles.retrieve_given,
    "list": roles.list_given,
    "delete": roles.take_role,
}


def alerts(sdk: str, where: str, object: str) -> Kind:
    return Kind(
        sdk=sdk, path=where + "/spend_alerts/{alert_id}", record="spend_alert", object=object, show=shapes.spend_alert,
        acts={**CRUD, "list": verbs.whole}, takes={"create": ALERT, "update": ALERT}, paging=ALERTS,
    )  # fmt: skip


def spend_limit(sdk: str, where: str, object: str) -> Kind:
    return Kind(
        sdk=sdk, path=where + "/spend_limit", record="spend_limit", object=object, show=shapes.spend_limit,
        acts=SINGLE, takes={"update": SPEND_LIMIT}, natural=lambda body: "month", single=True,
    )  # fmt: skip


def role(sdk: str, where: str) -> Kind:
    return Kind(
        sdk=sdk, path=where + "/roles/{role_id}", record="role", object="role", show=shapes.role, event="role",
        acts={
            "create": roles.create_role, "retrieve": roles.retrieve_role, "update": roles.update_role,
            "list": roles.list_roles, "delete": roles.delete_role,
        },
        takes={"create": ROLE, "update": ROLE_CHANGES}, paging=ROLES,
    )  # fmt: skip


def given(sdk: str, where: str) -> Kind:
    return Kind(
        sdk=sdk, path=where + "/roles/{role_id}", record="role_assignment", object="role", show=shapes.role,
        acts=GIVEN, takes={"create": ASSIGNED}, paging=ROLES,
    )  # fmt: skip


ALL = "/organization"
ONE = "/organization/projects/{project_id}"

KINDS: tuple[Kind, ...] = (
    Kind(
        sdk="admin_api_keys", path=ALL + "/admin_api_keys/{key_id}", record="admin_key",
        object="organization.admin_api_key", show=shapes.user,
        acts={
            "create": keys.create_admin_key, "retrieve": keys.retrieve_admin_key, "list": keys.list_admin_keys,
            "delete": keys.delete_key, "rotate": keys.rotate,
        },
        takes={
            "create": {"name": Name, "expires_in_seconds": Lifetime | None, "owner_id": Id | None}, "rotate": GRACE,
        },
        paging=Paging(ordered=True),
    ),
    Kind(
        sdk="projects", path=ONE, record="project", object="organization.project", show=shapes.project,
        acts={
            "create": people.create_project, "retrieve": verbs.retrieve, "update": verbs.update,
            "list": people.list_projects, "archive": people.archive,
        },
        takes={
            "create": {"name": Name, "residency": Absent, **PROJECT}, "update": {"name": Name | None, **PROJECT},
        },
        asks=("include_archived",), event="project", told={"name": "title"},
    ),
    Kind(
        sdk="projects.service_accounts", path=ONE + "/service_accounts/{service_account_id}",
        record="service_account", object="organization.project.service_account", show=shapes.service_account,
        acts={**CRUD, "create": people.create_service_account, "delete": people.delete_service_account},
        takes={
            "create": {
                "name": Name, "create_service_account_only": bool | None, "expires_in_seconds": Lifetime | None,
            },
            "update": {"name": Name | None, "role": Literal["member", "owner"] | None},
        },
        event="service_account", told={"role": "role"},
    ),
    Kind(
        sdk="projects.service_accounts.api_keys", record="service_account_key",
        path=ONE + "/service_accounts/{service_account_id}/api_keys/{api_key_id}",
        object="organization.project.service_account.api_key", show=shapes.user,
        acts={"create": people.create_service_account_key},
        takes={"create": {"name": Name | None, "scopes": Scopes | None, "expires_in_seconds": Lifetime | None}},
    ),
    Kind(
        sdk="projects.api_keys", path=ONE + "/api_keys/{api_key_id}", record="api_key",
        object="organization.project.api_key", show=shapes.user,
        acts={
            "create": keys.create_project_key, "retrieve": keys.retrieve_project_key,
            "update": keys.update_project_key, "list": keys.list_project_keys, "delete": keys.delete_key,
            "rotate": keys.rotate,
        },
        takes={
            "create": {
                "name": Name, "user_id": Id | None, "scopes": Scopes | None, "expires_in_seconds": Lifetime | None,
            },
            "update": {"scopes": Scopes | None, "expires_in_seconds": Lifetime | None}, "rotate": GRACE,
        },
        asks=("owner_project_access",),
    ),
    Kind(
        sdk="projects.users", path=ONE + "/users/{user_id}", record="project_user",
        object="organization.project.user", show=shapes.project_user,
        acts={
            "create": people.create_project_user, "retrieve": verbs.retrieve_link,
            "update": people.update_project_user, "list": verbs.list_links, "delete": people.delete_project_user,
        },
        takes={"create": {"role": Word, "user_id": Id | None, "email": Email | None}, "update": {"role": Word | None}},
        event="user", told={"role": "role"},
    ),
    Kind(
        sdk="projects.groups", path=ONE + "/groups/{group_id}", record="project_group", object="project.group",
        show=shapes.project_group,
        acts={
            "create": people.grant_group, "retrieve": people.retrieve_group, "list": verbs.list_links,
            "delete": people.revoke_group,
        },
        takes={"create": {"group_id": Id, "role": Id}}, paging=Paging(NEXT, least=0, ordered=True),
    ),
    Kind(
        sdk="projects.rate_limits", path=ONE + "/rate_limits/{rate_limit_id:path}", record="rate_limit",
        object="project.rate_limit", show=shapes.user,
        acts={"list_rate_limits": limits.list_rate_limits, "update_rate_limit": limits.update_rate_limit},
        takes={"update_rate_limit": {
            "max_requests_per_1_minute": Limit | None, "max_tokens_per_1_minute": Limit | None,
            "max_requests_per_1_day": Limit | None, "max_concurrent_requests": Limit | None,
            "observe_only": Observed | None, "max_images_per_1_minute": Absent,
            "max_audio_megabytes_per_1_minute": Absent, "batch_1_day_max_input_tokens": Absent,
        }},
        paging=Paging(default=100, most=1000, backward=True),
    ),
    Kind(
        sdk="projects.model_permissions", path=ONE + "/model_permissions", record="model_permissions",
        object="project.model_permissions", show=shapes.model_permissions, acts=SINGLE,
        takes={"update": {"mode": Literal["allow_list", "deny_list"], "model_ids": Models}},
        natural=lambda body: "models", single=True,
    ),
    spend_limit("spend_limit", ALL, "organization.spend_limit"),
    spend_limit("projects.spend_limit", ONE, "project.spend_limit"),
    alerts("spend_alerts", ALL, "organization.spend_alert"),
    alerts("projects.spend_alerts", ONE, "project.spend_alert"),
    Kind(
        sdk="users", path=ALL + "/users/{user_id}", record="user", object="organization.user", show=shapes.user,
        acts={
            "retrieve": verbs.retrieve, "update": people.update_user, "list": people.list_users,
            "delete": people.delete_user,
        },
        takes={"update": {
            "role": Word | None, "role_id": Id | None, "name": Name | None, "email": Email | None,
            "technical_level": Text | None, "developer_persona": Text | None,
        }},
        asks=("emails",), event="user", told={"role": "role"}, natural=lambda body: str(body["email"]).lower(),
    ),
    Kind(
        sdk="invites", path=ALL + "/invites/{invite_id}", record="invite", object="organization.invite",
        show=shapes.invite,
        acts={
            "create": people.create_invite, "retrieve": verbs.retrieve, "list": verbs.listed,
            "delete": people.delete_invite, "accept": people.accept_invite,
        },
        takes={
            "create": {
                "email": Email, "role": Word,
                "projects": Annotated[list[InvitedTo], Meta(max_length=1000)] | None,
            },
            "accept": {"name": Name | None},
        },
        event="invite", told={"email": "email", "role": "role"}, natural=lambda body: str(body["email"]).lower(),
    ),
    Kind(
        sdk="groups", path=ALL + "/groups/{group_id}", record="group", object="group", show=shapes.group,
        acts={**CRUD, "update": people.rename_group, "delete": people.delete_group},
        takes={"create": {"name": Name}, "update": {"name": Name}}, paging=MANY, event="group",
        told={"name": "group_name"}, natural=lambda body: str(body["name"]),
    ),
    Kind(
        sdk="groups.users", path=ALL + "/groups/{group_id}/users/{user_id}", record="group_user",
        object="group.user", show=shapes.group_user,
        acts={
            "create": people.add_to_group, "retrieve": people.retrieve_from_group, "list": verbs.list_links,
            "delete": people.remove_from_group,
        },
        takes={"create": {"user_id": Id}}, paging=MANY._replace(order="desc"),
    ),
    role("roles", ALL),
    role("projects.roles", "/projects/{project_id}"),
    given("users.roles", ALL + "/users/{user_id}"),
    given("groups.roles", ALL + "/groups/{group_id}"),
    given("projects.users.roles", "/projects/{project_id}/users/{user_id}"),
    given("projects.groups.roles", "/projects/{project_id}/groups/{group_id}"),
)  # fmt: skip


def audit_logs(ask: Ask) -> dict[str, Any]:
    """Newest first. There is nothing of tenants here, so `tenant_only` finds nothing."""
    query, paging = ask.query, ask.kind.paging
    window = paging.window(query)
    spans = query.numbers("effective_at", ("gt", "gte", "lt", "lte"))
    lists = {name: query.texts(name) for name in FILTERS}
    if query.flag("tenant_only"):
        return paging.page([], False, [])
    entries, more = ask.directory.audit_log.page(
        window.limit, after=window.after, before=window.before, effective_at=spans, **lists
    )
    return paging.page(entries, more, [entry["id"] for entry in entries])


FILTERS = ("event_types", "project_ids", "actor_ids", "actor_emails", "resource_ids")
AUDIT_LOGS = Kind(
    sdk="audit_logs", path=ALL + "/audit_logs/{audit_log_id}", record="audit_log", object="organization.audit_log",
    show=shapes.user, acts={"list": audit_logs}, asks=(*FILTERS, "effective_at", "tenant_only"),
    paging=Paging(backward=True),
)  # fmt: skip

ROWS: tuple[Row, ...] = tuple(row for kind in (*KINDS, AUDIT_LOGS) for row in kind.rows())

# What OpenAI has and this server has not: where, in the SDK and in the path, and why not.
ELSEWHERE = (
    ("certificates", "/organization/certificates", "mutual TLS is for whatever stands in front of the server"),
    ("projects.certificates", ONE + "/certificates", "mutual TLS is for whatever stands in front of the server"),
    ("external_keys", "/organization/external_keys", "what is kept is encrypted by the disk it is on"),
    ("external_storage", "/organization/external_storage", "what is kept is in the data directory or the database"),
    ("workload_identity_providers", "/organization/workload_identity_providers", "programs have API keys"),
    ("data_retention", "/organization/data_retention", "the settings of the server say what is kept"),
    ("projects.data_retention", ONE + "/data_retention", "the settings of the server say what is kept"),
    ("projects.hosted_tool_permissions", ONE + "/hosted_tool_permissions", "there are no hosted tools"),
    ("projects.service_tier_settings", ONE + "/service_tier_settings", "there is one tier"),
)
