"""Every route x every way of asking wrongly: one canonical error body, the right status, the headers the SDK needs."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from conftest import Served

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "mock", "prompt": "hi"}
EMBEDDING = {"model": "mock-embedding", "input": "hi"}
POSTS = {"/chat/completions": CHAT, "/completions": COMPLETION, "/embeddings": EMBEDDING}
GETS = ("/models", "/models/mock")


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes


def send(server: Served, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    given = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    given = {name: value for name, value in given.items() if value}
    request = urllib.request.Request(server.base_url + path, body, given, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers, error.read())


def check(answer: Answer, status: int, code: str | None, param: str | None = None, message: str = "") -> None:
    """The one canonical body, whatever went wrong."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["openai-version"] == "2020-10-01"
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert answer.headers["access-control-expose-headers"] == "X-Request-ID"
    decoded = json.loads(answer.body)
    assert set(decoded) == {"error"} and set(decoded["error"]) == {"message", "type", "param", "code"}
    assert decoded["error"]["code"] == code and decoded["error"]["param"] == param
    assert message in decoded["error"]["message"] and decoded["error"]["message"]
    assert decoded["error"]["type"] == "invalid_request_error"


ROUTES = [
    *(("POST", path) for path in POSTS),
    *(("GET", path) for path in GETS),
    ("GET", "/nothing"),
    ("POST", "/nothing"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_key(mock_server: Served, method: str, path: str) -> None:
    body = b"{}" if method == "POST" else None
    check(send(mock_server, method, path, body, Authorization=""), 401, None, message="You didn't provide an API key.")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_wrong_key(mock_server: Served, method: str, path: str) -> None:
    body = b"{}" if method == "POST" else None
    answer = send(mock_server, method, path, body, Authorization="Bearer sk-invalid-0123456789only")
    check(answer, 401, "invalid_api_key", message="Incorrect API key provided: sk-inval")
    assert b"0123456789only" not in answer.body


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_key_of_another_kind_of_authorization(mock_server: Served, method: str, path: str) -> None:
    body = b"{}" if method == "POST" else None
    check(send(mock_server, method, path, body, Authorization="Basic abc"), 401, None)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_another_organization_or_project(mock_server: Served, method: str, path: str) -> None:
    body = b"{}" if method == "POST" else None
    check(send(mock_server, method, path, body, OpenAI_Organization="org-other"), 401, "mismatched_organization")
    check(send(mock_server, method, path, body, OpenAI_Project="proj_other"), 401, "mismatched_project")


@pytest.mark.parametrize("path", POSTS)
def test_an_admin_key_asks_no_model(mock_server: Served, path: str) -> None:
    body = json.dumps(POSTS[path]).encode()
    answer = send(mock_server, "POST", path, body, Authorization=f"Bearer {mock_server.admin_key}")
    check(answer, 403, "insufficient_permissions")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"", b"{", b"[1, 2", b'{"model": "mock"', b"\xff\xfe", b'{"a": 1} x', b"nonsense"])
def test_bad_json(mock_server: Served, path: str, body: bytes) -> None:
    check(send(mock_server, "POST", path, body), 400, None, message="We could not parse the JSON body")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"[]", b'"text"', b"3", b"null"])
def test_json_that_is_no_object(mock_server: Served, path: str, body: bytes) -> None:
    check(send(mock_server, "POST", path, body), 400, "invalid_type", message="expected an object")


@pytest.mark.parametrize("path", POSTS)
def test_missing_model(mock_server: Served, path: str) -> None:
    body = {name: value for name, value in POSTS[path].items() if name != "model"}
    answer = send(mock_server, "POST", path, json.dumps(body).encode())
    check(answer, 400, "missing_required_parameter", "model", "Missing required parameter: 'model'.")


@pytest.mark.parametrize("path", POSTS)
def test_unknown_model(mock_server: Served, path: str) -> None:
    answer = send(mock_server, "POST", path, json.dumps({**POSTS[path], "model": "no-such"}).encode())
    check(answer, 404, "model_not_found", message="The model `no-such` does not exist or you do not have access to it.")


def test_unknown_model_retrieved(mock_server: Served) -> None:
    check(send(mock_server, "GET", "/models/no/such:model"), 404, "model_not_found")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("extra", [{"surprise": 1}, {"user": 3}, {"model": 5}])
def test_bad_parameters_are_named(mock_server: Served, path: str, extra: dict[str, Any]) -> None:
    [name] = extra
    answer = send(mock_server, "POST", path, json.dumps({**POSTS[path], **extra}).encode())
    check(answer, 400, "unknown_parameter" if name == "surprise" else "invalid_type", name)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_wrong_method(mock_server: Served, path: str, method: str) -> None:
    answer = send(mock_server, method, path)
    check(answer, 405, None, message=f"Not allowed to {method} on /v1{path}")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("path", GETS)
def test_wrong_method_on_get(mock_server: Served, path: str) -> None:
    check(send(mock_server, "PUT", path, b"{}"), 405, None)


def test_unknown_url(mock_server: Served) -> None:
    check(send(mock_server, "POST", "/x", b"{}"), 404, None, message="Invalid URL (POST /v1/x)")


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_compressed(mock_server: Served, path: str) -> None:
    check(send(mock_server, "POST", path, b"x", Content_Encoding="gzip"), 400, None, message="Compressed")


@pytest.mark.parametrize("path", POSTS)
def test_deeply_nested_json(mock_server: Served, path: str) -> None:
    answer = send(mock_server, "POST", path, b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"


def test_the_sdk_raises_the_right_class(mock_server: Served) -> None:
    def create(client: Any, **parameters: Any) -> None:
        client.chat.completions.create(**{**CHAT, **parameters})

    client = mock_server.client()
    with pytest.raises(openai.AuthenticationError) as unauthorized:
        create(mock_server.client(api_key="sk-wrong-0123456789abcdef"))
    assert unauthorized.value.code == "invalid_api_key" and unauthorized.value.request_id.startswith("req_")
    with pytest.raises(openai.PermissionDeniedError):
        create(mock_server.client(api_key=mock_server.admin_key))
    with pytest.raises(openai.NotFoundError) as missing:
        create(client, model="no-such")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        create(client, temperature=3)
    assert bad.value.param == "temperature" and bad.value.code == "decimal_above_max_value"


@pytest.mark.parametrize(
    ("status", "error"),
    [(429, openai.RateLimitError), (500, openai.InternalServerError), (503, openai.InternalServerError)],
)
def test_engine_errors_keep_their_status(mock_server: Served, status: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        mock_server.client().chat.completions.create(**CHAT, extra_body={"mock": {"error": {"status": status}}})


def test_an_error_in_a_stream_raises(mock_server: Served) -> None:
    stream = mock_server.client().chat.completions.create(
        **CHAT,
        stream=True,
        extra_body={"mock": {"text": "one two three four", "chunk": 4, "cut": 2, "error": {"status": 500}}},
    )
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass


def test_success_carries_the_headers_too(mock_server: Served) -> None:
    raw = mock_server.client().chat.completions.with_raw_response.create(**CHAT)
    for name in ("limit", "remaining", "reset"):
        for kind in ("requests", "tokens"):
            assert raw.headers[f"x-ratelimit-{name}-{kind}"]
    assert raw.headers["openai-organization"].startswith("org-")
    assert raw.headers["openai-project"].startswith("proj_")
    assert raw.headers["x-tertulia-model"] == "mock"
    assert raw.parse()._request_id == raw.headers["x-request-id"]


def test_rate_limits_hold_and_say_when_to_come_back(tmp_path: Any) -> None:
    from conftest import serve

    served = serve(tmp_path, "requests_per_minute = 2\n", "--chat-model", "mock", "--embedding-model", "mock-embedding")
    try:
        client = served.client()
        for _ in range(2):
            client.chat.completions.create(**CHAT)
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(**CHAT)
        headers = limited.value.response.headers
        assert limited.value.code == "rate_limit_exceeded" and limited.value.type == "requests"
        assert int(headers["retry-after"]) >= 1 and int(headers["retry-after-ms"]) > 0
        assert headers["x-should-retry"] == "true" and headers["x-ratelimit-remaining-requests"] == "0"
    finally:
        served.stop()
