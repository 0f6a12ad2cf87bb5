"""One table of settings: every way of giving one, every mistake in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tertulia.config import LocalModel, Policy, Route, RouteTarget, Sampling, Settings, Upstream, load, table
from tertulia.core import Preset
from tertulia.errors import SettingsError


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "t.toml"
        path.write_text(text)
        return str(path)

    return write


def refused(flags: dict[str, Any] | None = None, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as error:
        load(flags, environment or {})
    assert "\n" not in error.value.message
    return error.value.message


def test_defaults() -> None:
    settings = load(environment={})
    assert settings == Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


def test_later_wins_default_file_environment_flag(file: Any) -> None:
    path = file('port = 1\nhost = "a"\nparallel = 1\n')
    environment = {"TERTULIA_CONFIG": path, "TERTULIA_HOST": "b", "TERTULIA_PARALLEL": "2"}
    settings = load({"parallel": 3, "host": None}, environment)
    assert (settings.port, settings.host, settings.parallel, settings.threads) == (1, "b", 3, 0)
    assert settings.config == path


def test_a_flag_names_another_file_than_the_environment(file: Any) -> None:
    assert load({"config": file("port = 5")}, {"TERTULIA_CONFIG": "missing.toml"}).port == 5


def test_an_empty_variable_is_not_given() -> None:
    assert load(environment={"TERTULIA_PORT": ""}).port == 8000


def test_variables_of_others_are_left_alone() -> None:
    assert load(environment={"TERTULIA_TEST_MODELS": "x", "OPENAI_API_KEY": "y", "XTERTULIA_PORT": "1"}) == Settings()


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("Yes", True), ("on", True), ("0", False), ("False", False),
                        ("no", False), ("off", False)],
)  # fmt: skip
def test_yes_and_no_in_the_environment(text: str, value: bool) -> None:
    assert load(environment={"TERTULIA_MOCK": text}).mock is value


def test_numbers_in_the_environment() -> None:
    settings = load(environment={"TERTULIA_PORT": "0", "TERTULIA_READ_TIMEOUT": "2.5", "TERTULIA_LOAD_TIMEOUT": "3"})
    assert (settings.port, settings.read_timeout, settings.load_timeout) == (0, 2.5, 3)


def test_every_plain_setting_can_be_given_by_environment_and_by_file(file: Any) -> None:
    sample = {"yes/no": ("no", "false"), "number": ("7", "7"), "text": ("error", '"error"')}
    for row in table():
        if not row.plain or row.name == "config":
            continue
        by_environment, by_file = sample[row.shape]
        if row.choices:
            by_environment, by_file = row.choices[-1], f'"{row.choices[-1]}"'
        one = getattr(load(environment={row.env: by_environment}), row.name)
        other = getattr(load({"config": file(f"{row.name} = {by_file}")}, {}), row.name)
        assert one == other == {"yes/no": False, "number": 7, "text": by_environment}[row.shape], row.name


def test_sections(file: Any) -> None:
    settings = load(
        {
            "config": file(
                """
                [models.mine]
                file = "m.gguf"
                context_length = 2048
                sampling = { temperature = 0.2 }
                [presets.poet]
                model = "mine"
                system = "Rhyme."
                examples = [{ user = "a", assistant = "b" }]
                parameters = { temperature = 1.5 }
                [upstreams.far]
                base_url = "https://example.org/v1"
                models = { "far" = "gpt-4o" }
                [aliases]
                "gpt-*" = "mine"
                [prices.far]
                input = 2.5
                output = 10
                """
            )
        },
        {},
    )
    assert settings.models == {"mine": LocalModel(file="m.gguf", context_length=2048, sampling={"temperature": 0.2})}
    assert settings.presets["poet"] == Preset(
        model="mine", system="Rhyme.", examples=[{"user": "a", "assistant": "b"}], parameters={"temperature": 1.5}
    )
    assert settings.upstreams["far"] == Upstream(base_url="https://example.org/v1", models={"far": "gpt-4o"})
    assert settings.aliases == {"gpt-*": "mine"} and settings.prices["far"] == {"input": 2.5, "output": 10}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "prot: there is no such setting; did you mean port?"),
        ("zzzzzz = 1", "zzzzzz: there is no such setting"),
        ("[models.a]\nfil = 'x'", "[models.a] fil: there is no such setting; did you mean file?"),
        ("[presets.a]\nmodel = 'x'\nsistem = ''", "[presets.a] sistem: there is no such setting; did you mean system?"),
        ("[upstreams.a]\nbase_ulr = ''", "[upstreams.a] base_ulr: there is no such setting; did you mean base_url?"),
        ("port = 'x'", "port: expected int, got text"),
        ("port = true", "port: expected int, got bool"),
        ("port = 1.5", "port: expected int, got float"),
        ("port = -1", "port: expected int >= 0"),
        ("port = 65536", "port: expected int <= 65535"),
        ("parallel = 0", "parallel: expected int >= 1"),
        ("context_length = 0", "context_length: expected int >= 1"),
        ("read_timeout = 0", "read_timeout: expected float > 0.0"),
        ("read_timeout = nan", "read_timeout: expected float > 0.0"),
        ("read_timeout = inf", "read_timeout: expected float <= 2678400.0"),
        ("spend_limit = -1", "spend_limit: expected float >= 0.0"),
        ("spend_limit = inf", "spend_limit: expected float <= 1000000000.0"),
        ("mock = 'yes'", "mock: expected bool, got text"),
        ("host = 1", "host: expected text, got int"),
        (
            "observe_only = ['tokens_per_minut']",
            "observe_only[0]: expected requests_per_minute, tokens_per_minute, requests_per_day, concurrent_requests "
            "or spend_limit, got 'tokens_per_minut'; did you mean tokens_per_minute?",
        ),
        ("observe_only = 'tokens'", "observe_only: expected bool | array, got text"),
        ("log_level = 'loud'", "log_level: expected debug, info, warning or error, got 'loud'"),
        ("log_level = 'Warn'", "log_level: expected debug, info, warning or error, got 'Warn'; did you mean warning?"),
        ("log_level = 3", "log_level: expected debug, info, warning or error, got int"),
        ("on_break = 'eror'", "on_break: expected error or continue, got 'eror'; did you mean error?"),
        (
            "[routes.'gpt-4.1']\ntargets = [{model = 'm'}]\nbalance = 'fast'",
            "routes.gpt-4.1.balance: expected weighted, least_busy or fastest, got 'fast'; did you mean fastest?",
        ),
        ("[routes.a]\ntargets = [{model = 'm'}, {model = 1}]", "routes.a.targets[1].model: expected text, got int"),
        ("[routes.a]\ntargets = []", "routes.a.targets: expected array of length >= 1"),
        ("[routes.a]\nfallback = ['x']", "routes.a: object missing required field targets"),
        ("[routes.a]\ntargets = [{weight = 2}]", "routes.a.targets[0]: object missing required field model"),
        ("[routes.a]\ntargets = [{model = 'm', weight = 0}]", "routes.a.targets[0].weight: expected float > 0.0"),
        (
            "[routes.a]\ntargets = [{model = 'm', wieght = 1}]",
            "routes.a.targets[0].wieght: there is no such setting; did you mean weight?",
        ),
        ("[routes.a]\ntarget = []", "[routes.a] target: there is no such setting; did you mean targets?"),
        ("[policies.key_1]\ncache = 'on'", "policies.key_1.cache: expected off, deterministic or all, got 'on'"),
        ("[policies.key_1]\npriority = 1", "policies.key_1.priority: expected high, normal or low, got int"),
        (
            "[upstreams.a]\nbase_url = 'x'\nkind = 'opanai'",
            "upstreams.a.kind: expected openai or azure, got 'opanai'; did you mean openai?",
        ),
        (
            "[upstreams.a]\nbase_url = 'x'\nprices = {m = {input = 'a'}}",
            "upstreams.a.prices.m.input: expected float, got text",
        ),
        ("[upstreams.a]\nbase_url = 'x'\ncontext_length = {m = 0}", "upstreams.a.context_length.m: expected int >= 1"),
        ("[upstreams.a]\nbase_url = 'x'\nmodels = ['m']", "upstreams.a.models: expected object, got array"),
        ("fallback = ['a', 2]", "fallback[1]: expected text, got int"),
        ("models = 3", "models: expected object, got int"),
        ("[models]\na = 3", "models.a: expected object, got int"),
        ("[models.good]\nfile='x'\n[models.bad]\nfile = 3", "models.bad.file: expected text, got int"),
        ("[models.a]\nparallel = 0", "models.a.parallel: expected int >= 1"),
        ("[models.a]\nlora = [1]", "models.a.lora[0]: expected text, got int"),
        ("chat_model = ''", "chat_model: expected text of length >= 1"),
        (
            "[models.a]\nsampling = {temprature = 1}",
            "models.a.sampling.temprature: there is no such setting; did you mean temperature?",
        ),
        ("[models.a]\nsampling = {top_k = 1, top_p = 'abc'}", "models.a.sampling.top_p: expected float, got text"),
        ("[models.a]\nsampling = {temperature = 2.5}", "models.a.sampling.temperature: expected float <= 2.0"),
        ("[models.a]\nsampling = {max_tokens = 0}", "models.a.sampling.max_tokens: expected int >= 1"),
        ("[models.a]\nsampling = {min_p = nan}", "models.a.sampling.min_p: expected float >= 0.0"),
        ("[models.a]\nsampling = 3", "models.a.sampling: expected object, got int"),
        ("[upstreams.far]\nkey = 'env:X'", "upstreams.far: object missing required field base_url"),
        ("[upstreams.far]\nbase_url = ''\ntimeout = 0", "upstreams.far.timeout: expected float > 0.0"),
        ("[presets.p]\nsystem = 'x'", "presets.p: object missing required field model"),
        ("[presets.p]\nmodel = 'x'\nexamples = [{user = 1}]", "presets.p.examples[0].user: expected text, got int"),
        ("[aliases]\nx = 3", "aliases.x: expected text, got int"),
        ("[prices.x]\ninput = 'a'", "prices.x.input: expected float, got text"),
        ("x = = 1", "not valid TOML: Invalid value (at line 1, column 5)"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_file_and_key(text: str, said: str, file: Any) -> None:
    path = file(text)
    assert refused({"config": path}) == f"{path}: {said}"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused({"config": str(tmp_path / "no.toml")}) == f"{tmp_path}/no.toml: no such file"
    assert refused({"config": str(tmp_path)}) == f"{tmp_path}: cannot be read (IsADirectoryError)"
    (tmp_path / "latin.toml").write_bytes(b'host = "\xe9"')
    assert refused({"config": str(tmp_path / "latin.toml")}).endswith("cannot be read (UnicodeDecodeError)")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TERTULIA_PORTT", "1", "TERTULIA_PORTT: there is no such setting; did you mean TERTULIA_PORT?"),
        ("TERTULIA_QQQQ", "1", "TERTULIA_QQQQ: there is no such setting"),
        ("TERTULIA_PORT", "abc", "TERTULIA_PORT: expected a number, got 'abc'"),
        ("TERTULIA_PORT", "1.5", "TERTULIA_PORT: expected int, got float"),
        ("TERTULIA_PORT", "99999", "TERTULIA_PORT: expected int <= 65535"),
        ("TERTULIA_READ_TIMEOUT", "inf", "TERTULIA_READ_TIMEOUT: expected float <= 2678400.0"),
        ("TERTULIA_MOCK", "maybe", "TERTULIA_MOCK: expected yes or no, got 'maybe'"),
        (
            "TERTULIA_LOG_LEVEL",
            "loud",
            "TERTULIA_LOG_LEVEL: expected debug, info, warning or error, got 'loud'",
        ),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(name: str, value: str, said: str) -> None:
    assert refused(environment={name: value}) == said


def test_a_table_has_no_variable() -> None:
    assert refused(environment={"TERTULIA_ALIASES": "{}"}).startswith("TERTULIA_ALIASES: there is no such setting")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"prot": 1}, "prot: there is no such setting; did you mean port?"),
        ({"port": 70000}, "--port: expected int <= 65535"),
        ({"max_body": 0}, "--max-body: expected int >= 1"),
        ({"api_key": 5}, "--api-key: expected text, got int"),
        ({"aliases": {"a": 1}}, "--aliases.a: expected text, got int"),
    ],
)
def test_a_mistake_in_a_flag_names_the_flag(flags: dict[str, Any], said: str) -> None:
    assert refused(flags) == said


def test_sampling_of_every_known_name_is_taken(file: Any) -> None:
    text = "temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, typical_p=1.0, repeat_penalty=1.1, repeat_last_n=-1, "
    text += "presence_penalty=-2, frequency_penalty=2, max_tokens=9"
    sampling = load({"config": file(f"[models.a]\nsampling = {{{text}}}")}, {}).models["a"].sampling
    assert set(sampling) == set(Sampling.__struct_fields__) and sampling["top_k"] == 40


def test_no_message_holds_the_value_of_a_key() -> None:
    assert "sk-secret" not in refused({"api_key": ["sk-secret"]})


def test_the_table_says_everything_that_docs_and_flags_need() -> None:
    rows = {row.name: row for row in table()}
    assert list(rows) == list(Settings.__struct_fields__)
    for row in rows.values():
        assert (row.help and row.help[0].islower()) or row.help.startswith(("US", "TOML", "CPU", "MB")), row.name
        assert row.shape in ("text", "number", "yes/no", "table", "list")
        assert row.plain == (row.shape not in ("table", "list"))
    assert rows["memory_budget"].env == "TERTULIA_MEMORY_BUDGET" and rows["memory_budget"].flag == "--memory-budget"
    assert (rows["port"].shape, rows["mock"].shape, rows["spend_limit"].shape) == ("number", "yes/no", "number")
    assert {row.name for row in rows.values() if not row.plain} == {
        "aliases",
        "models",
        "presets",
        "upstreams",
        "routes",
        "fallback",
        "policies",
        "prices",
    }
    assert {row.name for row in table(LocalModel)} == set(LocalModel.__struct_fields__)
    assert rows["log_level"].choices == ("debug", "info", "warning", "error") and rows["host"].choices == ()
    assert {row.name: row.choices for row in table(Route)}["on_break"] == ("error", "continue")  # None is not said
    shapes = (LocalModel, Upstream, Route, RouteTarget, Policy)
    assert all(row.help for shape in shapes for row in table(shape))


@pytest.mark.parametrize(
    ("host", "near"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("gateway.example.org", False)],
)  # fmt: skip
def test_which_addresses_only_this_machine_reaches(host: str, near: bool) -> None:
    assert Settings(host=host).on_loopback is near
