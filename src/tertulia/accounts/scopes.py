"""What a restricted key may do: scopes, one to read and one to write for each group of endpoints, by OpenAI's names.

`api.all.read` reads everything. Who may write may read, too. Which group a request belongs to, its path says.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core import Principal
from ..errors import BadRequest, Forbidden

READ_ONLY = "api.all.read"
MODELS = "api.model.read"
REQUEST = "api.model.request"  # every kind of model call

# Beginnings of paths under /v1, the longest that fits counts: scope to read, scope to write.
GROUPS = {
    "/models": (MODELS, "api.model.write"),
    "/chat/completions": ("api.chat.completions.read", "api.model.chat.request"),
    "/completions": (MODELS, "api.model.completions.request"),
    "/embeddings": (MODELS, "api.model.embeddings.request"),
    "/moderations": (MODELS, "api.model.moderations.request"),
    "/audio": (MODELS, "api.model.audio.request"),
    "/images": (MODELS, "api.model.images.request"),
    "/videos": ("api.videos.read", "api.videos.write"),
    "/realtime": (MODELS, "api.model.realtime.request"),
    "/responses": ("api.responses.read", "api.responses.write"),
    "/conversations": ("api.conversations.read", "api.conversations.write"),
    "/assistants": ("api.assistants.read", "api.assistants.write"),
    "/threads": ("api.threads.read", "api.threads.write"),
    "/files": ("api.files.read", "api.files.write"),
    "/uploads": ("api.files.read", "api.files.write"),
    "/containers": ("api.containers.read", "api.containers.write"),
    "/vector_stores": ("api.vector_stores.read", "api.vector_stores.write"),
    "/batches": ("api.batch.read", "api.batch.write"),
    "/fine_tuning": ("api.fine_tuning.read", "api.fine_tuning.write"),
    "/evals": ("api.evals.read", "api.evals.write"),
    "/graders": ("api.evals.read", "api.evals.write"),
    "/webhooks": ("api.webhooks.read", "api.webhooks.write"),
}
ALIASES = {"model.request": REQUEST, "model.read": MODELS}
SCOPES = frozenset({READ_ONLY, REQUEST, *(scope for pair in GROUPS.values() for scope in pair)})


def checked(scopes: Iterable[str] | None) -> list[str] | None:
    """The scopes as they are kept, None for all: an empty list restricts nothing, as OpenAI has it. Raises BadRequest
    that names the first unknown one."""
    known = sorted({ALIASES.get(scope, scope) for scope in scopes or ()})
    for scope in known:
        if scope not in SCOPES:
            raise BadRequest(f"Unknown scope: '{scope[:64]}'.", param="scopes", code="invalid_value")
    return known or None


def needed(method: str, path: str) -> str | None:
    """The scope a request needs; None for a path that belongs to no group."""
    if not path.startswith("/v1/"):
        return None
    way = path[3:]
    while way:
        group = GROUPS.get(way)
        if group is not None:
            return group[0] if method in ("GET", "HEAD", "OPTIONS") else group[1]
        way = way.rpartition("/")[0]
    return None


def allows(scopes: frozenset[str], scope: str) -> bool:
    """Whether these scopes hold that one."""
    if scope in scopes:
        return True
    if scope.endswith(".read"):
        return READ_ONLY in scopes or scope[:-4] + "write" in scopes
    return REQUEST in scopes and scope.startswith("api.model.") and scope.endswith(".request")


def check(who: Principal, method: str, path: str) -> None:
    """Raises Forbidden if the key may not do that."""
    if who.scopes is not None:
        scope = needed(method, path)
        if scope is not None and not allows(who.scopes, scope):
            raise missing(scope)


def missing(scope: str) -> Forbidden:
    """The refusal, in OpenAI's words."""
    return Forbidden(
        f"You have insufficient permissions for this operation. Missing scopes: {scope}. Check that you have the "
        "correct role in your organization (Reader, Member, Owner) and project (Member, Owner), and if you're using a "
        "restricted API key, that it has the necessary scopes."
    )
