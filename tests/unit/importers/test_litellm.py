"""Configurations as LiteLLM's users have them, and what becomes of each part."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tertulia.accounts.credentials import Credentials
from tertulia.config import Settings, load
from tertulia.errors import SettingsError
from tertulia.gateway.names import Names
from tertulia.importers import litellm
from tertulia.importers.providers import PROVIDERS
from tertulia.server import check_models, far_engines, mocks, prices_of

LARGE = """
model_list:
  - model_name: gpt-4o
    litellm_params:
      model: azure/gpt-4o-eu
      api_base: https://my-endpoint-europe.openai.azure.com/
      api_key: os.environ/AZURE_API_KEY_EU
      api_version: "2024-02-01"
      rpm: 60
  - model_name: gpt-4o
    litellm_params:
      model: azure/gpt-4o-ca
      api_base: https://my-endpoint-canada.openai.azure.com/
      api_key: sk-very-secret-1
      api_version: "2024-02-01"
      rpm: 30
      input_cost_per_token: 2.5e-6
      output_cost_per_token: 0.00001
    model_info: {mode: chat, base_model: azure/gpt-4o, max_input_tokens: 128000, supports_vision: true}
  - model_name: gpt-4o
    litellm_params: {model: gpt-4o, api_key: sk-very-secret-2, rpm: 10}
  - model_name: claude-sonnet
    litellm_params: {model: anthropic/claude-sonnet-4-5, api_key: os.environ/ANTHROPIC_API_KEY}
  - model_name: claude-bedrock
    litellm_params: {model: bedrock/anthropic.claude-v2, aws_region_name: us-east-1}
  - model_name: embeddings
    litellm_params: {model: openai/text-embedding-3-small}
    model_info: {mode: embedding}
  - model_name: pictures
    litellm_params: {model: dall-e-3}
    model_info: {mode: image_generation}
router_settings:
  routing_strategy: latency-based-routing
  num_retries: 3
  timeout: 30
  fallbacks: [{"gpt-4o": ["claude-sonnet", "not-there"]}]
  model_group_alias: {"gpt-4": "gpt-4o", "gpt-4-old": {"model": "gpt-4o", "hidden": true}}
  allowed_fails: 3
  cooldown_time: 30
  redis_host: os.environ/REDIS_HOST
litellm_settings:
  num_retries: 7
  request_timeout: 600
  drop_params: true
  default_fallbacks: ["claude-sonnet"]
  cache: true
  cache_params: {type: redis, ttl: 600, host: secret-host}
  success_callback: ["langfuse", "prometheus"]
general_settings:
  master_key: sk-very-secret-3
  database_url: postgresql://user:very-secret-4@host/litellm
environment_variables:
  LANGFUSE_SECRET: very-secret-5
"""
LOCAL = """
model_list:
  - model_name: llama
    litellm_params:
      model: ollama_chat/llama3.1
      api_base: "http://localhost:11434"
      temperature: 0.2
      extra_body: {keep_alive: "10m"}
  - model_name: qwen
    litellm_params:
      model: hosted_vllm/Qwen/Qwen2.5-7B-Instruct
      api_base: http://10.0.0.5:8001
      api_key: fake-key
      timeout: 300
      stream_timeout: 20
      max_parallel_requests: 8
      weight: 2
  - model_name: qwen
    litellm_params:
      model: openai/qwen-other
      api_base: os.environ/QWEN_BASE
      api_key: os.environ/QWEN_KEY
      weight: 1
      headers: {X-Team: research, X-Api-Key: very-secret}
  - model_name: studio
    litellm_params: {model: lm_studio/phi-4, api_base: "http://localhost:1234/v1"}
litellm_settings:
  fallbacks: [{"qwen": ["llama"]}]
  cache: false
"""
WILDCARDS = """
model_list:
  - model_name: "*"
    litellm_params: {model: "openrouter/*", api_key: os.environ/OPENROUTER_API_KEY}
  - model_name: "groq/*"
    litellm_params: {model: "groq/*", api_key: os.environ/GROQ_API_KEY}
  - model_name: "gpt-3*"
    litellm_params: {model: openai/gpt-4o-mini}
  - model_name: "x-*-y"
    litellm_params: {model: "openai/*"}
"""


def made(text: str, environment: dict[str, str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """The tables and the notes; what was written is what Tertulia reads."""
    written, notes = litellm.convert(text, "config.yaml", environment or {})
    return tomllib.loads(written), notes


def accepted(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Settings:
    """Reads the result as `tertulia serve` does, up to the names and who answers them."""
    written, _ = litellm.convert(text, "config.yaml", environment)
    path = tmp_path / "t.toml"
    path.write_text(written)
    settings = load({"config": str(path), "data": str(tmp_path / "data")}, {})
    for upstream in settings.upstreams.values():
        if upstream.key:
            monkeypatch.setenv(upstream.key.removeprefix("env:"), "x")
    credentials = Credentials()
    credentials.require({name: each.key for name, each in settings.upstreams.items() if each.key})
    check_models(settings)
    prices_of(settings)
    engines = [*mocks(settings), *(far.engine for far in far_engines(settings, {}, credentials).values())]
    names = Names(
        engines, settings.presets, settings.aliases, {}, settings.strict_models, routes=settings.routes,
        fallback=settings.fallback,
    )  # fmt: skip
    for group in (*settings.routes, *settings.presets, *settings.aliases):
        if "*" not in group:
            assert names.plan(group).groups
    return settings


@pytest.mark.parametrize("text", [LARGE, LOCAL, WILDCARDS])
def test_the_result_is_what_serve_accepts(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted(text, tmp_path, monkeypatch, {"QWEN_BASE": "https://qwen.example.org/v1"})


def test_deployments_of_one_name_become_a_route_over_upstreams() -> None:
    tables, _ = made(LARGE)
    upstreams = tables["upstreams"]
    assert set(upstreams) == {"azure-my-endpoint-europe", "azure-my-endpoint-canada", "openai", "openai-2", "anthropic"}
    assert upstreams["azure-my-endpoint-europe"] == {
        "base_url": "https://my-endpoint-europe.openai.azure.com",
        "kind": "azure",
        "api_version": "2024-02-01",
        "key": "env:AZURE_API_KEY_EU",
        "requests_per_minute": 60,
        "models": {"azure-my-endpoint-europe/gpt-4o-eu": "gpt-4o-eu"},
    }
    canada = upstreams["azure-my-endpoint-canada"]
    ours = "azure-my-endpoint-canada/gpt-4o-ca"
    assert canada["prices"] == {ours: {"input": 2.5, "output": 10.0}} and canada["context_length"] == {ours: 128000}
    route = tables["routes"]["gpt-4o"]
    assert [target["weight"] for target in route["targets"]] == [60, 30, 10]
    assert route["targets"][2]["model"] == "openai/gpt-4o"
    assert (route["balance"], route["fallback"]) == ("fastest", ["claude-sonnet"])
    assert upstreams["anthropic"]["models"] == {"claude-sonnet": "claude-sonnet-4-5"}
    assert upstreams["openai-2"] == {
        "base_url": "https://api.openai.com/v1", "key": "env:OPENAI_API_KEY",
        "models": {"embeddings": "text-embedding-3-small"},
    }  # fmt: skip


def test_the_settings_of_router_and_litellm() -> None:
    tables, _ = made(LARGE)
    assert tables["aliases"] == {"gpt-4": "gpt-4o", "gpt-4-old": "gpt-4o"}
    assert {name: value for name, value in tables.items() if not isinstance(value, dict)} == {
        "strict_models": True, "retries": 3, "request_timeout": 30, "breaker_failures": 4, "breaker_cooldown": 30,
        "cache": "all", "cache_ttl": 600, "fallback": ["claude-sonnet"],
    }  # fmt: skip


def test_no_secret_is_copied_and_each_has_a_variable_of_its_own() -> None:
    for text in (LARGE, LOCAL):
        written, notes = litellm.convert(text, "config.yaml", {})
        assert "secret" not in written.replace("LANGFUSE_SECRET", "")
        assert "very-secret" not in "\n".join(notes)
    tables, notes = made(LARGE)
    keys = {upstream["key"] for upstream in tables["upstreams"].values()}
    assert {"env:AZURE_GPT_4O_KEY", "env:OPENAI_GPT_4O_KEY"} < keys
    assert "model_list[1] (gpt-4o): its api_key is in clear and was not copied; put it into AZURE_GPT_4O_KEY" in notes


def test_two_keys_in_clear_do_not_share_a_variable() -> None:
    text = "model_list:\n" + "".join(
        f"  - model_name: m\n    litellm_params: {{model: openai/x{n}, api_key: sk-{key}}}\n"
        for n, key in enumerate(["one", "two", "one"])
    )
    tables, _ = made(text)
    assert [upstream["key"] for upstream in tables["upstreams"].values()] == ["env:OPENAI_M_KEY", "env:OPENAI_M_2_KEY"]


def test_what_could_not_be_carried_over_is_said() -> None:
    _, notes = made(LARGE)
    for said in (
        "model_list[4] (claude-bedrock): bedrock does not speak the OpenAI API; left out",
        "model_list[6] (pictures): models of mode image_generation are not served",
        "model_list[3] (claude-sonnet): goes through Anthropic's OpenAI-compatible endpoint",
        "router_settings.fallbacks of gpt-4o: there is no model 'not-there'",
        "router_settings.model_group_alias.gpt-4-old: hidden",
        "router_settings.redis_host",
        "litellm_settings.drop_params: a parameter that a model does not take is a 400",
        "litellm_settings.cache_params.type: there is no redis cache",
        "litellm_settings.success_callback: langfuse: nothing is sent",
        "litellm_settings.success_callback: prometheus: figures are at /metrics",
        "general_settings.master_key: keys are Tertulia's own",
        "general_settings.database_url",
        "environment_variables.LANGFUSE_SECRET: not copied",
    ):
        assert any(note.startswith(said) for note in notes), said
    assert all("\n" not in note for note in notes)


def test_servers_of_ones_own() -> None:
    tables, notes = made(LOCAL, {"QWEN_BASE": "https://qwen.example.org/v1/"})
    assert tables["upstreams"]["ollama_chat"] == {
        "base_url": "http://localhost:11434/v1", "models": {"llama-base": "llama3.1"},
    }  # fmt: skip
    assert tables["presets"] == {
        "llama": {"model": "llama-base", "parameters": {"temperature": 0.2, "keep_alive": "10m"}}
    }
    vllm = tables["upstreams"]["hosted_vllm-10-0-0-5"]
    assert vllm == {
        "base_url": "http://10.0.0.5:8001/v1", "timeout": 300, "max_concurrency": 8, "first_byte_timeout": 20,
        "models": {"hosted_vllm-10-0-0-5/Qwen/Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B-Instruct"},
    }  # fmt: skip
    other = tables["upstreams"]["openai-qwen-example-org"]
    assert other["base_url"] == "https://qwen.example.org/v1" and other["headers"] == {"X-Team": "research"}
    assert tables["routes"]["qwen"]["fallback"] == ["llama-base"] and tables["cache"] == "off"
    assert "litellm_settings.fallbacks of qwen: llama stands in as llama-base, without its parameters" in notes
    assert [target["weight"] for target in tables["routes"]["qwen"]["targets"]] == [2, 1]
    assert "model_list[2] (qwen): its address was in QWEN_BASE; base_url holds what it is now" in notes
    tables, notes = made(LOCAL)
    assert tables["upstreams"]["openai-qwen-base-invalid"]["base_url"] == "https://qwen-base.invalid"
    assert "model_list[2] (qwen): QWEN_BASE is not set here; write its address into base_url" in notes


def test_patterns() -> None:
    tables, notes = made(WILDCARDS)
    upstreams = tables["upstreams"]
    assert upstreams["openrouter"]["discover"] is True and "prefix" not in upstreams["openrouter"]
    assert (upstreams["groq"]["discover"], upstreams["groq"]["prefix"]) == (True, "groq/")
    assert tables["aliases"] == {"gpt-3*": "openai/gpt-4o-mini"}
    assert any(note.startswith("model_list[3] (x-*-y)") for note in notes)
    no_wildcard = "discover = true is no wildcard: the models that"
    assert f"model_list[0] (*): {no_wildcard} openrouter lists are served, any other name is a 404" in notes
    assert f"model_list[1] (groq/*): {no_wildcard} groq lists are served as groq/NAME, any other name is a 404" in notes


@pytest.mark.parametrize(("strategy", "said"), [("latency-based-routing", True), ("least-busy", False), ("", False)])
def test_weights_that_count_for_nothing_are_said(strategy: str, said: bool) -> None:
    text = f"""
    model_list:
      - {{model_name: m, litellm_params: {{model: openai/x, weight: 3}}}}
      - {{model_name: m, litellm_params: {{model: groq/x, weight: 1}}}}
      - {{model_name: alone, litellm_params: {{model: groq/y, weight: 1}}}}
    {"router_settings: {routing_strategy: " + strategy + "}" if strategy else ""}
    """
    _, notes = made(text)
    weight = [note for note in notes if "weight of its deployments" in note]
    assert weight == ["m: the weight of its deployments counts for nothing where the fastest is chosen"] * said


def test_a_name_that_looks_like_a_target_of_ours_stays_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
    model_list:
      - {model_name: gpt, litellm_params: {model: openai/gpt-4o}}
      - {model_name: gpt, litellm_params: {model: openai/gpt-4o-mini}}
      - {model_name: openai/gpt-4o, litellm_params: {model: groq/other}}
    """
    tables, _ = made(text)
    assert tables["upstreams"]["openai"]["models"] == {
        "openai/gpt-4o-target": "gpt-4o", "openai/gpt-4o-mini": "gpt-4o-mini",
    }  # fmt: skip
    assert tables["upstreams"]["groq"]["models"] == {"openai/gpt-4o": "other"}
    accepted(text, tmp_path, monkeypatch, {})


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ("{model: openai/x, api_base: 'http://user:pass@host/v1'}", "its api_base is no plain http or https address"),
        ("{model: openai/x, api_base: 'unix:///x'}", "its api_base is no plain http or https address"),
        ("{model: custom_openai/x}", "custom_openai needs an api_base; left out"),
        ("{model: nobody/x}", "'nobody/x' is a provider nobody here knows"),
        ("{model: openai/x, timeout: -1}", "timeout cannot be -1; left out"),
        ("{model: openai/x, ssl_verify: false}", "ssl_verify: certificates are always verified"),
        ("{model: openai/x, mock_response: hi}", "mock_response: there is nothing like it here"),
        ("{model: openai/x, rpm: os.environ/NO}", "rpm: NO is not set here; left out"),
        ("{model: azure/x, api_base: 'https://a.openai.azure.com'}", "it has no api_version; 2024-10-21 is written"),
        ("[]", "it has no model_name or no litellm_params"),
    ],
)
def test_what_is_odd_in_a_deployment_is_said(
    parameters: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"model_list:\n  - model_name: m\n    litellm_params: {parameters}\n"
    _, notes = made(text)
    assert any(note.startswith(f"model_list[0] (m): {said}") for note in notes), notes
    assert "pass" not in " ".join(notes)
    accepted(text, tmp_path, monkeypatch, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", r"^c.yaml: not valid YAML \(line \d\)$"),
        ("just text", "^c.yaml: this is no configuration of a LiteLLM proxy"),
        ("model_list:", "^c.yaml: this is no configuration of a LiteLLM proxy: it has no model_list$"),
        ("other: 1", "^c.yaml: this is no configuration of a LiteLLM proxy"),
        ("!!python/object/apply:os.system ['true']", "^c.yaml: not valid YAML"),
    ],
)
def test_what_is_no_such_configuration(text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        litellm.convert(text, "c.yaml", {})


@pytest.mark.parametrize(
    "text",
    [
        "model_list: {}", "model_list: [1, null, {model_name: 3}]", "model_list: null\nlitellm_settings: [1]",
        "router_settings: {fallbacks: 3, model_group_alias: [1], num_retries: many, allowed_fails: x}",
        "litellm_settings: {cache: true, cache_params: null, callbacks: otel, num_retries: 99, request_timeout: -5}",
        "model_list: [{model_name: m, litellm_params: {model: gpt-4o, extra_headers: null}, model_info: null}]",
    ],
)  # fmt: skip
def test_odd_shapes_break_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted(text, tmp_path, monkeypatch, {})


@pytest.mark.parametrize("name", sorted(PROVIDERS))
def test_every_provider_has_an_address_or_needs_one(name: str) -> None:
    provider = PROVIDERS[name]
    assert provider.base.startswith(
        ("https://", "http://localhost:", "http://127.0.0.1:", "")
    ) and not provider.base.endswith("/")
    text = f"model_list:\n  - model_name: m\n    litellm_params: {{model: {name}/x}}\n"
    tables, notes = made(text)
    assert ("upstreams" in tables) == bool(provider.base)
    assert bool(provider.base) != any("needs an api_base" in note for note in notes)


def test_the_command(tmp_path: Path) -> None:
    source, target = tmp_path / "config.yaml", tmp_path / "t.toml"
    source.write_text(LARGE)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tertulia", "import", "litellm", *arguments], capture_output=True, text=True
        )

    done = run(str(source))
    assert done.returncode == 0 and tomllib.loads(done.stdout)["retries"] == 3
    assert f"{source}: model_list[4] (claude-bedrock): bedrock does not speak the OpenAI API; left out\n" in done.stderr
    assert run(str(source), "-o", str(target)).stdout == "" and target.read_text() == done.stdout
    again = run(str(source), "-o", str(target))
    assert (again.returncode, again.stderr) == (2, f"tertulia: {target}: File exists\n")
    missing = run(str(tmp_path / "no.yaml"))
    assert (missing.returncode, missing.stderr) == (2, f"tertulia: {tmp_path}/no.yaml: No such file or directory\n")
