"""API keys of projects and admin keys: how they are listed, shown and changed. A secret is shown by the verb that makes
it and by no other.
"""

from __future__ import annotations

from typing import Any

from ...accounts import scopes
from ...accounts.records import Record
from ...accounts.roles import PERMISSIONS
from ...errors import BadRequest
from . import verbs
from .kinds import Ask

ROTATED_SECONDS = 86400  # that a key goes on working beside its successor, if nothing else is asked for
Key = dict[str, Any]


def project_key(ask: Ask, key: Key) -> dict[str, Any]:
    """As the SDK's ProjectAPIKey, and Tertulia's own `scopes`: none for all."""
    owner, active = owner_of(ask, key)
    return {
        "object": "organization.project.api_key", "id": key["id"], "name": key["name"],
        "redacted_value": key["hint"], "created_at": key["created_at"], "last_used_at": key["last_used_at"],
        "expires_at": key["expires_at"], "owner": owner, "scopes": key["scopes"] or [],
        "owner_project_access": "active" if active else "inactive",
    }  # fmt: skip


def owner_of(ask: Ask, key: Key) -> tuple[dict[str, Any], bool]:
    """(the owner as it is shown, whether it has access to the key's project)."""
    id, project = key["owner_id"], key["project_id"]
    if id is None:  # of an older Tertulia: whoever owns the organization
        return {"type": None, "user": None, "service_account": None}, True
    if id.startswith("user-"):
        person = ask.seen("user", id)
        roles = ask.directory.roles
        active = person is not None and roles.may_enter(id, project)
        role = _role_in(ask, id, project) if active else "none"
        return {"type": "user", "user": _person(id, person, role), "service_account": None}, active
    account = ask.seen("service_account", id)
    role = account.body["role"] if account is not None else "none"
    shown = {
        "id": id, "name": account.body["name"] if account else "", "role": role,
        "created_at": account.created_at if account else 0,
    }  # fmt: skip
    return {"type": "service_account", "service_account": shown, "user": None}, role != "none"


def _person(id: str, person: Record | None, role: str) -> dict[str, Any]:
    body = person.body if person is not None else {"email": ""}
    return {
        "id": id, "email": body["email"], "name": body.get("name") or body["email"], "role": role,
        "created_at": person.created_at if person else 0,
    }  # fmt: skip


def _role_in(ask: Ask, user: str, project: str) -> str:
    index = ask.directory.roles.index
    if index.role_of.get(user) == "owner":
        return "owner"
    roles = {index.inside.get((project, principal)) for principal in (user, *index.groups.get(user, ()))}
    return next((role for role in ("owner", "member") if role in roles), "viewer")


def list_project_keys(ask: Ask) -> dict[str, Any]:
    """Those of an archived project, too: they are refused, and can be looked at."""
    wanted = ask.query.choice("owner_project_access", ("active", "inactive", "any"))
    paging = ask.kind.paging
    window = paging.window(ask.query)
    shown: list[dict[str, Any]] = []
    after, more = window.after, True
    while more and len(shown) <= window.limit:
        keys, more = ask.directory.key_page("project", ask.parent, after, paging.most, window.order)
        after = keys[-1]["id"] if keys else None
        shown += [
            key for key in (project_key(ask, key) for key in keys)
            if wanted in (None, "any", key["owner_project_access"])
        ]  # fmt: skip
    page = shown[: window.limit]
    return paging.page(page, len(shown) > window.limit, [key["id"] for key in page])


def found(ask: Ask) -> Key:
    """The key the call is about. Raises NotFound."""
    if ask.kind.record == "admin_key":
        return ask.directory.key(ask.id, "admin")
    return ask.directory.key(ask.id, "project", ask.parent)


def retrieve_project_key(ask: Ask) -> dict[str, Any]:
    return project_key(ask, found(ask))


def create_project_key(ask: Ask) -> dict[str, Any]:
    """Tertulia's own: a key of a user; without `user_id`, of the caller."""
    given = verbs.kept(ask.given)
    owner = given.get("user_id", ask.who.owner_id)
    if owner is not None and (ask.seen("user", owner) is None or not ask.directory.roles.may_enter(owner, ask.parent)):
        raise BadRequest("There is no such user in the project.", param="user_id", code="invalid_value")
    key, secret = ask.directory.create_key(
        ask.change, "project", ask.parent, owner, given["name"], scopes.checked(given.get("scopes")), end(ask, given)
    )
    return {**project_key(ask, key), "value": secret}


def end(ask: Ask, given: dict[str, Any]) -> int | None:
    lifetime = given.get("expires_in_seconds")
    return None if lifetime is None else ask.change.now + int(lifetime)


def update_project_key(ask: Ask) -> dict[str, Any]:
    """An empty list of scopes restricts nothing, as OpenAI has it."""
    before, given = found(ask), verbs.kept(ask.given)
    changes: dict[str, Any] = {}
    if "scopes" in given:
        changes["scopes"] = scopes.checked(given["scopes"])
    if "expires_in_seconds" in given:
        changes["expires_at"] = end(ask, given)
    if changes:
        ask.directory.update_key(ask.change, ask.id, **changes)
    return project_key(ask, {**before, **changes})


def delete_key(ask: Ask) -> dict[str, Any]:
    """It is refused from now on."""
    found(ask)
    ask.directory.revoke_key(ask.change, ask.id)
    return verbs.deleted(ask, ask.id)


def rotate(ask: Ask) -> dict[str, Any]:
    """Tertulia's own: a successor with a secret of its own; both work until grace_seconds (a day) are over."""
    before, grace = found(ask), ask.given.get("grace_seconds")
    may_have(ask, before)
    key, secret = ask.directory.rotate_key(ask.change, ask.id, ROTATED_SECONDS if grace is None else grace)
    shown = admin_key(ask, key) if before["kind"] == "admin" else project_key(ask, key)
    return {**shown, "value": secret}


# admin keys
def admin_key(ask: Ask, key: Key) -> dict[str, Any]:
    person = ask.seen("user", key["owner_id"]) if key["owner_id"] else None
    owner: dict[str, Any] = {"type": "user", "object": "organization.user", "role": "owner"}
    if person is not None:
        owner |= {
            "id": person.id, "name": person.body.get("name"), "created_at": person.created_at,
            "role": person.body["role"],
        }  # fmt: skip
    return {
        "object": "organization.admin_api_key", "id": key["id"], "name": key["name"], "redacted_value": key["hint"],
        "created_at": key["created_at"], "last_used_at": key["last_used_at"], "expires_at": key["expires_at"],
        "owner": owner,
    }  # fmt: skip


def list_admin_keys(ask: Ask) -> dict[str, Any]:
    paging = ask.kind.paging
    window = paging.window(ask.query)
    keys, more = ask.directory.key_page("admin", None, window.after, window.limit, window.order)
    return paging.page([admin_key(ask, key) for key in keys], more, [key["id"] for key in keys])


def retrieve_admin_key(ask: Ask) -> dict[str, Any]:
    return admin_key(ask, found(ask))


def create_admin_key(ask: Ask) -> dict[str, Any]:
    """Of the caller; owner_id is Tertulia's own: the user whose roles the key has."""
    given = verbs.kept(ask.given)
    owner = given.get("owner_id", ask.who.owner_id)
    if owner is not None and ask.seen("user", owner) is None:
        raise BadRequest("There is no such user.", param="owner_id", code="invalid_value")
    may_have(ask, {"kind": "admin", "owner_id": owner})
    key, secret = ask.directory.create_key(ask.change, "admin", None, owner, given["name"], expires_at=end(ask, given))
    return {**admin_key(ask, key), "value": secret}


def may_have(ask: Ask, key: Key) -> None:
    """Whoever gets the secret of an admin key can do what its owner can. Raises Forbidden."""
    if key["kind"] == "admin" and key["owner_id"] != ask.who.owner_id:
        ask.may_give(PERMISSIONS)
