"""The nouns every room speaks of: who asks (Principal), what is asked (Call), the answer on its way (Reply), what it
used (Usage), what answers (ModelCard, Target). It imports no other room but errors and knows nothing of HTTP, SQL or
any model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .call import (  # who asks, and the two nouns that do something, in a module of their own
    BYTES_PER_TOKEN,
    CLIENT_LEFT,
    DEADLINE,
    FAILED,
    FINISHED,
    NO_WISHES,
    STOPPED,
    Call,
    Next,
    Principal,
    Reply,
    Sink,
    Source,
    Stage,
    Wishes,
    retry_headers,
)

__all__ = [
    "BYTES_PER_TOKEN",
    "CLIENT_LEFT", "DEADLINE", "FAILED", "FINISHED", "NOBODY", "NO_WISHES", "STOPPED", "Call", "Leg", "ModelCard",
    "Next", "Plan", "Preset", "Principal", "Reply", "Sink", "Source", "Stage", "Target", "Task", "Usage", "Wishes",
    "retry_headers",
]  # fmt: skip


NOBODY = Principal("", "", "", "nobody")


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer, as the engine counted them; estimated where it broke off before it had said so."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False
    cache_write_tokens: int = 0  # of the prompt's, put into the upstream's prompt cache


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model, whoever serves it.

    source: where its file comes from: `pypi:PACKAGE==VERSION/PATH`, `hf:ORG/REPO/FILE`, `file:/PATH`, `upstream:NAME`
    or `mock:`. bytes and sha256 are of the file as served; context_length in tokens, None if not known.
    """

    id: str
    kind: str  # "chat", "completion" or "embedding"
    source: str
    sha256: str | None = None
    bytes: int | None = None
    licence: str | None = None
    context_length: int | None = None
    dimensions: int | None = None
    capabilities: tuple[str, ...] = ()
    sampling: dict[str, float] = {}  # defaults for sampling parameters a caller does not give
    owned_by: str = "tertulia"
    created: int = 0
    description: str = ""


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model name with a base model, a system message, few-shot examples and sampling parameters behind it."""

    model: str
    system: str | None = None
    examples: list[dict[str, str]] = []  # [{"user": ..., "assistant": ...}, ...] as earlier turns
    parameters: dict[str, Any] = {}  # body parameters used where the caller gives none


class Target(msgspec.Struct, frozen=True):
    """What a model name resolved to: the engine that answers, the name it knows the model by, and the model's card.

    live is route's: how the target is doing; opaque to everyone else.
    """

    engine: Any  # an engines.base.Engine
    model: str
    card: ModelCard
    preset: Preset | None = None
    live: Any = None


class Leg(msgspec.Struct, frozen=True):
    """One target of a plan, with its share of the calls among its group."""

    target: Target
    weight: float = 1.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Who may answer for a model name: groups of legs. Calls are balanced over the first group; each later one is a
    fallback, tried when the one before cannot answer. What route needs to know of a name is here and nowhere else.

    revision changes whenever anything about the plan does that an answer depends on: part of every cache key.
    Times are in seconds; longest is in tokens. first and alone are found from the groups.
    """

    name: str
    groups: tuple[tuple[Leg, ...], ...]
    balance: str = "weighted"  # or "least_busy", "fastest"
    retries: int = 2  # further tries before the first byte, over all targets of a group
    on_break: str = "error"  # or "continue": what becomes of a stream whose target breaks
    timeout: float | None = None  # from first byte of the request to last byte of the answer; None: the server's
    cache: str | None = None  # "off", "deterministic" or "all"; None: the server's
    revision: str = ""
    longest: int | None = None  # what the largest target of the first group holds; None: not known, or its own to say
    first: Any = None  # the Target that is asked first, of several one of them
    alone: bool = False  # it is the only one of the first group

    def __post_init__(self) -> None:
        if self.groups:
            msgspec.structs.force_setattr(self, "first", self.groups[0][0].target)
            msgspec.structs.force_setattr(self, "alone", len(self.groups[0]) == 1)


class Task(msgspec.Struct, frozen=True):
    """One kind of call: its name, the URL it has, and the check that decodes and validates a body of it.

    check(call) decodes call.body into call.asked once, sets call.model, call.stream, call.target and call.plan, and
    raises BadRequest or ModelNotFound.
    """

    name: str  # "chat", "completion", "embedding"
    path: str
    check: Callable[[Call], None]
