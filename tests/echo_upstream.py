"""An upstream that says back what it was sent: for the tests of what must not reach a caller. It remembers requests.

The model's name says how: `STATUS/SHAPE`, where SHAPE is how the key it was sent stands in the error: `message`,
`escaped` (in JSON), `percent` (as in a URL), `detail` (no error of OpenAI's shape), `text` (no JSON) or `code`. With
status 200 it is an error within an answer; `slow` a stream of a token every tenth of a second; anything else an answer.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import quote

SHAPES = ("message", "escaped", "percent", "detail", "text", "code")
TOKENS = 20  # of a slow stream


class Echo:
    """One upstream. requests: (path, headers in the order they came, body) of each POST."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, list[tuple[str, str]], dict[str, Any]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"echo": self}))
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def keys(self) -> list[str]:
        """The keys it was sent, in their order."""
        return [_key(dict(headers)) for _, headers, _ in self.requests]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _key(headers: dict[str, str]) -> str:
    found = {name.lower(): value for name, value in headers.items()}
    return found.get("api-key", found.get("authorization", "")).removeprefix("Bearer ")


class _Handler(BaseHTTPRequestHandler):
    echo: ClassVar[Echo]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        key = _key(dict(self.headers.items()))
        self._tell(400, {"error": {"message": f"no list for {key}", "type": "t", "param": None, "code": "no"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = list(self.headers.items())
        self.echo.requests.append((self.path, headers, body))
        first, _, shape = body["model"].partition("/")
        key = _key(dict(headers)) + " " + " ".join(value for name, value in headers if name.lower() == "x-further")
        if not first.isdecimal():
            self._answer(body, slow=first == "slow")
        elif shape == "stream":
            said = json.dumps({"error": {"message": f"bad key {key}", "type": "t", "code": int(first)}})
            self._tell(200, f"data: {said}\n\n".encode(), "text/event-stream")
        else:
            self._tell(int(first), said_back(shape, key), "text/plain" if shape == "text" else "application/json")

    def _answer(self, body: dict[str, Any], slow: bool) -> None:
        base = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
        used = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "hello", "refusal": None}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            self._tell(200, {**base, "choices": [choice], "usage": used})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for number in range(TOKENS):
            finish = "stop" if number == TOKENS - 1 else None
            choice = {"index": 0, "delta": {"content": f" tok{number}"}, "finish_reason": finish}
            self.wfile.write(b"data: %s\n\n" % json.dumps({**base, "choices": [choice]}).encode())
            time.sleep(0.1 if slow else 0)
        self.wfile.write(b"data: [DONE]\n\n")

    def _tell(self, status: int, body: Any, kind: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def said_back(shape: str, key: str) -> bytes:
    """An error with a key in it."""
    if shape == "text":
        return f"no such key: {key}".encode()
    if shape == "detail":
        return json.dumps({"detail": f"no such key: {key}"}).encode()
    text = quote(key, safe="") if shape == "percent" else key
    error = {"message": f"Incorrect API key provided: {text}.", "type": "t", "param": None, "code": "theirs"}
    if shape == "code":
        error["code"] = key
    data = json.dumps({"error": error}).encode()
    if shape == "escaped":
        for word in key.split():
            data = data.replace(word.encode(), "".join(f"\\u{ord(letter):04x}" for letter in word).encode())
    return data


@contextmanager
def running() -> Iterator[Echo]:
    echo = Echo()
    try:
        yield echo
    finally:
        echo.close()


def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return int(gone.getsockname()[1])
