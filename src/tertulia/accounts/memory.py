"""What calls need to know of keys, projects, their limits and roles, in memory: rows of the database go in, in the
order of their revisions. It knows no SQL.

Objects that others hold (Organization, Project, Principal) are changed in place and live as long as the process.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable
from typing import Any

import msgspec

from ..core import Principal
from .projects import FIELDS, ModelPermissions, Organization, Project, RateLimit, SpendLimit
from .records import Record
from .roles import KINDS as ROLE_KINDS
from .roles import Roles

log = logging.getLogger("tertulia.accounts")

NANO_PER_CENT = 10_000_000
LIMIT_KINDS = ("rate_limit", "spend_limit", "model_permissions")
KINDS = ("project", *LIMIT_KINDS, *ROLE_KINDS)

# hash, id, kind, project, owner, scopes (JSON), when it expires, was revoked and was last used
KeyRow = tuple[bytes, str, str, str | None, str | None, str | None, int | None, int | None, int | None]


class Memory:
    """Keys to principals, and what principals may do."""

    def __init__(self) -> None:
        self.organization = Organization("")
        self.projects: dict[str, Project] = {}
        self.roles = Roles()
        self.keys: dict[bytes, tuple[bytes, Principal]] = {}  # by keyed hash, which is there to be compared
        self.gone: dict[bytes, str] = {}  # hashes of keys that are "expired" or "revoked"
        self._expiring: list[tuple[int, bytes]] = []  # a heap: when, and which key
        self._limits: dict[str, tuple[str, str | None]] = {}  # of a limit's record: parent and natural name
        self._scopes: dict[str, frozenset[str]] = {}  # one object for all keys that have the same

    def take_records(self, found: Iterable[tuple[Record, bool]], whole: bool) -> None:
        """(record, whether it is deleted), oldest first; whole: these are all there are."""
        records = list(found)
        if whole:
            self.roles = Roles()  # who looks meanwhile sees the old one
            self._limits = {}
            self._clear(self.organization)
            for project in self.projects.values():
                self._clear(project)
        for record, _ in records:
            if record.kind == "project":
                self._take_project(record)
        roles = self.roles
        for record, deleted in records:
            if record.kind in LIMIT_KINDS:
                try:
                    self._take_limit(record, deleted)
                except (KeyError, TypeError, ValueError, OverflowError):  # one bad row must not hide all other changes
                    log.error("the %s %s cannot be understood, and is not in force", record.kind, record.id)
            elif record.kind in ROLE_KINDS:
                roles.remove(record) if deleted else roles.put(record)

    def _take_project(self, record: Record) -> None:
        project = self.projects.get(record.id)
        if project is None:
            project = self.projects[record.id] = Project(record.id, self.organization)
        project.name = str(record.body.get("name") or "")
        project.archived_at = record.body.get("archived_at")
        project.version += 1

    def _clear(self, limited: Organization | Project) -> None:
        limited.spend_limit = None
        if isinstance(limited, Project):
            limited.rate_limits, limited.models = {}, None
        limited.version += 1

    def _take_limit(self, record: Record, deleted: bool) -> None:
        parent, natural = self._limits.pop(record.id, (record.parent, record.natural))
        limited = self.organization if parent == self.organization.id else self.projects.get(parent)
        if limited is None:
            log.warning("%s is of %s, which is not there", record.id, parent)
            return
        if not deleted:
            self._limits[record.id] = record.parent, record.natural
        body = None if deleted else record.body
        if record.kind == "spend_limit":
            limited.spend_limit = spend_limit_of(body) if body is not None else None
        elif isinstance(limited, Project) and record.kind == "rate_limit":
            limits = {model: limit for model, limit in limited.rate_limits.items() if model != natural}
            if body is not None:
                limits[record.natural or ""] = rate_limit_of(body)
            limited.rate_limits = limits
        elif isinstance(limited, Project):
            limited.models = permissions_of(body) if body is not None else None
        limited.version += 1

    def take_keys(self, rows: Iterable[KeyRow], whole: bool, now: float) -> None:
        """Keys that are new or have changed; whole: these are all there are."""
        before = self.keys
        known: dict[bytes, tuple[bytes, Principal]] = {} if whole else before
        gone: dict[bytes, str] = {} if whole else self.gone
        organization, projects, expiring = self.organization.id, self.projects, self._expiring
        for hash, id, kind, project, owner, scopes, expires_at, revoked_at, used in rows:
            hash = bytes(hash)
            if revoked_at is not None or (expires_at is not None and expires_at <= now):
                gone[hash] = "revoked" if revoked_at is not None else "expired"
                known.pop(hash, None)
                continue
            there = before.get(hash)
            if there is not None:
                hash, who = there
            else:
                who = Principal(id, organization, project or "", kind)
                if project is not None:
                    who.account = account = projects.get(project)
                    if account is None:
                        log.warning("the key %s is of %s, which is not there", id, project)
                        continue
                    who.project = account.id  # one string for all its keys
                who.kind = "admin" if kind == "admin" else "project"
                who.used = used or 0
            who.owner_id = owner
            who.scopes = self._scopes_of(scopes) if scopes is not None else None
            who.expires_at = expires_at
            if expires_at is not None:
                heapq.heappush(expiring, (expires_at, hash))
            known[hash] = there or (hash, who)
        self.keys, self.gone = known, gone

    def _scopes_of(self, text: str) -> frozenset[str]:
        found = self._scopes.get(text)
        if found is None:
            found = self._scopes[text] = frozenset(msgspec.json.decode(text, type=list[str]))
        return found

    def expire(self, now: float) -> bool:
        """Takes out the keys that have expired; whether there were any."""
        heap, any_gone = self._expiring, False
        while heap and heap[0][0] <= now:
            at, hash = heapq.heappop(heap)
            known = self.keys.get(hash)
            if known is not None and known[1].expires_at == at:
                self.gone[hash] = "expired"
                del self.keys[hash]
                any_gone = True
        return any_gone


def rate_limit_of(body: dict[str, Any]) -> RateLimit:
    return RateLimit(
        body.get("max_requests_per_1_minute"), body.get("max_tokens_per_1_minute"),
        body.get("max_requests_per_1_day"), body.get("max_concurrent_requests"), observed_of(body.get("observe_only")),
    )  # fmt: skip


def observed_of(given: bool | list[str] | None) -> frozenset[str]:
    """The kinds of limits that a record has observe only: all, none, or those of the fields that it names."""
    return frozenset(FIELDS[name] for name in (given if isinstance(given, list) else FIELDS if given else ()))


def spend_limit_of(body: dict[str, Any]) -> SpendLimit:
    return SpendLimit(round(body["threshold_amount"] * NANO_PER_CENT), bool(body.get("observe_only")))


def permissions_of(body: dict[str, Any]) -> ModelPermissions:
    return ModelPermissions(body["mode"] == "allow_list", frozenset(body["model_ids"]))
