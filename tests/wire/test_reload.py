"""A changed configuration, on a real server with real upstreams: nothing under way notices, everything after does."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

import mock_upstream
from conftest import Served, serve

MOCK = ("--chat-model", "mock", "--embedding-model", "mock-embedding")
TEXT = "".join(f" tok{n}" for n in range(20))


def upstream(
    name: str, mock: mock_upstream.Mock | Recorder, model: str, theirs: str = "tokens:20", more: str = ""
) -> str:
    return f'[upstreams.{name}]\nbase_url = "{mock.base_url}"\nmodels = {{ "{model}" = "{theirs}" }}\n{more}\n'


class Recorder(ThreadingHTTPServer):
    """An upstream that remembers the connections and keys it was asked with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Recording)
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.asked: list[tuple[int, str | None]] = []  # port of the other side, key
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def connections(self) -> int:
        return len({port for port, _ in self.asked})


class Recording(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Recorder)
        self.server.asked.append((self.client_address[1], self.headers["authorization"]))
        body = b'{"id":"x","object":"chat.completion","created":1,"model":"m","choices":[]}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    it = Recorder()
    yield it
    it.shutdown()
    it.server_close()


@pytest.fixture(scope="module")
def slow() -> Iterator[mock_upstream.Mock]:
    """An upstream whose answers of 20 pieces take two seconds."""
    with mock_upstream.started("--gap", "0.1") as mock:
        yield mock


@pytest.fixture(scope="module")
def quick() -> Iterator[mock_upstream.Mock]:
    with mock_upstream.started("--gap", "0") as mock:
        yield mock


class Config:
    """A server, and the file it reads."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.path = served.data / "tertulia.toml"

    def write(self, text: str) -> None:
        """As an editor does it: another file takes the place of the first."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        os.replace(fresh, self.path)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.served.root}/metrics", timeout=10) as answer:
            return answer.read().decode()

    def figures(self) -> dict[str, float]:
        lines = [line for line in self.metrics().splitlines() if line.startswith("tertulia_config")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def count(self, result: str) -> float:
        return self.figures()[f'tertulia_config_reloads_total{{result="{result}"}}']

    def change(self, text: str, result: str = "ok", signalled: bool = False) -> None:
        """Writes the file and waits until it was read."""
        before = self.count(result)
        self.write(text)
        if signalled:
            self.served.process.send_signal(signal.SIGHUP)
        until(lambda: self.count(result) == before + 1)

    def errors(self) -> str:
        return (self.served.data / "stderr.log").read_text()

    def ask(self, model: str, **more: Any) -> Any:
        return self.served.client().chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi"}], **more
        )

    def models(self) -> set[str]:
        return {model.id for model in self.served.client().models.list()}


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[str], Config]]:
    running: list[Served] = []

    def start(text: str) -> Config:
        running.append(serve(tmp_path, text, *MOCK))
        return Config(running[0])

    yield start
    for one in running:
        one.stop()


class Stream(threading.Thread):
    """A streamed answer, read in a thread."""

    def __init__(self, config: Config, model: str) -> None:
        super().__init__(daemon=True)
        self.text, self.failure = "", ""
        self.answer = config.ask(model, stream=True)
        self.start()
        until(lambda: self.text)

    def run(self) -> None:
        try:
            for chunk in self.answer:
                if chunk.choices:
                    self.text += chunk.choices[0].delta.content or ""
        except Exception as error:  # whatever it was, the test says it
            self.failure = repr(error)

    def whole(self) -> bool:
        self.join(15)
        return (self.text, self.failure) == (TEXT, "")


def test_a_new_upstream_and_alias_while_a_stream_runs(
    served: Callable[[str], Config], slow: mock_upstream.Mock, quick: mock_upstream.Mock
) -> None:
    first = upstream("slow", slow, "far")
    config = served(first)
    stream = Stream(config, "far")
    config.change(first + upstream("quick", quick, "new") + '[aliases]\n"nick" = "new"\n')
    assert stream.is_alive() and stream.text != TEXT
    assert {"new", "nick"} <= config.models()
    assert config.ask("nick").choices[0].message.content == TEXT
    assert stream.whole()
    assert config.figures()["tertulia_config_last_reload_success"] == 1


def test_a_removed_upstream_ends_the_call_it_has_and_gets_no_other(
    served: Callable[[str], Config], slow: mock_upstream.Mock
) -> None:
    config = served(upstream("slow", slow, "far"))
    stream = Stream(config, "far")
    config.change("[upstreams]\n")
    assert stream.is_alive()
    assert "far" not in config.models() and 'target="slow/far"' in config.metrics()
    assert stream.whole()
    until(lambda: 'target="slow/far"' not in config.metrics())
    with pytest.raises(openai.NotFoundError):
        config.ask("far")


def test_a_file_with_a_mistake_leaves_the_old_one_in_force_and_says_why(
    served: Callable[[str], Config], quick: mock_upstream.Mock
) -> None:
    good = upstream("quick", quick, "far")
    config = served(good)
    for bad, why in (
        (good + "[aliases]\nx = 'nobody'\n", "aliases.x: there is no model 'nobody'"),
        ("prot = 1\n" + good, "prot: there is no such setting; did you mean port?"),
        (good + "x = = 1", "not valid TOML"),
        (good.replace("http://", "file://"), "upstreams.quick.base_url: expected an http or https URL"),
        (
            good + "[routes.r]\ntargets = [{ upstream = 'gone', model = 'm' }]\n",
            "routes.r.targets[0].upstream: there is no",
        ),
        (good + "[presets.p]\nmodel = 'far'\nparameters = { temperature = 9 }\n", "presets.p.parameters.temperature"),
        (good + "[prices.far]\ninptu = 1\n", "prices.far.inptu: there is no such price"),
        (
            good + "[upstreams.quick.prices]\nfarr = { input = 1 }\n",
            "upstreams.quick.prices.farr: it has no model of that name; did you mean far?",
        ),
        (
            good.replace("http://", "http://me:hidden@"),
            "upstreams.quick.base_url: a user name and password have no place there",
        ),
        (
            good + "[upstreams.b]\nbase_url = 'http://b/v1'\nkey = 'env:NOT_SET'\n",
            "the environment variable NOT_SET is not",
        ),
        (
            good + "[routes.r]\ntargets = [{ upstream = 'quick', model = 'new' }]\nfallback = ['nowhere']\n",
            "routes.r.fallback[0]: there is no model 'nowhere'",
        ),
    ):
        config.change(bad, "refused")
        until(lambda why=why: why in config.errors())
        assert config.errors().splitlines()[-1].startswith("ERROR tertulia.reload: the configuration was not taken")
        assert config.ask("far").choices[0].message.content == TEXT
        assert not config.models() & {"x", "r", "quick/new"}
    assert config.figures()["tertulia_config_last_reload_success"] == 0
    config.change(good + "[aliases]\nx = 'far'\n")
    assert config.ask("x").choices[0].message.content == TEXT
    assert config.figures()["tertulia_config_last_reload_success"] == 1


def test_what_is_set_for_nobody_is_said_at_the_start_and_on_reload(
    served: Callable[[str], Config], quick: mock_upstream.Mock
) -> None:
    good = upstream("quick", quick, "far")
    config = served(good + "[prices.farr]\ninput = 1\noutput = 1\n[policies.key_1]\npriority = 'high'\n")
    assert "WARNING tertulia: prices.farr: no model has that name, so nothing costs that; did you mean far?" in (
        config.errors()
    )
    assert "WARNING tertulia: policies.key_1: no key has that id" in config.errors()
    config.change(good + "[prices.far]\ninput = 1\noutput = 1\n[policies.key_2]\npriority = 'high'\n")
    until(lambda: "policies.key_2: no key has that id" in config.errors())
    assert "prices.far:" not in config.errors()


def test_without_watch_only_sighup_has_it_read(served: Callable[[str], Config], quick: mock_upstream.Mock) -> None:
    config = served("watch = false\n" + upstream("quick", quick, "far"))
    text = "watch = false\n" + upstream("quick", quick, "other")
    config.write(text)
    time.sleep(2.5)
    assert config.count("ok") == 0 and "far" in config.models()
    config.change(text, signalled=True)
    assert "other" in config.models() and "far" not in config.models()
    assert config.served.process.poll() is None


def test_an_upstream_that_is_as_before_keeps_its_connections(
    served: Callable[[str], Config], recorder: Recorder
) -> None:
    same = upstream("same", recorder, "far")
    config = served(same + upstream("other", recorder, "changing"))
    config.ask("far")
    config.ask("changing")
    assert recorder.connections() == 2
    config.change(same + upstream("other", recorder, "changing", more="connections = 3"))
    config.ask("far")
    assert recorder.connections() == 2
    config.ask("changing")
    assert recorder.connections() == 3


def test_a_changed_upstream_goes_on_offering_what_it_had_listed(
    served: Callable[[str], Config], quick: mock_upstream.Mock
) -> None:
    listing = upstream("quick", quick, "far", more="discover = true\nprefix = 'q/'")
    config = served(listing)
    until(lambda: any(model.startswith("q/") for model in config.models()))
    listed = config.models()
    name = next(model for model in listed if model.startswith("q/"))
    config.change(listing + f'connections = 9\n[aliases]\n"nick" = "{name}"\n')
    assert config.models() == listed | {"nick"}


def test_what_needs_a_restart_is_named_and_keeps_its_value(
    served: Callable[[str], Config], quick: mock_upstream.Mock
) -> None:
    config = served(upstream("quick", quick, "far"))
    config.change('threads = 7\nhost = "0.0.0.0"\nstrict_models = true\n' + upstream("quick", quick, "far"))
    until(lambda: "a restart" in config.errors())
    assert "tertulia.toml: host needs a restart; until then the old value holds" in config.errors()  # threads is a flag
    config.change('host = "0.0.0.0"\n' + upstream("quick", quick, "far"))  # as it was said
    config.change('host = "0.0.0.1"\n' + upstream("quick", quick, "far"))
    until(lambda: config.errors().count("a restart") == 2)
    config.change(upstream("quick", quick, "far"))  # what is in force
    config.change('host = "0.0.0.1"\nstrict_models = true\n' + upstream("quick", quick, "far"))
    until(lambda: config.errors().count("a restart") == 3)
    with pytest.raises(openai.NotFoundError):
        config.ask("gpt-4o")  # what can change did


def test_a_key_in_a_file_is_read_again(served: Callable[[str], Config], recorder: Recorder, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("one")
    config = served("cache = 'off'\n" + upstream("far", recorder, "far", more=f'key = "file:{secret}"'))
    config.ask("far")
    before = config.count("ok")
    secret.write_text("two, and longer")
    until(lambda: config.count("ok") == before + 1)
    config.ask("far")
    assert [key for _, key in recorder.asked] == ["Bearer one", "Bearer two, and longer"]
    secret.unlink()  # being replaced: nothing is read until it is back
    time.sleep(1.5)
    assert config.count("refused") == 0
    config.served.process.send_signal(signal.SIGHUP)
    until(lambda: config.count("refused") == 1)
    until(lambda: "cannot be read" in config.errors())
    assert "longer" not in config.errors()
    config.ask("far")


def test_a_file_that_is_being_written_in_place_is_left_alone(
    served: Callable[[str], Config], quick: mock_upstream.Mock
) -> None:
    far, nick = upstream("quick", quick, "far"), '[aliases]\n"nick" = "far"\n'
    config = served(far)
    with config.path.open("w", buffering=1) as file:  # emptied, and written in bits for more than a second
        for line in [*far.splitlines(True), *nick.splitlines(True)]:
            time.sleep(0.4)
            file.write(line)
    until(lambda: config.count("ok") == 1)
    assert config.count("refused") == 0 and {"far", "nick"} <= config.models()
    line = f"INFO tertulia.reload: {config.path} was read again and is in force; changed: aliases.nick"
    until(lambda: line in config.errors().splitlines())
    config.path.write_text("\n")
    until(lambda: config.count("refused") == 1)
    until(lambda: f"the settings in force stay: {config.path} is empty" in config.errors())
    assert {"far", "nick"} <= config.models()
    config.path.unlink()
    until(lambda: f"WARNING tertulia.reload: {config.path} is missing: the old settings stay" in config.errors())
    time.sleep(2.2)
    assert config.errors().count("is missing") == 1 and {"far", "nick"} <= config.models()
    config.write(far)
    until(lambda: config.count("ok") == 2)
    assert config.count("refused") == 1 and "nick" not in config.models()


def test_limits_and_log_level_change(served: Callable[[str], Config], quick: mock_upstream.Mock) -> None:
    config = served(upstream("quick", quick, "far"))
    config.change('requests_per_minute = 2\nlog_level = "info"\n' + upstream("quick", quick, "far"))
    raw = config.served.client().chat.completions.with_raw_response.create(
        model="far", messages=[{"role": "user", "content": "hi"}]
    )
    assert raw.headers["x-ratelimit-limit-requests"] == "2"
    config.change("requests_per_minute = 3\n" + upstream("quick", quick, "far"))
    until(lambda: "changed: requests_per_minute, log_level" in config.errors())
    config.change('log_level = "error"\n' + upstream("quick", quick, "far"))
