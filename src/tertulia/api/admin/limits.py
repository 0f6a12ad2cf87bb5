"""Rate limits of a project, model by model. Every model that can be asked is in the list, with the limits in force,
whether somebody has set them or they are the server's own.
"""

from __future__ import annotations

from typing import Any

from ...accounts.memory import rate_limit_of
from ...accounts.projects import RateLimit
from ...errors import NotFound
from . import shapes, verbs
from .kinds import Ask

PREFIX = "rl-"


def in_force(ask: Ask) -> dict[str, RateLimit]:
    """By model."""
    project, defaults = ask.account(ask.parent), ask.world.defaults()
    permitted = project.models
    models = {card.id for card in ask.world.names.listed() if permitted is None or permitted.permits(card.id)}
    found = {model: defaults for model in models}
    for record in ask.records.all("rate_limit", ask.parent):
        found[record.natural or ""] = filled(rate_limit_of(record.body), defaults)
    return found


def filled(limit: RateLimit, defaults: RateLimit) -> RateLimit:
    """With the server's own where nothing is set; what only observes on this server does so here, too."""
    values = {name: own for name, own in defaults._asdict().items() if getattr(limit, name) is None}
    return limit._replace(**values, observed=limit.observed | defaults.observed)


def list_rate_limits(ask: Ask) -> dict[str, Any]:
    found = in_force(ask)
    return verbs.pages(ask, list(found), lambda model: PREFIX + model, lambda one: shapes.rate_limit(one, found[one]))


def update_rate_limit(ask: Ask) -> dict[str, Any]:
    """What is null is the server's own again."""
    found, model = in_force(ask), ask.id.removeprefix(PREFIX)
    if not ask.id.startswith(PREFIX) or model not in found:
        raise NotFound(f"No such rate limit: {ask.id[:64]}")
    record = ask.records.find("rate_limit", ask.parent, model)
    body = {**(record.body if record is not None else {}), **ask.given}
    if record is None:
        ask.change.create("rate_limit", ask.parent, body, natural=model)
    else:
        ask.change.update(record.id, body)
    ask.tell("rate_limit.updated", ask.id, {"changes_requested": ask.given})
    return shapes.rate_limit(model, filled(rate_limit_of(body), ask.world.defaults()))
