"""Projects, users, invites, groups and service accounts: what is particular to them, above all what goes with them when
they go, and that nobody gives more than he has.
"""

from __future__ import annotations

from typing import Any

from ...accounts import scopes
from ...accounts.records import Record
from ...accounts.roles import NONE, ORGANIZATION_ROLES, PROJECT_ROLES
from ...errors import BadRequest, Conflict
from ..decode import not_a_choice
from . import shapes, verbs
from .kinds import Ask
from .roles import assign, assigned_in, keep_an_owner, of_groups, role_named, unassign_all

INVITED_SECONDS = 7 * 86400  # until an invite expires


# projects
def list_projects(ask: Ask) -> dict[str, Any]:
    if ask.query.flag("include_archived"):
        return verbs.listed(ask)
    return verbs.pick(ask, lambda project: project.body.get("archived_at") is None)


def create_project(ask: Ask) -> dict[str, Any]:
    return shapes.project(ask, verbs.made(ask, {"name": ask.given["name"], "archived_at": None}))


def archive(ask: Ask) -> dict[str, Any]:
    """Its keys are refused from then on, and nothing in it can be changed."""
    record = verbs.found(ask)
    if ask.directory.home()[1] == record.id:
        raise BadRequest("The default project cannot be archived.", code="default_project")
    body = {**record.body, "archived_at": ask.change.now}
    ask.change.update(record.id, body)
    ask.tell("project.archived", record.id, {})
    return shapes.project(ask, record._replace(body=body))


# users
def list_users(ask: Ask) -> dict[str, Any]:
    wanted = {email.lower() for email in ask.query.texts("emails")}
    if not wanted:
        return verbs.listed(ask)
    found = [user for email in wanted if (user := ask.records.find("user", ask.organization, email)) is not None]
    return verbs.paged(ask, found, lambda user: user.id)


def update_user(ask: Ask) -> dict[str, Any]:
    record = verbs.found(ask)
    given = verbs.kept(ask.given)
    name, id = given.pop("role", None), given.pop("role_id", None)
    if name is not None and id is not None:
        raise BadRequest("Give either 'role' or 'role_id', not both.", param="role_id", code="invalid_value")
    if id is not None:
        role = role_named(ask, id, None, "role_id")
        if role.id.startswith("role-"):
            name = role.body["name"]
        else:
            assign(ask, record.id, "user", role)
    if given or name is not None:  # nobody touches who has more than himself, or takes from others what he has not
        ask.may_give(ORGANIZATION_ROLES.get(record.body["role"], NONE))
    if "email" in given:
        given["email"] = given["email"].lower()
    if name is not None:
        given["role"] = organization_role(ask, name)
        keep_an_owner(ask, record, given["role"])
    return shapes.user(ask, verbs.changed(ask, record, given))


def organization_role(ask: Ask, name: str) -> str:
    """Raises BadRequest for one that does not exist, Forbidden for one that is more than the caller has."""
    if name not in ORGANIZATION_ROLES:
        raise not_a_choice(name, list(ORGANIZATION_ROLES), "role")
    ask.may_give(ORGANIZATION_ROLES[name])
    return name


def project_role(ask: Ask, name: str, project: str, param: str = "role") -> str:
    """The same for a role in a project; param: which parameter says so."""
    if name not in PROJECT_ROLES:
        raise not_a_choice(name, list(PROJECT_ROLES), param)
    ask.may_give(PROJECT_ROLES[name], project)
    return name


def delete_user(ask: Ask) -> dict[str, Any]:
    """With everything the user was in, and his keys."""
    record = verbs.found(ask)
    keep_an_owner(ask, record, None)
    ask.may_give(ORGANIZATION_ROLES.get(record.body["role"], NONE))
    for kind in ("project_user", "group_user"):
        for link in ask.records.all(kind):
            if link.natural == record.id:
                ask.change.delete(link.id)
    unassign_all(ask, record.id)
    ask.directory.revoke_keys_of(ask.change, record.id)
    verbs.gone(ask, record)
    return verbs.deleted(ask, record.id)


# users in projects
def create_project_user(ask: Ask) -> dict[str, Any]:
    given = verbs.kept(ask.given)
    email, id = given.get("email"), given.get("user_id")
    if (email is None) == (id is None):
        raise BadRequest("Give either 'user_id' or 'email'.", param="user_id", code="missing_required_parameter")
    person = ask.user(id) if id is not None else ask.records.find("user", ask.organization, str(email).lower())
    if person is None:
        raise BadRequest("There is no user with that email in the organization.", param="email", code="user_not_found")
    role = project_role(ask, given["role"], ask.parent)
    return shapes.project_user(ask, join(ask, ask.parent, person.id, role))


def join(ask: Ask, project: str, user: str, role: str) -> Record:
    """Raises Conflict if the user is in the project."""
    if ask.records.find("project_user", project, user) is not None:
        raise Conflict(f"The user {user} is in the project already.", code="user_in_project")
    link = ask.change.create("project_user", project, {"role": role}, natural=user)
    ask.change.audit("user.added", user, {"id": user, "data": {"role": role}}, project)
    return link


def update_project_user(ask: Ask) -> dict[str, Any]:
    link, given = verbs.linked(ask), verbs.kept(ask.given)
    if "role" in given:
        ask.may_give(PROJECT_ROLES.get(link.body["role"], NONE), ask.parent)
        project_role(ask, given["role"], ask.parent)
    return shapes.project_user(ask, verbs.changed(ask, link, given))


def delete_project_user(ask: Ask) -> dict[str, Any]:
    """His keys stay, and are refused as long as he has no access in another way."""
    link = verbs.linked(ask)
    ask.may_give(PROJECT_ROLES.get(link.body["role"], NONE), ask.parent)
    unassign_all(ask, ask.id, ask.parent)
    verbs.gone(ask, link)
    return verbs.deleted(ask, ask.id)


# invites
def create_invite(ask: Ask) -> dict[str, Any]:
    given = verbs.kept(ask.given)
    email = given["email"].lower()
    if ask.records.find("user", ask.organization, email) is not None:
        raise Conflict("A user with that email is in the organization already.", code="user_already_exists")
    old = ask.records.find("invite", ask.organization, email)
    if old is not None:
        if old.body["expires_at"] > ask.change.now:
            raise Conflict("An invite to that email is pending already.", code="invite_already_exists")
        ask.change.delete(old.id)
    body = {
        "email": email, "role": organization_role(ask, given["role"]), "projects": invited_to(ask, given),
        "expires_at": ask.change.now + INVITED_SECONDS, "accepted_at": None,
    }  # fmt: skip
    return shapes.invite(ask, verbs.made(ask, body))


def invited_to(ask: Ask, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Projects and roles there: if nothing is said of them, the default project."""
    if "projects" not in given:
        return [{"id": ask.directory.home()[1], "role": "member"}]
    found: dict[str, dict[str, Any]] = {}
    for index, wanted in enumerate(given["projects"]):
        project, param = ask.seen("project", wanted.id), f"projects[{index}]"
        if project is None or project.body.get("archived_at") is not None:
            raise BadRequest(f"There is no active project {wanted.id!r}.", param=f"{param}.id", code="invalid_value")
        if project.id in found:
            raise BadRequest(f"The project {project.id} is named twice.", param=f"{param}.id", code="invalid_value")
        role = project_role(ask, wanted.role, project.id, f"{param}.role")
        found[project.id] = {"id": project.id, "role": role}
    return list(found.values())


def accept_invite(ask: Ask) -> dict[str, Any]:
    """Tertulia's own: there is no page on which somebody could accept it, so whoever administers says that he has."""
    record, given = verbs.found(ask), verbs.kept(ask.given)
    if record.body["accepted_at"] is not None or record.body["expires_at"] <= ask.change.now:
        raise BadRequest("Only a pending invite can be accepted.", code="invite_not_pending")
    body = {"email": record.body["email"], "name": given.get("name"), "role": record.body["role"]}
    person = ask.change.create("user", ask.organization, body, natural=body["email"])
    ask.tell("user.added", person.id, {"data": {"role": body["role"]}})
    for project in record.body["projects"]:
        known = ask.seen("project", project["id"])
        if known is not None and known.body.get("archived_at") is None:
            join(ask, project["id"], person.id, project["role"])
    ask.change.update(record.id, {**record.body, "accepted_at": ask.change.now}, natural=None)
    ask.tell("invite.accepted", record.id, {})
    return shapes.user(ask, person)


def delete_invite(ask: Ask) -> dict[str, Any]:
    if verbs.found(ask).body["accepted_at"] is not None:
        raise BadRequest("An accepted invite cannot be deleted; delete the user.", code="invite_already_accepted")
    return verbs.delete(ask)


# groups
def delete_group(ask: Ask) -> dict[str, Any]:
    record = verbs.found(ask)
    for link in (*ask.records.all("group_user", record.id), *ask.records.all("project_group")):
        if record.id in (link.parent, link.natural):
            ask.change.delete(link.id)
    unassign_all(ask, record.id)
    verbs.gone(ask, record)
    return verbs.deleted(ask, record.id)


def rename_group(ask: Ask) -> dict[str, Any]:
    answer = verbs.update(ask)
    return {name: answer[name] for name in ("id", "created_at", "is_scim_managed", "name")}


def add_to_group(ask: Ask) -> dict[str, Any]:
    person = ask.user(ask.given["user_id"])
    for permissions, project in of_groups(ask, [ask.parent]):
        ask.may_give(permissions, project)
    if ask.records.find("group_user", ask.parent, person.id) is not None:
        raise Conflict(f"The user {person.id} is in the group already.", code="user_in_group")
    ask.change.create("group_user", ask.parent, {}, natural=person.id)
    ask.tell("group.updated", ask.parent, {"changes_requested": {"users_added": [person.id]}})
    return {"object": "group.user", "group_id": ask.parent, "user_id": person.id}


def retrieve_from_group(ask: Ask) -> dict[str, Any]:
    return shapes.group_user(ask, verbs.linked(ask))


def remove_from_group(ask: Ask) -> dict[str, Any]:
    ask.change.delete(verbs.linked(ask).id)
    ask.tell("group.updated", ask.parent, {"changes_requested": {"users_removed": [ask.id]}})
    return {"object": "group.user.deleted", "deleted": True}


# groups in projects
def grant_group(ask: Ask) -> dict[str, Any]:
    """role: the id or name of a role of the project; with one of its own the group is a member that has it, too."""
    group, project = ask.records.get("group", ask.given["group_id"], ask.organization), ask.parent
    role = role_named(ask, ask.given["role"], project, "role")
    ask.may_give(frozenset(role.body["permissions"]), project)
    if ask.records.find("project_group", project, group.id) is not None:
        raise Conflict(f"The group {group.id} has access to the project already.", code="group_in_project")
    plain = role.id.startswith("role-")
    body = {"role": role.body["name"] if plain else "member"}
    link = ask.change.create("project_group", project, body, natural=group.id)
    ask.tell("role.assignment.created", role.id, assigned_in(project, group.id, "group"))
    if not plain:
        assign(ask, group.id, "group", role, project, told=True)
    return shapes.project_group(ask, link)


def revoke_group(ask: Ask) -> dict[str, Any]:
    link = verbs.linked(ask)
    ask.may_give(PROJECT_ROLES.get(link.body["role"], NONE), ask.parent)
    unassign_all(ask, ask.id, ask.parent)
    ask.change.delete(link.id)
    ask.tell("role.assignment.deleted", f"role-project-{link.body['role']}", assigned_in(ask.parent, ask.id, "group"))
    return {"object": "project.group.deleted", "deleted": True}


def retrieve_group(ask: Ask) -> dict[str, Any]:
    """There are no groups of tenants here, so asking for such a one finds nothing."""
    if ask.query.choice("group_type", ("group", "tenant_group")) == "tenant_group":
        raise ask.missing()
    return verbs.retrieve_link(ask)


# service accounts
def create_service_account(ask: Ask) -> dict[str, Any]:
    given = verbs.kept(ask.given)
    alone = bool(given.get("create_service_account_only"))
    lifetime = given.get("expires_in_seconds")
    if alone and lifetime is not None:
        raise BadRequest(
            "'expires_in_seconds' is about the key that 'create_service_account_only' leaves out.",
            param="expires_in_seconds", code="invalid_value",
        )  # fmt: skip
    record = verbs.made(ask, {"name": given["name"], "role": "none" if alone else "member"})
    key = None if alone else new_key(ask, record, "Secret Key", None, lifetime)
    return {**shapes.service_account(ask, record), "api_key": key}


def create_service_account_key(ask: Ask) -> dict[str, Any]:
    given = verbs.kept(ask.given)
    record = ask.records.get("service_account", ask.ids["service_account_id"], ask.parent)
    if record.body["role"] == "none":
        raise BadRequest(
            "The service account has no role in the project, so a key of it would be refused. Give it a role first.",
            code="service_account_without_role",
        )
    return new_key(
        ask, record, given.get("name", "Secret Key"), given.get("scopes"), given.get("expires_in_seconds")
    )  # fmt: skip


def new_key(ask: Ask, owner: Record, name: str, wanted: list[str] | None, lifetime: int | None) -> dict[str, Any]:
    """The secret is shown here and never again."""
    end = None if lifetime is None else ask.change.now + lifetime
    key, secret = ask.directory.create_key(
        ask.change, "project", ask.parent, owner.id, name, scopes.checked(wanted), end
    )
    return {
        "object": "organization.project.service_account.api_key", "id": key["id"], "value": secret, "name": name,
        "created_at": key["created_at"], "expires_at": key["expires_at"],
    }  # fmt: skip


def delete_service_account(ask: Ask) -> dict[str, Any]:
    """With all its keys."""
    record = verbs.found(ask)
    ask.directory.revoke_keys_of(ask.change, record.id)
    verbs.gone(ask, record)
    return verbs.deleted(ask, record.id)
