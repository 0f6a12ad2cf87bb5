"""The one table of settings. The fields of Settings below are it: each has a type, a default and a help text, and from
them come the environment variables (TERTULIA_NAME), the TOML keys, the flags of `tertulia serve` and docs/settings.md.

Order, later wins: default, TOML file, environment, flag. This file knows nothing of what the settings do.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from .core import Preset
from .errors import SettingsError

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1, le=10**15)]  # what a double, and so any client, still holds exactly
Seconds = Annotated[float, Meta(gt=0, le=2_678_400)]  # a month; infinity is no number for a timer
NotNegative = Annotated[int, Meta(ge=0, le=10**15)]
Days = Annotated[int, Meta(ge=0, le=36_500)]
Limits = Literal["requests_per_minute", "tokens_per_minute", "requests_per_day", "concurrent_requests", "spend_limit"]
Dollars = Annotated[float, Meta(ge=0, le=1e9)]
Named = Annotated[str, Meta(min_length=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Retries = Annotated[int, Meta(ge=0, le=10)]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What [models.NAME] sampling may hold, with the ranges that callers have too."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    min_p: Share | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: Positive | None = None


class LocalModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[models.NAME]: a model served by an engine of this machine."""

    file: Annotated[str | None, Meta(description="a GGUF file on disk")] = None
    source: Annotated[str | None, Meta(description="a catalogue name, or hf:ORG/REPO/FILE.gguf")] = None
    kind: Annotated[str | None, Meta(description="chat, completion or embedding; read from the file if not given")] = (
        None
    )
    context_length: Annotated[Positive | None, Meta(description="tokens per request; the model's own if not given")] = (
        None
    )
    parallel: Annotated[Positive | None, Meta(description="requests answered at the same time")] = None
    lora: Annotated[list[str], Meta(description="GGUF LoRA adapters to load")] = []
    sampling: Annotated[dict[str, float], Meta(description="sampling defaults where a caller gives none")] = {}


class Upstream(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[upstreams.NAME]: any server that speaks the OpenAI API."""

    base_url: Annotated[str, Meta(description="where its API is, ending in /v1 as a rule")]
    kind: Annotated[
        Literal["openai", "azure"], Meta(description="azure: key in `api-key`, deployments in the path")
    ] = "openai"
    api_version: Annotated[str | None, Meta(description="sent as ?api-version=, as Azure OpenAI wants it")] = None
    key: Annotated[
        str | None,
        Meta(description="reference to its key: env:NAME, file:PATH, aws:ID, azure:VAULT/SECRET, vault:PATH#FIELD"),
    ] = None
    models: Annotated[dict[str, str], Meta(description="our model name = its model name")] = {}
    discover: Annotated[
        bool, Meta(description="ask it for its models (GET /models) at start and every 5 minutes, and offer them all")
    ] = False
    prefix: Annotated[str, Meta(description="put before the names of discovered models, for example `vllm/`")] = ""
    organization: Annotated[str | None, Meta(description="sent as OpenAI-Organization")] = None
    project: Annotated[str | None, Meta(description="sent as OpenAI-Project")] = None
    headers: Annotated[
        dict[str, str],
        Meta(description="further headers sent with every request; a value may be a reference as for `key`"),
    ] = {}
    connect_timeout: Annotated[Seconds, Meta(description="seconds to connect, TLS included")] = 5.0
    first_byte_timeout: Annotated[Seconds, Meta(description="seconds until an answer must begin")] = 300.0
    stall_timeout: Annotated[Seconds, Meta(description="seconds between two pieces of an answer")] = 60.0
    timeout: Annotated[Seconds | None, Meta(description="seconds one attempt may take in all; no limit of its own")] = (
        None
    )
    connections: Annotated[Positive, Meta(description="idle connections kept open")] = 256
    max_concurrency: Annotated[
        Positive | None, Meta(description="calls in flight at once, for each of its models; further ones wait in line")
    ] = None
    requests_per_minute: Annotated[Positive | None, Meta(description="calls sent to it a minute, at most")] = None
    tokens_per_minute: Annotated[Positive | None, Meta(description="tokens sent to it a minute, at most")] = None
    stream_usage: Annotated[
        bool, Meta(description="ask for the usage of streams even if the caller does not; off for servers that refuse")
    ] = True
    continues: Annotated[
        bool, Meta(description='it takes `continue_final_message`, as vLLM does: for `on_break = "continue"`')
    ] = False
    tls_ca: Annotated[str | None, Meta(description="file with certificates to trust instead of the system's")] = None
    prices: Annotated[
        dict[str, dict[str, float]],
        Meta(description="by our model name: US dollars per million tokens: input, cached_input, output"),
    ] = {}
    context_length: Annotated[
        dict[str, Positive], Meta(description="by our model name: tokens it holds, to refuse what cannot fit")
    ] = {}


class RouteTarget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the targets of [routes.NAME]."""

    model: Annotated[str, Meta(description="a model known here, or with upstream: one of that upstream's own names")]
    upstream: Annotated[str | None, Meta(description="the upstream that has it")] = None
    weight: Annotated[float, Meta(gt=0, le=1_000_000, description="its share of the calls")] = 1.0


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[routes.NAME]: a model name answered by one of several targets."""

    targets: Annotated[list[RouteTarget], Meta(min_length=1, description="who answers, balanced")]
    balance: Annotated[
        Literal["weighted", "least_busy", "fastest"], Meta(description="how a target is chosen for a call")
    ] = "weighted"
    fallback: Annotated[
        list[str], Meta(description="model names to try in turn when no target answers; the last may be local")
    ] = []
    retries: Annotated[Retries | None, Meta(description="tries after the first; the server's if not given")] = None
    on_break: Annotated[
        Literal["error", "continue"] | None,
        Meta(description="a stream that breaks off: end it with an error, or have the next target continue the text"),
    ] = None
    timeout: Annotated[Seconds | None, Meta(description="seconds a call may take; request_timeout if not given")] = None
    cache: Annotated[
        Literal["off", "deterministic", "all"] | None, Meta(description="what is cached; the server's if not given")
    ] = None


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[policies.KEY_ID]: what holds for the calls of one API key, by the id it has in the access log."""

    cache: Annotated[Literal["off", "deterministic", "all"] | None, Meta(description="what is cached for it")] = None
    priority: Annotated[
        Literal["high", "normal", "low"] | None, Meta(description="its place in line when a target is busy")
    ] = None


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting of the server."""

    host: Annotated[str, Meta(description="address to listen on; anything but loopback exposes the server")] = (
        "127.0.0.1"
    )
    port: Annotated[Port, Meta(description="port to listen on; 0 lets the system choose")] = 8000
    data: Annotated[str, Meta(description="directory of everything that is kept")] = "~/.local/share/tertulia"
    config: Annotated[str | None, Meta(description="TOML file with settings")] = None
    api_key: Annotated[str | None, Meta(description="project key to use at first start instead of a random one")] = None
    admin_key: Annotated[str | None, Meta(description="admin key to use at first start instead of a random one")] = None
    database: Annotated[str | None, Meta(description="database URL; SQLite in the data directory if not given")] = None
    database_grace: Annotated[
        Seconds, Meta(description="seconds calls are answered while the database cannot be read; then 503")
    ] = 3600.0
    chat_model: Annotated[Named, Meta(description="local model that answers chat and completions by default")] = (
        "smollm2-135m-instruct"
    )
    embedding_model: Annotated[Named, Meta(description="local model that answers embeddings by default")] = (
        "all-minilm-l6-v2"
    )
    strict_models: Annotated[
        bool, Meta(description="answer 404 for a model name that is not installed; no aliases")
    ] = False
    preload: Annotated[bool, Meta(description="load the default models at start instead of on first use")] = True
    memory_budget: Annotated[Positive, Meta(description="MB that loaded local models may use together")] = 4096
    parallel: Annotated[Positive, Meta(description="requests a local model answers at the same time")] = 4
    context_length: Annotated[
        Positive | None,
        Meta(description="tokens a local model holds per request; the model's own, at most 8192, if not given"),
    ] = None
    threads: Annotated[NotNegative, Meta(description="CPU threads of a local engine; 0: one per core")] = 0
    load_timeout: Annotated[Seconds, Meta(description="seconds a local model may take to load")] = 120.0
    max_body: Annotated[Positive, Meta(description="MB a JSON request body may have")] = 32
    request_timeout: Annotated[Seconds, Meta(description="seconds a call may take from first byte to last")] = 600.0
    read_timeout: Annotated[Seconds, Meta(description="seconds a client may take to send its request")] = 30.0
    keep_alive: Annotated[Positive, Meta(description="seconds an idle connection is kept")] = 75
    max_connections: Annotated[Positive, Meta(description="open connections over which new ones are refused")] = 4096
    requests_per_minute: Annotated[Positive, Meta(description="requests a minute of one project to one model")] = (
        10_000_000
    )
    tokens_per_minute: Annotated[Positive, Meta(description="tokens a minute of one project with one model")] = (
        1_000_000_000
    )
    requests_per_day: Annotated[
        Positive | None, Meta(description="requests in 24 hours of one project to one model; no limit if not given")
    ] = None
    concurrent_requests: Annotated[
        Positive | None, Meta(description="requests at a time of one project to one model; no limit if not given")
    ] = None
    reserve_output: Annotated[
        Positive | None,
        Meta(
            description="tokens that tokens_per_minute sets aside for an answer without a given maximum, and the "
            "maximum it is given where a limit of tokens is in force; the model's longest, if that is not too much"
        ),
    ] = None
    spend_limit: Annotated[
        Dollars | None, Meta(description="US dollars a project may spend a calendar month; no limit if not given")
    ] = None
    observe_only: Annotated[
        bool | list[Limits],
        Meta(
            description="refuse nothing for a limit; say in metrics, ledger and answers what would have been; a list: "
            "only for the limits of these settings"
        ),
    ] = False
    unknown_price: Annotated[
        Literal["flag", "refuse"], Meta(description="mark or refuse calls of an upstream's model without a price")
    ] = "flag"
    alert_webhook: Annotated[str | None, Meta(description="address (URL) that spend alerts are posted to")] = None
    alert_webhook_secret: Annotated[
        str | None, Meta(description="reference to the secret they are signed with: whsec_ and base64")
    ] = None
    alert_smtp: Annotated[
        str | None,
        Meta(description="mail server for spend alerts: smtp://USER@HOST:PORT, or smtps:// for TLS from the start"),
    ] = None
    alert_smtp_password: Annotated[str | None, Meta(description="reference to the password for it")] = None
    alert_from: Annotated[str | None, Meta(description="address that spend alerts come from")] = None
    flush_seconds: Annotated[
        float,
        Meta(gt=0, le=3600, description="seconds between two flushes of the ledger: what a power loss may cost"),
    ] = 1.0
    fold_seconds: Annotated[Seconds, Meta(description="seconds between two moves of the journal into the database")] = (
        30.0
    )
    ledger_days: Annotated[
        Days, Meta(description="days that entries of the ledger are kept in the database; 0: for good")
    ] = 400
    audit_days: Annotated[Days, Meta(description="days that entries of the audit log are kept; 0: for good")] = 0
    metrics_open: Annotated[
        bool | None,
        Meta(
            description="answer /metrics without a key; if not given, only a server that listens on loopback does, and "
            "others want an admin key"
        ),
    ] = None
    access_log: Annotated[
        str, Meta(description="file for the JSON access log; - for standard error, empty for none")
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="what is logged on standard error")
    ] = "warning"
    trace_engine: Annotated[bool, Meta(description="keep the log of local engines in the data directory")] = False
    retries: Annotated[int, Meta(ge=0, le=10, description="further tries of a call whose upstream fails")] = 2
    retry_budget: Annotated[
        float, Meta(ge=0, le=10, description="retries a target may cost, as a share of its calls")
    ] = 0.2
    on_break: Annotated[
        Literal["error", "continue"],
        Meta(description="a stream that breaks off: end it with an error, or have the next target continue the text"),
    ] = "error"
    breaker_failures: Annotated[
        Positive, Meta(description="failures in a row after which a target is left alone for a while")
    ] = 5
    breaker_cooldown: Annotated[Seconds, Meta(description="seconds it is left alone at first")] = 10.0
    queue_size: Annotated[NotNegative, Meta(description="calls that may wait for a busy target")] = 1000
    queue_timeout: Annotated[Seconds, Meta(description="seconds a call may wait for a busy target")] = 30.0
    heartbeat: Annotated[
        float, Meta(ge=0, le=3600, description="seconds between comments sent while a stream waits; 0: none")
    ] = 15.0
    cache: Annotated[
        Literal["off", "deterministic", "all"],
        Meta(description="which answers are kept: none, of temperature 0 or a seed, or all"),
    ] = "deterministic"
    cache_memory: Annotated[NotNegative, Meta(description="MB of answers kept in memory")] = 64
    cache_disk: Annotated[NotNegative, Meta(description="MB of answers kept on disk, over a restart too; 0: none")] = 0
    cache_ttl: Annotated[Seconds, Meta(description="seconds an answer is kept")] = 3600.0
    coalesce: Annotated[bool, Meta(description="let identical calls in flight share one answer")] = True
    retry_grace: Annotated[
        float, Meta(ge=0, le=600, description="seconds a call goes on after its client left, for the client's retry")
    ] = 0.0
    watch: Annotated[bool, Meta(description="read the configuration file again when it changes")] = True
    secrets_refresh: Annotated[Seconds, Meta(description="seconds after which secrets of upstreams are read again")] = (
        300.0
    )
    traces: Annotated[
        str | None,
        Meta(description="where traces go: URL of an OTLP/HTTP collector for traces; needs the extra `otel`"),
    ] = None
    mock: Annotated[bool, Meta(description="offer the deterministic model `mock`")] = True
    aliases: Annotated[dict[str, str], Meta(description="model name or pattern = model that answers")] = {}
    models: Annotated[dict[str, LocalModel], Meta(description="more local models")] = {}
    presets: Annotated[
        dict[str, Preset], Meta(description="names with a model, a system message and parameters behind")
    ] = {}
    upstreams: Annotated[dict[str, Upstream], Meta(description="servers that answer for us")] = {}
    routes: Annotated[dict[str, Route], Meta(description="model names with several targets behind")] = {}
    fallback: Annotated[
        list[str], Meta(description="model names tried in turn when an upstream cannot answer, for every route")
    ] = []
    policies: Annotated[dict[str, Policy], Meta(description="what holds for single API keys")] = {}
    prices: Annotated[
        dict[str, dict[str, float]], Meta(description="US dollars per million tokens: input, cached_input, output")
    ] = {}

    @property
    def data_dir(self) -> Path:
        return Path(self.data).expanduser().absolute()

    @property
    def on_loopback(self) -> bool:
        """Whether nobody but programs of this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Setting(msgspec.Struct, frozen=True):
    """One row of the table. shape is a word for its type, choices the texts it may be if they are few; plain ones have
    an environment variable and a flag."""

    name: str
    shape: str
    default: Any
    help: str
    plain: bool
    choices: tuple[str, ...] = ()

    @property
    def env(self) -> str:
        return "TERTULIA_" + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _described(annotation: Any) -> tuple[str, str]:
    """The help text and a word for the type of an annotated field, however deep the metadata sits."""
    help, outer = "", annotation
    while hasattr(outer, "__metadata__"):
        for meta in outer.__metadata__:
            help = meta.description or help
        outer = get_args(outer)[0]
    if choices(annotation):
        return help, "text"
    base = _bare(annotation)
    if bool in get_args(base):  # or a list, which only a file can have
        base = bool
    if get_origin(base) is list:
        return help, "list"
    return help, {str: "text", int: "number", float: "number", bool: "yes/no"}.get(base, "table")


def table(of: type[msgspec.Struct] = Settings) -> list[Setting]:
    """Every setting, in order; what docs, flags and the environment are made from."""
    hints = get_type_hints(of, include_extras=True)
    rows = []
    for field in msgspec.structs.fields(of):
        help, shape = _described(hints[field.name])
        default = field.default if field.default is not msgspec.NODEFAULT else None
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        rows.append(
            Setting(field.name, shape, default, help, shape not in ("table", "list"), choices(hints[field.name]))
        )
    return rows


def load(flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """The settings in force.

    flags: names to values, None meaning not given. Raises SettingsError that names the key, what is wrong with it and,
    for a name that does not exist, the nearest one that does.
    """
    environment = os.environ if environment is None else environment
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    _refuse_unknown(given, Settings, "")
    path = given.get("config") or environment.get("TERTULIA_CONFIG")
    values: dict[str, Any] = _read_file(path) if path else {}
    origin = {name: f"{path}: {name}" for name in values}
    for row in table():
        if row.plain and environment.get(row.env, "") != "":
            values[row.name] = _from_text(row, environment[row.env])
            origin[row.name] = row.env
    _refuse_unknown_variables(environment)
    for name, value in given.items():
        values[name] = value
        origin[name] = "--" + name.replace("_", "-")
    if path:
        values["config"] = str(path)
    _check_sampling(values.get("models"), origin.get("models", "models"))
    try:
        return msgspec.convert(values, Settings, strict=True)
    except msgspec.ValidationError:
        name, where, what = next(
            (name, *found) for name, shape in get_type_hints(Settings, include_extras=True).items()
            if name in values and (found := _mistake(values[name], shape))
        )  # fmt: skip
        raise SettingsError(f"{origin.get(name, name)}{where}: {what}") from None


def _check_sampling(models: Any, where: str) -> None:
    """Each value of each [models.NAME] sampling, so that a mistake names it."""
    for name, model in models.items() if isinstance(models, Mapping) else ():
        sampling = model.get("sampling") if isinstance(model, Mapping) else getattr(model, "sampling", None)
        if not isinstance(sampling, Mapping):
            continue  # none, or of a type that is refused with the others
        refuse_wrong(sampling, Sampling, f"{where}.{name}.sampling.")


def refuse_wrong(values: Mapping[str, Any], shape: type[msgspec.Struct], where: str) -> None:
    """Raises SettingsError for a name that shape does not have, or for a value that is not as shape has it."""
    _refuse_unknown(values, shape, where)
    hints = get_type_hints(shape, include_extras=True)
    for name, value in values.items():
        found = _mistake(value, hints[name])
        if found is not None:
            raise SettingsError(f"{where}{name}{found[0]}: {found[1]}")


def _mistake(value: Any, shape: Any) -> tuple[str, str] | None:
    """The first place in value that is not as shape has it, as the end of a key's path, and what is wrong there."""
    try:
        msgspec.convert(value, shape, strict=True)
    except msgspec.ValidationError as error:
        what = str(error).partition(" - at `")[0]
    else:
        return None
    base = _bare(shape)
    if isinstance(value, list):
        base = next((kind for kind in get_args(base) if get_origin(kind) is list), base)
    parts: Iterable[tuple[str, Any, Any]] = ()
    if isinstance(value, Mapping) and get_origin(base) is dict:
        parts = ((f".{name}", inner, get_args(base)[1]) for name, inner in value.items())
    elif isinstance(value, list) and get_origin(base) is list:
        parts = ((f"[{at}]", inner, get_args(base)[0]) for at, inner in enumerate(value))
    elif isinstance(value, Mapping) and isinstance(base, type) and issubclass(base, msgspec.Struct):
        hints = get_type_hints(base, include_extras=True)
        for name in value:
            if name not in hints:
                return f".{name}", f"there is no such setting{nearest(str(name), hints)}"
        parts = ((f".{name}", inner, hints[name]) for name, inner in value.items())
    for name, inner, inside in parts:
        if found := _mistake(inner, inside):
            return name + found[0], found[1]
    return "", _plain(what, choices(shape), value)


def _bare(shape: Any) -> Any:
    """A type without its metadata, and without None where that is one of two."""
    while hasattr(shape, "__metadata__"):
        shape = get_args(shape)[0]
    kinds = [kind for kind in get_args(shape) if kind is not type(None)]
    return _bare(kinds[0]) if type(None) in get_args(shape) and len(kinds) == 1 else shape


def choices(shape: Any) -> tuple[str, ...]:
    """The texts a value of this type may be, if it is one of a few."""
    base = _bare(shape)
    return get_args(base) if get_origin(base) is Literal else ()


def _plain(what: str, allowed: tuple[str, ...], value: Any) -> str:
    """msgspec's words in the style of the other messages."""
    if allowed:
        words = f"expected {', '.join(allowed[:-1])} or {allowed[-1]}"
        if isinstance(value, str):
            return f"{words}, got {value!r}{nearest(value.strip().lower(), allowed)}"
        what = f"{words}, {what.partition(', ')[2]}"
    what = what.replace("`", "").replace(" | null", "").replace("str", "text", 1)
    return what[:1].lower() + what[1:]


def _from_text(row: Setting, text: str) -> Any:
    if row.shape == "yes/no":
        word = text.strip().lower()
        if word in ("1", "true", "yes", "on"):
            return True
        if word in ("0", "false", "no", "off"):
            return False
        raise SettingsError(f"{row.env}: expected yes or no, got {text!r}")
    if row.shape == "number":
        try:
            return int(text)
        except ValueError:
            try:
                return float(text)
            except ValueError:
                raise SettingsError(f"{row.env}: expected a number, got {text!r}") from None
    return text


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = {row.env for row in table() if row.plain}
    for name in environment:
        # TERTULIA_TEST_* belongs to the test-suite
        if name.startswith("TERTULIA_") and name not in known and not name.startswith("TERTULIA_TEST_"):
            # without the prefix, which would make every name near to every other
            near = nearest(name[9:], {row[9:] for row in known}).replace("mean ", "mean TERTULIA_")
            raise SettingsError(f"{name}: there is no such setting{near}")


def _read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({error.__class__.__name__})") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None
    _refuse_unknown(values, Settings, f"{path}: ")
    for section, shape in (
        ("models", LocalModel),
        ("presets", Preset),
        ("upstreams", Upstream),
        ("routes", Route),
        ("policies", Policy),
    ):
        entries = values.get(section, {})
        if not isinstance(entries, dict):
            continue  # its type is refused later, with the others
        for name, entry in entries.items():
            if isinstance(entry, dict):
                _refuse_unknown(entry, shape, f"{path}: [{section}.{name}] ")
    return values


def _refuse_unknown(values: Mapping[str, Any], shape: type[msgspec.Struct], where: str) -> None:
    known = {field.name for field in msgspec.structs.fields(shape)}
    for name in values:
        if name not in known:
            raise SettingsError(f"{where}{name}: there is no such setting{nearest(name, known)}")


def nearest(name: str, known: Collection[str], alike: float = 0.5) -> str:
    """A message's end that suggests the name meant, or nothing if none is near: alike is from 0 to 1."""
    near = difflib.get_close_matches(name, known, 1, alike)
    return f"; did you mean {near[0]}?" if near else ""
