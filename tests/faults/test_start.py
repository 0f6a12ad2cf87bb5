"""How a server starts, or says in one line why it does not; and what it says when it stops."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import Served, serve, with_models
from tertulia import server
from tertulia.accounts import client_env
from tertulia.config import load
from tertulia.engines.catalog import CATALOG
from tertulia.errors import SettingsError
from tertulia.inprocess import start

MOCK = ("--chat-model", "mock", "--embedding-model", "mock-embedding")
MOCKS = {"chat_model": "mock", "embedding_model": "mock-embedding"}
HELLO = [{"role": "user", "content": "Hello"}]


def refused(data: Path, *arguments: str) -> str:
    """The one line of a `tertulia serve` that does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "tertulia", "serve", "--data", str(data), *MOCK, *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done
    return done.stderr


def metrics(served: Served) -> str:
    return urllib.request.urlopen(f"{served.root}/metrics", timeout=10).read().decode()


def begun(tmp_path: Path, **given: Any) -> None:
    """What a start does before it listens, in this process."""
    start(data=str(tmp_path), **{**MOCKS, **given}).close()


# ---- one server for one directory


def test_a_second_server_on_one_directory_says_who_is_there(tmp_path: Path) -> None:
    first = serve(tmp_path, "", *MOCK)
    try:
        before = (tmp_path / "client.env").read_bytes()
        said = refused(tmp_path, "--port", "0")
        assert str(first.process.pid) in said and first.base_url in said and "--data" in said
        assert (tmp_path / "client.env").read_bytes() == before
        with start(data=str(tmp_path), **MOCKS) as background:  # tertulia.client() may share it
            assert background.client().chat.completions.create(model="mock", messages=HELLO).choices
        assert (tmp_path / "client.env").read_bytes() == before
    finally:
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    again = serve(tmp_path, "", *MOCK)  # the lock died with its process
    assert client_env.read(tmp_path)["OPENAI_BASE_URL"] == again.base_url
    assert again.stop() == 0


def test_the_lock_is_let_go(tmp_path: Path) -> None:
    with server.only_server(tmp_path) as tell:
        tell("http://127.0.0.1:1/v1")
        with pytest.raises(SettingsError, match=f"process {os.getpid()}, http://127.0.0.1:1/v1"):
            server.only_server(tmp_path).__enter__()
    assert (tmp_path / "serve.lock").stat().st_mode & 0o777 == 0o600
    with server.only_server(tmp_path):
        pass


def test_a_start_that_fails_leaves_client_env_as_it_was(tmp_path: Path) -> None:
    assert serve(tmp_path, "", *MOCK).stop() == 0
    before = (tmp_path / "client.env").read_bytes()
    (tmp_path / "t.toml").write_text("[presets.p]\nmodel = 'mock'\nparameters = { temperature = 9 }\n")
    assert "presets.p.parameters.temperature" in refused(tmp_path, "--port", "0", "--config", str(tmp_path / "t.toml"))
    assert (tmp_path / "client.env").read_bytes() == before


def test_a_port_that_another_tertulia_has(tmp_path: Path, mock_server: Served) -> None:
    port = mock_server.root.rpartition(":")[2]
    said = refused(tmp_path, "--port", port)
    assert f"Port {port}" in said and "another Tertulia" in said and "--port" in said and "TERTULIA_PORT" in said


def test_a_port_that_another_program_has(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refused(tmp_path, "--port", str(taken.getsockname()[1]))
    assert "another program" in said and "TERTULIA_PORT" in said


# ---- what the settings get wrong


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"chat_model": "smolm2-135m-instruct"},
         "chat_model: there is no model 'smolm2-135m-instruct'; did you mean smollm2-135m-instruct?"),
        ({"chat_model": "smolm2"}, "chat_model: there is no model 'smolm2'; did you mean smollm2-135m-instruct?"),
        ({"embedding_model": "qqqqqqqq"}, "embedding_model: there is no model 'qqqqqqqq'"),
        ({"chat_model": "gpt-4o"}, "chat_model: there is no model 'gpt-4o'"),
        ({"chat_model": "mock", "mock": False}, "chat_model: there is no model 'mock'"),
        ({"chat_model": "mock-embedding"},
         "chat_model: 'mock-embedding' is no model for chat; did you mean embedding_model?"),
        ({"chat_model": "all-minilm-l6-v2"},
         "chat_model: 'all-minilm-l6-v2' is no model for chat; did you mean embedding_model?"),
        ({"embedding_model": "smollm2-135m-instruct"},
         "embedding_model: 'smollm2-135m-instruct' is no model for embeddings; did you mean chat_model?"),
        ({"upstreams": {"u": {"base_url": "http://127.0.0.1:1/v1", "models": {"mock": "x"}}}},
         "upstreams.u.models.mock: a model of this machine has that name; choose another"),
    ],
)  # fmt: skip
def test_models_are_checked_before_anything_is_fetched(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        server.check_models(load({"data": str(tmp_path), **MOCKS, **given}, {}))
    assert error.value.message == said
    assert not any((tmp_path / "models").glob("**/*.gguf"))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"chat_model": "mock", "embedding_model": "mock"},
        {"chat_model": "p", "presets": {"p": {"model": "mock"}}},
        {"chat_model": "a", "aliases": {"a": "mock"}},
        {"chat_model": "anything", "aliases": {"any*": "mock"}},
        {"chat_model": "f", "upstreams": {"u": {"base_url": "http://127.0.0.1:1/v1", "models": {"f": "x"}}}},
    ],
)
def test_names_that_something_answers_to_pass(tmp_path: Path, given: Any) -> None:
    server.check_models(load({"data": str(tmp_path), **given}, {}))


def test_an_installed_model_keeps_its_name(tmp_path: Path, model: Path) -> None:
    with_models(tmp_path, model.parent)
    far = {"u": {"base_url": "http://127.0.0.1:1/v1", "models": {model.stem: "x"}}}
    with pytest.raises(SettingsError, match=f"upstreams.u.models.{model.stem}: a model of this machine"):
        server.check_models(load({"data": str(tmp_path), **MOCKS, "upstreams": far}, {}))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"temprature": 1}, "presets.p.parameters.temprature: there is no such parameter; did you mean temperature?"),
        ({"temperature": 9}, "presets.p.parameters.temperature: Invalid 'temperature': "),
        ({"top_k": "many"}, "presets.p.parameters.top_k: expected int, got text"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "presets.p.parameters.max_tokens: Setting 'max_tokens' and"),
        ({"best_of": 99}, "presets.p.parameters.best_of: Invalid 'best_of': "),
        *(({name: True}, f"presets.p.parameters.{name}: this is the caller's to say, not a preset's")
          for name in ("stream", "model", "messages", "prompt", "input")),
    ],
)  # fmt: skip
def test_parameters_of_a_preset_are_tried_at_start(tmp_path: Path, parameters: Any, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        begun(tmp_path, presets={"p": {"model": "mock", "parameters": parameters}})
    assert error.value.message.startswith(said)


def test_parameters_that_a_call_may_have_pass(tmp_path: Path) -> None:
    far = {"u": {"base_url": "http://127.0.0.1:1/v1", "models": {"far": "x"}}}
    presets = {
        "p": {"model": "mock", "parameters": {"temperature": 0, "max_tokens": 3, "top_k": 4, "seed": 1}},
        "q": {"model": "mock", "parameters": {"best_of": 2, "echo": True}},
        "r": {"model": "far", "parameters": {"reasoning": {"effort": "low"}}},  # what an upstream takes, it knows
    }
    begun(tmp_path, presets=presets, upstreams=far)


# ---- what is said at start and at the end


def test_a_budget_below_a_default_model_is_said(model_files: Path, tmp_path: Path) -> None:
    served = serve(with_models(tmp_path, model_files), "memory_budget = 50\npreload = false\n")
    served.stop()
    said = (tmp_path / "stderr.log").read_text()
    size = (CATALOG["smollm2-135m-instruct"].card.bytes or 0) // 1_000_000
    assert "memory_budget is 50 MB" in said and f"smollm2-135m-instruct alone has {size} MB" in said
    assert "minilm" not in said  # 36 MB


def test_a_stop_says_for_what_it_waits(tmp_path: Path) -> None:
    served = serve(tmp_path, "", *MOCK)
    ended = threading.Event()

    def ask() -> None:
        served.client().chat.completions.create(model="mock", messages=HELLO, extra_body={"mock": {"first_delay": 2}})
        ended.set()

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 10
    while "tertulia_calls_in_flight 1" not in metrics(served) and time.monotonic() < deadline:
        time.sleep(0.02)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(20) == 0
    asking.join(10)
    assert ended.is_set()
    assert (tmp_path / "stderr.log").read_text().endswith("stopping: waiting for 1 answer (Ctrl-C again cuts them)\n")


def test_a_second_sigterm_cuts_what_a_stop_waits_for(tmp_path: Path) -> None:
    served = serve(tmp_path, f"access_log = '{tmp_path}/access.log'", *MOCK)
    said = tmp_path / "stderr.log"

    def ask() -> None:
        with contextlib.suppress(openai.APIError):
            served.client().chat.completions.create(
                model="mock", messages=HELLO, extra_body={"mock": {"first_delay": 9}}
            )

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 10
    while "tertulia_calls_in_flight 1" not in metrics(served) and time.monotonic() < deadline:
        time.sleep(0.02)
    served.process.send_signal(signal.SIGTERM)
    while "stopping: waiting for 1 answer" not in said.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    began = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(20) == 0
    assert time.monotonic() - began < 4  # neither the answer's nine seconds nor the ten of grace
    asking.join(10)
    (line,) = (tmp_path / "access.log").read_text().splitlines()
    assert json.loads(line)["outcome"] == "stopped"


SLOW_END = """
import sys, time
from tertulia import server
from tertulia.config import load

close = server.Server._close
async def slowly(self):
    print("closing", flush=True)
    time.sleep(0.5)
    await close(self)
    print("closed", flush=True)
server.Server._close = slowly
settings = load({"data": sys.argv[1], "port": 0, "chat_model": "mock", "embedding_model": "mock-embedding"})
server.run(settings, lambda _: print("listens", flush=True))
"""


def test_signals_while_everything_is_closed_do_not_end_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_END, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "listens\n":
            process.send_signal(signal.SIGTERM)
        if line == "closing\n":
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        if line == "closed\n":
            break
    else:
        raise AssertionError(f"ended before it was closed: {process.wait(5)}")
    assert process.wait(20) == 0


def test_a_stop_with_nothing_under_way_says_nothing(tmp_path: Path) -> None:
    served = serve(tmp_path, "", *MOCK)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(20) == 0
    assert "stopping" not in (tmp_path / "stderr.log").read_text()


def test_a_model_that_could_not_be_fetched_is_said_to_be_so(tmp_path: Path) -> None:
    """No network and no models: the server serves what it can, and says of the rest what to do."""
    dead = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
    }
    served = serve(tmp_path, environment=dead)
    try:
        with pytest.raises(openai.InternalServerError) as missing:
            served.client().chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "hi"}])
        assert missing.value.code == "model_not_fetched" and missing.value.status_code == 503
        assert "tertulia pull smollm2-135m-instruct" in str(missing.value)
        with pytest.raises(urllib.error.HTTPError) as unready:
            urllib.request.urlopen(f"{served.root}/readyz", timeout=10)
        assert json.loads(unready.value.read())["status"] == "missing"
        answer = served.client().chat.completions.create(model="mock", messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content
    finally:
        served.stop()
