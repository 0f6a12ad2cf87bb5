"""One connection to a server on a raw socket, for tests of what happens on it between requests."""

from __future__ import annotations

import json
import socket
import time
from urllib.parse import urlsplit

from conftest import Served


class Line:
    """One connection, on which requests are sent byte by byte if need be, and whole answers read."""

    def __init__(self, served: Served) -> None:
        parts = urlsplit(served.base_url)
        self.socket = socket.create_connection((parts.hostname or "", parts.port or 0), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.socket.sendall(piece)
            if len(pieces) > 1:
                time.sleep(0.002)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        head, _, self.buffer = self._until(b"\r\n\r\n").partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        if headers.get("transfer-encoding") == "chunked":
            body, _, self.buffer = self._until(b"0\r\n\r\n").partition(b"0\r\n\r\n")
        else:
            length = int(headers["content-length"])
            while len(self.buffer) < length:
                self._more()
            body, self.buffer = self.buffer[:length], self.buffer[length:]
        return int(lines[0].split()[1]), headers, body

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            self._more()
        return self.buffer

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError(f"closed after {self.buffer!r}")
        self.buffer += data


def request(served: Served, text: str, *, extra: str = "", key: str = "", length: str = "", **more: object) -> bytes:
    body = json.dumps({"model": "mock", "messages": [{"role": "user", "content": text}], **more}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key or served.api_key}\r\n{extra}"
        f"Content-Length: {length or len(body)}\r\nContent-Type: application/json\r\n\r\n"
    )
    return head.encode() + body


def said(answer: tuple[int, dict[str, str], bytes]) -> str:
    status, _, body = answer
    assert status == 200, body
    return str(json.loads(body)["choices"][0]["message"]["content"])
