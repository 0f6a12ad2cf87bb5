"""An upstream behind the gateway, over real sockets: bytes pass untouched under every split, faults have outcomes."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Served, serve
from tertulia.store.journal import read

Script = Callable[[socket.socket, bytes], None]
ANSWER = b'{"id":"x",  "object":"chat.completion","odd":[1, 2 ,3],"usage":{"prompt_tokens":3,"completion_tokens":4}}'
EVENTS = [
    b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"one"}}]}\n\n',
    b": a comment\n\n",
    b'data: {"id":"x","choices":[],"usage": {"prompt_tokens":3,"completion_tokens":4}}\n\n',
    b"data: [DONE]\n\n",
]
BODY = {"model": "far", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


class Upstream:
    """A server that reads one request after another on each connection and lets `script` answer it."""

    def __init__(self, up: bool = True) -> None:
        """up: whether it listens at once; else its port refuses connections until rise()."""
        self.script: Script = whole(ANSWER)
        self.requests: list[bytes] = []
        self.left = threading.Event()
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        if up:
            self.rise()

    def rise(self) -> None:
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                wire, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(wire,), daemon=True).start()

    def _serve(self, wire: socket.socket) -> None:
        with wire:
            got = b""
            while True:
                try:
                    data = wire.recv(65536)
                except OSError:
                    return
                if not data:
                    return
                got += data
                head, _, rest = got.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                if b"\r\n\r\n" in got and len(rest) >= length:
                    self.requests.append(got)
                    got = b""
                    try:
                        self.script(wire, self.requests[-1])
                    except OSError:
                        self.left.set()
                        return


def whole(body: bytes, status: str = "200 OK", extra: bytes = b"") -> Script:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n".encode()
    return lambda wire, request: wire.sendall(head + extra + b"\r\n" + body)


def streamed(pieces: list[bytes], gap: float = 0.0, end: bool = True) -> Script:
    def script(wire: socket.socket, request: bytes) -> None:
        wire.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in pieces:
            wire.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            time.sleep(gap)
        if end:
            wire.sendall(b"0\r\n\r\n")

    return script


@pytest.fixture(scope="module")
def far() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
def gateway(far: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = f"""
retries = 0
breaker_failures = 1000000
chat_model = "mock"
embedding_model = "mock-embedding"
[upstreams.far]
base_url = "http://127.0.0.1:{far.port}/v1"
key = "env:FAR_KEY"
first_byte_timeout = 1.0
stall_timeout = 1.0
models = {{ far = "their-model", "same-model" = "same-model", short = "short" }}
context_length = {{ short = 50 }}
"""
    served = serve(tmp_path_factory.mktemp("gateway"), config, environment={"FAR_KEY": "sk-far-secret-0123456789"})
    yield served
    served.stop()


def ask(gateway: Served, **more: Any) -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"{gateway.base_url}/chat/completions", json.dumps({**BODY, **more}).encode(),
        {"Authorization": f"Bearer {gateway.api_key}", "Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def code(answer: bytes) -> str:
    return str(json.loads(answer)["error"]["code"])


def test_an_answer_passes_byte_for_byte(gateway: Served, far: Upstream) -> None:
    far.script = whole(ANSWER)
    assert ask(gateway) == (200, ANSWER)


def test_only_the_model_name_is_rewritten(gateway: Served, far: Upstream) -> None:
    far.script = whole(ANSWER)
    ask(gateway, model="same-model", odd=[1, 2.50, "ü"])
    sent = far.requests[-1].partition(b"\r\n\r\n")[2]
    assert sent == json.dumps({**BODY, "model": "same-model", "odd": [1, 2.50, "ü"]}).encode()
    ask(gateway, odd=[1, 2.50, "ü"])
    assert json.loads(far.requests[-1].partition(b"\r\n\r\n")[2]) == {
        **BODY,
        "model": "their-model",
        "odd": [1, 2.5, "ü"],
    }
    assert b'"odd":[1, 2.5, "\\u00fc"]' in far.requests[-1]  # the other fields keep their bytes


def test_the_upstream_gets_its_own_key_and_not_the_callers(gateway: Served, far: Upstream) -> None:
    far.script = whole(ANSWER)
    ask(gateway)
    assert b"authorization: Bearer sk-far-secret-0123456789\r\n" in far.requests[-1]
    assert gateway.api_key.encode() not in far.requests[-1]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_a_stream_passes_under_every_split(gateway: Served, far: Upstream, size: int) -> None:
    text = b"".join(EVENTS)
    far.script = streamed([text[at : at + size] for at in range(0, len(text), size)])
    assert ask(gateway, **STREAM) == (200, text)


def test_usage_of_an_upstream_reaches_the_ledger(gateway: Served, far: Upstream) -> None:
    """And is hidden from a caller who did not ask for it."""
    far.script = streamed(EVENTS)
    assert ask(gateway, stream=True) == (200, b"".join([*EVENTS[:2], EVENTS[3]]))
    entry = json.loads(list(read(gateway.data / "ledger"))[-1])
    assert (entry["prompt_tokens"], entry["completion_tokens"], entry["outcome"]) == (3, 4, "finished")
    assert (entry["asked"], entry["model"], entry["target"], "fallback" in entry) == ("far", "far", "far", False)
    far.script = streamed(EVENTS[:1])
    ask(gateway, stream=True)
    entry = json.loads(list(read(gateway.data / "ledger"))[-1])
    assert (entry["completion_tokens"], entry["outcome"], entry["estimated"]) == (1, "failed", True)


@pytest.mark.parametrize("status", ["400 Bad Request", "429 Too Many Requests", "503 Service Unavailable"])
def test_a_refusal_passes_as_it_is(gateway: Served, far: Upstream, status: str) -> None:
    body = b'{"error":{"message":"no","type":"t","param":null,"code":"theirs"}}'
    far.script = whole(body, status)
    assert ask(gateway) == (int(status[:3]), body)


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "302 Found", "500 Oops"])
def test_what_concerns_our_key_or_is_no_answer_is_ours_to_say(gateway: Served, far: Upstream, status: str) -> None:
    far.script = whole(b"<html>", status, b"location: http://127.0.0.1:1/\r\n")
    answer = ask(gateway)
    assert answer[0] == 502 and code(answer[1]) == "engine_failed"


def test_garbage_is_a_typed_error(gateway: Served, far: Upstream) -> None:
    far.script = lambda wire, request: wire.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")
    answer = ask(gateway)
    assert answer[0] == 502 and code(answer[1]) == "engine_failed"


def test_a_cut_before_the_end_is_an_error_in_the_stream(gateway: Served, far: Upstream) -> None:
    def cut(wire: socket.socket, request: bytes) -> None:
        streamed(EVENTS[:1], end=False)(wire, request)
        wire.close()

    far.script = cut
    status, answer = ask(gateway, stream=True)
    events = answer.split(b"\n\n")
    assert status == 200 and answer.startswith(EVENTS[0])
    assert code(events[1].removeprefix(b"data: ")) == "engine_failed"


def test_silence_ends_at_the_timeout(gateway: Served, far: Upstream) -> None:
    far.script = lambda wire, request: time.sleep(10)
    answer = ask(gateway)
    assert answer[0] == 504 and b"did not begin its answer within 1 seconds" in answer[1]
    far.script = streamed(EVENTS[:1], gap=10)
    status, streamed_answer = ask(gateway, stream=True)
    assert status == 200 and b"said nothing for 1 seconds" in streamed_answer


def test_a_slow_but_steady_stream_is_not_silence(gateway: Served, far: Upstream) -> None:
    far.script = streamed(EVENTS, gap=0.4)  # from event to event, past the comment
    assert ask(gateway, **STREAM) == (200, b"".join(EVENTS))


def test_a_kept_connection_that_was_closed_is_not_the_callers_problem(gateway: Served, far: Upstream) -> None:
    def once(wire: socket.socket, request: bytes) -> None:
        whole(ANSWER)(wire, request)
        wire.shutdown(socket.SHUT_RDWR)

    far.script = once
    for _ in range(30):
        assert ask(gateway) == (200, ANSWER)


def test_what_cannot_fit_is_refused_before_it_is_sent(gateway: Served, far: Upstream) -> None:
    far.script = whole(ANSWER)
    sent = len(far.requests)
    status, answer = ask(gateway, model="short", messages=[{"role": "user", "content": "word " * 51}])
    assert (status, code(answer), len(far.requests)) == (400, "context_length_exceeded", sent)
    assert json.loads(answer)["error"]["param"] == "messages"
    assert ask(gateway, model="short", messages=[{"role": "user", "content": "word " * 50}]) == (200, ANSWER)


def test_the_server_starts_without_the_upstream_whose_models_its_settings_name(tmp_path: Path) -> None:
    far = Upstream(up=False)

    def script(wire: socket.socket, request: bytes) -> None:
        listing = b'{"object":"list","data":[{"id":"big"},{"id":"embed"}]}'
        whole(listing if request.startswith(b"GET /v1/models ") else ANSWER)(wire, request)

    far.script = script
    config = f"""
chat_model = "far/big"
embedding_model = "far/embed"
fallback = ["far/big"]
[aliases]
nick = "far/big"
[presets.poet]
model = "far/big"
system = "Rhyme."
[upstreams.far]
base_url = "http://127.0.0.1:{far.port}/v1"
discover = true
prefix = "far/"
[routes.r]
targets = [{{ model = "far/big" }}]
"""
    served = serve(tmp_path, config)
    names = ("far/big", "nick", "poet", "r", "gpt-4o")
    try:
        for name in names:
            status, answer = ask(served, model=name)
            assert (status, code(answer)) == (404, "model_not_found"), name
        assert ready(served) == (503, {"far/big": "missing", "far/embed": "missing"})
        far.rise()
        end = time.monotonic() + 20
        while ask(served, model="far/big")[0] != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert [ask(served, model=name) for name in names] == [(200, ANSWER)] * len(names)
        assert ready(served) == (200, {"far/big": "ready", "far/embed": "ready"})
        said = (tmp_path / "stderr.log").read_text()
        assert "chat_model: 'far/big' is not known yet; upstreams.far may list it" in said
    finally:
        served.stop()


def ready(served: Served) -> tuple[int, dict[str, str]]:
    try:
        with urllib.request.urlopen(f"{served.root}/readyz", timeout=10) as answer:
            return answer.status, json.loads(answer.read())["models"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["models"]


def test_nobody_there_is_a_typed_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    config = f'chat_model = "mock"\n[upstreams.u]\nbase_url = "http://127.0.0.1:{port}/v1"\nmodels = {{ far = "x" }}\n'
    served = serve(tmp_path, config, "--embedding-model", "mock-embedding")
    try:
        answer = ask(served)
        assert answer[0] == 502 and code(answer[1]) == "engine_failed"
    finally:
        served.stop()


def test_a_client_that_leaves_ends_the_upstream_call(gateway: Served, far: Upstream) -> None:
    far.left.clear()
    far.script = streamed([EVENTS[0]] * 1000, gap=0.02)
    stream = gateway.client(_strict_response_validation=False).chat.completions.create(**BODY, stream=True)
    next(iter(stream))
    stream.close()
    assert far.left.wait(5)
