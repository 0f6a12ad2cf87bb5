"""Every exception has the shape by which the SDK knows it."""

from __future__ import annotations

import inspect
import json

import pytest

from tertulia import errors
from tertulia.core import retry_headers
from tertulia.errors import BadRequest, ModelNotFound, QuotaExceeded, RateLimited, TertuliaError, UpstreamRefused

EXPECTED = {
    "TertuliaError": (500, "server_error", None, None),
    "BadRequest": (400, "invalid_request_error", None, False),
    "ContextLengthExceeded": (400, "invalid_request_error", "context_length_exceeded", False),
    "Unauthorized": (401, "invalid_request_error", None, False),
    "Forbidden": (403, "invalid_request_error", "insufficient_permissions", False),
    "NotFound": (404, "invalid_request_error", None, False),
    "ModelNotFound": (404, "invalid_request_error", "model_not_found", False),
    "MethodNotAllowed": (405, "invalid_request_error", None, False),
    "Conflict": (409, "invalid_request_error", None, False),
    "TooLarge": (413, "invalid_request_error", None, False),
    "RateLimited": (429, "requests", "rate_limit_exceeded", True),
    "QuotaExceeded": (429, "insufficient_quota", "insufficient_quota", False),
    "Overloaded": (503, "service_unavailable_error", "server_is_overloaded", True),
    "Unavailable": (503, "service_unavailable_error", "database_unavailable", True),
    "DeadlineExceeded": (504, "server_error", "deadline_exceeded", None),
    "EngineFailed": (502, "server_error", "engine_failed", True),
    "BadUpstreamAnswer": (502, "server_error", "bad_upstream_answer", True),
    "UpstreamTimeout": (504, "server_error", "upstream_timeout", True),
    "UpstreamRefused": (502, "server_error", None, None),
    "SettingsError": (500, "server_error", None, None),
}
FOUND = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, TertuliaError)}


def made(kind: type[TertuliaError]) -> TertuliaError:
    if kind is UpstreamRefused:
        return UpstreamRefused(502)
    return kind("x") if kind is ModelNotFound else kind()


def test_the_list_above_is_whole() -> None:
    assert FOUND.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_status_type_code_and_retry(name: str) -> None:
    error = made(FOUND[name])
    assert (error.status, error.type, error.code, error.retry) == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_body_has_all_four_keys_and_the_message_is_one_sentence(name: str) -> None:
    error = made(FOUND[name])
    body = json.loads(error.body())
    assert body == {"error": {"message": error.message, "type": error.type, "param": None, "code": error.code}}
    assert error.message and "\n" not in error.message and str(error) == error.message
    assert error.message[-1] in ".!"


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_module_docstring_draws_the_tree(name: str) -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if name in line.split()]
    assert len(lines) == 1
    if name != "SettingsError":
        assert str(EXPECTED[name][0]) in lines[0]


def test_what_is_given_wins_over_the_class() -> None:
    error = BadRequest("No.", param="n", code="invalid_value", type="other")
    assert json.loads(error.body())["error"] == {
        "message": "No.",
        "type": "other",
        "param": "n",
        "code": "invalid_value",
    }
    assert BadRequest.code is None and BadRequest.type == "invalid_request_error"


def test_the_event_is_one_server_sent_event_of_the_body() -> None:
    error = BadRequest('two\nlines and "quotes"')
    assert error.event() == b"data: " + error.body() + b"\n\n"
    assert error.event().count(b"\n") == 2


def test_the_unknown_model_is_named() -> None:
    assert ModelNotFound("gpt-9").message == "The model `gpt-9` does not exist or you do not have access to it."


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (TertuliaError(), []),
        (BadRequest(), [("x-should-retry", "false")]),
        (QuotaExceeded(), [("x-should-retry", "false")]),
        (RateLimited(retry_after=0.2), [("x-should-retry", "true"), ("retry-after", "1"), ("retry-after-ms", "200")]),
        (
            RateLimited(retry_after=11.05),
            [("x-should-retry", "true"), ("retry-after", "12"), ("retry-after-ms", "11050")],
        ),
        (RateLimited(retry_after=0), [("x-should-retry", "true"), ("retry-after", "1"), ("retry-after-ms", "1")]),
        (TertuliaError(headers=(("allow", "POST"),)), [("allow", "POST")]),
    ],
)
def test_retry_headers(error: TertuliaError, headers: list[tuple[str, str]]) -> None:
    assert retry_headers(error) == headers
