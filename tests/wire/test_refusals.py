"""Every route x every way of asking wrongly: one canonical error body, the right status, the headers the SDK needs."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import Served, serve

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


def check(
    answer: Answer, status: int, code: str | None, param: str | None = None, message: str = "",
    type: str = "invalid_request_error",
) -> None:  # fmt: skip
    """The one canonical body, whatever went wrong, and the header that tells the SDK whether to try again."""
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
    assert decoded["error"]["type"] == type
    if answer.headers["x-should-retry"] != "true":  # no word of when, where another try would be vain
        assert answer.headers["retry-after"] is None and answer.headers["retry-after-ms"] is None


def post(server: Served, path: str, **body: Any) -> Answer:
    return send(server, "POST", path, json.dumps(body).encode())


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


def test_long_prompts_are_read_to_their_ends(mock_server: Served) -> None:
    """What is compiled looks at their beginnings only, where nobody wants more."""
    words = "word \n" * 5_000
    asked = CHAT | {
        "messages": [{"role": "user", "content": words + "in json"}],
        "response_format": {"type": "json_object"},
    }
    answer = send(mock_server, "POST", "/chat/completions", json.dumps(asked).encode())
    assert answer.status == 200, answer.body
    assert json.loads(answer.body)["usage"]["prompt_tokens"] >= 5_000
    asked["messages"] = [{"role": "user", "content": words}]
    check(send(mock_server, "POST", "/chat/completions", json.dumps(asked).encode()), 400, None, "messages")
    del asked["response_format"]
    check(
        send(mock_server, "POST", "/chat/completions", json.dumps(asked | {"n": 0}).encode()),
        400, "integer_below_min_value", "n",
    )  # fmt: skip
    broken = json.dumps(asked).encode().replace(b"word \\n" * 2_500, b"word \\n" * 2_500 + b"\x01", 1)
    check(send(mock_server, "POST", "/chat/completions", broken), 400, None)


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
    check(answer, 400, None, message="We could not parse the JSON body")


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_too_large(mock_server: Served, path: str) -> None:
    connection = http.client.HTTPConnection(mock_server.root.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1" + path)
    connection.putheader("Authorization", f"Bearer {mock_server.api_key}")
    connection.putheader("Content-Length", str(32 * 2**20 + 1))
    connection.endheaders()
    answer = connection.getresponse()
    check(Answer(answer.status, answer.headers, answer.read()), 413, None, message="at most 32 MB")
    assert answer.headers["connection"] == "close"
    connection.close()


# ---- what a local model cannot do: the real ones, refused before anything is computed

LOCAL_CHAT = {**CHAT, "model": "gpt-4o-mini"}
LOCAL_COMPLETION = {"model": "gpt-3.5-turbo-instruct", "prompt": "hi"}
LOCAL_EMBEDDING = {"model": "text-embedding-3-small", "input": "hi"}
WORDS = "word " * 12_000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/chat/completions", {**LOCAL_CHAT, "messages": [{"role": "user", "content": WORDS}]}, "messages"),
        ("/chat/completions", {**LOCAL_CHAT, "max_tokens": 1_000_000}, "messages"),
        ("/completions", {**LOCAL_COMPLETION, "prompt": WORDS}, "prompt"),
        ("/completions", {**LOCAL_COMPLETION, "max_tokens": 1_000_000}, "prompt"),
        ("/completions", {**LOCAL_COMPLETION, "prompt": [[9906], [9906] * 12_000]}, "prompt"),
    ],
    ids=["long chat", "long chat answer", "long prompt", "long completion", "many token ids"],
)
def test_more_than_the_context_holds(server: Served, path: str, body: dict[str, Any], param: str, stream: bool) -> None:
    answer = post(server, path, **body, stream=stream)
    check(answer, 400, "context_length_exceeded", param, "This model's maximum context length is ")


@pytest.mark.parametrize("given", [WORDS, ["hi", WORDS]], ids=["one", "one of two"])
def test_an_input_longer_than_the_context(server: Served, given: Any) -> None:
    answer = post(server, "/embeddings", **{**LOCAL_EMBEDDING, "input": given})
    check(answer, 400, "context_length_exceeded", "input", "This model's maximum context length is ")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning_effort": "high"},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"web_search_options": {}},
        {"store": True},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_parameter_the_model_cannot_honour(server: Served, extra: dict[str, Any], stream: bool) -> None:
    [name] = extra
    answer = post(server, "/chat/completions", **LOCAL_CHAT, **extra, stream=stream)
    check(answer, 400, "unsupported_parameter", name, f"Unsupported parameter: '{name}' is not supported with this")


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, "Images"),
        ({"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}, "Audio"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "Files"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("at", [0, 1])
def test_a_part_the_model_cannot_read(server: Served, part: dict[str, Any], what: str, at: int) -> None:
    content = [{"type": "text", "text": "What is this?"}]
    content.insert(at, part)
    answer = post(server, "/chat/completions", **{**LOCAL_CHAT, "messages": [{"role": "user", "content": content}]})
    check(answer, 400, "unsupported_value", f"messages[0].content[{at}]", what)


UNENFORCEABLE = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 3}}}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_enforced(server: Served, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": UNENFORCEABLE}}
    answer = post(server, "/chat/completions", **LOCAL_CHAT, response_format=form, stream=stream)
    check(answer, 400, None, "response_format", "Invalid schema for response_format 'answer': ")


@pytest.mark.parametrize("stream", [False, True])
def test_parameters_that_cannot_be_enforced(server: Served, stream: bool) -> None:
    fine = {"type": "function", "function": {"name": "fine"}}
    bad = {"name": "bad", "parameters": UNENFORCEABLE}
    tools = [fine, {"type": "function", "function": bad}]
    answer = post(server, "/chat/completions", **LOCAL_CHAT, tools=tools, stream=stream)
    said, code = "Invalid schema for function 'bad': ", "invalid_function_parameters"
    check(answer, 400, code, "tools[1].function.parameters", said)
    answer = post(server, "/chat/completions", **LOCAL_CHAT, functions=[bad], stream=stream)
    check(answer, 400, code, "functions[0].parameters", said)


# ---- limits and engines that break


@pytest.fixture(scope="module")
def poor_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A token costs a tenth of a cent here, and a cent may be spent."""
    served = serve(
        tmp_path_factory.mktemp("poor"),
        "spend_limit = 0.01\n[prices.mock]\ninput = 0\noutput = 1000\n[prices.mock-embedding]\ninput = 1000\n",
        "--chat-model", "mock", "--embedding-model", "mock-embedding",
    )  # fmt: skip
    yield served
    served.stop()


def check_no_quota(answer: Answer) -> None:
    said = "You exceeded your current quota, please check your plan and billing details."
    check(answer, 429, "insufficient_quota", None, said, "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false" and answer.headers["retry-after"] is None


def test_no_money_left(poor_server: Served) -> None:
    check_no_quota(post(poor_server, "/chat/completions", **CHAT, max_tokens=1000))
    check_no_quota(post(poor_server, "/chat/completions", **CHAT, max_tokens=1000, stream=True))
    check_no_quota(post(poor_server, "/completions", **COMPLETION, max_tokens=11))
    check_no_quota(post(poor_server, "/embeddings", **{**EMBEDDING, "input": "a long text " * 10}))
    for _ in range(6):  # a token each, five reserved: what was not used is given back
        assert post(poor_server, "/chat/completions", **CHAT, max_tokens=5).status == 200
    check_no_quota(post(poor_server, "/chat/completions", **CHAT, max_tokens=5))
    with pytest.raises(openai.RateLimitError) as poor:  # and the SDK does not try again
        poor_server.client(max_retries=3).chat.completions.create(**CHAT)
    assert poor.value.code == "insufficient_quota" == poor.value.type


@pytest.fixture(scope="module")
def busy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = serve(
        tmp_path_factory.mktemp("busy"), "requests_per_minute = 2\ntokens_per_minute = 5000\n",
        "--chat-model", "mock", "--embedding-model", "mock-embedding",
    )  # fmt: skip
    yield served
    served.stop()


def test_rate_limits_in_one_body(busy_server: Served) -> None:
    vain = post(busy_server, "/chat/completions", **CHAT, max_tokens=6000)
    check(vain, 429, "rate_limit_exceeded", None, "Request too large for mock", "tokens")
    assert vain.headers["x-should-retry"] == "false"
    for _ in range(2):  # of each model
        assert post(busy_server, "/embeddings", **EMBEDDING).status == 200
        assert post(busy_server, "/chat/completions", **CHAT).status == 200
    for path, body in POSTS.items():
        answer = post(busy_server, path, **body)
        check(answer, 429, "rate_limit_exceeded", None, f"Rate limit reached for {body['model']}", "requests")
        assert answer.headers["x-should-retry"] == "true"
        assert 1 <= int(answer.headers["retry-after"]) <= 61 and 0 < int(answer.headers["retry-after-ms"]) <= 60_000


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("status", "code", "type", "retry"),
    [
        (413, None, "invalid_request_error", "false"),
        (429, "rate_limit_exceeded", "requests", "true"),
        (500, None, "server_error", None),
        (502, "engine_failed", "server_error", "true"),
        (503, "server_is_overloaded", "service_unavailable_error", "true"),
        (504, "deadline_exceeded", "server_error", None),
    ],
)
def test_an_engine_that_breaks(
    mock_server: Served, path: str, status: int, code: str | None, type: str, retry: str | None
) -> None:
    for stream in [{}] if path == "/embeddings" else [{}, {"stream": True}]:
        answer = post(mock_server, path, **POSTS[path], **stream, mock={"error": {"status": status}})
        check(answer, status, code, type=type)
        assert answer.headers["x-should-retry"] == retry


def test_an_engine_that_says_when_to_come_back(mock_server: Served) -> None:
    answer = post(mock_server, "/chat/completions", **CHAT, mock={"error": {"status": 503, "retry_after": 1.5}})
    check(answer, 503, "server_is_overloaded", type="service_unavailable_error")
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1500")


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


def test_rate_limits_hold_and_say_when_to_come_back(tmp_path: Path) -> None:
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
