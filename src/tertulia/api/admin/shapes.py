"""How what is administered is shown: records as the SDK's types."""

from __future__ import annotations

import time
from typing import Any

from ...accounts.memory import spend_limit_of
from ...accounts.projects import FIELDS, RateLimit
from ...accounts.records import Record
from ...accounts.roles import ORGANIZATION_ROLES, PROJECT_ROLES
from .kinds import Ask

ORGANIZATION, PROJECT = "api.organization", "api.project"  # what a role is for


def project(ask: Ask, record: Record) -> dict[str, Any]:
    archived = record.body.get("archived_at")
    return {
        "object": "organization.project", "id": record.id, "name": record.body["name"],
        "created_at": record.created_at, "archived_at": archived,
        "status": "active" if archived is None else "archived",
    }  # fmt: skip


def user(ask: Ask, record: Record) -> dict[str, Any]:
    body = record.body
    return {
        "object": "organization.user", "id": record.id, "name": body.get("name"), "email": body["email"],
        "role": body["role"], "added_at": record.created_at, "created": record.created_at,
        "is_service_account": False, "is_scim_managed": False,
        "technical_level": body.get("technical_level"), "developer_persona": body.get("developer_persona"),
    }  # fmt: skip


def project_user(ask: Ask, record: Record) -> dict[str, Any]:
    """natural is the user's id."""
    person = ask.seen("user", record.natural or "")
    return {
        "object": "organization.project.user", "id": record.natural, "role": record.body["role"],
        "added_at": record.created_at, "name": person and person.body.get("name"),
        "email": person and person.body["email"],
    }  # fmt: skip


def invite(ask: Ask, record: Record) -> dict[str, Any]:
    body = record.body
    accepted, expires = body.get("accepted_at"), body["expires_at"]
    status = "accepted" if accepted is not None else "expired" if expires <= time.time() else "pending"
    return {
        "object": "organization.invite", "id": record.id, "email": body["email"], "role": body["role"],
        "status": status, "created_at": record.created_at, "expires_at": expires, "accepted_at": accepted,
        "projects": body["projects"],
    }  # fmt: skip


def service_account(ask: Ask, record: Record) -> dict[str, Any]:
    return {
        "object": "organization.project.service_account", "id": record.id, "name": record.body["name"],
        "role": record.body["role"], "created_at": record.created_at,
    }  # fmt: skip


def spend_limit(ask: Ask, record: Record) -> dict[str, Any]:
    """observe_only is Tertulia's own."""
    whole = ask.directory.organization
    about = whole if record.parent == whole.id else ask.account(record.parent)
    enforcing = ask.world.reached(about, spend_limit_of(record.body))
    return {
        "object": ask.kind.object, "currency": "USD", "interval": "month",
        "threshold_amount": record.body["threshold_amount"], "observe_only": bool(record.body.get("observe_only")),
        "enforcement": {"status": "enforcing" if enforcing else "inactive"},
    }  # fmt: skip


def spend_alert(ask: Ask, record: Record) -> dict[str, Any]:
    return {"object": ask.kind.object, "id": record.id, **record.body}


def model_permissions(ask: Ask, record: Record) -> dict[str, Any]:
    return {"object": "project.model_permissions", "mode": record.body["mode"], "model_ids": record.body["model_ids"]}


def rate_limit(model: str, limit: RateLimit) -> dict[str, Any]:
    """max_concurrent_requests and observe_only are Tertulia's own."""
    return {
        "object": "project.rate_limit", "id": f"rl-{model}", "model": model,
        "max_requests_per_1_minute": limit.requests_per_minute, "max_tokens_per_1_minute": limit.tokens_per_minute,
        "max_requests_per_1_day": limit.requests_per_day, "max_concurrent_requests": limit.concurrent_requests,
        "observe_only": observe_only(limit),
    }  # fmt: skip


def observe_only(limit: RateLimit) -> bool | list[str]:
    """True or False where that says it, else the names of the limits that only observe."""
    names = [name for name, kind in FIELDS.items() if kind in limit.observed]
    return len(names) > 0 if len(names) in (0, len(FIELDS)) else names


def group(ask: Ask, record: Record) -> dict[str, Any]:
    return {
        "object": "group", "id": record.id, "name": record.body["name"], "created_at": record.created_at,
        "group_type": "group", "is_scim_managed": False,
    }  # fmt: skip


def project_group(ask: Ask, record: Record) -> dict[str, Any]:
    """natural is the group's id."""
    found = ask.seen("group", record.natural or "")
    return {
        "object": "project.group", "project_id": record.parent, "group_id": record.natural,
        "group_name": found.body["name"] if found else "", "group_type": "group", "created_at": record.created_at,
    }  # fmt: skip


def group_user(ask: Ask, record: Record) -> dict[str, Any]:
    """natural is the user's id."""
    person = ask.seen("user", record.natural or "")
    name, email = (person.body.get("name"), person.body["email"]) if person else (None, None)
    return {
        "id": record.natural, "name": name or email or "", "email": email, "is_service_account": False,
        "picture": None, "user_type": "user",
    }  # fmt: skip


def role(ask: Ask, record: Record) -> dict[str, Any]:
    return {
        "object": "role", "id": record.id, "name": record.body["name"],
        "description": record.body.get("description"), "permissions": record.body["permissions"],
        "resource_type": resource_type(ask, record), "predefined_role": record.id.startswith("role-"),
    }  # fmt: skip


def resource_type(ask: Ask, record: Record) -> str:
    return ORGANIZATION if record.parent == ask.organization else PROJECT


def predefined(organization: str, project: str | None) -> list[Record]:
    """The roles that are always there, in the organization or in a project."""
    where, known = ("organization", ORGANIZATION_ROLES) if project is None else ("project", PROJECT_ROLES)
    return [
        Record(
            f"role-{where}-{name}", "role", project or organization, name, 0,
            {"name": name, "description": f"Predefined role of the {where}", "permissions": sorted(permissions)},
        )
        for name, permissions in known.items()
    ]  # fmt: skip
