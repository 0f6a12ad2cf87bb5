"""What all tests share: no address but loopback, the models (fetched once), a real server in a process of its own."""

from __future__ import annotations

import ipaddress
import os
import re
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
CHAT_MODEL, EMBEDDING_MODEL = "smollm2-135m-instruct", "all-minilm-l6-v2"


class NotLoopback(RuntimeError):
    """A test tried to reach an address that is not on this machine."""


def _refuse_other_addresses() -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise NotLoopback(str(address))
        return connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def pytest_configure(config: pytest.Config) -> None:
    _refuse_other_addresses()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the tests of crowds open thousands of sockets
    for name in list(os.environ):  # the developer's own settings must not change what tests see
        if name.startswith(("TERTULIA_", "OPENAI_")) and not name.startswith("TERTULIA_TEST_"):
            del os.environ[name]


@pytest.fixture(scope="session")
def model_files() -> Path:
    """A directory with the default models; fetched on first use and kept in .cache between runs."""
    shelf = Path(os.environ.get("TERTULIA_TEST_MODELS") or ROOT / ".cache" / "models")
    subprocess.run(
        [sys.executable, "-m", "tertulia", "pull", "--data", str(shelf.parent), CHAT_MODEL, EMBEDDING_MODEL], check=True
    )
    return shelf


@pytest.fixture(scope="session")
def model(model_files: Path) -> Path:
    """The file of the default chat model."""
    return model_files / f"{CHAT_MODEL}.gguf"


@dataclass
class Served:
    """A running `tertulia serve`: where it is and the keys to it."""

    process: subprocess.Popen[str]
    base_url: str
    api_key: str
    admin_key: str
    data: Path
    output: list[str] = field(default_factory=list)

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")

    def client(self, **options: Any) -> Any:
        """The official client, in strict mode: it raises on any deviation from the typed shapes."""
        from openai import OpenAI

        return OpenAI(**self._options(options))

    def async_client(self, **options: Any) -> Any:
        from openai import AsyncOpenAI

        return AsyncOpenAI(**self._options(options))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "base_url": self.base_url, "api_key": self.api_key, "max_retries": 0, "timeout": 120,
            "_strict_response_validation": True, **options,
        }  # fmt: skip

    def stop(self) -> int:
        """SIGTERM and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def serve(
    data: Path, config: str = "", *arguments: str, environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Served:  # fmt: skip
    """Starts `tertulia serve` on a port of the system's choice and waits until it answers; before is called in the new
    process first."""
    data.mkdir(parents=True, exist_ok=True)
    api_key, admin_key = f"sk-test-{secrets.token_hex(16)}", f"sk-admin-{secrets.token_hex(16)}"
    # One thread an engine: a machine that runs other things beside the tests would make two wait for each other.
    command = [
        sys.executable,
        "-m",
        "tertulia",
        "serve",
        "--data",
        str(data),
        "--port",
        "0",
        "--threads",
        "1",
        *arguments,
    ]
    if config:
        (data / "tertulia.toml").write_text(config)
        command += ["--config", str(data / "tertulia.toml")]
    # with TERTULIA_TEST_PACKAGE the servers run from there: `make test-compiled` tests the compiled package so
    package = os.environ.get("TERTULIA_TEST_PACKAGE")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=open(data / "stderr.log", "w"), text=True,  # noqa: SIM115
        env={
            **os.environ, **({"PYTHONPATH": package} if package else {}), "TERTULIA_API_KEY": api_key,
            "TERTULIA_ADMIN_KEY": admin_key, **(environment or {}),
        },
        start_new_session=True, preexec_fn=before,
    )  # fmt: skip
    served = Served(process, "", api_key, admin_key, data)
    deadline = time.monotonic() + 60
    assert process.stdout is not None
    while not served.base_url:
        line = process.stdout.readline()
        served.output.append(line)
        found = re.search(r"http://\S+/v1", line)
        if found:
            served.base_url = found[0]
        elif not line or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"serve did not start: {served.output} {(data / 'stderr.log').read_text()}")
    return served


def with_models(data: Path, model_files: Path) -> Path:
    """A data directory that has the fetched models, linked and not copied."""
    data.mkdir(parents=True, exist_ok=True)
    if not (data / "models").exists():
        (data / "models").symlink_to(model_files)
    return data


@pytest.fixture(scope="session")
def server(model_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real server with the real default models, for the whole session."""
    served = serve(with_models(tmp_path_factory.mktemp("server"), model_files))
    yield served
    served.stop()


@pytest.fixture(scope="session")
def mock_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real server whose models are the mock engine: no model file, no waiting."""
    served = serve(tmp_path_factory.mktemp("mock"), "", "--chat-model", "mock", "--embedding-model", "mock-embedding")
    yield served
    served.stop()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL of this run's own. Tests that stop it start it again."""
    with Cluster.started() as running:
        yield running


@pytest.fixture
def postgresql(cluster: Cluster) -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database."""
    with cluster.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database; whoever asks for it runs twice, once on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'given.db'}"
    return str(request.getfixturevalue("postgresql"))
