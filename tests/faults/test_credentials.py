"""Secrets of upstreams in a running server: nothing that comes out of it holds one, whatever fails; one that changes is
used from then on and disturbs nobody; one that cannot be read any more keeps its last value.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import echo_upstream
import mock_upstream
import secret_stores
from conftest import Served, serve
from echo_upstream import SHAPES, TOKENS, Echo, closed_port
from secret_stores import Stores

MODELS = "chat_model = 'mock'\nembedding_model = 'mock-embedding'\nretries = 0\nbreaker_failures = 1000000\n"
NAMES = ("env", "file", "aws", "azure", "vault")
SECRETS = {name: f"sk-{name}-never+to/be=seen-0123456789" for name in (*NAMES, "header")}


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    with echo_upstream.running() as upstream:
        yield upstream


@pytest.fixture
def stores() -> Iterator[Stores]:
    with secret_stores.running() as running:
        running.values = {
            "far": {"key": SECRETS["vault"], "aws": SECRETS["aws"]}, "plain": SECRETS["azure"],
        }  # fmt: skip
        yield running


def ask(served: Served, model: str, stream: bool = False) -> tuple[int, bytes]:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    request = urllib.request.Request(
        f"{served.base_url}/chat/completions", json.dumps(body).encode(),
        {"Authorization": f"Bearer {served.api_key}", "Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upstream(name: str, base_url: str, key: str, models: list[str], more: str = "") -> str:
    named = ", ".join(f'"{name}:{model}" = "{model}"' for model in models)
    return f'[upstreams.{name}]\nbase_url = "{base_url}"\nkey = "{key}"\nmodels = {{ {named} }}\n{more}\n'


def references(stores: Stores, home: Path) -> dict[str, str]:
    (home / "key").write_text(SECRETS["file"])
    (home / "key").chmod(0o600)
    return {
        "env": "env:A_SECRET", "file": f"file:{home}/key", "aws": "aws:far#aws",
        "azure": f"azure:127.0.0.1:{stores.azure}/plain", "vault": "vault:secret/far#key",
    }  # fmt: skip


def environment(stores: Stores, home: Path) -> dict[str, str]:
    return {**stores.environment(home), "A_SECRET": SECRETS["env"], "A_HEADER": SECRETS["header"]}


def doctor(served: Served, env: dict[str, str], *flags: str) -> bytes:
    command = [sys.executable, "-m", "tertulia", "doctor", "--data", str(served.data)]
    command += ["--config", str(served.data / "tertulia.toml"), *flags]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, timeout=120).stdout


def get(served: Served, path: str) -> bytes:
    request = urllib.request.Request(served.root + path, None, {"Authorization": f"Bearer {served.api_key}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        return error.read()


def kept(data: Path) -> dict[str, bytes]:
    """Every file of the data directory."""
    return {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}


def holds(where: str, text: bytes) -> list[str]:
    """Which secrets a text holds, and how: as they are, or escaped."""
    plain = json.dumps(text.decode("utf-8", "replace")).encode()
    return [
        f"{name} in {where}"
        for name, secret in SECRETS.items()
        for form in (secret, quote(secret, safe=""), secret.encode().hex())
        if form.encode() in text or form.encode() in plain
    ]


STATUSES = (200, 400, 401, 403, 404, 429, 500, 503)
ECHOING = [f"{status}/{shape}" for status in STATUSES for shape in SHAPES]
ECHOING.remove("200/detail")  # an answer, and no error
STREAMED = ["400/stream", "401/stream", "429/stream", "500/stream"]


def test_nothing_that_comes_out_holds_a_secret(echo: Echo, stores: Stores, tmp_path: Path) -> None:
    home, env = tmp_path, environment(stores, tmp_path)
    further = 'headers = { "X-Further" = "env:A_HEADER", "X-Title" = "Our chat" }'
    config = f'{MODELS}log_level = "debug"\nsecrets_refresh = 0.2\naccess_log = "{tmp_path}/data/access.log"\n'
    for name, reference in references(stores, home).items():
        config += upstream(name, echo.base_url, reference, [*ECHOING, *STREAMED, "fine"], further)
        config += upstream(f"{name}-gone", f"http://127.0.0.1:{closed_port()}/v1", reference, ["x"], further)
        config += upstream(f"{name}-tls", echo.base_url.replace("http", "https"), reference, ["x"], further)
    with mock_upstream.started("--tls", str(mock_upstream.CERTIFICATE), str(mock_upstream.KEY)) as untrusted:
        config += upstream("untrusted", untrusted.base_url, "env:A_SECRET", ["x"], further)
        served = serve(tmp_path / "data", config, environment=env)
        found = _everything(served, env, echo, stores)
    leaks = [leak for where, text in found.items() for leak in holds(where, text)]
    assert not leaks, leaks


def _everything(served: Served, env: dict[str, str], echo: Echo, stores: Stores) -> dict[str, bytes]:
    """What the server says and keeps while everything goes wrong, by where it was found."""
    found: dict[str, bytes] = {}
    echo.requests.clear()
    try:
        for name in NAMES:
            for model in [*ECHOING, *STREAMED]:
                status, found[f"answer {name}:{model}"] = ask(served, f"{name}:{model}", "stream" in model)
                assert status >= 400 or b'"error"' in found[f"answer {name}:{model}"]
            assert ask(served, f"{name}:fine")[0] == 200
            for broken in ("gone", "tls"):
                status, found[f"answer {name}-{broken}"] = ask(served, f"{name}-{broken}:x")
                assert status == 502, found[f"answer {name}-{broken}"]
        assert ask(served, "untrusted:x")[0] == 502
        assert {SECRETS[name] for name in NAMES} == set(echo.keys())  # so there was something to see
        stores.broken = True
        until(lambda: "its last value is used" in (served.data / "stderr.log").read_text())
        for path in ("/metrics", "/readyz", "/v1/models", "/v1/models/env:fine"):
            found[path] = get(served, path)
        assert b"tertulia_calls_total" in found["/metrics"]
        assert re.search(rb'tertulia_secret_reads_total{result="failed"} [1-9]', found["/metrics"])
        stores.broken = False
        for flags in ((), ("--deep",), ("--deep", "--json")):
            found[f"doctor {flags}"] = said = doctor(served, env, *flags)
            assert b"upstream vault" in said and b"upstream env-gone" in said
    finally:
        served.stop()
    found |= {f"data/{name}": text for name, text in kept(served.data).items()}
    assert b"its last value is used" in found["data/stderr.log"] and b"fine" in found["data/access.log"]
    return found | {"stdout": "".join(served.output).encode()}


def test_a_refusal_still_says_what_it_said(echo: Echo, tmp_path: Path) -> None:
    config = MODELS + upstream("env", echo.base_url, "env:A_SECRET", ["400/message", "429/detail", "400/escaped"])
    served = serve(tmp_path, config, environment={"A_SECRET": SECRETS["env"]})
    try:
        error = {"message": "Incorrect API key provided: [redacted] .", "type": "t", "param": None, "code": "theirs"}
        for model in ("400/message", "400/escaped"):
            status, answer = ask(served, f"env:{model}")
            assert status == 400 and json.loads(answer) == {"error": error}
        status, answer = ask(served, "env:429/detail")
        assert status == 429 and json.loads(answer)["error"]["message"] == "no such key: [redacted] "
    finally:
        served.stop()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def change(stores: Stores, home: Path, value: str) -> None:
    stores.values = {"far": {"key": value, "aws": value}, "plain": value}
    (home / "key.new").write_text(value)
    (home / "key.new").replace(home / "key")


@pytest.mark.parametrize("scheme", ["file", "aws", "azure", "vault"])
def test_a_changed_secret_is_used_and_disturbs_no_stream(
    echo: Echo, stores: Stores, tmp_path: Path, scheme: str
) -> None:
    reference = references(stores, tmp_path)[scheme]
    config = f"{MODELS}secrets_refresh = 0.2\nwatch = false\ncache = 'off'\n"
    config += upstream("u", echo.base_url, reference, ["slow", "fine"])
    served = serve(tmp_path / "data", config, environment=environment(stores, tmp_path))
    echo.requests.clear()
    streams: list[tuple[int, bytes]] = []

    def use() -> str:
        assert ask(served, "u:fine")[0] == 200
        return echo.keys()[-1]

    try:
        reader = threading.Thread(target=lambda: streams.append(ask(served, "u:slow", True)))
        reader.start()
        until(lambda: len(echo.requests) == 1)
        assert use() == SECRETS[scheme]
        change(stores, tmp_path, "sk-second-9876543210")
        until(lambda: use() == "sk-second-9876543210")
        assert reader.is_alive(), "the stream was to go on meanwhile"
        reader.join(20)
        assert streams[0][0] == 200 and streams[0][1].count(b"tok") == TOKENS
        assert streams[0][1].endswith(b"data: [DONE]\n\n")
        stores.broken = True
        (tmp_path / "key").unlink()
        until(lambda: "its last value is used" in (served.data / "stderr.log").read_text())
        assert use() == "sk-second-9876543210"
        stores.broken = False
        change(stores, tmp_path, "not\nfor a header: \u00e9")  # what cannot be sent is not taken
        until(lambda: "cannot be sent; the old value is used" in (served.data / "stderr.log").read_text())
        assert use() == "sk-second-9876543210"
        change(stores, tmp_path, "sk-third-5556667778")
        until(lambda: use() == "sk-third-5556667778")
    finally:
        served.stop()
    said = (served.data / "stderr.log").read_text()
    assert not [key for key in (SECRETS[scheme], "sk-second", "sk-third", "for a header:") if key in said]


def test_a_changed_header_and_a_reload(echo: Echo, tmp_path: Path) -> None:
    """A reload reads secrets anew; an upstream whose key alone has changed keeps its connections."""
    (tmp_path / "key").write_text("sk-first-0123456789")
    config = f"{MODELS}cache = 'off'\n" + upstream(
        "u", echo.base_url, "env:A_SECRET", ["fine"], f'headers = {{ "X-Further" = "file:{tmp_path}/key" }}'
    )
    served = serve(tmp_path / "data", config, environment={"A_SECRET": SECRETS["env"]})
    echo.requests.clear()

    def use() -> dict[str, Any]:
        assert ask(served, "u:fine")[0] == 200
        return {name.lower(): value for name, value in echo.requests[-1][1]}

    try:
        assert use()["x-further"] == "sk-first-0123456789"
        (tmp_path / "key").write_text("sk-changed-0123456789")
        until(lambda: use()["x-further"] == "sk-changed-0123456789")
        assert use()["authorization"] == f"Bearer {SECRETS['env']}"
    finally:
        served.stop()


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("env:NOT_THERE", "upstreams.u.key: the environment variable NOT_THERE is not set"),
        ("file:/nowhere/key", "upstreams.u.key: /nowhere/key cannot be read (No such file or directory)"),
        ("aws:none", "upstreams.u.key: aws:none cannot be read: ResourceNotFoundException"),
        ("aws:far#other", "upstreams.u.key: aws:far#other cannot be read: it has no field 'other' with text in it"),
        ("vault:secret/none#key", "upstreams.u.key: vault:secret/none#key cannot be read: InvalidPath"),
        (SECRETS["env"], "upstreams.u.key: expected env:NAME, file:PATH, aws:ID, azure:VAULT/SECRET or vault:"),
    ],
)  # fmt: skip
def test_a_secret_that_cannot_be_read_at_first_is_said(
    stores: Stores, tmp_path: Path, reference: str, said: str
) -> None:
    path = tmp_path / "t.toml"
    path.write_text(MODELS + upstream("u", "http://127.0.0.1:9/v1", reference, ["x"]))
    command = [sys.executable, "-m", "tertulia", "serve", "--data", str(tmp_path / "data"), "--port", "0"]
    done = subprocess.run(
        [*command, "--config", str(path)], capture_output=True, text=True, timeout=60,
        env={**os.environ, **environment(stores, tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not holds("output", (done.stdout + done.stderr).encode())
    assert not (tmp_path / "data" / "tertulia.db").exists()  # no keys were made that nobody was shown
