"""What the server does when things break: each fault has a clear outcome, nothing hangs, no process is left behind, and
the next request works. Real processes, real sockets, real signals.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
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


def works(served: Served, model: str = "mock", retries: int = 0) -> bool:
    """Whether a call is answered; with retries, as the SDK makes them on a 5xx that allows it."""
    client = served.client(max_retries=retries)
    answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=4)
    return bool(answer.choices[0].message.content)


def long_story(client: Any, **parameters: Any) -> Any:
    """An answer that takes the engine long: it goes on past its end."""
    return client.chat.completions.create(
        model="gpt-4o-mini", messages=HELLO, max_tokens=4000, extra_body={"ignore_eos": True}, **parameters
    )


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


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def ready(served: Served) -> bool:
    """Whether the default models are loaded."""
    try:
        return bool(urllib.request.urlopen(f"{served.root}/readyz", timeout=10).status == 200)
    except urllib.error.HTTPError:
        return False


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
    stream = long_story(local.client(), stream=True)
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
    assert works(local, "gpt-4o-mini", retries=4)


def test_engine_child_killed_before_a_whole_answer(local: Served) -> None:
    assert until(lambda: ready(local), 60)
    running = children(local.process.pid)
    before = {child: cpu_seconds(child) for child in running}

    def generates() -> bool:  # half a second of work since: far beyond reading so short a prompt
        return any(cpu_seconds(child) - before[child] > 0.5 for child in running)

    async def work() -> None:
        asking = asyncio.create_task(long_story(local.async_client()))
        assert await asyncio.to_thread(until, generates, 60)
        assert "tertulia_calls_in_flight 1" in metrics(local) and not asking.done()
        for child in running:
            os.kill(child, signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as broken:
            await asking
        assert broken.value.code == "engine_failed" and broken.value.status_code == 502

    asyncio.run(work())
    assert works(local, "gpt-4o-mini", retries=4)


def test_gateway_killed_leaves_no_orphan(model_files: Path, tmp_path: Path) -> None:
    served = serve(with_models(tmp_path, model_files))
    stream = long_story(served.client(), stream=True)
    next(stream)
    running = children(served.process.pid)
    assert running
    served.process.kill()
    served.process.wait()
    with pytest.raises(openai.APIConnectionError):
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
    stream = long_story(local.client(), stream=True)
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
    if not config.startswith("port"):
        arguments = ("--port", "0", *arguments)
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
        [sys.executable, "-m", "tertulia", "serve", "--data", str(tmp_path / "file" / "x"), "--port", "0"],
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


def test_a_body_of_100_mb_that_is_sent(mock: Served) -> None:
    head = request(mock, b"")[:-4].replace(b"Content-Length: 0", b"Content-Length: 104857600")
    before, sent = resident_mb(mock.process.pid), 0
    with socket.create_connection(address(mock), 10) as wire:
        wire.sendall(head + b"\r\n\r\n")
        try:
            while sent < 100:
                wire.sendall(b"x" * 2**20)
                sent += 1
        except ConnectionError:
            pass  # refused before the end of it
        wire.settimeout(10)
        assert wire.recv(65536).startswith(b"HTTP/1.1 413")  # said all the same, and still there to read
    assert resident_mb(mock.process.pid) - before < 10
    assert works(mock)


def test_a_body_of_100_mb_by_the_sdk(mock: Served) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        mock.client().chat.completions.create(model="mock", messages=[{"role": "user", "content": "x" * 100 * 2**20}])
    assert refused.value.status_code == 413
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
    # Some 45 MB: twenty alternatives are told of each of the letters, far more than sockets of both sides hold.
    script = {"text": "x" * 30_000, "chunk": 1}
    asked = {"model": "mock", "messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 20, "mock": script}
    gateway = mock.process.pid
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(address(mock))
        before = resident_mb(gateway)
        wire.sendall(request(mock, json.dumps(asked).encode(), b"Connection: close\r\n"))
        assert until(lambda: "tertulia_calls_in_flight 1" in metrics(mock), 10)
        worked = -1.0
        while cpu_seconds(gateway) > worked + 0.1:  # until it rests
            worked = cpu_seconds(gateway)
            time.sleep(1)
        assert resident_mb(gateway) - before < 15, "what nobody reads is kept in memory"
        assert "tertulia_calls_in_flight 1" in metrics(mock)
        assert works(mock)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        wire.settimeout(20)
        size, last = 0, b""
        while data := wire.recv(2**20):
            size += len(data)
            last = (last + data)[-200:]
    assert b"[DONE]" in last and size > 30e6
    assert until(lambda: "tertulia_calls_in_flight 0" in metrics(mock), 5)
    assert works(mock)


# ---- what is written down


def test_no_prompt_and_no_key_in_any_log(tmp_path: Path) -> None:
    data = tmp_path / "data"
    served = serve(
        data, f'access_log = "{data}/access.log"\nlog_level = "debug"\n',
        "--chat-model", "mock", "--embedding-model", "mock-embedding",
    )  # fmt: skip
    secret, stranger = "the password of the cellar", "sk-secret-0123456789abcdef"
    client, said = served.client(), [{"role": "user", "content": secret}]
    try:
        with pytest.raises(openai.AuthenticationError):
            served.client(api_key=stranger).chat.completions.create(model="mock", messages=said)
        assert client.chat.completions.create(model="mock", messages=said).choices[0].message.content == secret
        assert list(client.chat.completions.create(model="mock", messages=said, stream=True))
        assert client.completions.create(model="mock", prompt=secret).choices[0].text == secret
        assert client.embeddings.create(model="mock-embedding", input=secret, encoding_format="float").data
        for wrong in ({"temperature": secret}, {"mock": {"error": {"status": 500, "message": secret}}}):
            with pytest.raises(openai.APIStatusError):
                client.chat.completions.create(model="mock", messages=said, extra_body=wrong)
        exchange(served, request(served, b'{"messages": "' + secret.encode()))
    finally:
        assert served.stop() == 0  # with which everything is written
    lines = [json.loads(line) for line in (data / "access.log").read_text().splitlines()]
    assert [line["status"] for line in lines] == [401, 200, 200, 200, 200, 400, 500, 400]
    assert {line["task"] for line in lines} == {"chat", "completion", "embedding"}
    written = {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert {"access.log", "stderr.log", "000001.jsonl"} <= {path.name for path in written}
    assert any(content.startswith(b"SQLite format 3") for content in written.values())
    for path, content in written.items():
        assert secret.encode() not in content and stranger.encode() not in content, path
        if path.name != "client.env":  # the one place of the keys, for their owner only
            assert served.api_key.encode() not in content and served.admin_key.encode() not in content, path
    assert (data / "client.env").stat().st_mode & 0o077 == 0


def test_a_sender_of_too_much_gets_to_read_why(mock: Served) -> None:
    """A plain client sends its whole body before it reads: the refusal must not be lost in a reset connection."""
    body = b"x" * (8 * 2**20)
    connection = http.client.HTTPConnection(*address(mock), timeout=20)
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {mock.api_key}"})
    answer = connection.getresponse()
    assert answer.status == 413 and b"too large" in answer.read()
    connection.close()
    assert works(mock)
