"""`tertulia doctor`: looks at everything a server needs, one line each, and says what to do where something is wrong.

It makes nothing and starts no server; the shelf of models alone may bring its own records up to date. It knows where
things are and what they should look like; how they are used is told in their own rooms. What may crash (a library on an
old CPU) is tried in a process of its own. No key is printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import SettingsError, TertuliaError

if TYPE_CHECKING:
    from .config import LocalModel, Settings, Upstream
    from .core import ModelCard
    from .engines.upstream import Upstream as Far

MEGABYTE = 1_000_000
MEMORY_NEEDED = 500 * MEGABYTE  # the server, and the two default models for a request or two
DISK_NEEDED, DISK_WANTED = 100 * MEGABYTE, 1000 * MEGABYTE
IMPORT_SECONDS, GENERATION_SECONDS = 60.0, 120.0
QUICK_DATABASE = 256 * MEGABYTE  # up to this size the whole database is read through
OK, WARN, FAIL = "ok", "warn", "fail"
COLOURS = {OK: "32", WARN: "33", FAIL: "31"}
ENGINES = {("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"), ("Darwin", "x86_64"), ("Windows", "AMD64")}
SIMD = ("avx", "avx2", "fma", "f16c", "bmi2", "avx512f", "avx512_vnni", "amx_int8", "asimd", "asimddp", "sve")
SERVER_PACKAGES = ("uvloop", "httptools", "uvicorn", "starlette", "msgspec", "sqlalchemy")
ENGINE_PACKAGES = ("xllamacpp", "llguidance")


@dataclass(frozen=True)
class Finding:
    """What one check found: state ok, warn or fail; what is so; do is the next step, given where there is one."""

    check: str
    state: str
    what: str
    do: str = ""


@dataclass(frozen=True)
class Patient:
    """What is looked at: the settings in force (defaults where they cannot be read), the environment they came from."""

    settings: Settings
    environment: Mapping[str, str] = field(default_factory=dict)
    deep: bool = False

    @property
    def data(self) -> Path:
        return self.settings.data_dir


Check = Callable[[Patient], Iterator[Finding]]


# The machine ----------------------------------------------------------------------------------------------------------


def python(patient: Patient) -> Iterator[Finding]:
    yield Finding("python", OK, f"{platform.python_version()}, tertulia {__version__}")


def system(patient: Patient) -> Iterator[Finding]:
    name = f"{platform.system()} {platform.machine()}"
    if (platform.system(), platform.machine()) in ENGINES:
        yield Finding("platform", OK, f"{name} {' '.join(platform.libc_ver())}".rstrip())
    else:
        do = "local models may not run here; upstreams and the model mock do"
        yield Finding("platform", WARN, f"{name}: there is no prebuilt engine for it", do)


def processor(patient: Patient) -> Iterator[Finding]:
    cores, flags = available_cores(), simd_flags()
    what = f"{cores:g} core{'s' if cores != 1 else ''}" + (f", {' '.join(flags)}" if flags else "")
    if platform.machine() in ("x86_64", "AMD64") and flags and "avx2" not in flags:
        do = "see whether `tertulia doctor --deep` gets an answer; if not, use upstreams or another machine"
        yield Finding("cpu", WARN, f"{what}: no AVX2, which the prebuilt engine was made for", do)
    elif patient.settings.threads > max(1, cores):
        do = f"set threads to 0 or at most {max(1, int(cores))}"
        yield Finding("cpu", WARN, f"{what}, but threads is {patient.settings.threads}: they wait for each other", do)
    else:
        yield Finding("cpu", OK, what)


def available_cores() -> float:
    """Cores this process may use: its affinity, less what a container grants."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, round(int(quota) / int(period), 2))
    return cores


def simd_flags() -> list[str]:
    """The vector instructions that matter to the engine; nothing where the system does not say."""
    for line in read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            there = set(value.split())
            return [flag for flag in SIMD if flag in there]
    return []


def memory(patient: Patient) -> Iterator[Finding]:
    free, budget = available_memory(), patient.settings.memory_budget * MEGABYTE
    if free is None:
        yield Finding(
            "memory", OK, f"the system does not say how much is free; memory_budget is {budget // MEGABYTE} MB"
        )
        return
    what = f"{free // MEGABYTE} MB free, memory_budget {budget // MEGABYTE} MB"
    if free < MEMORY_NEEDED:
        yield Finding("memory", WARN, f"{what}: hardly enough for a model", "close other programs, or use upstreams")
    elif free < budget:
        do = f"set memory_budget to {free * 4 // 5 // MEGABYTE} or less: models are then unloaded in time"
        yield Finding("memory", WARN, what, do)
    else:
        yield Finding("memory", OK, what)


def available_memory() -> int | None:
    """Bytes that can be used without swapping, in a container at most what is left of its limit; None if unknown."""
    free = None
    for line in read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = read("/sys/fs/cgroup/memory.max").strip(), read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        left = max(0, int(limit) - int(used))
        free = left if free is None else min(free, left)
    return free


def read(path: str) -> str:
    """The text of a file of the kernel's; nothing where there is none."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


# What is installed ----------------------------------------------------------------------------------------------------


def packages(patient: Patient) -> Iterator[Finding]:
    yield importable("packages", SERVER_PACKAGES, "install tertulia again: pip install --force-reinstall tertulia")


def engine(patient: Patient) -> Iterator[Finding]:
    yield importable("engine", ENGINE_PACKAGES, "pip install --force-reinstall xllamacpp llguidance; or use upstreams")


def importable(check: str, names: tuple[str, ...], do: str) -> Finding:
    """Imports packages in a process of its own, so that a crash in there is a finding and not our end."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {', '.join(names)}"], capture_output=True, text=True, timeout=IMPORT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(check, FAIL, f"{', '.join(names)} cannot be tried ({type(error).__name__})", do)
    if done.returncode == 0:
        return Finding(check, OK, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    if done.returncode < 0:
        killer = signal.Signals(-done.returncode).name
        why = ": this CPU lacks an instruction they were built with" if killer == "SIGILL" else ""
        return Finding(check, FAIL, f"importing {', '.join(names)} crashes with {killer}{why}", do)
    said = done.stderr.strip().splitlines()
    return Finding(check, FAIL, said[-1] if said else f"importing {', '.join(names)} fails", do)


def client(patient: Patient) -> Iterator[Finding]:
    if importlib.util.find_spec("openai") is None:
        do = "for tertulia.client(): pip install 'tertulia[client]'"
        yield Finding("client", OK, "openai is not installed; only programs of yours need it", do)
    else:
        yield Finding("client", OK, f"openai {importlib.metadata.version('openai')}")


# What is kept ---------------------------------------------------------------------------------------------------------


def data_directory(patient: Patient) -> Iterator[Finding]:
    data, elsewhere = patient.data, "choose another with --data or TERTULIA_DATA"
    if not data.exists():
        parent = existing(data)
        if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
            yield Finding("data", OK, f"{data} is not there yet; the first `tertulia serve` makes it")
        else:
            yield Finding("data", FAIL, f"{data} cannot be made: {parent} does not let us", elsewhere)
        return
    if not data.is_dir():
        yield Finding("data", FAIL, f"{data} is not a directory", elsewhere)
        return
    try:
        tempfile.TemporaryFile(dir=data).close()
    except OSError as error:
        yield Finding("data", FAIL, f"{data} cannot be written: {error.strerror}", f"chown or chmod it, or {elsewhere}")
        return
    state, mode = data.stat(), stat.S_IMODE(data.stat().st_mode)
    if hasattr(os, "geteuid") and state.st_uid != os.geteuid():
        do = f"run as that user, or: chown -R {os.geteuid()} {data}"
        yield Finding("data", WARN, f"{data} belongs to another user (id {state.st_uid})", do)
    elif mode & 0o077:
        yield Finding("data", WARN, f"{data} has mode {mode:04o}: others can look into it", f"chmod 700 {data}")
    else:
        yield Finding("data", OK, f"{data}, mode {mode:04o}")


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def disk(patient: Patient) -> Iterator[Finding]:
    free = shutil.disk_usage(existing(patient.data)).free
    what = f"{free / 1e9:.1f} GB free where the data directory is"
    if free < DISK_NEEDED:
        yield Finding("disk", FAIL, what, "free some: the ledger must be able to grow")
    elif free < DISK_WANTED:
        yield Finding("disk", WARN, what, "free some before models are pulled")
    else:
        yield Finding("disk", OK, what)


def private_files(patient: Patient) -> Iterator[Finding]:
    begun = (patient.data / "tertulia.db").exists()
    for name, lost in (
        ("secret", "restore it from a backup: without it no key in the database is recognised"),
        ("client.env", "start `tertulia serve` once: it writes it anew"),
    ):
        path = patient.data / name
        try:
            state = path.stat()
            content = path.read_bytes()
        except FileNotFoundError:
            if begun:
                yield Finding(name, FAIL if name == "secret" else WARN, f"{path} is missing", lost)
            else:
                yield Finding(name, OK, "not there yet; the first start makes it")
            continue
        except OSError as error:
            yield Finding(name, FAIL, f"{path} cannot be read: {error.strerror}", f"chown or chmod 600 {path}")
            continue
        mode = stat.S_IMODE(state.st_mode)
        if mode & 0o077:
            yield Finding(name, FAIL, f"{path} has mode {mode:04o}: others may read it", f"chmod 600 {path}")
        elif name == "secret" and len(content) != 32:
            yield Finding(name, FAIL, f"{path} is damaged: it has {len(content)} bytes and not 32", lost)
        else:
            yield Finding(name, OK, f"mode {mode:04o}")


def database(patient: Patient) -> Iterator[Finding]:
    from urllib.parse import quote

    from sqlalchemy import Engine, create_engine, exc, text

    from .store.database import HEAD, connect, found_version, name_of, reason

    path, url = patient.data / "tertulia.db", patient.settings.database
    if url is None and not path.exists():
        yield Finding("database", OK, "not there yet; the first start makes it")
        return
    try:
        # without a server at work nothing is locked, and looking leaves no -wal and -shm behind
        idle = "" if path.with_name("tertulia.db-wal").exists() else "&immutable=1"
        engine: Engine
        if url is None:
            engine = create_engine(f"sqlite:///file:{quote(str(path))}?mode=ro{idle}&uri=true")
        else:
            engine = connect(patient.data, url)
        where = name_of(engine) if url else path.name
        with engine.connect() as connection:
            found = found_version(connection)
            small = url is None and (patient.deep or path.stat().st_size <= QUICK_DATABASE)
            sound = connection.execute(text("PRAGMA quick_check(1)")).scalar() if small else "ok"
        engine.dispose()
    except SettingsError as error:
        yield Finding("database", FAIL, error.message, "check `database`" if url else "install the newer Tertulia")
        return
    except (exc.SQLAlchemyError, OSError) as error:
        do = "check `database`" if url else f"restore {path} from a backup, or move it away to begin anew"
        yield Finding("database", FAIL, f"cannot be opened: {reason(error)}", do)
        return
    if sound != "ok":
        yield Finding("database", FAIL, f"{where} is damaged: {sound}", f"restore {path} from a backup")
    elif found == HEAD:
        yield Finding("database", OK, f"{where}, schema version {found}")
    else:
        yield Finding("database", OK, f"{where}, schema version {found}; the next start makes it {HEAD}")


def journal(patient: Patient) -> Iterator[Finding]:
    import msgspec

    from .accounts.entry import read_line
    from .store.journal import read

    path, bad, number = patient.data / "ledger", 0, 0
    try:
        for line in read(path):
            number += 1
            try:
                read_line(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                bad += 1
    except OSError as error:
        yield Finding("journal", FAIL, f"{path} cannot be read: {error.strerror}", f"chown or chmod 600 {path}")
        return
    if bad:
        what = f"{bad} of {number} entries are damaged; what they cost is not counted"
        yield Finding("journal", WARN, what, f"look at {path} and at the disk")
    else:
        yield Finding("journal", OK, f"{number} {'entry' if number == 1 else 'entries'}" if number else "empty")


# What is configured ---------------------------------------------------------------------------------------------------


def configuration(flags: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[Settings, list[Finding]]:
    """The settings in force and what is wrong with them; what cannot be read is replaced by defaults."""
    from .config import Settings, load

    findings, known = [], {}
    for name, value in environment.items():
        try:
            load({}, {name: ""})
            known[name] = value
        except SettingsError as error:
            findings.append(Finding("environment", FAIL, error.message, f"correct or unset {name}"))
    findings = findings or [Finding("environment", OK, "no TERTULIA_ variable is misspelt")]
    path = flags.get("config") or environment.get("TERTULIA_CONFIG")
    try:
        settings = load(flags, known)
    except SettingsError as error:
        findings.append(Finding("settings", FAIL, error.message, "correct it; docs/settings.md lists what there is"))
        data = flags.get("data") or environment.get("TERTULIA_DATA")
        return Settings(data=str(data)) if data else Settings(), findings
    findings.append(Finding("settings", OK, str(path) if path else "defaults, environment and flags; no file"))
    if path and (settings.api_key or settings.admin_key):
        mode = stat.S_IMODE(Path(path).stat().st_mode)
        if mode & 0o077 and any(word in Path(path).read_text(encoding="utf-8") for word in ("api_key", "admin_key")):
            what = f"{path} holds a key and has mode {mode:04o}: others may read it"
            findings.append(Finding("settings", WARN, what, f"chmod 600 {path}"))
    return settings, findings


def models(patient: Patient) -> Iterator[Finding]:
    from .engines.models import Shelf

    shelf = Shelf(patient.data / "models")
    # whatever is on the shelf, looked at before the shelf forgets the damaged ones
    files = [path for path in shelf.directory.rglob("*.gguf") if shelf.incoming not in path.parents]
    sound = {card.id: card for card in shelf.installed()}
    for card in sound.values():
        yield Finding("model", OK, f"{card.id}, {(card.bytes or 0) // MEGABYTE} MB, as it was fetched")
        if patient.deep:
            yield from hashed(shelf, card.id)
    for path in sorted(files):
        id = path.relative_to(shelf.directory).as_posix().removesuffix(".gguf")
        if id not in sound:
            file, at, revision = id.partition("@")
            fetch = f"tertulia pull {id if id in shelf.catalog else f'hf:{file}.gguf{at}{revision}'}"
            yield Finding("model", FAIL, f"{id} is damaged and is not served", f"fetch it again: {fetch}")
    broken = {path.relative_to(shelf.directory).as_posix().removesuffix(".gguf") for path in files} - sound.keys()
    for name, model in patient.settings.models.items():
        yield configured(name, model, sound)
    for setting in ("chat_model", "embedding_model"):
        name = getattr(patient.settings, setting)
        if name not in broken and not served(patient.settings, name, sound):
            yield missing(setting, name, name in shelf.catalog)


def hashed(shelf: Any, id: str) -> Iterator[Finding]:
    try:
        yield Finding("model", OK, f"{id}: SHA-256 {str(shelf.verify(id).sha256)[:16]}..., hashed just now")
    except TertuliaError as error:
        yield Finding("model", FAIL, error.message, f"fetch it again: tertulia pull {id}")


def configured(name: str, model: LocalModel, sound: Mapping[str, ModelCard]) -> Finding:
    """A [models.NAME] of the configuration."""
    from .engines.catalog import PullFailed, hub_name
    from .engines.models import card_of

    if model.file is not None:
        try:
            card = card_of(Path(model.file).expanduser(), id=name)
        except (OSError, TertuliaError) as error:
            why = f"{model.file}: {error.strerror}" if isinstance(error, OSError) else str(error)
            return Finding("model", FAIL, f"models.{name}: {why}", "correct `file`, or fetch the file again")
        return Finding("model", OK, f"{name}, {(card.bytes or 0) // MEGABYTE} MB, {model.file}")
    source = model.source or name
    try:
        id = hub_name(source).id if source.startswith("hf:") else source
    except PullFailed as error:
        return Finding("model", FAIL, f"models.{name}: {error.message}", "correct `source`")
    if id in sound:
        return Finding("model", OK, f"{name} is {id}")
    return Finding("model", WARN, f"{name}: {source} is not fetched yet", f"tertulia pull {source}")


def served(settings: Settings, name: str, sound: Mapping[str, ModelCard]) -> bool:
    """Whether something answers by this name: a model here, a preset or alias, an upstream's, or the mock."""
    return (
        name in sound
        or name in settings.models
        or name in settings.presets
        or name in settings.aliases
        or name in settings.routes
        or any(
            name in upstream.models or (upstream.discover and name.startswith(upstream.prefix))
            for upstream in settings.upstreams.values()
        )
        or (settings.mock and name in ("mock", "mock-embedding"))
    )


def missing(setting: str, name: str, known: bool) -> Finding:
    if known:
        return Finding(
            "model", WARN, f"{name} ({setting}) is not fetched yet", f"tertulia pull {name}; `serve` does it too"
        )
    return Finding(
        "model",
        FAIL,
        f"{setting} names {name}, and there is no such model",
        f"correct {setting}; see `tertulia models`",
    )


def port(patient: Patient) -> Iterator[Finding]:
    from .repl import alive

    host, number = patient.settings.host, patient.settings.port
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    where = f"[{near}]:{number}" if ":" in near else f"{near}:{number}"
    if number and alive(f"http://{where}/v1"):
        yield Finding("port", OK, f"a Tertulia answers on {where}")
        yield from readiness(where)
    else:
        yield bindable(host, number)
    if not patient.settings.on_loopback:
        do = "keep to loopback behind a proxy that speaks TLS, or see that only whom you trust can connect"
        yield Finding("host", WARN, f"{host} is reached from other machines, without encryption", do)


def client_file(patient: Patient) -> Iterator[Finding]:
    """Whether DATA/client.env leads programs to a server."""
    from .accounts import client_env
    from .repl import alive

    url = client_env.read(patient.data).get("OPENAI_BASE_URL")
    if not url:
        return
    if alive(url):
        yield Finding("client.env", OK, f"a Tertulia answers on {url}")
    else:
        do = "`tertulia serve` writes it anew when it starts"
        yield Finding("client.env", WARN, f"it points to {url}, where no Tertulia answers", do)


def readiness(where: str) -> Iterator[Finding]:
    from .repl import Api

    status, body = Api(f"http://{where}").get("/readyz", 5.0)
    if status != 200:
        states = json.loads(body).get("models", {}) if body.startswith(b"{") else {}
        waiting = ", ".join(f"{name} is {state}" for name, state in states.items() if state != "ready")
        do = "if it stays so: `tertulia models`, and `tertulia doctor --deep`"
        yield Finding("port", WARN, f"it is not ready: {waiting or f'HTTP {status}'}", do)


def bindable(host: str, number: int) -> Finding:
    """Whether a server could listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen(1)
        except OSError as error:
            do = "stop it, or choose another port with --port"
            if isinstance(error, PermissionError):
                do = "choose a port above 1023 with --port"
            elif isinstance(error, socket.gaierror) or "assign" in str(error.strerror):
                do = "choose an address of this machine with --host; 127.0.0.1 is always one"
            what = (
                "is taken by another program"
                if "in use" in str(error.strerror)
                else f"cannot be used: {error.strerror}"
            )
            return Finding("port", FAIL, f"{host}:{number} {what}", do)
    return Finding("port", OK, f"{host}:{number} is free" if number else "the system chooses one")


def upstreams(patient: Patient) -> Iterator[Finding]:
    for name, upstream in patient.settings.upstreams.items():
        yield from upstream_findings(name, upstream, patient)


def upstream_findings(name: str, upstream: Upstream, patient: Patient) -> Iterator[Finding]:
    from .accounts.credentials import Credentials, references_of
    from .engines.upstream import Upstream as Far

    check, credentials = f"upstream {name}", Credentials()
    wanted = references_of({name: upstream})
    try:
        near = [credentials.check(setting, reference) for setting, reference in wanted.items()]
        if patient.deep or all(near):  # what is kept elsewhere is read only when networks are to be used
            credentials.require(wanted)
            engine = Far(name, upstream, credentials.key(upstream), headers=credentials.headers(upstream))
        else:
            engine = Far(name, upstream)  # refuses what cannot be used
    except SettingsError as error:
        yield Finding(check, FAIL, error.message, "correct it, or set what it names")
        return
    yield from private_references(check, wanted)
    what = f"{upstream.base_url}, {'key from ' + upstream.key.partition(':')[0] if upstream.key else 'no key'}"
    if not patient.deep:
        yield Finding(check, OK, f"{what}; not asked (--deep asks it)")
        return
    yield asked(check, engine, upstream, what)


def private_references(check: str, wanted: Mapping[str, str]) -> Iterator[Finding]:
    """What is wrong with the files that references name, which can be read."""
    for reference in wanted.values():
        path = Path(reference.removeprefix("file:")).expanduser()
        if reference.startswith("file:") and path.stat().st_mode & 0o077:
            yield Finding(check, WARN, f"{path} holds a key that others may read", f"chmod 600 {path}")


def asked(check: str, engine: Far, upstream: Upstream, what: str) -> Finding:
    """Asks an upstream for its models as the server does: with its key, headers and certificates, through its proxy."""
    import asyncio

    from .errors import BadUpstreamAnswer, UpstreamRefused

    async def ask() -> int:
        try:
            return len(await engine.list_models())
        finally:
            await engine.close()

    try:
        return Finding(check, OK, f"{what}; answers, and lists {asyncio.run(ask())} models")
    except BadUpstreamAnswer:
        return Finding(check, OK, f"{what}; answers, though not with a list of models")
    except UpstreamRefused as error:  # without a list of models it can be in order
        if error.status < 500:
            return Finding(check, OK, f"{what}; answers (HTTP {error.status} for /models)")
        return Finding(check, WARN, f"{upstream.base_url} answers with HTTP {error.status}", "ask whoever runs it")
    except TertuliaError as error:
        if error.retry is False:  # the statuses that concern our key
            why = f"{upstream.base_url} refuses the key: {error.message}"
            return Finding(check, FAIL, why, "check what its key refers to")
        return Finding(check, FAIL, f"{upstream.base_url}: {error.message}", "check base_url and whether it runs")


def prices(patient: Patient) -> Iterator[Finding]:
    from .accounts.prices import list_date, list_prices

    if any((patient.settings.prices, *(upstream.prices for upstream in patient.settings.upstreams.values()))):
        from .server import prices_of

        try:
            prices_of(patient.settings)
        except SettingsError as error:
            yield Finding("prices", FAIL, error.message, "correct it; docs/how-to/limits.md says how")
            return
    what = f"OpenAI's list prices of {list_date()}, of {len(list_prices())} models"
    yield Finding("prices", OK, what, "what differs belongs into [prices]")


def alerts(patient: Patient) -> Iterator[Finding]:
    """Whether spend alerts have somewhere to go. No secret is printed."""
    settings = patient.settings
    given = [name for name in settings.__struct_fields__ if name.startswith("alert_") and getattr(settings, name)]
    if not given:
        return
    from .accounts.credentials import Credentials, references
    from .server import channels

    credentials = Credentials()
    wanted = {name: reference for name, reference in references(settings).items() if name in given}
    try:
        near = [credentials.check(setting, reference) for setting, reference in wanted.items()]
        if not (patient.deep or all(near)):
            yield Finding("alerts", OK, f"{', '.join(given)}: not asked for the secrets (--deep does)")
            return
        credentials.require(wanted)
        where = [channel.name for channel in channels(settings, credentials)]
    except SettingsError as error:
        yield Finding("alerts", FAIL, error.message, "correct it, or set what it names")
        return
    yield from private_references("alerts", wanted)
    yield Finding("alerts", OK, f"spend alerts go out by {' and '.join(where)}")


# With --deep ----------------------------------------------------------------------------------------------------------


def generation(patient: Patient) -> Iterator[Finding]:
    """The default models, each asked for something tiny in a child of its own, as the server would do it."""
    if not patient.deep:
        return
    import asyncio

    from .engines.models import Shelf

    shelf = Shelf(patient.data / "models")
    for name in (patient.settings.chat_model, patient.settings.embedding_model):
        card, path = shelf.card(name), shelf.path(name)
        if card is None or path is None:
            continue
        try:
            what = asyncio.run(asyncio.wait_for(tried(patient.settings, card, path), GENERATION_SECONDS))
            yield Finding("answer", OK, f"{name} {what}")
        except TimeoutError:
            do = "see that the machine is not busy, or use a smaller model"
            yield Finding("answer", FAIL, f"{name} gave no answer in {GENERATION_SECONDS:g} s", do)
        except TertuliaError as error:
            do = f"tertulia models --verify {name}; with trace_engine the engine's log says more"
            yield Finding("answer", FAIL, error.message, do)


async def tried(settings: Settings, card: ModelCard, path: Path) -> str:
    """Loads a model and asks it once; what it did, and how long that took. Raises TertuliaError."""
    import time

    from .engines.children import Children
    from .errors import EngineFailed

    asked: dict[str, object]
    children = Children(settings, lambda id: path)
    began = time.monotonic()
    try:
        child = await children.running(card, settings.models.get(card.id))
        loaded = time.monotonic()
        if card.kind == "embedding":
            place, asked = "/v1/embeddings", {"input": "One sentence."}
        else:
            place, asked = "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        with child:
            status, body = await child.pool.fetch("POST", place, child.headers, json.dumps(asked).encode())
    finally:
        await children.close()
    if status != 200 or not (b'"embedding"' in body or b'"text"' in body):
        raise EngineFailed(f"The engine of {card.id} answers with HTTP {status}.")
    return f"loads in {loaded - began:.1f} s and answers in {time.monotonic() - loaded:.1f} s"


# The command ----------------------------------------------------------------------------------------------------------

CHECKS: tuple[Check, ...] = (
    python, system, processor, memory, packages, engine, client,  # the machine and what is installed
    data_directory, disk, private_files, database, journal,  # what is kept
    models, port, client_file, upstreams, prices, alerts, generation,  # what is configured, after settings themselves
)  # fmt: skip


def examine(flags: Mapping[str, Any], environment: Mapping[str, str], deep: bool = False) -> Iterator[Finding]:
    """Every finding, as it is found."""
    settings, found = configuration(flags, environment)
    yield from found
    patient = Patient(settings, environment, deep)
    for check in CHECKS:
        try:
            yield from check(patient)
        except Exception as error:  # a doctor must not fall ill of what it looks at; the other checks still count
            name = check.__name__.replace("_", " ")
            what = f"could not be checked: {type(error).__name__}: {error}"
            yield Finding(name, FAIL, " ".join(what.split()), "if it is not clear why, please report it")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """The flags of `tertulia doctor`."""
    parser.add_argument("--deep", action="store_true", help="also hash model files, load models, and ask upstreams")
    parser.add_argument("--json", action="store_true", help="print a JSON list of {check, state, what, do}")
    parser.add_argument("--data", metavar="DIR", help="data directory, as for serve")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings, as for serve")
    parser.add_argument("--host", metavar="HOST", help="address to listen on, as for serve")
    parser.add_argument("--port", metavar="PORT", type=int, help="port to listen on, as for serve")
    parser.set_defaults(run=doctor)


def doctor(options: argparse.Namespace) -> int:
    """Runs `tertulia doctor`; the exit code: 0 if nothing fails, 1 otherwise."""
    logging.getLogger("tertulia").setLevel(logging.CRITICAL)  # what would be logged is found and said anyway
    flags = {name: getattr(options, name) for name in ("data", "config", "host", "port")}
    counts = dict.fromkeys((OK, WARN, FAIL), 0)
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    findings = []
    for finding in examine(flags, os.environ, options.deep):
        counts[finding.state] += 1
        if options.json:
            findings.append(asdict(finding))
        else:
            print(line(finding, colours), flush=True)
    if options.json:
        print(json.dumps(findings, indent=2))
    else:
        print(f"\n{counts[OK]} ok, {counts[WARN]} to look at, {counts[FAIL]} wrong")
    return 1 if counts[FAIL] else 0


def line(finding: Finding, colours: bool) -> str:
    mark = f"{finding.state:4}"
    if colours:
        mark = f"\x1b[{COLOURS[finding.state]}m{mark}\x1b[0m"
    return f"{mark}  {finding.check:12}  {finding.what}" + (f" -> {finding.do}" if finding.do else "")
