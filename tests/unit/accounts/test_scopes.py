"""What restricted keys may do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tertulia.accounts.scopes import SCOPES, allows, check, checked, needed
from tertulia.api import chat, completions, embeddings
from tertulia.core import Principal
from tertulia.errors import BadRequest, Forbidden


def who(*scopes: str) -> Principal:
    principal = Principal("key_1", "org-1", "proj_1")
    principal.scopes = frozenset(checked(scopes) or ()) or None
    return principal


def may(principal: Principal, method: str, path: str) -> bool:
    try:
        check(principal, method, path)
    except Forbidden:
        return False
    return True


def test_no_scopes_are_all() -> None:
    assert checked(None) is None and checked([]) is None
    assert may(who(), "POST", "/v1/chat/completions") and may(who(), "DELETE", "/v1/files/file-1")


def test_scopes_are_kept_once_each_by_their_full_names() -> None:
    assert checked(["model.request", "api.model.request", "api.files.read"]) == ["api.files.read", "api.model.request"]


@pytest.mark.parametrize("scope", ["", "api", "api.all.write", "API.ALL.READ", "api.files.read ", "x" * 1000, "*"])
def test_an_unknown_scope_is_named(scope: str) -> None:
    with pytest.raises(BadRequest) as error:
        checked(["api.files.read", scope])
    assert (error.value.status, error.value.param) == (400, "scopes")
    assert scope[:64] in error.value.message and len(error.value.message) < 100


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/v1/chat/completions", "api.model.chat.request"),
        ("GET", "/v1/chat/completions/chatcmpl-1/messages", "api.chat.completions.read"),
        ("POST", "/v1/embeddings", "api.model.embeddings.request"),
        ("GET", "/v1/models/org/name:tag", "api.model.read"),
        ("POST", "/v1/responses", "api.responses.write"),
        ("GET", "/v1/responses/resp_1/input_items", "api.responses.read"),
        ("HEAD", "/v1/files/file-1/content", "api.files.read"),
        ("DELETE", "/v1/vector_stores/vs_1", "api.vector_stores.write"),
        ("GET", "/v1/filesystem", None), ("GET", "/healthz", None), ("GET", "/v1/", None), ("GET", "files", None),
    ],
)  # fmt: skip
def test_the_path_says_what_is_needed(method: str, path: str, scope: str | None) -> None:
    assert needed(method, path) == scope and (scope is None or scope in SCOPES)


def test_every_task_of_ours_needs_a_scope() -> None:
    for make in (chat, completions, embeddings):
        scope = needed("POST", make.task(lambda call, name: None).path)  # type: ignore[arg-type, return-value]
        assert scope is not None and scope.endswith(".request")


def test_read_only_reads_everything_and_asks_no_model() -> None:
    reader = who("api.all.read")
    for path in ("/v1/models", "/v1/files", "/v1/responses/resp_1", "/v1/vector_stores", "/v1/batches/b"):
        assert may(reader, "GET", path)
        assert not may(reader, "POST", path)
    assert not may(reader, "POST", "/v1/chat/completions")


def test_request_is_for_every_model_and_nothing_else() -> None:
    caller = who("model.request")
    assert may(caller, "POST", "/v1/chat/completions") and may(caller, "POST", "/v1/images/generations")
    assert not may(caller, "POST", "/v1/files") and not may(caller, "GET", "/v1/models")


def test_one_group_alone() -> None:
    caller = who("api.model.embeddings.request", "api.files.write")
    assert may(caller, "POST", "/v1/embeddings") and not may(caller, "POST", "/v1/chat/completions")
    assert may(caller, "GET", "/v1/files") and may(caller, "DELETE", "/v1/files/f")  # who writes may read
    assert allows(frozenset(["api.files.read"]), "api.files.read")
    assert not allows(frozenset(["api.files.read"]), "api.files.write")


def test_the_refusal_is_openais() -> None:
    with pytest.raises(Forbidden) as error:
        check(who("api.files.read"), "POST", "/v1/chat/completions")
    assert (error.value.status, error.value.type) == (403, "invalid_request_error")
    assert error.value.message.startswith(
        "You have insufficient permissions for this operation. Missing scopes: api.model.chat.request. Check that you "
        "have the correct role in your organization"
    )


def test_every_scope_is_documented() -> None:
    page = Path(__file__).parents[3] / "docs" / "how-to" / "keys.md"
    documented = set(re.findall(r"`(api\.[a-z_.]+\.(?:read|write|request))`", page.read_text(encoding="utf-8")))
    assert {scope for scope in SCOPES if not scope.startswith("api.model.")} <= documented
    assert {scope for scope in documented if not scope.startswith("api.organization.")} == SCOPES
