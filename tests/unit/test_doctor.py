"""`tertulia doctor`: things are broken for real, and the line that should say so does."""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conftest import Served, with_models
from tertulia import doctor
from tertulia.accounts import client_env
from tertulia.accounts.directory import Directory
from tertulia.accounts.prices import list_date
from tertulia.config import LocalModel, Settings, Upstream
from tertulia.doctor import FAIL, OK, WARN, Check, Finding, Patient
from tertulia.engines import gguf
from tertulia.store.database import HEAD, open_database


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory as a first start leaves it."""
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    database = open_database(data)
    Directory(database, data)
    database.dispose()
    (data / "client.env").touch(0o600)
    (data / "ledger").mkdir(0o700)
    return data


def look(check: Check, data: Path | str, deep: bool = False, **settings: Any) -> list[Finding]:
    return list(check(Patient(Settings(data=str(data), **settings), os.environ, deep)))


def only(findings: list[Finding], state: str) -> Finding:
    """The one finding that is not ok; where a step is needed it is there."""
    assert [finding.state for finding in findings if finding.state != OK] == [state], findings
    finding = next(finding for finding in findings if finding.state != OK)
    assert finding.do and "\n" not in finding.what + finding.do
    return finding


def all_ok(findings: list[Finding]) -> bool:
    return bool(findings) and all(finding.state == OK for finding in findings)


# The command ----------------------------------------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tertulia", "doctor", "--port", "0", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_sound_installation_has_nothing_wrong_and_is_left_as_it_was(data: Path) -> None:
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    done = command("--data", str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr and ", 0 wrong" in done.stdout and "fail" not in done.stdout
    for check in (
        "python",
        "platform",
        "cpu",
        "memory",
        "engine",
        "data",
        "disk",
        "secret",
        "database",
        "journal",
        "port",
    ):
        assert any(line.split()[1] == check for line in done.stdout.splitlines() if line.strip()), check
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_many_things_wrong_at_once_are_all_said(data: Path, tmp_path: Path) -> None:
    (data / "client.env").chmod(0o644)
    (data / "secret").write_bytes(b"short")
    config = tmp_path / "tertulia.toml"
    config.write_text("prot = 9000\n")
    done = command("--data", str(data), "--config", str(config), "--json", TERTULIA_PORTT="1")
    findings = {finding["check"]: finding for finding in json.loads(done.stdout) if finding["state"] == "fail"}
    assert done.returncode == 1 and not done.stderr
    assert findings.keys() == {"environment", "settings", "secret", "client.env"}
    assert "TERTULIA_PORT" in findings["environment"]["what"] and "TERTULIA_PORTT" in findings["environment"]["do"]
    assert "did you mean port" in findings["settings"]["what"]
    assert all(finding["do"] for finding in findings.values())


def test_a_directory_that_is_not_there_yet_is_no_fault_and_is_not_made(tmp_path: Path) -> None:
    done = command("--data", str(tmp_path / "a" / "b"))
    assert done.returncode == 0 and "first `tertulia serve` makes it" in done.stdout
    assert not (tmp_path / "a").exists()


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    def broken_check(patient: Patient) -> Any:
        raise ZeroDivisionError("of all things")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (broken_check, doctor.python))
    found = list(doctor.examine({"data": str(data)}, {}))
    assert only(found, FAIL).what == "could not be checked: ZeroDivisionError: of all things"
    assert found[-1].check == "python"


# The machine and what is installed ------------------------------------------------------------------------------------


def test_the_machine_is_read(data: Path) -> None:
    cpu, memory = look(doctor.processor, data)[0], look(doctor.memory, data, memory_budget=1)[0]
    assert cpu.state == OK and cpu.what[0].isdigit()
    assert memory.state == OK or "hardly enough" in memory.what
    assert "threads is 4096" in only(look(doctor.processor, data, threads=4096), WARN).what
    assert "set memory_budget to" in only(look(doctor.memory, data, memory_budget=10**9), WARN).do


def test_an_old_cpu_is_a_sentence(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "simd_flags", lambda: ["avx"])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "no AVX2" in only(look(doctor.processor, data), WARN).what


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "crashes with SIGILL: this CPU lacks an instruction",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashes with SIGSEGV"),
        ("raise ImportError('libgomp.so.1: cannot open shared object file')", "ImportError: libgomp.so.1"),
    ],
)
def test_an_engine_that_crashes_does_not_take_the_doctor_along(
    content: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    (tmp_path / "xllamacpp.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert words in only(look(doctor.engine, data), FAIL).what


# What is kept ---------------------------------------------------------------------------------------------------------


def test_a_data_directory_that_others_can_read(data: Path) -> None:
    data.chmod(0o755)
    assert only(look(doctor.data_directory, data), WARN).do == f"chmod 700 {data}"
    data.chmod(0o700)
    assert all_ok(look(doctor.data_directory, data))


def test_a_data_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "not a directory" in only(look(doctor.data_directory, tmp_path / "file"), FAIL).what
    assert "cannot be made" in only(look(doctor.data_directory, tmp_path / "file" / "below"), FAIL).what
    if sys.platform == "linux":
        assert "cannot be written" in only(look(doctor.data_directory, "/proc"), FAIL).what


def test_a_disk_that_is_full(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 50_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "0.1 GB" in only(look(doctor.disk, data), FAIL).what


def test_files_with_secrets(data: Path) -> None:
    assert all_ok(look(doctor.private_files, data))
    for name in ("secret", "client.env"):
        (data / name).chmod(0o640)
        assert only(look(doctor.private_files, data), FAIL).do == f"chmod 600 {data / name}"
        (data / name).chmod(0o600)
    (data / "secret").write_bytes(b"x" * 31)
    assert "31 bytes" in only(look(doctor.private_files, data), FAIL).what
    (data / "secret").unlink()
    assert "backup" in only(look(doctor.private_files, data), FAIL).do
    (data / "tertulia.db").unlink()
    assert all_ok(look(doctor.private_files, data))  # nothing has begun, so nothing is lost


def test_databases(data: Path) -> None:
    path = data / "tertulia.db"
    assert f"schema version {HEAD}" in look(doctor.database, data)[0].what
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
    assert "0999" in only(look(doctor.database, data), FAIL).what
    path.write_bytes(b"this is no database at all, " * 400)
    assert "file is not a database" in only(look(doctor.database, data), FAIL).what
    path.unlink()
    assert all_ok(look(doctor.database, data)) and not path.exists()
    assert look(doctor.database, data, database=f"sqlite:///{path}")[0].state == FAIL and not path.exists()


def test_a_damaged_page_of_the_database(data: Path) -> None:
    path = data / "tertulia.db"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[16:18], "big")
    for page in range(1, len(content) // size):  # any but the first, which holds the schema
        content[page * size : page * size + 100] = secrets.token_bytes(100)
    path.write_bytes(content)
    assert only(look(doctor.database, data), FAIL).check == "database"


def test_the_password_of_a_database_is_not_shown(data: Path) -> None:
    finding = only(look(doctor.database, data, database="postgresql://me:hunter2@127.0.0.1:9/tertulia"), FAIL)
    assert "hunter2" not in finding.what + finding.do


def test_a_damaged_journal(data: Path) -> None:
    entry = {
        "id": "req_1", "attempt": 1, "at": 1.5, "key": "key_1", "project": "proj_1", "task": "chat", "asked": "mock",
        "model": "mock", "status": 200, "outcome": "finished", "ms": 1.25,
    }  # fmt: skip
    good = json.dumps(entry).encode() + b"\n"
    journal = data / "ledger" / "000001.jsonl"
    journal.write_bytes(good * 3)
    assert look(doctor.journal, data) == [Finding("journal", OK, "3 entries")]
    journal.write_bytes(good + b'{"id":"req_2","at"\n' + good + bytes(9))
    assert "1 of 3 entries are damaged" in only(look(doctor.journal, data), WARN).what


# What is configured ---------------------------------------------------------------------------------------------------


def test_every_misspelt_variable_is_named() -> None:
    environment = {"TERTULIA_PROT": "1", "TERTULIA_DATTA": "x", "TERTULIA_LOG_LEVEL": "info"}
    settings, findings = doctor.configuration({}, environment)
    assert [finding.state for finding in findings] == [FAIL, FAIL, OK]
    assert settings.log_level == "info"  # the rest is still read


def test_a_file_with_a_key_is_private(tmp_path: Path) -> None:
    path = tmp_path / "tertulia.toml"
    path.write_text(f'api_key = "sk-{secrets.token_hex(16)}"\n')
    path.chmod(0o644)
    finding = only(doctor.configuration({"config": str(path)}, {})[1], WARN)
    assert finding.do == f"chmod 600 {path}" and "sk-" not in finding.what


def test_a_broken_file_still_lets_the_rest_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "tertulia.toml"
    path.write_text("port = [")
    settings, findings = doctor.configuration({"config": str(path), "data": str(tmp_path)}, {})
    assert "not valid TOML" in only(findings, FAIL).what and settings.data_dir == tmp_path


def test_models_that_are_damaged_or_lost(data: Path) -> None:
    shelf = data / "models"
    (shelf / "org" / "repo").mkdir(parents=True)
    (shelf / "incoming").mkdir()
    (shelf / "incoming" / "half.gguf").write_bytes(b"not yet a model, and no fault")
    (shelf / "smollm2-135m-instruct.gguf").write_bytes(b"GGUF, but not really")
    (shelf / "org" / "repo" / "file@main.gguf").write_bytes(b"nobody knows what this is")
    findings = look(doctor.models, data, embedding_model="mock-embedding")
    assert {finding.do.partition(": ")[2] for finding in findings} == {
        "tertulia pull smollm2-135m-instruct",
        "tertulia pull hf:org/repo/file.gguf@main",
    }
    assert {finding.state for finding in findings} == {FAIL}


def test_models_that_are_not_there(data: Path) -> None:
    assert "tertulia pull" in only(look(doctor.models, data, embedding_model="mock-embedding"), WARN).do
    finding = only(look(doctor.models, data, chat_model="smolm2", embedding_model="mock-embedding"), FAIL)
    assert "chat_model names smolm2" in finding.what
    assert look(doctor.models, data, chat_model="mock", embedding_model="mock-embedding") == []


def test_models_of_the_configuration(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    with path.open("wb") as out:
        gguf.write(out, {"general.architecture": "llama", "general.type": "model", "llama.context_length": 64}, [])
    mocks = {"chat_model": "mock", "embedding_model": "mock-embedding"}
    assert all_ok(look(doctor.models, data, models={"tiny": LocalModel(file=str(path))}, **mocks))
    path.write_bytes(path.read_bytes()[:30])
    assert (
        "models.tiny"
        in only(look(doctor.models, data, models={"tiny": LocalModel(file=str(path))}, **mocks), FAIL).what
    )
    path.unlink()
    finding = only(look(doctor.models, data, models={"tiny": LocalModel(file=str(path))}, **mocks), FAIL)
    assert "No such file" in finding.what
    source = LocalModel(source="hf:org/repo/file.gguf")
    assert (
        only(look(doctor.models, data, models={"x": source}, **mocks), WARN).do == "tertulia pull hf:org/repo/file.gguf"
    )
    assert (
        "correct" in only(look(doctor.models, data, models={"x": LocalModel(source="hf:nonsense")}, **mocks), FAIL).do
    )


# Ports and upstreams --------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        assert f"{number} is taken" in only(look(doctor.port, data, port=number), FAIL).what
    assert all_ok(look(doctor.port, data, port=number))


def test_addresses_that_are_not_ours_or_everybodys(data: Path) -> None:
    assert "--host" in look(doctor.port, data, host="192.0.2.1", port=0)[0].do
    assert "without encryption" in only(look(doctor.port, data, host="0.0.0.0", port=0), WARN).what
    assert look(doctor.port, data, host="no.such.host.invalid", port=0)[0].state == FAIL


def test_a_port_where_a_tertulia_answers(data: Path, mock_server: Served) -> None:
    number = int(mock_server.root.rpartition(":")[2])
    assert look(doctor.port, data, port=number) == [Finding("port", OK, f"a Tertulia answers on 127.0.0.1:{number}")]


def test_where_client_env_leads(data: Path, mock_server: Served) -> None:
    assert look(doctor.client_file, data) == []  # it names no server
    client_env.write(data, mock_server.base_url, "sk-x", None)
    assert all_ok(look(doctor.client_file, data))
    with socket.create_server(("127.0.0.1", 0)) as gone:
        number = gone.getsockname()[1]
    client_env.write(data, f"http://127.0.0.1:{number}/v1", "sk-x", None)
    assert f":{number}/v1, where no Tertulia answers" in only(look(doctor.client_file, data), WARN).what


def test_upstreams(data: Path, tmp_path: Path, mock_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(base_url: str, key: str | None, deep: bool = True) -> list[Finding]:
        return look(doctor.upstreams, data, deep, upstreams={"other": Upstream(base_url=base_url, key=key)})

    monkeypatch.setenv("GOOD_KEY", mock_server.api_key)
    monkeypatch.setenv("BAD_KEY", "sk-never-to-be-seen-0123456789")
    assert "not asked" in ask("http://127.0.0.1:9/v1", "env:GOOD_KEY", deep=False)[0].what
    assert all_ok(ask(mock_server.base_url, "env:GOOD_KEY"))
    refused = only(ask(mock_server.base_url, "env:BAD_KEY"), FAIL)
    assert "refuses the key" in refused.what
    assert "NO_SUCH_KEY is not set" in only(ask(mock_server.base_url, "env:NO_SUCH_KEY"), FAIL).what
    assert "9/v1: The upstream refused the connection" in only(ask("http://127.0.0.1:9/v1", None), FAIL).what
    assert "expected an http or https URL" in only(ask("127.0.0.1:9/v1", None), FAIL).what
    hidden = only(ask("http://me:never-to-be-seen@127.0.0.1:9/v1", None), FAIL)
    literal = only(ask(mock_server.base_url, "sk-never-to-be-seen-0123456789"), FAIL)
    path = tmp_path / "key"
    path.write_text(mock_server.api_key)
    path.chmod(0o644)
    shown = only(ask(mock_server.base_url, f"file:{path}"), WARN)
    assert shown.do == f"chmod 600 {path}" and stat.S_IMODE(path.stat().st_mode) == 0o644
    for finding in (refused, hidden, literal, shown):
        assert "never-to-be-seen" not in str(finding) and mock_server.api_key not in str(finding)


class Listing(BaseHTTPRequestHandler):
    """Answers every GET with a list of models, and keeps what was asked."""

    asked: ClassVar[list[tuple[str, dict[str, str]]]] = []
    body, status = b'{"data":[{"id":"a"},{"id":"b"}]}', 200

    def do_GET(self) -> None:
        self.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


def test_upstreams_are_asked_as_the_server_asks_them(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-never-to-be-seen-0123456789")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    port = server.server_address[1]

    def ask(**settings: Any) -> list[Finding]:
        given = {"base_url": f"http://127.0.0.1:{port}/v1", "key": "env:SOME_KEY", **settings}
        return look(doctor.upstreams, data, True, upstreams={"u": Upstream(**given)})

    try:
        base = f"http://127.0.0.1:{port}"
        [found] = ask(kind="azure", base_url=base, api_version="2024-10-21", headers={"X-Who": "me"})
        assert found.state == OK and "lists 2 models" in found.what
        path, headers = Listing.asked[-1]
        assert path == "/openai/models?api-version=2024-10-21" and headers["x-who"] == "me"
        assert headers["api-key"] == "sk-never-to-be-seen-0123456789" and "authorization" not in headers
        monkeypatch.setenv("HTTP_PROXY", base)
        assert all_ok(ask(base_url="http://far.example/v1"))
        assert Listing.asked[-1][0] == "http://far.example/v1/models"
        monkeypatch.delenv("HTTP_PROXY")
        for status, state in ((404, OK), (401, FAIL), (503, WARN)):
            monkeypatch.setattr(Listing, "status", status)
            [found] = ask()
            assert found.state == state and str(status) in found.what and "never-to-be-seen" not in str(found)
        assert "tls_ca" in only(ask(base_url="https://127.0.0.1:9/v1", tls_ca="/nowhere"), FAIL).what
    finally:
        server.shutdown()
        server.server_close()


# With a model ---------------------------------------------------------------------------------------------------------


def test_a_deep_look_gets_an_answer(model_files: Path, tmp_path: Path) -> None:
    data = with_models(tmp_path / "data", model_files)
    found = look(doctor.generation, data, deep=True)
    assert all_ok(found) and len(found) == 2 and all("answers in" in finding.what for finding in found)
    assert look(doctor.generation, data) == []
    failing = only(look(doctor.generation, data, deep=True, memory_budget=1, embedding_model="mock-embedding"), FAIL)
    assert "memory_budget" in failing.what


def test_the_date_of_the_list_of_prices(data: Path) -> None:
    [found] = look(doctor.prices, data)
    assert found.state == OK and list_date() in found.what
    upstream = {"house": Upstream(base_url="http://127.0.0.1:9/v1", models={"ours": "gpt-4o"},
                                  prices={"ours": {"input": 1.0}})}  # fmt: skip
    assert all_ok(look(doctor.prices, data, upstreams=upstream))
    assert (
        "prices.nobodys.output: missing" in only(look(doctor.prices, data, prices={"nobodys": {"input": 1}}), FAIL).what
    )


def test_where_spend_alerts_go(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "whsec_" + base64.b64encode(b"never to be seen, this one").decode()
    monkeypatch.setenv("HOOK", secret)
    hook = {"alert_webhook": "https://example.org/", "alert_webhook_secret": "env:HOOK"}
    assert look(doctor.alerts, data) == []
    assert only(look(doctor.alerts, data, alert_webhook_secret="env:HOOK"), FAIL).what.startswith(
        "alert_webhook_secret"
    )
    assert (
        "NONE_SUCH" in only(look(doctor.alerts, data, **{**hook, "alert_webhook_secret": "env:NONE_SUCH"}), FAIL).what
    )
    (tmp_path / "word").write_text(secret)
    mail = {"alert_smtp": "smtp://me@example.org", "alert_smtp_password": f"file:{tmp_path / 'word'}"}
    assert "others may read" in only(look(doctor.alerts, data, **mail), WARN).what
    (tmp_path / "word").chmod(0o600)
    found = look(doctor.alerts, data, **hook, **mail)
    assert all_ok(found) and found[-1].what == "spend alerts go out by webhook and mail"
    far = look(doctor.alerts, data, **{**hook, "alert_webhook_secret": "vault:secret/hook#key"})
    assert far[-1].state == OK and "--deep" in far[-1].what
    monkeypatch.setenv("HOOK", "whsec_dGlueQ==")
    assert "at least 16 bytes" in only(look(doctor.alerts, data, **hook), FAIL).what
    assert not any(text in str(each) for text in (secret, "dGlueQ") for each in found + far)
