"""What a row of the table is made of, and one administrative call on its way through a verb. It knows HTTP's methods,
nothing else of HTTP, and no SQL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Meta

from ...accounts import scopes
from ...accounts.change import Change
from ...accounts.directory import Directory
from ...accounts.projects import Organization, Project, RateLimit, SpendLimit
from ...accounts.records import Record, Records, absent
from ...core import Principal
from ...errors import BadRequest, NotFound
from ...gateway.names import Names
from ..decode import decode
from ..pages import Paging, Query

# what a terminal shows as it is: no controls, and nothing that turns or hides the text around it
PLAIN = r"^[^\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]*$"
VISIBLE = "control characters and invisible ones are not allowed"  # what a refusal says instead of the pattern
NO_NULL = "a null character is in it"
Name = Annotated[str, Meta(min_length=1, max_length=255, pattern=PLAIN, description=VISIBLE)]
Text = Annotated[str, Meta(max_length=2048, pattern=r"^[^\x00]*$", description=NO_NULL)]
Id = Annotated[str, Meta(min_length=1, max_length=128, pattern=PLAIN, description=VISIBLE)]
PART = r"[^@\s\x00-\x1f\x7f<>()\[\],;:\\\"]"  # of an address; there may be more than ASCII in it
Email = Annotated[
    str,
    Meta(
        max_length=320, pattern=rf"^{PART}+@[^.]{PART}*$", description="this is not a valid e-mail address",
    ),
]  # fmt: skip
Lifetime = Annotated[int, Meta(ge=1, le=3_155_760_000)]  # seconds; a hundred years
Scopes = Annotated[list[Annotated[str, Meta(max_length=128)]], Meta(max_length=128)]


class Absent(msgspec.Struct):
    """The type of a parameter that OpenAI knows and that does nothing here: it is refused unless it is null."""


Fields = Mapping[str, Any]  # parameters of a body and their types; one that takes None may be left out
PLAIN_PAGES = Paging()
ID = re.compile(r"[!-~]{1,600}$", re.ASCII)  # rate limits have the names of models


class World(NamedTuple):
    """What the verbs need to know beyond what is administered."""

    directory: Directory
    names: Names
    defaults: Callable[[], RateLimit]  # what holds for a project that has no rate limit of its own
    reached: Callable[[Organization | Project, SpendLimit], bool]  # whether such a limit refuses its calls now


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A row of the table: records of one kind, where they are, what may be done with them, and how they are shown.

    path ends in the parameter for one of them, unless it is single: then there is one of its parent or none. acts: by
    the SDK's name of a verb; takes: the parameters of its body; asks: what the list can be asked for besides its page.
    event and told: the family of audit events, and what they tell of the body under which name.
    """

    sdk: str
    path: str
    record: str
    object: str
    show: Callable[[Ask, Record], dict[str, Any]]
    acts: Mapping[str, Act]
    takes: Mapping[str, Fields] = field(default_factory=dict)
    asks: tuple[str, ...] = ()
    paging: Paging = PLAIN_PAGES
    event: str = ""
    told: Mapping[str, str] = field(default_factory=dict)
    natural: Callable[[dict[str, Any]], str | None] = lambda body: None
    single: bool = False

    def rows(self) -> Iterator[Row]:
        for verb, act in self.acts.items():
            method, one, tail = WAYS[verb]
            where = self.path if one or self.single else self.path.rpartition("/")[0]
            yield Row(self, verb, method, where + tail, act, body_of(self.takes.get(verb, {})))


WAYS = {  # verb: method, whether it is about one of them, what follows in the path
    "create": ("POST", False, ""), "list": ("GET", False, ""), "retrieve": ("GET", True, ""),
    "update": ("POST", True, ""), "delete": ("DELETE", True, ""), "archive": ("POST", True, "/archive"),
    "list_rate_limits": ("GET", False, ""), "update_rate_limit": ("POST", True, ""),
    "accept": ("POST", True, "/accept"), "rotate": ("POST", True, "/rotate"),
}  # fmt: skip
OWN = frozenset({"accept", "rotate"})  # verbs that are Tertulia's and not the SDK's


class Row(NamedTuple):
    """One verb of one kind."""

    kind: Kind
    verb: str
    method: str
    path: str
    act: Act
    body: Body

    @property
    def writes(self) -> bool:
        return self.method != "GET"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those of the query string."""
        return (*self.kind.paging.parameters, *self.kind.asks) if self.verb.startswith("list") else ()

    @property
    def sdk(self) -> str | None:
        """The name of the method in the SDK, after client.admin.organization."""
        own = self.verb in OWN or (self.kind.sdk == "projects.api_keys" and self.verb == "create")
        return None if own else f"{self.kind.sdk}.{self.verb}"


class Body(NamedTuple):
    """How the body of a row is read."""

    decoder: msgspec.json.Decoder[Any]
    refused: tuple[str, ...]

    def read(self, raw: bytes) -> dict[str, Any]:
        """The parameters that are given; null stands for None. Raises BadRequest."""
        found = decode(self.decoder, raw.strip() or b"{}")
        given = {name: value for name in found.__struct_fields__ if (value := getattr(found, name)) is not UNSET}
        for name in self.refused:
            if given.pop(name, None) is not None:
                raise BadRequest(
                    f"Unsupported parameter: '{name}' is not available on this server.",
                    param=name, code="unsupported_parameter",
                )  # fmt: skip
        return given


def body_of(fields: Fields) -> Body:
    def optional(kind: Any) -> bool:
        return kind is Absent or type(None) in getattr(kind, "__args__", ())

    made = [
        (name, Any | msgspec.UnsetType if kind is Absent else kind | msgspec.UnsetType, UNSET)
        if optional(kind) else (name, kind)
        for name, kind in sorted(fields.items(), key=lambda pair: optional(pair[1]))
    ]  # fmt: skip
    shape = msgspec.defstruct("Body", made, forbid_unknown_fields=True)
    refused = tuple(name for name, kind in fields.items() if kind is Absent)
    return Body(msgspec.json.Decoder(shape), refused)


class Ask:
    """One call: by whom, about what, with what. A verb that writes has a change, which is kept when it returns."""

    def __init__(
        self, world: World, row: Row, who: Principal, ids: dict[str, str], query: Query, given: dict[str, Any]
    ) -> None:
        self.world, self.directory, self.row, self.kind = world, world.directory, row, row.kind
        self.who, self.ids, self.query, self.given = who, ids, query, given
        self.changing: Change | None = None
        self._seen: dict[str, Record | None] = {}

    @property
    def change(self) -> Change:
        assert self.changing is not None, "only a verb that writes may change something"
        return self.changing

    @property
    def records(self) -> Records:
        """What is there, within the change if there is one."""
        return self.directory.records if self.changing is None else self.changing.records

    @property
    def id(self) -> str:
        """Of the one object that the call is about."""
        return self.ids[self.kind.path.rpartition("/{")[2].rstrip("}").partition(":")[0]]

    @property
    def project_id(self) -> str | None:
        return self.ids.get("project_id")

    @property
    def organization(self) -> str:
        return self.directory.organization.id

    @property
    def parent(self) -> str:
        """What the records of this kind belong to."""
        if self.kind.record == "project":
            return self.organization
        if self.kind.record == "group_user":
            return self.ids["group_id"]
        return self.project_id or self.organization

    def account(self, project: str) -> Project:
        """What calls know of a project; another gateway may have made it just now."""
        found = self.directory.projects.get(project)
        if found is None:
            self.directory.look()
            found = self.directory.projects[project]
        return found

    def enter(self) -> None:
        """Raises NotFound if the project or group of the path is not there, BadRequest if it is to be changed and
        archived."""
        if self.project_id is not None:
            project = self.records.get("project", self.project_id, self.organization)
            if self.row.writes and project.body.get("archived_at") is not None:
                raise BadRequest("Archived projects cannot be used or updated.", code="project_archived")
        if "group_id" in self.ids:
            self.records.get("group", self.ids["group_id"], self.organization)

    def may_give(self, permissions: frozenset[str], project: str | None = None) -> None:
        """Nobody can give, to himself or to others, what he has not. Raises Forbidden."""
        missing = permissions - self.directory.roles.permissions(self.who.owner_id, project)
        if missing:
            raise scopes.missing(min(missing))

    def seen(self, kind: str, id: str) -> Record | None:
        """The record of that id, if there is one; looked up once for a whole page."""
        if id not in self._seen:
            try:
                self._seen[id] = self.records.get(kind, id)
            except NotFound:
                self._seen[id] = None
        return self._seen[id]

    def user(self, id: str) -> Record:
        """Raises NotFound."""
        return self.records.get("user", id, self.organization)

    def tell(self, event: str, resource: str, details: dict[str, Any]) -> None:
        """An entry of the audit log."""
        project = resource if self.kind.record == "project" else self.project_id
        self.change.audit(event, resource, {"id": resource, **details}, project)

    def missing(self) -> Exception:
        """The error for what the call is about, if it is not there."""
        return absent(self.kind.record, self.id)


Act = Callable[[Ask], dict[str, Any]]
