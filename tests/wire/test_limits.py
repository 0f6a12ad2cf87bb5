"""Limits over the wire: what a program sees of them, how an administrator changes them, and that what is told of a
refusal is true."""

from __future__ import annotations

import base64
import http.server
import json
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import mock_upstream
from conftest import Served, serve

MESSAGES: Any = [{"role": "user", "content": "Say the tokens."}]
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
CONFIG = """
cache = "off"
coalesce = false
[upstreams.far]
base_url = "{url}"
models = {{ "far" = "tokens:10", "free" = "tokens:10", "gpt-4o-mini" = "tokens:10", "mine" = "gpt-4o-mini" }}
prices.far = {{ input = 10.0, output = 100.0 }}
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[mock_upstream.Mock]:
    with mock_upstream.started("--gap", "0.001") as mock:
        yield mock


@pytest.fixture
def served(tmp_path: Path, upstream: mock_upstream.Mock) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(more: str = "", **options: Any) -> Served:
        config = more + CONFIG.format(url=upstream.base_url)
        started.append(
            serve(tmp_path, config, "--chat-model", "mock", "--embedding-model", "mock-embedding", **options)
        )  # fmt: skip
        return started[-1]

    yield start
    for one in started:
        one.stop()


def metrics(served: Served) -> str:
    with urllib.request.urlopen(f"{served.root}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def metric(served: Served, name: str, **labels: str) -> float:
    for line in metrics(served).splitlines():
        found = re.match(rf"{name}(?:{{(.*)}})? (\S+)$", line)
        if found and all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
            return float(found[2])
    return 0.0


def ask(served: Served, model: str = "far", **more: Any) -> Any:
    options = more.pop("client", {})
    return served.client(**options).chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, **{"max_tokens": 10, **more}
    )  # fmt: skip


def refused(served: Served, kind: type[openai.APIStatusError], **more: Any) -> openai.APIStatusError:
    with pytest.raises(kind) as error:
        ask(served, **more)
    return error.value


def project(served: Served) -> str:
    return str(served.client().models.with_raw_response.list().headers["openai-project"])


def administer(served: Served) -> Any:
    return openai.OpenAI(base_url=served.base_url, api_key=served.api_key, admin_api_key=served.admin_key).admin


def test_an_administrator_s_limits_hold_at_once_and_come_off_at_once(served: Callable[..., Served]) -> None:
    it = served()
    id, admin = project(it), administer(it).organization.projects
    ask(it)
    limit = next(one for one in admin.rate_limits.list_rate_limits(id, limit=100) if one.model == "far")
    admin.rate_limits.update_rate_limit(limit.id, project_id=id, max_requests_per_1_minute=2)
    raw = ask(it)  # what was asked before the change counts
    assert raw.headers["x-ratelimit-limit-requests"] == "2" and raw.headers["x-ratelimit-remaining-requests"] == "0"
    error = refused(it, openai.RateLimitError)
    assert error.code == "rate_limit_exceeded"
    assert f"far in organization {raw.headers['openai-organization']}" in str(error)
    assert 1 <= int(error.response.headers["retry-after"]) <= 60
    ask(it, "free")  # another model has a limit of its own
    admin.rate_limits.update_rate_limit(
        limit.id, project_id=id, max_requests_per_1_minute=100, max_tokens_per_1_minute=50
    )  # fmt: skip
    error = refused(it, openai.RateLimitError)
    assert "tokens per min (TPM): Limit 50" in str(error) and error.type == "tokens"
    admin.rate_limits.update_rate_limit(limit.id, project_id=id, extra_body={"observe_only": True})
    assert ask(it).headers["x-tertulia-observed"] == "tokens"
    assert metric(it, "tertulia_would_refuse_total", limit="tokens", project=id) == 1
    assert metric(it, "tertulia_refused_total", limit="requests", project=id) == 1
    admin.rate_limits.update_rate_limit(
        limit.id, project_id=id, max_requests_per_1_day=3, extra_body={"observe_only": ["max_tokens_per_1_minute"]}
    )  # fmt: skip
    assert ask(it).headers["x-tertulia-observed"] == "tokens"  # the third of the day: what was observed is not counted
    error = refused(it, openai.RateLimitError)
    assert "requests per day (RPD): Limit 3, Used 3" in str(error)
    assert int(error.response.headers["retry-after"]) > 86_000 and error.response.headers["x-should-retry"] == "false"


def test_spend_limits_of_project_and_organization(served: Callable[..., Served]) -> None:
    """A request costs 25 tokens in and 10 out: an eighth of a cent."""
    it = served()
    id, admin = project(it), administer(it).organization
    admin.projects.spend_limit.update(id, threshold_amount=1, currency="USD", interval="month")
    answered = 0
    while answered < 20:
        try:
            ask(it)
        except openai.RateLimitError as error:
            assert error.code == "insufficient_quota" and error.response.headers["x-should-retry"] == "false"
            assert "retry-after" not in error.response.headers
            break
        answered += 1
    assert 6 <= answered <= 8  # the last ones must fit by their worst case
    spent = metric(it, "tertulia_spent_dollars", of=id)
    assert spent == pytest.approx(answered * 0.00125) and metric(it, "tertulia_reserved_dollars", of=id) == 0
    admin.projects.spend_limit.delete(id)
    ask(it)
    admin.spend_limit.update(threshold_amount=1, currency="USD", interval="month")
    refused(it, openai.RateLimitError)
    assert metric(it, "tertulia_refused_total", limit="spend", project=id) == 2
    it.stop()
    again = served()  # the keys are others, the project is not
    refused(again, openai.RateLimitError)


def test_a_stream_that_is_left_is_paid_as_far_as_it_was_generated(tmp_path: Path) -> None:
    with mock_upstream.started("--gap", "0.05") as slow:
        config = "spend_limit = 1.0\n" + CONFIG.format(url=slow.base_url)
        it = serve(tmp_path, config, "--chat-model", "mock", "--embedding-model", "mock-embedding")
        try:
            stream = it.client().chat.completions.create(model="far", messages=MESSAGES, max_tokens=100, stream=True)
            next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
            reserved = metric(it, "tertulia_reserved_dollars")
            assert reserved > 100 * 100e-6
            stream.close()
            until(lambda: metric(it, "tertulia_reserved_dollars") == 0)
            spent = metric(it, "tertulia_spent_dollars")
            sent = slow.requests()[-1]["tokens"]
            assert sent < 10  # it was stopped
            # the prompt as far as it is known, the answer by its pieces, of which the first has no text
            assert sent * 100e-6 + 20 * 10e-6 <= spent <= (sent + 1) * 100e-6 + 40 * 10e-6
        finally:
            it.stop()


def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_shipped_prices_flags_and_refusals(served: Callable[..., Served]) -> None:
    it = served("spend_limit = 5.0\n")
    listed = ask(it, "mine", max_tokens=10)  # called gpt-4o-mini over there
    assert "x-tertulia-unpriced" not in listed.headers
    assert metric(it, "tertulia_spent_dollars") == pytest.approx(25 * 0.15e-6 + 10 * 0.6e-6)
    flagged = ask(it, "free")
    assert flagged.headers["x-tertulia-unpriced"] == "true"
    assert metric(it, "tertulia_unpriced_total", model="free") == 1
    it.stop()
    strict = served('unknown_price = "refuse"\n')
    error = refused(strict, openai.PermissionDeniedError, model="free")
    assert error.code == "model_price_unknown"
    ask(strict, "mine")
    strict.client().chat.completions.create(model="mock", messages=MESSAGES)  # what runs here is free


def test_a_model_that_is_not_permitted_is_a_403_in_openai_s_words(served: Callable[..., Served]) -> None:
    it = served()
    id, admin = project(it), administer(it).organization.projects
    admin.model_permissions.update(id, mode="deny_list", model_ids=["far"])
    error = refused(it, openai.PermissionDeniedError)
    assert error.body == {
        "message": f"Project `{id}` does not have access to model `far`", "type": "invalid_request_error",
        "param": None, "code": "model_not_found",
    }  # fmt: skip
    ask(it, "free")
    admin.model_permissions.delete(id)
    ask(it)


def test_the_sdk_waits_as_it_is_told_and_is_answered(served: Callable[..., Served]) -> None:
    """Concurrent requests: the refused one tries again after a second, by itself."""
    it = served("concurrent_requests = 1\n")
    done: list[float] = []

    def other() -> None:
        it.client().chat.completions.create(model="mock", messages=MESSAGES, extra_body={"mock": {"delay": 0.7}})

    thread = threading.Thread(target=other)
    thread.start()
    until(lambda: metric(it, "tertulia_calls_in_flight") == 1)
    began = time.monotonic()
    it.client(max_retries=2).chat.completions.create(model="mock", messages=MESSAGES)
    done.append(time.monotonic() - began)
    thread.join()
    assert 0.9 <= done[0] < 4


GOT: list[tuple[dict[str, str], bytes]] = []


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        GOT.append((dict(self.headers.items()), body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[str]:
    """The settings of somebody who is told, and puts it into GOT."""
    GOT.clear()
    hook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=hook.serve_forever)
    thread.start()
    yield f'alert_webhook = "http://127.0.0.1:{hook.server_port}/alerts"\nalert_webhook_secret = "env:HOOK_SECRET"\n'
    hook.shutdown()
    thread.join()
    hook.server_close()


def alert(served: Served, cents: int) -> None:
    """One of the project of its key."""
    mail: Any = {"type": "email", "recipients": ["ann@example.com"]}
    administer(served).organization.projects.spend_alerts.create(
        project(served), threshold_amount=cents, currency="USD", interval="month", notification_channel=mail
    )


def test_a_spend_alert_reaches_the_webhook_once(served: Callable[..., Served], hook: str) -> None:
    for _ in range(2):  # and not again after a restart
        it = served(hook, environment={"HOOK_SECRET": SECRET})
        id = project(it)
        if not GOT:
            alert(it, 1)
        for _ in range(9):
            ask(it)
        until(lambda: GOT)
        time.sleep(0.3)
        it.stop()
    ((headers, body),) = GOT
    openai.OpenAI(api_key="x", webhook_secret=SECRET).webhooks.verify_signature(body, headers)
    said = json.loads(body)
    assert said["type"] == "project.spend_alert.crossed" and said["data"]["project_id"] == id
    assert said["data"]["threshold_amount"] == 1 <= said["data"]["spent_amount"] < 2


def test_money_is_counted_and_told_over_all_gateways_of_a_database(
    tmp_path: Path, database: str, upstream: mock_upstream.Mock, hook: str
) -> None:
    """A request costs an eighth of a cent: neither has spent the 3 cents, nor the 2 of the alert, but both together."""
    more = f'spend_limit = 0.03\nfold_seconds = 0.2\ndatabase = "{database}"\n' + hook
    config, started = more + CONFIG.format(url=upstream.base_url), list[Served]()
    try:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            if started:
                shutil.copy(tmp_path / "one" / "secret", tmp_path / name / "secret")
            models = ("--chat-model", "mock", "--embedding-model", "mock-embedding")
            started.append(serve(tmp_path / name, config, *models, environment={"HOOK_SECRET": SECRET}))
        one, two = started
        id = project(one)
        assert project(two) == id
        alert(one, 2)
        for _ in range(10):
            ask(one)
        until(lambda: metric(two, "tertulia_spent_dollars", of=id) == pytest.approx(0.0125))
        for _ in range(7):
            ask(two)
        until(lambda: GOT)
        until(lambda: metric(one, "tertulia_spent_dollars", of=id) == pytest.approx(0.02125))
        answered = 17
        with pytest.raises(openai.RateLimitError) as error:
            while answered < 25:
                ask(two)
                answered += 1
        assert error.value.code == "insufficient_quota" and 21 <= answered <= 24
        spent = pytest.approx(answered * 0.00125)
        until(lambda: metric(one, "tertulia_spent_dollars", of=id) == spent)
        refused(one, openai.RateLimitError)
        time.sleep(0.5)  # some more folds: nothing is counted twice, and nobody is told again
        for each in started:
            assert metric(each, "tertulia_spent_dollars", of=id) == spent
            assert metric(each, "tertulia_reserved_dollars", of=id) == 0
        assert len(GOT) == 1 and json.loads(GOT[0][1])["data"]["threshold_amount"] == 2
    finally:
        for each in started:
            each.stop()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[prices.mock]\ninput = nan\n", "prices.mock.input: expected a number of US dollars, got nan"),
        ("[prices.mock]\noutput = -1\n", "prices.mock.output: must not be negative"),
        ("[prices.mock]\noutput = inf\n", "prices.mock.output: expected a number of US dollars, got inf"),
        ('alert_webhook = "http://h/"\n', "alert_webhook: it needs alert_webhook_secret"),
        ('alert_smtp = "smtp://me:word@h"\n', "alert_smtp: the password belongs into alert_smtp_password"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_a_clear_mistake_of_the_settings(tmp_path: Path, config: str, said: str) -> None:
    with pytest.raises(AssertionError, match="did not start") as error:
        serve(tmp_path, config, "--chat-model", "mock", "--embedding-model", "mock-embedding")
    assert said in str(error.value) and "Traceback" not in str(error.value)
