"""Roles and who has them: those that are always there, which are a word in the record of a user or of a membership, and
those of one's own, each given by an assignment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ...accounts.records import Record, absent
from ...accounts.roles import NONE, OF_A_PROJECT, ORGANIZATION_ROLES, PROJECT_ROLES, checked
from ...errors import BadRequest, Conflict, NotFound
from . import shapes, verbs
from .kinds import Ask

IN_A_PROJECT = OF_A_PROJECT | PROJECT_ROLES["owner"]


# roles
def known(ask: Ask, project: str | None) -> list[Record]:
    """Every role of the organization, or of a project."""
    parent = project or ask.organization
    return [*shapes.predefined(ask.organization, project), *ask.records.all("role", parent)]


def role_named(ask: Ask, id: str, project: str | None, param: str | None = None) -> Record:
    """The role with that id, or a predefined one of that name. Raises NotFound, of a parameter BadRequest."""
    for role in shapes.predefined(ask.organization, project):
        if id == role.id or (param is not None and id == role.body["name"]):
            return role
    try:
        return ask.records.get("role", id, project or ask.organization)
    except NotFound as error:
        if param is None:
            raise
        raise BadRequest(error.message, param=param, code="invalid_value") from None


def list_roles(ask: Ask) -> dict[str, Any]:
    return verbs.paged(ask, known(ask, ask.project_id), lambda role: role.id)


def retrieve_role(ask: Ask) -> dict[str, Any]:
    return shapes.role(ask, role_named(ask, ask.id, ask.project_id))


def create_role(ask: Ask) -> dict[str, Any]:
    given = verbs.kept(ask.given)
    body: dict[str, Any] = {
        "name": new_name(ask, given["role_name"]), "description": given.get("description"),
        "permissions": permissions(ask, given["permissions"]), "updated_at": ask.change.now,
        "created_by": ask.who.owner_id,
    }  # fmt: skip
    record = ask.change.create("role", ask.parent, body, natural=body["name"])
    ask.tell("role.created", record.id, {
        "role_name": body["name"], "permissions": body["permissions"], "resource_id": ask.parent,
        "resource_type": shapes.resource_type(ask, record),
    })  # fmt: skip
    return shapes.role(ask, record)


def new_name(ask: Ask, name: str) -> str:
    if any(role.body["name"] == name for role in shapes.predefined(ask.organization, ask.project_id)):
        raise Conflict(f"There is a role {name} already.")
    return name


def permissions(ask: Ask, wanted: list[str]) -> list[str]:
    """Those of a role, if they exist, make sense where it is, and the caller has them."""
    found = checked(wanted)
    for name in found:
        if ask.project_id is not None and name not in IN_A_PROJECT:
            raise BadRequest(f"{name} is no permission of a project.", param="permissions", code="invalid_value")
    ask.may_give(frozenset(found), ask.project_id)
    return found


def own(ask: Ask) -> Record:
    """The role the call is about, which is to be changed. Raises BadRequest for a predefined one."""
    role = role_named(ask, ask.id, ask.project_id)
    if role.id.startswith("role-"):
        raise BadRequest("Predefined roles cannot be changed or deleted.", code="predefined_role")
    ask.may_give(frozenset(role.body["permissions"]), ask.project_id)
    return role


def update_role(ask: Ask) -> dict[str, Any]:
    role, given = own(ask), verbs.kept(ask.given)
    body, changes = {**role.body, "updated_at": ask.change.now}, dict[str, Any]()
    if "role_name" in given:
        body["name"] = changes["role_name"] = new_name(ask, given["role_name"])
    if "description" in given:
        body["description"] = changes["description"] = given["description"]
    if "permissions" in given:
        body["permissions"] = permissions(ask, given["permissions"])
        before, after = set(role.body["permissions"]), set(body["permissions"])
        changes |= {"permissions_added": sorted(after - before), "permissions_removed": sorted(before - after)}
    ask.change.update(role.id, body, natural=body["name"])
    ask.tell("role.updated", role.id, {"changes_requested": changes})
    return shapes.role(ask, role._replace(body=body))


def delete_role(ask: Ask) -> dict[str, Any]:
    """Whoever had it has it no more."""
    role = own(ask)
    for assignment in ask.records.all("role_assignment"):
        if assignment.body["role_id"] == role.id:
            ask.change.delete(assignment.id)
    ask.change.delete(role.id)
    ask.tell("role.deleted", role.id, {})
    return {"object": "role.deleted", "id": role.id, "deleted": True}


# who has them
def assign(
    ask: Ask, principal: str, kind: str, role: Record, project: str | None = None, told: bool = False
) -> None:  # fmt: skip
    """Gives a role of one's own to a user or group. Raises Conflict if it has it, Forbidden if it is more than the
    caller has."""
    ask.may_give(frozenset(role.body["permissions"]), project)
    natural = f"{role.id}/{project or ''}"
    if ask.records.find("role_assignment", principal, natural) is not None:
        raise Conflict(f"The {kind} has that role already.", code="role_already_assigned")
    ask.change.create("role_assignment", principal, {"role_id": role.id, "project_id": project}, natural=natural)
    if not told:
        ask.tell("role.assignment.created", role.id, assigned_in(project or ask.organization, principal, kind))


def unassign(ask: Ask, principal: str, kind: str, role: Record, project: str | None) -> None:
    """Raises NotFound if it was not given to that very user or group."""
    link = ask.records.find("role_assignment", principal, f"{role.id}/{project or ''}")
    if link is None:
        raise absent("role", role.id)
    ask.may_give(frozenset(role.body["permissions"]), project)
    ask.change.delete(link.id)
    ask.tell("role.assignment.deleted", role.id, assigned_in(project or ask.organization, principal, kind))


def unassign_all(ask: Ask, principal: str, project: str | None = None) -> None:
    """All roles that a user or group was given, or those in one project."""
    for assignment in ask.records.all("role_assignment", principal):
        if project is None or assignment.body["project_id"] == project:
            ask.change.delete(assignment.id)


def assigned_in(resource: str, principal: str, kind: str) -> dict[str, Any]:
    """What the audit log tells of an assignment."""
    where = shapes.PROJECT if resource.startswith("proj_") else shapes.ORGANIZATION
    return {"principal_id": principal, "principal_type": kind, "resource_id": resource, "resource_type": where}


def of_groups(ask: Ask, groups: Iterable[str]) -> Iterator[tuple[frozenset[str], str | None]]:
    """(permissions, project) of all roles that groups have, in the organization (None) and in projects."""
    inside = ask.records.all("project_group")
    for group in groups:
        for link in inside:
            if link.natural == group:
                yield PROJECT_ROLES.get(link.body["role"], NONE), link.parent
        for assignment in ask.records.all("role_assignment", group):
            role = ask.seen("role", assignment.body["role_id"])
            if role is not None:
                yield frozenset(role.body["permissions"]), assignment.body["project_id"]


def keep_an_owner(ask: Ask, user: Record, role: str | None) -> None:
    """The last owner stays one: nobody could make another."""
    if user.body["role"] == "owner" and role != "owner":
        users = ask.records.all("user", ask.organization)
        if not any(other.body["role"] == "owner" and other.id != user.id for other in users):
            raise BadRequest("The last owner of the organization must remain one.", code="last_owner")


class Holder:
    """The user or group that a call about assigned roles is about, in the organization or in a project. Its predefined
    role stands in `record`, in the organization the user itself, in a project its membership."""

    def __init__(self, ask: Ask) -> None:
        """Raises NotFound."""
        self.ask, self.project = ask, ask.project_id
        self.kind = "user" if "user_id" in ask.ids else "group"
        self.id = ask.ids[f"{self.kind}_id"]
        self.self = ask.user(self.id) if self.kind == "user" else ask.records.get("group", self.id, ask.organization)
        self.record: Record | None = self.self if self.kind == "user" else None
        if self.project is not None:
            self.record = ask.records.find(f"project_{self.kind}", self.project, self.id)
            if self.record is None and ask.row.verb != "list":
                raise absent(f"{self.kind} in the project", self.id)

    def roles(self) -> dict[str, tuple[Record, list[dict[str, str]]]]:
        """By id: every role it has, and from whom."""
        found: dict[str, tuple[Record, list[dict[str, str]]]] = {}
        groups = self.ask.directory.roles.index.groups.get(self.id, ()) if self.kind == "user" else ()
        for principal, kind in ((self.id, self.kind), *((group, "group") for group in sorted(groups))):
            for role in self._of(principal, kind):
                found.setdefault(role.id, (role, []))[1].append({"principal_type": kind, "principal_id": principal})
        return found

    def _of(self, principal: str, kind: str) -> Iterator[Record]:
        record = self.record
        if principal != self.id:
            record = self.ask.records.find("project_group", self.project, principal) if self.project else None
        if record is not None:
            where = "organization" if self.project is None else "project"
            id = f"role-{where}-{record.body['role']}"
            yield from (role for role in shapes.predefined(self.ask.organization, self.project) if role.id == id)
        for assignment in self.ask.records.all("role_assignment", principal):
            role = self.ask.seen("role", assignment.body["role_id"])
            if role is not None and assignment.body["project_id"] == self.project:
                yield role

    def set(self, role: str) -> None:
        """Gives it another predefined role."""
        if self.record is None:
            raise BadRequest("The predefined roles of the organization are for users.", param="role_id")
        roles = ORGANIZATION_ROLES if self.project is None else PROJECT_ROLES
        before = self.record.body["role"]
        self.ask.may_give(roles.get(before, NONE) | roles[role], self.project)
        if self.project is None and before == "owner":
            keep_an_owner(self.ask, self.record, role)
        self.ask.change.update(self.record.id, {**self.record.body, "role": role})

    def shown(self) -> dict[str, Any]:
        """As the answer to an assignment shows it."""
        if self.kind == "user":
            return {"user": shapes.user(self.ask, self.self)}
        return {"group": {
            "object": "group", "id": self.id, "name": self.self.body["name"], "created_at": self.self.created_at,
            "scim_managed": False,
        }}  # fmt: skip


def give_role(ask: Ask) -> dict[str, Any]:
    holder = Holder(ask)
    role = role_named(ask, ask.given["role_id"], holder.project, "role_id")
    if role.id.startswith("role-"):
        if holder.record is not None and holder.record.body["role"] == role.body["name"]:
            raise Conflict(f"The {holder.kind} has that role already.", code="role_already_assigned")
        holder.set(role.body["name"])
        resource = holder.project or ask.organization
        ask.tell("role.assignment.created", role.id, assigned_in(resource, holder.id, holder.kind))
    else:
        assign(ask, holder.id, holder.kind, role, holder.project)
    return {"object": f"{holder.kind}.role", "role": shapes.role(ask, role), **holder.shown()}


def take_role(ask: Ask) -> dict[str, Any]:
    """Who loses the role of an owner is a member; who loses another has no access to the project any more, and in the
    organization administers nothing."""
    holder = Holder(ask)
    role = role_named(ask, ask.ids["role_id"], holder.project)
    if not role.id.startswith("role-"):
        unassign(ask, holder.id, holder.kind, role, holder.project)
    else:
        if holder.record is None or holder.record.body["role"] != role.body["name"]:
            raise absent("role", role.id)
        if role.body["name"] == "owner" or (holder.project is None and role.body["name"] != "member"):
            holder.set("member")
        elif holder.project is not None:
            unassign_all(ask, holder.id, holder.project)
            ask.change.delete(holder.record.id)
        else:
            raise BadRequest("Every user of the organization is at least a member.", code="predefined_role")
        resource = holder.project or ask.organization
        ask.tell("role.assignment.deleted", role.id, assigned_in(resource, holder.id, holder.kind))
    return {"object": f"{holder.kind}.role.deleted", "deleted": True}


def list_given(ask: Ask) -> dict[str, Any]:
    items = list(Holder(ask).roles().values())
    return verbs.pages(ask, items, lambda item: item[0].id, lambda item: show_given(ask, *item))


def retrieve_given(ask: Ask) -> dict[str, Any]:
    found = Holder(ask).roles().get(ask.ids["role_id"])
    if found is None:
        raise absent("role", ask.ids["role_id"])
    return show_given(ask, *found)


def show_given(ask: Ask, role: Record, sources: list[dict[str, str]]) -> dict[str, Any]:
    own = not role.id.startswith("role-")
    return {
        **shapes.role(ask, role), "assignment_sources": sources, "created_at": role.created_at if own else None,
        "updated_at": role.body.get("updated_at"), "created_by": role.body.get("created_by"),
        "created_by_user_obj": None, "metadata": {},
    }  # fmt: skip
