"""What the server does when things break: each fault has a clear outcome, nothing hangs, no process is left behind, and
the next request works. Real processes, real sockets, real signals.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import Served, serve, with_models

HELLO = [{"role": "user", "content": "Tell me a very long story about the sea."}]


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = serve(
        tmp_path_factory.mktemp("faults"), "read_timeout = 2.0\nmax_body = 1\nmax_connections = 2000\n",
        "--chat-model", "mock", "--embedding-model", "mock-embedding",
    )  # fmt: skip
    yield served
    assert served.stop() == 0


@pytest.fixture
def local(model_files: Path, tmp_path: Path) -> Iterator[Served]:
    served = serve(with_models(tmp_path, model_files))
    yield served
    served.stop()


def works(served: Served, model: str = "mock") -> bool:
    answer = served.client().chat.completions.create(model=model, messages=HELLO, max_tokens=4)
    return bool(answer.choices[0].message.content)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = stat.read_text().partition(" ")
        except OSError:
            continue  # it has just gone
        if int(rest.rsplit(")", 1)[1].split()[1]) == pid:
            found.append(int(number))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(what: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.02)
    return bool(what())


def metrics(served: Served) -> str:
    return urllib.request.urlopen(f"{served.root}/metrics", timeout=10).read().decode()


def address(served: Served) -> tuple[str, int]:
    host, _, port = served.root.removeprefix("http://").partition(":")
    return host, int(port)


def exchange(served: Served, sent: bytes, seconds: float = 10) -> bytes:
    """Sends bytes as they are and reads until the server closes or is done."""
    with socket.create_connection(address(served), seconds) as wire:
        wire.sendall(sent)
        wire.settimeout(seconds)
        got = b""
        while True:
            data = wire.recv(65536)
            got += data
            head, _, rest = got.partition(b"\r\n\r\n")
            length = next((int(h[15:]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:")), None)
            if not data or (length is not None and len(rest) >= length):
                return got


def request(served: Served, body: bytes, extra: bytes = b"", path: bytes = b"/v1/chat/completions") -> bytes:
    key = served.api_key.encode()
    return (
        b"POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n%s"
        b"Content-Length: %d\r\n\r\n%s" % (path, key, extra, len(body), body)
    )


# ---- the engine


def test_engine_child_killed_mid_stream(local: Served) -> None:
    client = local.client()
    stream = client.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=2000, stream=True)
    next(stream)
    next(stream)
    running = children(local.process.pid)
    assert running
    with pytest.raises(openai.APIError) as broken:
        for child in running:
            os.kill(child, signal.SIGKILL)
        for _ in stream:
            pass
    assert broken.value.code == "engine_failed"
    assert until(lambda: not any(alive(child) for child in running), 5)
    assert works(local.client().with_options(max_retries=4) and local, "gpt-4o-mini")


def test_engine_child_killed_before_a_whole_answer(local: Served) -> None:
    async def work() -> None:
        client = local.async_client()
        asking = asyncio.create_task(
            client.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=2000)
        )
        while not children(local.process.pid):
            await asyncio.sleep(0.05)
        await asyncio.sleep(3)
        for child in children(local.process.pid):
            os.kill(child, signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as broken:
            await asking
        assert broken.value.code == "engine_failed"

    asyncio.run(work())
    assert works(local, "gpt-4o-mini")


def test_gateway_killed_leaves_no_orphan(model_files: Path, tmp_path: Path) -> None:
    served = serve(with_models(tmp_path, model_files))
    stream = served.client().chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=2000, stream=True)
    next(stream)
    running = children(served.process.pid)
    assert running
    served.process.kill()
    served.process.wait()
    with pytest.raises((openai.APIError, openai.APIConnectionError, Exception)):
        for _ in stream:
            pass
    assert until(lambda: not any(alive(child) for child in running), 2), "an engine outlived the gateway"
    again = serve(tmp_path)  # the same directory serves again, with everything that was acknowledged
    try:
        assert works(again)
    finally:
        again.stop()


def test_a_stop_ends_the_children_too(model_files: Path, tmp_path: Path) -> None:
    served = serve(with_models(tmp_path, model_files))
    assert works(served, "gpt-4o-mini")
    running = children(served.process.pid)
    assert running
    assert served.stop() == 0
    assert not any(alive(child) for child in running)


def test_a_client_that_leaves_stops_the_engine(local: Served) -> None:
    client = local.client()
    stream = client.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=4000, stream=True)
    next(stream)
    stream.close()
    assert until(lambda: 'outcome="client_left"' in metrics(local), 2)
    assert "tertulia_calls_in_flight 0" in metrics(local)


def test_a_corrupt_model_file_is_said_and_not_served(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + os.urandom(4096))
    done = run_serve(tmp_path / "data", f'[models.bad]\nfile = "{bad}"\n')
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "models.bad.file" in done.stderr


def test_a_model_file_that_breaks_after_the_start(model_files: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes((model_files / "smollm2-135m-instruct.gguf").read_bytes())
    served = serve(
        tmp_path / "data", f'preload = false\n[models.copy]\nfile = "{copy}"\n',
        "--chat-model", "mock", "--embedding-model", "mock-embedding",
    )  # fmt: skip
    try:
        with copy.open("r+b") as file:
            file.truncate(50_000_000)
        with pytest.raises(openai.InternalServerError) as broken:
            works(served, "copy")
        assert str(tmp_path) not in str(broken.value)
        assert works(served)
    finally:
        served.stop()


# ---- the start


def run_serve(data: Path, config: str = "", *arguments: str) -> subprocess.CompletedProcess[str]:
    """`tertulia serve` that is expected not to start."""
    data.mkdir(parents=True, exist_ok=True)
    (data / "t.toml").write_text(config)
    return subprocess.run(
        [sys.executable, "-m", "tertulia", "serve", "--data", str(data), "--config", str(data / "t.toml"),
         "--chat-model", "mock", "--embedding-model", "mock-embedding", *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_serve(tmp_path, "", "--port", str(port))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"Port {port}" in done.stderr and "--port" in done.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("prot = 1\n", "did you mean port?"),
        ("port = 99999\n", "port"),
        ("[models.x]\nfiel = 'a'\n", "did you mean file?"),
        ("= nonsense", "not valid TOML"),
        ("[aliases]\nx = 'nothing'\n", "there is no model 'nothing'"),
        ("[presets.p]\nmodel = 'nothing'\n", "there is no model 'nothing'"),
        ("[models.x]\nfile = '/does/not/exist.gguf'\n", "models.x.file"),
        ("[upstreams.u]\nbase_url = 'http://127.0.0.1:1/v1'\nkey = 'sk-plain'\n", "env:NAME"),
        ("[upstreams.u]\nbase_url = 'ftp://x'\n", "upstreams.u"),
    ],
)
def test_a_bad_configuration_is_one_line_and_exit_code_2(tmp_path: Path, config: str, said: str) -> None:
    done = run_serve(tmp_path, config)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and said in done.stderr and "sk-plain" not in done.stderr


def test_an_unknown_option_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_serve(tmp_path, "", "--prot", "1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_data_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "tertulia", "serve", "--data", str(tmp_path / "file" / "x")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "data directory" in done.stderr


# ---- the wire


def test_a_thousand_connections_that_say_nothing(mock: Served) -> None:
    silent = [socket.create_connection(address(mock), 10) for _ in range(1000)]
    try:
        assert works(mock)
        began = time.monotonic()
        for connection in silent:  # the server closes them: read_timeout is 2 s here
            connection.settimeout(15)
            assert connection.recv(1) == b""
        assert time.monotonic() - began < 15
    finally:
        for connection in silent:
            connection.close()
    assert works(mock)


def test_connections_over_the_limit_are_told(mock: Served) -> None:
    crowd = []
    try:
        for _ in range(2100):
            crowd.append(socket.create_connection(address(mock), 10))
        crowd[-1].settimeout(5)
        assert crowd[-1].recv(200).startswith(b"HTTP/1.1 503")
    finally:
        for connection in crowd:
            connection.close()
    assert until(lambda: works(mock), 5)


def test_a_request_that_dribbles(mock: Served) -> None:
    with socket.create_connection(address(mock), 10) as wire:
        wire.settimeout(10)
        with pytest.raises((ConnectionError, TimeoutError, BrokenPipeError)):
            for byte in request(mock, b"{}"):
                wire.sendall(bytes([byte]))
                time.sleep(0.1)
            raise ConnectionError(wire.recv(1))
    assert works(mock)


def test_a_body_of_100_mb(mock: Served) -> None:
    head = request(mock, b"")[:-4].replace(b"Content-Length: 0", b"Content-Length: 104857600")
    answer = exchange(mock, head + b"\r\n\r\n")  # refused by its head: not a byte of the body is awaited
    assert answer.startswith(b"HTTP/1.1 413") and b'"type":"invalid_request_error"' in answer
    assert b"connection: close" in answer
    assert works(mock)


def test_a_body_of_100_mb_in_chunks(mock: Served) -> None:
    head = request(mock, b"")[:-4].replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with socket.create_connection(address(mock), 10) as wire:
        wire.settimeout(10)
        wire.sendall(head + b"\r\n\r\n")
        sent = 0
        try:
            while sent < 100:
                wire.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
                sent += 1
        except OSError:
            pass  # the server has closed; what it said may still be there to read
        assert sent < 100
    assert works(mock)


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
    ids=lambda sent: sent[:24].decode("latin-1"),
)
def test_malformed_http(mock: Served, sent: bytes) -> None:
    answer = exchange(mock, sent)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
    assert works(mock)


def test_two_authorizations_are_refused(mock: Served) -> None:
    answer = exchange(mock, request(mock, b"{}", b"Authorization: Bearer sk-other-0123456789\r\n"))
    assert answer.startswith(b"HTTP/1.1 401")


def test_pipelined_requests_are_answered_in_order(mock: Served) -> None:
    def body(text: str) -> bytes:
        return json.dumps({"model": "mock", "messages": [{"role": "user", "content": text}]}).encode()

    sent = b"".join(
        [request(mock, body("first")), b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
         request(mock, body("third"), b"Connection: close\r\n")]
    )  # fmt: skip
    with socket.create_connection(address(mock), 10) as wire:
        wire.settimeout(10)
        wire.sendall(sent)
        got = b""
        while data := wire.recv(65536):
            got += data
    assert got.count(b"HTTP/1.1 200") == 3
    assert got.index(b"first") < got.index(b'"status":"ok"') < got.index(b"third")


def test_requests_in_every_split_of_their_bytes(mock: Served) -> None:
    sent = request(mock, b'{"model":"mock","messages":[{"role":"user","content":"hi"}]}', b"Connection: close\r\n")
    for cut in range(1, len(sent), 7):
        with socket.create_connection(address(mock), 10) as wire:
            wire.settimeout(10)
            wire.sendall(sent[:cut])
            time.sleep(0.002)
            wire.sendall(sent[cut:])
            assert wire.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_client_that_stops_reading_stops_the_engine_and_not_the_server(mock: Served) -> None:
    script = {"text": "x" * 60 * 2000, "chunk": 60}
    body = json.dumps({"model": "mock", "messages": HELLO, "stream": True, "mock": script}).encode()
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(address(mock))
        wire.sendall(request(mock, body))
        time.sleep(0.5)
        assert works(mock)
        wire.settimeout(20)
        got = b""
        while b"[DONE]" not in got[-200:]:
            data = wire.recv(65536)
            assert data
            got += data
    assert works(mock)


def test_no_prompt_and_no_key_in_any_log(mock: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        mock.client(api_key="sk-secret-0123456789abcdef").chat.completions.create(model="mock", messages=HELLO)
    secret = "the password of the cellar"
    mock.client().chat.completions.create(model="mock", messages=[{"role": "user", "content": secret}])
    for path in [*mock.data.glob("*.log"), mock.data / "ledger.jsonl"]:
        text = path.read_text()
        assert secret not in text and mock.api_key not in text and "sk-secret" not in text
