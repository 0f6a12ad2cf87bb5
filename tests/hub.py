"""A model hub and a package index on loopback, as much of them as the real clients need to download one file.

Files are given as bytes; knobs break the connection, spoil bytes or slow it down, and `asked` tells what was asked.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves hub files ("ORG/REPO": {"FILE": bytes}) and wheels ("NAME": {"FILE.whl": bytes}) until the with ends."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.wheels: dict[str, dict[str, bytes]] = {}
        self.token: str | None = None  # needed for hub files
        self.user: str | None = None  # "name:password", needed for the index
        self.cdn: str | None = None  # where hub files are redirected to: another Hub's url
        self.spoil = 0  # answers whose last byte is wrong
        self.cut: list[int] = []  # for each next answer: bytes after which the connection is closed
        self.ranges = True
        self.pause = 0.0  # seconds between pieces of 16 KiB
        self.html = False  # the index speaks HTML only
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def gets(self, ending: str) -> list[dict[str, str]]:
        """Headers of the GETs of a path with that ending."""
        return [headers for method, path, headers in self.asked if method == "GET" and path.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append((self.command, path, headers))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._hub_file(found[1], found[2], found[3], headers)
        elif found := re.fullmatch(r"/simple/([^/]+)/", path):
            self._index(found[1], headers)
        elif found := re.fullmatch(r"/files/([^/]+)/([^/]+)", path):
            self._bytes(self.hub.wheels[found[1]][found[2]], headers, {})
        else:
            self._plain(404, b"")

    def _hub_file(self, repository: str, revision: str, file: str, headers: dict[str, str]) -> None:
        hub = self.hub
        if hub.token and headers.get("authorization") != f"Bearer {hub.token}":
            return self._plain(401, b"", {"X-Error-Code": "GatedRepo"})
        if repository not in hub.repositories:
            return self._plain(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", COMMIT):
            return self._plain(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if file not in hub.repositories[repository]:
            return self._plain(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = hub.repositories[repository][file]
        digest = hashlib.sha256(data).hexdigest()
        extra = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'}
        if hub.cdn:
            extra |= {"Location": hub.cdn + self.path, "X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
            return self._plain(302, b"", extra)
        self._bytes(data, headers, extra)

    def _index(self, name: str, headers: dict[str, str]) -> None:
        hub = self.hub
        if name not in hub.wheels:
            return self._plain(404, b"")
        if hub.user and "authorization" not in headers:
            return self._plain(401, b"", {"WWW-Authenticate": "Basic"})
        files = [(file, f"../../files/{name}/{file}") for file in hub.wheels[name]]
        if hub.html or "json" not in headers.get("accept", ""):
            body = "".join(f'<a href="{url}#sha256=0">{file}</a>' for file, url in files).encode()
            return self._plain(200, body, {"Content-Type": "text/html"})
        body = json.dumps({"meta": {"api-version": "1.1"}, "name": name, "files": [
            {"filename": file, "url": url, "hashes": {}} for file, url in files
        ]}).encode()  # fmt: skip
        self._plain(200, body, {"Content-Type": "application/vnd.pypi.simple.v1+json"})

    def _bytes(self, data: bytes, headers: dict[str, str], extra: dict[str, str]) -> None:
        hub, start, status = self.hub, 0, 200
        if hub.ranges and (asked := re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))):
            start, status = int(asked[1]), 206
            if start >= len(data):
                return self._plain(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            extra = extra | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        if self.command == "GET" and hub.spoil:
            hub.spoil -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        self._plain(status, body, {"Accept-Ranges": "bytes", **extra})

    def _plain(self, status: int, body: bytes, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = self.hub.cut.pop(0) if self.hub.cut and len(body) > 4096 else len(body)
        try:
            for at in range(0, stop, 1 << 14):
                self.wfile.write(body[at : min(at + (1 << 14), stop)])
                if self.hub.pause and len(body) > 4096:
                    time.sleep(self.hub.pause)
        except OSError:
            stop = 0  # the client went away
        if stop < len(body):
            self.close_connection = True


def wheel(files: dict[str, bytes]) -> bytes:
    """A wheel's bytes: a zip with those files in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()
