"""What the hot path knows of a project: who may ask for which model, and how much. The directory keeps these objects up
to date in place, so whoever holds one sees a change at its next look.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .limits import CONCURRENT, DAILY, NONE, REQUESTS, TOKENS

# the fields of a rate limit's record, by which it can be said that some only observe, and the kinds they are of
FIELDS = {
    "max_requests_per_1_minute": REQUESTS, "max_tokens_per_1_minute": TOKENS, "max_requests_per_1_day": DAILY,
    "max_concurrent_requests": CONCURRENT,
}  # fmt: skip


class RateLimit(NamedTuple):
    """Of one project and model. None: the server's own setting. observed: the kinds that refuse nothing."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_per_day: int | None = None
    concurrent_requests: int | None = None
    observed: frozenset[str] = NONE


class SpendLimit(NamedTuple):
    """nano-dollars a calendar month (UTC)."""

    amount: int
    observe_only: bool = False


class ModelPermissions(NamedTuple):
    """Which models a project may ask: those listed, or all but those."""

    allow: bool
    models: frozenset[str]

    def permits(self, model: str) -> bool:
        return (model in self.models) is self.allow


class Organization:
    """All projects of one organization together."""

    __slots__ = ("id", "name", "spend_limit", "state", "version")

    def __init__(self, id: str, name: str = "") -> None:
        self.id, self.name = id, name
        self.spend_limit: SpendLimit | None = None
        self.version = 0  # rises with every change of the above
        self.state: Any = None  # what admit counts; opaque to everyone else


class Project:
    """One project."""

    __slots__ = (
        "archived_at",
        "id",
        "models",
        "name",
        "organization",
        "rate_limits",
        "spend_limit",
        "state",
        "version",
    )

    def __init__(self, id: str, organization: Organization, name: str = "") -> None:
        self.id, self.organization, self.name = id, organization, name
        self.archived_at: int | None = None
        self.rate_limits: dict[str, RateLimit] = {}  # by model
        self.spend_limit: SpendLimit | None = None
        self.models: ModelPermissions | None = None  # None: all
        self.version = 0  # rises with every change of the above
        self.state: Any = None  # what admit counts; opaque to everyone else
