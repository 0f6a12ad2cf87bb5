"""Who may administer what: the roles of users in the organization and in projects, by themselves or through groups, and
the permissions these roles give. A permission is the name of a part of the Admin API and `.read` or `.write`.

    owner     of the organization: everything; of a project: everything in that project
    reader    of the organization: reads everything
    member    administers nothing
    viewer    of a project: looks at everything in that project; a key of such a user reads and does nothing else
    a role of one's own (record kind `role`, given by `role_assignment`): its permissions, there where it is assigned
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core import Principal
from ..errors import BadRequest
from . import scopes
from .records import Record

PARTS = frozenset({
    "api.groups", "api.roles", "api.organization.admin_api_keys", "api.organization.audit_logs",
    "api.organization.invites", "api.organization.projects", "api.organization.spend_alerts",
    "api.organization.spend_limit", "api.organization.usage", "api.organization.users",
    "api.organization.projects.api_keys", "api.organization.projects.groups",
    "api.organization.projects.model_permissions", "api.organization.projects.rate_limits",
    "api.organization.projects.roles", "api.organization.projects.service_accounts",
    "api.organization.projects.spend_alerts", "api.organization.projects.spend_limit",
    "api.organization.projects.users",
})  # fmt: skip
PERMISSIONS = frozenset(f"{part}.{verb}" for part in PARTS for verb in ("read", "write"))
OF_A_PROJECT = frozenset(name for name in PERMISSIONS if name.startswith("api.organization.projects."))
READING = frozenset(name for name in PERMISSIONS if name.endswith(".read"))
NONE: frozenset[str] = frozenset()
ORGANIZATION_ROLES = {"owner": PERMISSIONS, "reader": READING, "member": NONE}
PROJECT_ROLES = {"owner": OF_A_PROJECT | {"api.organization.projects.read", "api.organization.projects.write"},
                 "member": NONE,
                 "viewer": frozenset(name for name in OF_A_PROJECT | {"api.organization.projects.read"}
                                     if name.endswith(".read"))}  # fmt: skip
KINDS = ("user", "role", "role_assignment", "group_user", "project_user", "project_group")
ADMIN_PATHS = ("/v1/organization/", "/v1/projects/")


def checked(permissions: Iterable[str]) -> list[str]:
    """The permissions of a role as they are kept. Raises BadRequest that names the first unknown one."""
    known = sorted(set(permissions))
    for name in known:
        if name not in PERMISSIONS:
            raise BadRequest(f"Unknown permission: '{name[:96]}'.", param="permissions", code="invalid_value")
    return known


def needed(method: str, path: str) -> tuple[str, str | None]:
    """(the permission that a request of the Admin API needs, the project it is about if it is about one)."""
    verb = "read" if method in ("GET", "HEAD", "OPTIONS") else "write"
    first, *rest = path.removeprefix("/v1/").rstrip("/").split("/")
    if first == "projects":
        return f"api.organization.projects.roles.{verb}", rest[0] if rest else None
    part, project = rest[0] if rest else "", None
    if part == "projects" and len(rest) > 1:
        project = rest[1]
        own = len(rest) < 3 or rest[2] == "archive"
        return (f"api.organization.projects.{verb}" if own else f"api.organization.projects.{rest[2]}.{verb}"), project
    if part == "roles" or (part in ("users", "groups") and len(rest) > 2 and rest[2] == "roles"):
        return f"api.roles.{verb}", None
    if part == "groups":
        return f"api.groups.{verb}", None
    return f"api.organization.{'usage' if part == 'costs' else part}.{verb}", None


class Index:
    """What of the records decides access, in the order in which it is asked for."""

    def __init__(self, kept: dict[str, dict[str, Record]]) -> None:
        self.role_of = {record.id: str(record.body.get("role", "member")) for record in kept["user"].values()}
        self.permissions = {
            record.id: frozenset(record.body.get("permissions", ())) for record in kept["role"].values()
        }
        self.groups: dict[str, set[str]] = {}  # of a user
        for record in kept["group_user"].values():
            self.groups.setdefault(record.natural or "", set()).add(record.parent)
        self.inside: dict[tuple[str, str], str] = {}  # (project, user or group): role there
        for record in (*kept["project_user"].values(), *kept["project_group"].values()):
            self.inside[record.parent, record.natural or ""] = str(record.body.get("role", "member"))
        self.assigned: dict[str, list[tuple[str, str | None]]] = {}  # of a user or group: (role, project)
        for record in kept["role_assignment"].values():
            given = (str(record.body.get("role_id", "")), record.body.get("project_id"))
            self.assigned.setdefault(record.parent, []).append(given)


class Roles:
    """The records that decide access, in memory."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Record]] = {kind: {} for kind in KINDS}
        self._index: Index | None = None  # made when it is asked for

    def put(self, record: Record) -> None:
        """A record is new or changed."""
        self._kept[record.kind][record.id] = record
        self._index = None

    def remove(self, record: Record) -> None:
        self._kept[record.kind].pop(record.id, None)
        self._index = None

    @property
    def index(self) -> Index:
        found = self._index
        if found is None:
            found = self._index = Index({kind: dict(kept) for kind, kept in self._kept.items()})
        return found

    def owners(self) -> list[str]:
        """The users who own the organization."""
        return [user for user, role in self.index.role_of.items() if role == "owner"]

    def user(self, id: str | None) -> Record | None:
        return self._kept["user"].get(id) if id else None

    def permissions(self, user: str | None, project: str | None = None) -> frozenset[str]:
        """All that a user may do in the organization, and with project also there. None is who owns all this."""
        if user is None:
            return PERMISSIONS
        index = self.index
        role = index.role_of.get(user)
        if role is None:  # deleted
            return NONE
        found = ORGANIZATION_ROLES.get(role, NONE)
        for principal in (user, *index.groups.get(user, ())):
            if project is not None:
                found |= PROJECT_ROLES.get(index.inside.get((project, principal), ""), NONE)
            for id, where in index.assigned.get(principal, ()):
                if where is None or where == project:
                    found |= index.permissions.get(id, NONE)
        return found

    def may_enter(self, user: str, project: str) -> bool:
        """Whether a user has access to a project: by itself, through a group, or as an owner of the organization."""
        index = self.index
        role = index.role_of.get(user)
        if role is None:
            return False
        return role == "owner" or any(
            (project, principal) in index.inside for principal in (user, *index.groups.get(user, ()))
        )

    def check_use(self, who: Principal, method: str, path: str) -> None:
        """Raises Forbidden if the owner of this project key is only to look, and that is more."""
        owner = who.owner_id
        if owner is None or not owner.startswith("user-"):
            return
        scope = scopes.needed(method, path)
        if scope is not None and not scope.endswith(".read") and self._only_views(owner, who.project):
            raise scopes.missing(scope)

    def _only_views(self, user: str, project: str) -> bool:
        index = self.index
        if index.role_of.get(user) == "owner":
            return False
        principals = (user, *index.groups.get(user, ()))
        return {index.inside.get((project, principal), "viewer") for principal in principals} == {"viewer"}

    def check(self, who: Principal, method: str, path: str) -> None:
        """Raises Forbidden if the owner of this admin key may not do that."""
        permission, project = needed(method, path)
        held = self.permissions(who.owner_id, project)
        # what has no permission of its own (there is no such path) is for who may do everything, and a 404 to them
        if permission not in held and not (permission not in PERMISSIONS and held >= _all_of(permission)):
            raise scopes.missing(permission)


def _all_of(permission: str) -> frozenset[str]:
    return READING if permission.endswith(".read") else PERMISSIONS
