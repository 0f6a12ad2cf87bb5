"""What becomes of the sections of a LiteLLM configuration other than its models: each function takes one of their
settings, and either sets ours or says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Target(Protocol):
    """The run that is being filled."""

    base: dict[str, str]
    settings: dict[str, Any]
    aliases: dict[str, str]
    presets: dict[str, dict[str, Any]]

    def note(self, text: str) -> None: ...
    def setting(self, where: str, name: str, value: Any) -> None: ...
    def routed(self, name: str) -> dict[str, Any] | None: ...


STRATEGIES = {
    "simple-shuffle": "weighted",
    "least-busy": "least_busy",
    "latency-based-routing": "fastest",
}
# One setting for one: theirs, ours.
SAME = {
    "num_retries": "retries",
    "timeout": "request_timeout",
    "request_timeout": "request_timeout",
    "cooldown_time": "breaker_cooldown",
    "max_request_size_mb": "max_body",
}
# What Tertulia does in its own way, or not at all, and what to do about it.
REASONS = {
    "master_key": "keys are Tertulia's own; TERTULIA_API_KEY at the first start takes over one that clients have",
    "database_url": "LiteLLM's database is not read; keys, teams and spend are Tertulia's own",
    "drop_params": "a parameter that a model does not take is a 400 that names it, never dropped",
    "modify_params": "requests are not changed",
    "context_window_fallbacks": "a prompt that does not fit is a 400 context_length_exceeded; no other model is tried",
    "content_policy_fallbacks": "a refused prompt is the caller's to hear of; no other model is tried",
    "redis_host": "balance and health are each server's own",
    "redis_port": "balance and health are each server's own",
    "redis_password": "balance and health are each server's own",
    "redis_url": "balance and health are each server's own",
    "enable_pre_call_checks": "where context_length is known it is always checked",
    "json_logs": "the setting access_log writes JSON",
    "alerting": "alerts are for who reads /metrics",
    "custom_auth": "code of LiteLLM's cannot be carried over",
}
CALLBACKS = {
    "prometheus": "figures are at /metrics without it",
    "otel": "give the setting traces the address of the collector",
}
QUIET = frozenset(["telemetry", "set_verbose", "debug_level", "store_model_in_db", "disable_cooldowns"])


def router(it: Target, where: str, key: str, value: Any) -> None:
    """One of router_settings."""
    if key == "routing_strategy":
        it.settings["balance"] = STRATEGIES.get(str(value), "weighted")
        if value not in STRATEGIES:
            it.note(f"{where}: there is no {value}; calls are shared by weight")
    elif key == "allowed_fails" and isinstance(value, int):
        it.setting(where, "breaker_failures", value + 1)  # LiteLLM leaves a target alone when it fails more often
    elif key == "default_fallbacks":
        _for_all(it, where, value)
    elif key == "fallbacks":
        _fallbacks(it, where, value)
    elif key == "model_group_alias":
        _aliases(it, where, value)
    else:
        _other(it, where, key, value)


def litellm(it: Target, where: str, key: str, value: Any) -> None:
    """One of litellm_settings; where router_settings say the same, theirs holds."""
    if key in ("cache", "cache_params"):
        _cache(it, where, key, value)
    elif key in ("callbacks", "success_callback", "failure_callback", "service_callbacks"):
        for name in value if isinstance(value, list) else [value]:
            it.note(f"{where}: {name}: {CALLBACKS.get(str(name), 'nothing is sent to others')}")
    elif key == "set_verbose":
        if value:
            it.setting(where, "log_level", "debug")
    elif SAME.get(key) not in it.settings:
        router(it, where, key, value)


def general(it: Target, where: str, key: str, value: Any) -> None:
    """One of general_settings."""
    _other(it, where, key, value)


def variables(it: Target, where: str, key: str, value: Any) -> None:
    """One of environment_variables: its value may be a secret."""
    it.note(f"{where}: not copied; set it in the server's environment if a key refers to it")


def _other(it: Target, where: str, key: str, value: Any) -> None:
    if value is None or key in QUIET:
        return
    if key in SAME and isinstance(value, int | float):
        it.setting(where, SAME[key], min(value, 10) if key == "num_retries" else value)
    else:
        it.note(f"{where}: {REASONS.get(key, 'there is nothing like it here')}")


def _known(it: Target, where: str, names: Any) -> list[str]:
    """Those of the names that there are, as what answers them without a preset."""
    found = []
    for name in names if isinstance(names, list) else [names]:
        if isinstance(name, str) and name in it.base:
            found.append(it.base[name])
            if name in it.presets:
                it.note(f"{where}: {name} stands in as {it.base[name]}, without its parameters")
        else:
            it.note(f"{where}: there is no model {name if isinstance(name, str) else 'with parameters of its own'!r}")
    return found


def _for_all(it: Target, where: str, names: Any) -> None:
    it.setting(where, "fallback", [*it.settings.get("fallback", []), *_known(it, where, names)])


def _fallbacks(it: Target, where: str, entries: Any) -> None:
    """A list of {model: [models to try]}."""
    for entry in entries if isinstance(entries, list) else []:
        for name, others in entry.items() if isinstance(entry, Mapping) else ():
            if name == "*":
                _for_all(it, where, others)
                continue
            route = it.routed(name)
            if route is None:
                it.note(f"{where}: there is no model {name!r}")
                continue
            held = route.setdefault("fallback", [])
            held += [one for one in _known(it, f"{where} of {name}", others) if one not in (*held, it.base[name])]


def _aliases(it: Target, where: str, entries: Any) -> None:
    for name, model in entries.items() if isinstance(entries, Mapping) else ():
        if isinstance(model, Mapping):
            if model.get("hidden"):
                it.note(f"{where}.{name}: hidden: every name is listed at /v1/models")
            model = model.get("model")
        if model in it.base:
            it.aliases[str(name)] = str(model)
        else:
            it.note(f"{where}.{name}: there is no model {model!r}")


def _cache(it: Target, where: str, key: str, value: Any) -> None:
    if key == "cache":
        it.setting(where, "cache", "all" if value else "off")
        return
    for name, one in value.items() if isinstance(value, Mapping) else ():
        if name == "type":
            if one == "disk":
                it.setting(where, "cache_disk", 1024)
            elif one != "local":
                it.note(
                    f"{where}.type: there is no {one} cache; answers are kept in memory, and with cache_disk on disk"
                )
        elif name == "ttl" and isinstance(one, int | float):
            it.setting(where, "cache_ttl", one)
        elif name == "mode" and one == "default_off":
            it.setting(where, "cache", "off")
            it.note(f"{where}.mode: with cache off no call can ask for it; [policies.KEY_ID] turns it on for a key")
        else:
            it.note(f"{where}.{name}: there is nothing like it here")


SECTIONS: dict[str, Callable[[Any, str, str, Any], None]] = {
    "router_settings": router,
    "litellm_settings": litellm,
    "general_settings": general,
    "environment_variables": variables,
}
