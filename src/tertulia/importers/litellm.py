"""Turns the configuration of a LiteLLM proxy into Tertulia's: deployments become upstreams, groups of several of them
routes, and what has no counterpart a line that says so. Nothing is dropped silently, and no key is ever copied: a
key in clear becomes a reference to an environment variable, with a line that names it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ..config import Settings, refuse_wrong
from ..errors import SettingsError
from . import toml
from .providers import OTHERS, PROVIDERS, Provider, split
from .sections import SECTIONS

ENVIRONMENT = "os.environ/"
AZURE_VERSION = "2024-10-21"  # the last one of Azure OpenAI's that is no preview; its v1 API needs none
HEAD = """\
# Made by `tertulia import litellm` from {source}.
# Keys are references; see docs/settings.md for every setting.
"""
# Parameters of a deployment that LiteLLM sends along: they become a preset's.
PARAMETERS = frozenset(
    [
        "temperature",
        "top_p",
        "max_tokens",
        "max_completion_tokens",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
        "n",
        "response_format",
        "reasoning_effort",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "service_tier",
        "verbosity",
        "parallel_tool_calls",
        "tool_choice",
    ]
)
# What nobody misses: it names, groups or describes, or says what Tertulia does anyway.
SILENT = frozenset(
    [
        "custom_llm_provider",
        "id",
        "db_model",
        "base_model",
        "metadata",
        "description",
        "mode",
        "max_tokens",
        "created_by",
    ]
)
PLACEHOLDERS = frozenset(
    ["none", "null", "empty", "fake", "fake-key", "dummy", "na", "n/a", "not-needed", "no-key", "anything"]
)
SECRET = re.compile(r"auth|key|token|secret|cookie|password", re.IGNORECASE)
SERVED = {None, "chat", "completion", "embedding"}


class Deployment(msgspec.Struct):
    """One entry of model_list: where it stands in the file, the name asked for, and who answers it by what name."""

    where: str
    name: str
    upstream: str
    theirs: str
    weight: float | None = None
    parameters: dict[str, Any] = {}
    price: dict[str, float] = {}
    context: int | None = None


class Import:
    """One run: `tables` is what Tertulia gets, `notes` what it does not, a line each."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """environment: where addresses given as os.environ/NAME are looked up; keys never are."""
        self.environment = environment
        self.notes: list[str] = []
        self.upstreams: dict[str, dict[str, Any]] = {}
        self.routes: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, str] = {}
        self.presets: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {"strict_models": True}
        self.groups: dict[str, list[Deployment]] = {}
        self.base: dict[str, str] = {}  # model group -> the name that answers it, without a preset
        self.weighted: dict[str, None] = {}  # groups with a weight of their own
        self._variables: dict[str, str] = {}  # key in clear -> the variable it should be in
        self._same: dict[Any, str] = {}  # what makes two deployments one upstream -> its name

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def tables(self) -> dict[str, Any]:
        """Everything, as the TOML file has it."""
        return {
            **self.settings, "upstreams": self.upstreams, "routes": self.routes, "presets": self.presets,
            "aliases": self.aliases,
        }  # fmt: skip

    # model_list
    def models(self, entries: Any) -> None:
        """Reads every deployment, then makes of each group a model, a route, or a preset over one of them."""
        for at, entry in enumerate(entries if isinstance(entries, list) else []):
            name = entry.get("model_name") if isinstance(entry, Mapping) else None
            parameters = entry.get("litellm_params") if isinstance(entry, Mapping) else None
            where = f"model_list[{at}]" + (f" ({name})" if name else "")
            if not isinstance(name, str) or not isinstance(parameters, Mapping):
                self.note(f"{where}: it has no model_name or no litellm_params")
                continue
            for other in entry.keys() - {"model_name", "litellm_params", "model_info"}:
                self.note(f"{where}: {other}: there is nothing like it here")
            found = self._deployment(where, name, dict(parameters), dict(entry.get("model_info") or {}))
            if found is not None:
                self.groups.setdefault(name, []).append(found)
        for name, deployments in self.groups.items():
            self._group(name, deployments)

    def _deployment(self, where: str, name: str, given: dict[str, Any], info: dict[str, Any]) -> Deployment | None:
        model, named = given.pop("model", None), given.get("custom_llm_provider")
        provider, theirs = split(str(model), named, bool(given.get("api_base") or given.get("base_url")))
        mode = info.get("mode")
        if mode not in SERVED:
            self.note(f"{where}: models of mode {mode} are not served")
            return None
        if provider not in PROVIDERS:
            known = "does not speak the OpenAI API" if provider in OTHERS else "is a provider nobody here knows"
            self.note(f"{where}: {provider or repr(model)} {known}; left out")
            return None
        known_as = PROVIDERS[provider]
        if known_as.note:
            self.note(f"{where}: {known_as.note}")
        base = self._address(where, provider, known_as, given)
        if base is None:
            return None
        if provider == "fireworks_ai" and not theirs.startswith("accounts/"):
            theirs = f"accounts/fireworks/models/{theirs}"
        upstream = self._connection(where, provider, known_as, base, given)
        if "*" in theirs:
            self._wildcard(where, name, theirs, provider, upstream)
            return None
        found = Deployment(where, name, self._upstream(provider, base, upstream), theirs)
        self._weigh(found, given)
        self._cost(found, given, info)
        self._rest(found, given, info)
        return found

    def _address(self, where: str, provider: str, known: Provider, given: dict[str, Any]) -> str | None:
        base = given.pop("api_base", None) or given.pop("base_url", None) or known.base
        if isinstance(base, str) and base.startswith(ENVIRONMENT):
            variable = base.removeprefix(ENVIRONMENT)
            base = self.environment.get(variable, "")
            if base:
                self.note(f"{where}: its address was in {variable}; base_url holds what it is now")
            else:
                base = f"https://{variable.lower().replace('_', '-')}.invalid"
                self.note(f"{where}: {variable} is not set here; write its address into base_url")
        if not base:
            self.note(f"{where}: {provider} needs an api_base; left out")
            return None
        try:
            parts = urlsplit(str(base))
        except ValueError:
            parts = urlsplit("")
        more = "@" in parts.netloc or parts.query or parts.fragment
        if parts.scheme not in ("http", "https") or not parts.hostname or more:
            self.note(f"{where}: its api_base is no plain http or https address; left out")
            return None
        path = parts.path.rstrip("/") or known.root
        return f"{parts.scheme}://{parts.netloc}{path}"

    def _connection(
        self, where: str, provider: str, known: Provider, base: str, given: dict[str, Any]
    ) -> dict[str, Any]:
        """The upstream's settings, but for its models."""
        made: dict[str, Any] = {"base_url": base}
        version = given.pop("api_version", None)
        if provider.startswith("azure"):
            made["kind"] = "azure"
            if not version and not base.endswith("/openai/v1"):
                version = AZURE_VERSION
                self.note(f"{where}: it has no api_version; {AZURE_VERSION} is written")
            if version:
                made["api_version"] = self._plain(where, "api_version", version)
        key = self._key(where, provider, known, given)
        if key:
            made["key"] = key
        for theirs, ours in (("organization", "organization"), ("timeout", "timeout"), ("rpm", "requests_per_minute"),
                             ("tpm", "tokens_per_minute"), ("max_parallel_requests", "max_concurrency"),
                             ("stream_timeout", "first_byte_timeout")):  # fmt: skip
            value = given.pop(theirs, None)
            if value is not None and (value := self._plain(where, theirs, value)) is not None:
                made[ours] = value
        headers = {**(given.pop("extra_headers", None) or {}), **(given.pop("headers", None) or {})}
        kept = {name: str(value) for name, value in headers.items() if not _is_secret(name, value)}
        for name in headers.keys() - kept.keys():
            self.note(f"{where}: the header {name} holds a secret and was not copied")
        if kept:
            made["headers"] = kept
        return {name: value for name, value in made.items() if self._accepts(where, name, value)}

    def _accepts(self, where: str, name: str, value: Any) -> bool:
        try:
            msgspec.convert({"upstreams": {"x": {"base_url": "x", name: value}}}, Settings, strict=True)
        except msgspec.ValidationError:
            self.note(f"{where}: {name} cannot be {value!r}; left out")
            return False
        return True

    def _plain(self, where: str, name: str, value: Any) -> Any:
        """A value that may be a reference to the environment: what is there now."""
        if not isinstance(value, str) or not value.startswith(ENVIRONMENT):
            return value
        found = self.environment.get(value.removeprefix(ENVIRONMENT))
        if found is None:
            self.note(f"{where}: {name}: {value.removeprefix(ENVIRONMENT)} is not set here; left out")
            return None
        number = re.fullmatch(r"\d+(\.\d+)?", found) and name != "organization" and name != "api_version"
        return (float(found) if "." in found else int(found)) if number else found

    def _key(self, where: str, provider: str, known: Provider, given: dict[str, Any]) -> str | None:
        key = given.pop("api_key", None)
        if key is None:
            return f"env:{known.key}" if known.key else None
        key = str(key)
        if key.startswith(ENVIRONMENT):
            return f"env:{key.removeprefix(ENVIRONMENT)}"
        if key.strip().lower() in PLACEHOLDERS | {""}:
            return None
        variable = self._variables.get(key)
        if variable is None:
            group = re.search(r"\((.*)\)", where)
            stem = re.sub(r"[^A-Z0-9]+", "_", f"{provider}_{group[1] if group else ''}".upper()).strip("_")
            variable, at = f"{stem}_KEY", 2
            while variable in self._variables.values():
                variable, at = f"{stem}_{at}_KEY", at + 1
            self._variables[key] = variable
        self.note(f"{where}: its api_key is in clear and was not copied; put it into {variable}")
        return f"env:{variable}"

    def _upstream(self, provider: str, base: str, made: dict[str, Any]) -> str:
        """The name of the upstream with these settings; one with a limit of its own is shared by nobody."""
        limited = "requests_per_minute" in made or "tokens_per_minute" in made
        same = (len(self.upstreams) if limited else None, toml.inline(made))
        if same not in self._same:
            stem = provider
            if base != PROVIDERS[provider].base:
                host = re.sub(r"[^a-z0-9]+", "-", (urlsplit(base).hostname or "").split(".openai.azure")[0].lower())
                stem = f"{provider}-{host}".strip("-")
            name, at = stem, 2
            while name in self.upstreams:
                name, at = f"{stem}-{at}", at + 1
            self._same[same] = name
            self.upstreams[name] = {**made, "models": {}}
        return self._same[same]

    def _wildcard(self, where: str, name: str, theirs: str, provider: str, made: dict[str, Any]) -> None:
        """Every model of an upstream, under its own name with something before it."""
        if theirs != "*" or not (name == "*" or name.endswith("/*")) or "*" in name[:-1]:
            self.note(f"{where}: {name} = {theirs}: only a whole provider can stand behind a pattern; left out")
            return
        made = {**made, "discover": True}
        if name != "*":
            made["prefix"] = name[:-1]
        found = self._upstream(provider, made["base_url"], made)
        if not self.upstreams[found]["models"]:
            del self.upstreams[found]["models"]
        lists = f"the models that {found} lists are served" + (f" as {name[:-1]}NAME" if name != "*" else "")
        self.note(f"{where}: discover = true is no wildcard: {lists}, any other name is a 404")

    def _weigh(self, it: Deployment, given: dict[str, Any]) -> None:
        weight = given.pop("weight", None)
        if weight is not None:
            self.weighted[it.name] = None
        limits = self.upstreams[it.upstream]
        it.weight = weight or limits.get("requests_per_minute") or limits.get("tokens_per_minute")
        if not isinstance(it.weight, int | float) or not 0 < it.weight <= 1_000_000:
            it.weight = None

    def _cost(self, it: Deployment, given: dict[str, Any], info: dict[str, Any]) -> None:
        for theirs, ours in (("input_cost_per_token", "input"), ("output_cost_per_token", "output")):
            cost = given.pop(theirs, None)
            other = info.pop(theirs, None)
            cost = other if cost is None else cost
            if isinstance(cost, int | float | str):
                try:
                    it.price[ours] = round(float(cost) * 1e6, 9)  # YAML reads 1e-6 as text
                except ValueError:
                    self.note(f"{it.where}: {theirs}: {cost!r} is no price")
        for ours in ("input", "output"):
            if it.price and ours not in it.price:  # LiteLLM takes it for free; here that must be written
                it.price[ours] = 0.0
                self.note(f"{it.where}: no cost of {ours} is given; 0 is written")
        length = info.pop("max_input_tokens", None)
        it.context = length if isinstance(length, int) and length > 0 else None

    def _rest(self, it: Deployment, given: dict[str, Any], info: dict[str, Any]) -> None:
        """Parameters to send along; everything else is said."""
        if given.pop("ssl_verify", True) is False:
            self.note(f"{it.where}: ssl_verify: certificates are always verified; tls_ca names one to trust")
        extra = given.pop("extra_body", None)
        it.parameters = {name: given.pop(name) for name in [*given] if name in PARAMETERS}
        if isinstance(extra, Mapping):
            it.parameters |= extra
        for name in [*given, *info]:
            if name not in SILENT and not name.startswith("supports_"):
                self.note(f"{it.where}: {name}: there is nothing like it here")

    # groups
    def _group(self, name: str, found: list[Deployment]) -> None:
        parameters = found[0].parameters
        if any(one.parameters != parameters for one in found):
            self.note(f"{name}: its deployments have different parameters; those of a name must be the same; left out")
            parameters = {}
        base = f"{name}-base" if parameters else name
        if len(found) == 1 and "*" not in name:
            self._model(found[0], base)
        else:
            ours = {self._ours(one): one for one in found}
            if "*" in name:
                self.aliases[name] = next(iter(ours))
                base = next(iter(ours))
            if len(ours) > 1:
                self._route(base, [(model, one.weight) for model, one in ours.items()])
        self.base[name] = base
        if parameters:
            self.presets[name] = {"model": base, "parameters": parameters}

    def _route(self, name: str, targets: list[tuple[str, float | None]]) -> None:
        weights = [weight for _, weight in targets]
        whole = all(weights)  # some weigh and others do not: LiteLLM then looks at none of them
        self.routes[name] = {
            "targets": [{"model": model, **({"weight": weight} if whole else {})} for model, weight in targets]
        }

    def _model(self, it: Deployment, ours: str) -> str:
        upstream = self.upstreams[it.upstream]
        upstream.setdefault("models", {})[ours] = it.theirs
        if it.price:
            upstream.setdefault("prices", {})[ours] = it.price
        if it.context:
            upstream.setdefault("context_length", {})[ours] = it.context
        return ours

    def _ours(self, it: Deployment) -> str:
        """A name of its own for one deployment of a group."""
        ours = f"{it.upstream}/{it.theirs}"
        while ours in self.groups:  # somebody may ask for that name and mean another
            ours += "-target"
        return self._model(it, ours)

    def routed(self, name: str) -> dict[str, Any] | None:
        """The route of a group, made if it has none yet; None if there is no such group."""
        base = self.base.get(name)
        if base is None or "*" in name:
            return None
        if base not in self.routes:
            for upstream_name, upstream in self.upstreams.items():
                models = upstream.get("models", {})
                if base in models:
                    ours = f"{upstream_name}/{models[base]}"
                    while ours in self.groups:
                        ours += "-target"
                    for table in ("models", "prices", "context_length"):
                        if base in upstream.get(table, {}):
                            upstream[table][ours] = upstream[table].pop(base)
                    self._route(base, [(ours, None)])
                    break
        return self.routes.get(base)

    def setting(self, where: str, name: str, value: Any) -> None:
        """Takes a setting, or says that it cannot be."""
        try:
            refuse_wrong({name: value}, Settings, "")
        except SettingsError as error:
            self.note(f"{where}: {error.message}; left out")
        else:
            self.settings[name] = value


def _is_secret(name: str, value: Any) -> bool:
    return bool(SECRET.search(str(name))) or str(value).startswith(ENVIRONMENT)


def read(text: str, source: str) -> Mapping[str, Any]:
    """LiteLLM's configuration from YAML. Raises SettingsError that names the line."""
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1})" if mark is not None else ""
        raise SettingsError(f"{source}: not valid YAML{at}") from None
    if not isinstance(values, Mapping) or all(values.get(name) is None for name in ("model_list", *SECTIONS)):
        raise SettingsError(f"{source}: this is no configuration of a LiteLLM proxy: it has no model_list")
    return values


def convert(text: str, source: str, environment: Mapping[str, str] | None = None) -> tuple[str, list[str]]:
    """A LiteLLM configuration as Tertulia's TOML, and a line for each thing that could not be carried over.

    source: the file's name, for messages. Raises SettingsError for what is no such configuration.
    """
    values = read(text, source)
    it = Import(os.environ if environment is None else environment)
    it.models(values.get("model_list"))
    for name, take in SECTIONS.items():
        section = values.get(name)
        for key, value in section.items() if isinstance(section, Mapping) else ():
            take(it, f"{name}.{key}", str(key), value)
    for name in values.keys() - SECTIONS.keys() - {"model_list"}:
        it.note(f"{name}: there is nothing like it here")
    strategy = it.settings.pop("balance", None)
    for route in it.routes.values():
        if strategy and len(route["targets"]) > 1:
            route["balance"] = strategy
    for name in it.weighted if strategy == "fastest" else ():
        if len(it.routes.get(it.base.get(name, ""), {}).get("targets", ())) > 1:
            it.note(f"{name}: the weight of its deployments counts for nothing where the fastest is chosen")
    return HEAD.format(source=source) + "\n" + toml.write(it.tables()), it.notes
