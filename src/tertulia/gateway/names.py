"""What a model name means: a route, a model, a preset, or an alias such as OpenAI's names; and who may answer for it.

The order is: a route, a model or a preset of exactly that name, a configured alias (exact, then patterns in the order
of the file), OpenAI's names if the server is not strict. Nothing else: an unknown name is a 404, never a guess.

Who may answer is a Plan. A model that several upstreams list has as many legs in one group; a route has what is
configured; where an upstream answers, the models of the setting `fallback` come after it. A model of this machine is
answered by nobody else unless a route says so; a name that the settings give to an upstream's model is not shared
with upstreams that merely list it.

An upstream with `discover` says what it has when it is up: a name that it may list leads nowhere until then, and is no
mistake of the settings.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from ..config import LocalModel, Route, Settings, Upstream
from ..core import Call, Leg, ModelCard, Plan, Preset, Target
from ..engines.base import Engine
from ..errors import BadRequest, ModelNotFound, SettingsError
from .length import refuse_too_long

log = logging.getLogger("tertulia.gateway")
CHAT, EMBEDDING = "chat", "embedding"
# OpenAI's names, current, legacy and retired, and which of the defaults stands in for them.
# What speaks, hears or draws is nobody's: text models do not stand in for it.
OPENAI_NAMES: tuple[tuple[str, str], ...] = (
    ("*-image*", ""),
    ("*-audio*", ""),
    ("*-realtime*", ""),
    ("*-transcribe*", ""),
    ("*-tts*", ""),
    ("gpt-*", CHAT),
    ("chatgpt-*", CHAT),
    ("o[0-9]*", CHAT),
    ("codex-*", CHAT),
    ("text-embedding-*", EMBEDDING),
    ("text-davinci-*", CHAT),
    ("davinci-*", CHAT),
    ("babbage-*", CHAT),
    ("text-curie-*", CHAT),
    ("text-babbage-*", CHAT),
    ("text-ada-*", CHAT),
)
# Two spellings of one parameter: a preset's gives way to the caller's, whichever each of them used.
SAME = {"max_tokens": ("max_completion_tokens",), "max_completion_tokens": ("max_tokens",)}
# Everything there is of Names. Where it is compiled there is no __dict__ to take it from.
KNOWS = (
    "_all", "_cards", "_checked", "_context_length", "_engines", "_exact", "_fallback", "_known", "_local", "_offered",
    "_on_break", "_patterns", "_presets", "_retries", "_routes", "_said", "_started", "_upstreams",
)  # fmt: skip
KNOWN_LIMIT = 4096  # distinct names kept resolved; callers choose names, so there must be a bound


class Names:
    """Resolves names; asked on every call, so answers are kept."""

    def __init__(
        self,
        engines: Sequence[Engine],
        presets: Mapping[str, Preset],
        aliases: Mapping[str, str],
        defaults: Mapping[str, str],
        strict: bool = False,
        *,
        routes: Mapping[str, Route] | None = None,
        fallback: Sequence[str] = (),
        retries: int = 2,
        on_break: str = "error",
        upstreams: Mapping[str, Upstream] | None = None,
        local: Mapping[str, LocalModel] | None = None,
        context_length: int | None = None,
    ) -> None:
        """defaults: {"chat": NAME, "embedding": NAME}. Raises SettingsError for a name that leads nowhere."""
        self._engines = list(engines)
        self._presets = dict(presets)
        self._routes, self._fallback = dict(routes or {}), list(fallback)
        self._retries, self._on_break = retries, on_break
        self._upstreams, self._local, self._context_length = dict(upstreams or {}), dict(local or {}), context_length
        patterns = [] if strict else [(name, defaults.get(kind, "")) for name, kind in OPENAI_NAMES]
        self._exact = {name: model for name, model in aliases.items() if not _is_pattern(name)}
        self._patterns = [(name, model) for name, model in aliases.items() if _is_pattern(name)] + patterns
        self._started = int(time.time())
        self._known: dict[str, Plan] = {}
        self._cards: dict[str, tuple[tuple[Engine, ModelCard], ...]] = {}  # who answers for a name
        self._all: dict[str, list[tuple[Engine, ModelCard]]] = {}  # and who has a model of that name
        self._offered: dict[str, dict[str, ModelCard]] = {}  # what routes name and their upstreams do not list
        self._said: set[tuple[str, str]] = set()
        self._checked = False
        self._offer()
        self.refresh()
        self._check()
        self._checked = True
        for kind, model in defaults.items():
            plan = self._find(model, 0)
            if plan is None:  # not fetched yet, or not listed yet
                self._expected(model, f"{kind}_model")
            elif not serves(card := plan.groups[0][0].target.card, kind):
                raise SettingsError(f"{kind}_model: {wrong_kind(model, card, kind)}")

    @classmethod
    def of(cls, settings: Settings, engines: Sequence[Engine]) -> Names:
        """As the settings have it. Raises SettingsError."""
        defaults = {CHAT: settings.chat_model, EMBEDDING: settings.embedding_model}
        return cls(
            engines, settings.presets, settings.aliases, defaults, settings.strict_models, routes=settings.routes,
            fallback=settings.fallback, retries=settings.retries, on_break=settings.on_break,
            upstreams=settings.upstreams, local=settings.models, context_length=settings.context_length,
        )  # fmt: skip

    def replace(self, other: Names) -> None:
        """From now on names mean what they mean to other; calls under way keep their plans."""
        for name in KNOWS:
            setattr(self, name, getattr(other, name))

    def _offer(self) -> None:
        """Has upstreams offer what routes name by the upstream's own names."""
        upstreams = {engine.name: engine for engine in self._engines if hasattr(engine, "offer")}
        for name, route in self._routes.items():
            for at, target in enumerate(route.targets):
                if target.upstream is None:
                    continue
                engine = upstreams.get(target.upstream) if target.upstream else None
                if engine is None:
                    setting = f"routes.{name}.targets[{at}].upstream"
                    raise SettingsError(f"{setting}: there is no upstream {target.upstream!r}")
                card = engine.offer(target.model)
                self._offered.setdefault(target.upstream, {})[card.id] = card

    def _check(self) -> None:
        for name, preset in self._presets.items():
            for at, example in enumerate(preset.examples):
                if odd := sorted(example.keys() - {"user", "assistant"}):
                    raise SettingsError(f"presets.{name}.examples[{at}].{odd[0]}: only user and assistant have turns")
            self._check_way(f"presets.{name}.model", name, preset.model)
        for name, model in self._exact.items():
            self._check_way(f"aliases.{name}", name, model)
        for name in self._routes:
            self._routed(name)
        for at, name in enumerate(self._fallback):
            self._legs(name, f"fallback[{at}]")

    def _check_way(self, setting: str, name: str, model: str) -> None:
        """Raises SettingsError if name, which stands for model, leads nowhere or in a circle."""
        if self._find(model, 0) is not None:
            return
        way, step = [name], model
        while step not in way:
            way.append(step)
            following = self._presets[step].model if step in self._presets else self._exact.get(step)
            if following is None:
                if step not in self._routes and not self._expected(step, setting):  # a route: of models not listed yet
                    raise SettingsError(f"{setting}: there is no model {model!r}")
                return
            step = following
        raise SettingsError(f"{setting}: it is a circle: {' -> '.join([*way, step])}")

    def _expected(self, model: str, setting: str) -> bool:
        """Whether an upstream may list a model of that name once it is asked; said, since it may be a mistake too."""
        upstream = may_list(self._upstreams, model)
        if upstream is not None and (setting, model) not in self._said:
            self._said.add((setting, model))
            log.warning("%s: %r is not known yet; upstreams.%s may list it", setting, model, upstream)
        return upstream is not None

    def refresh(self) -> None:
        """Asks the engines again what they serve. Upstreams share a name, but not with those that merely list it; a
        model of this machine has its own alone."""
        cards: dict[str, list[tuple[Engine, ModelCard]]] = {}
        for engine in self._engines:
            listed = {card.id: card for card in engine.models()}
            offered = self._offered.get(engine.name, {}) if hasattr(engine, "offer") else {}
            for card in (offered | listed).values():
                cards.setdefault(card.id, []).append((engine, card))
        self._all = cards
        self._cards = {id: tuple(self._who(found)) for id, found in cards.items()}
        self._known.clear()

    def _who(self, found: list[tuple[Engine, ModelCard]]) -> list[tuple[Engine, ModelCard]]:
        ours = [(engine, card) for engine, card in found if not _is_far(card)]
        if ours:
            return ours[-1:]
        named = [
            (engine, card) for engine, card in found
            if card.id in engine.named or card.id in self._offered.get(engine.name, ())  # type: ignore[attr-defined]
        ]  # fmt: skip
        return named or found

    def targets(self) -> set[tuple[str, str]]:
        """Every (upstream, model) there is; "" for this machine."""
        return {(engine_name(engine, card), id) for id, found in self._all.items() for engine, card in found}

    def resolve(self, call: Call, model: str) -> None:
        """Sets call.plan and call.target, and applies the preset if the name is one. Raises ModelNotFound."""
        call.plan = plan = self._known.get(model) or self.plan(model)
        call.target = target = plan.first
        if plan.longest is not None:
            refuse_too_long(call, plan.longest)
        if target.preset is not None:
            if call.task.name == EMBEDDING:
                raise BadRequest(f"The preset `{model}` does not embed.", param="model")
            _apply(call, target.preset)

    def find(self, model: str) -> Target:
        """What answers for model, or would at first. Raises ModelNotFound."""
        return self.plan(model).groups[0][0].target

    def is_far(self, model: str) -> bool:
        """Whether there is such a model, and an upstream has it."""
        plan = self._find(model, 0)
        return plan is not None and _is_far(plan.groups[0][0].target.card)

    def plan(self, model: str) -> Plan:
        """Who may answer for model. Raises ModelNotFound."""
        plan = self._known.get(model)
        if plan is None:
            plan = self._find(model, 0)
            if plan is None:
                raise ModelNotFound(model)
            if len(self._known) >= KNOWN_LIMIT:
                self._known.clear()
            self._known[model] = plan
        return plan

    def _find(self, model: str, depth: int) -> Plan | None:
        name = self._means(model)
        if name is None or depth > 8:  # or a preset that leads back to itself
            return None
        if name in self._routes:
            return self._routed(name)
        if name in self._cards:
            return self._plan(name, [self._of_model(name)])
        preset = self._presets[name]
        base = self._find(preset.model, depth + 1)
        return None if base is None else self._with_preset(base, preset)

    def _means(self, model: str) -> str | None:
        """The route, model or preset that a name stands for, through aliases; None if it leads nowhere."""
        for _ in range(8):  # an alias that leads back to itself
            if model in self._routes or model in self._cards or model in self._presets:
                return model
            following = self._exact.get(model)
            if following is None and model.isprintable():  # a caller's own name: it will stand in logs
                fits = (name for pattern, name in self._patterns if name != model and fnmatchcase(model, pattern))
                following = next(fits, None)
            if not following:
                return None
            model = following
        return None

    def _of_model(self, model: str, weight: float = 1.0, upstream: str | None = None) -> list[Leg]:
        """The legs of a model: one, or one for each upstream that has it; weight is of all of them together."""
        found = self._cards.get(model, ())
        if upstream is not None:
            there = self._all.get(model, ())
            found = tuple((engine, card) for engine, card in there if engine_name(engine, card) == upstream)
        return [Leg(Target(engine, model, card), weight / len(found)) for engine, card in found]

    def _legs(self, model: str, setting: str, weight: float = 1.0) -> list[Leg]:
        """Who answers for a name in a route's targets or in a fallback. Raises SettingsError.

        Once it has been checked, a name that leads nowhere any more (an upstream lists it no longer) has no legs.
        """
        name = model if model in self._cards else self._means(model)
        if name in self._cards:
            return self._of_model(name, weight)
        if self._checked:
            return self._targets(name) if name in self._routes else []
        if name is None:
            if self._expected(model, setting):
                return []
            raise SettingsError(f"{setting}: there is no model {model!r}")
        if name in self._presets:
            raise SettingsError(f"{setting}: {model!r} is a preset; name its model, {self._presets[name].model!r}")
        if ".targets[" in setting:
            raise SettingsError(f"{setting}: {model!r} is a route; name its targets")
        return self._targets(name)

    def _targets(self, name: str) -> list[Leg]:
        """The legs of a route's targets. Raises SettingsError if it names what is not there."""
        legs = []
        for at, target in enumerate(self._routes[name].targets):
            setting = f"routes.{name}.targets[{at}].model"
            if target.upstream is None:
                legs += self._legs(target.model, setting, target.weight)
                continue
            legs += self._of_model(self._ours(target.upstream, target.model), target.weight, target.upstream)
        return legs

    def _routed(self, name: str) -> Plan | None:
        """The plan of a route; None if none of its targets is there any more. Raises SettingsError."""
        route, groups = self._routes[name], [self._targets(name)]
        for at, model in enumerate(route.fallback):
            setting = f"routes.{name}.fallback[{at}]"
            if model == name and model not in self._cards:
                raise SettingsError(f"{setting}: {model!r} is this route itself")
            groups.append(self._legs(model, setting))
        groups = [group for group in groups if group]
        return self._plan(name, groups, route) if groups else None

    def _ours(self, upstream: str, model: str) -> str:
        """Our name for a model that an upstream calls so, or that we call so."""
        engine: Any = next(one for one in self._engines if hasattr(one, "offer") and one.name == upstream)
        return str(engine.offer(model).id)

    def _plan(self, name: str, groups: list[list[Leg]], route: Route | None = None) -> Plan:
        if _is_far(groups[0][0].target.card):
            groups = groups + [self._legs(model, f"fallback[{at}]") for at, model in enumerate(self._fallback)]
        taken: set[tuple[int, str]] = set()
        kept = []
        for group in groups:
            fresh = []
            for leg in group:
                who = (id(leg.target.engine), leg.target.model)
                if who not in taken:
                    taken.add(who)
                    fresh.append(leg)
            if fresh:
                kept.append(tuple(fresh))
        return Plan(
            name=name,
            groups=tuple(kept),
            balance=route.balance if route else "weighted",
            retries=self._retries if route is None or route.retries is None else route.retries,
            on_break=self._on_break if route is None or route.on_break is None else route.on_break,
            timeout=route.timeout if route else None,
            cache=route.cache if route else None,
            revision=self._revision(kept, None),
            longest=_longest(kept[0]),
        )

    def _with_preset(self, base: Plan, preset: Preset) -> Plan:
        """The plan of the preset's model, with the preset for whoever answers."""
        whole = _merge(base.groups[0][0].target.preset, preset)
        groups = [
            tuple(Leg(Target(leg.target.engine, leg.target.model, leg.target.card, whole), leg.weight) for leg in group)
            for group in base.groups
        ]
        return msgspec.structs.replace(base, groups=tuple(groups), revision=self._revision(groups, whole))

    def _revision(self, groups: Sequence[Sequence[Leg]], preset: Preset | None) -> str:
        """Stands for everything an answer depends on beside the request: who answers, with which model and preset."""
        who: list[object] = []
        for group in groups:
            for leg in group:
                engine, model, card = leg.target.engine, leg.target.model, leg.target.card
                where = (
                    engine.identity(model) if hasattr(engine, "identity")
                    else (model, self._local.get(model), self._context_length)
                )  # fmt: skip
                who.append((type(engine).__name__, where, card.source, card.sha256, card.bytes, card.kind))
                who.append(sorted(card.sampling.items()))
        return hashlib.sha256(msgspec.json.encode((who, preset), order="sorted")).hexdigest()[:16]

    def listed(self) -> list[ModelCard]:
        """Every model, preset and exact alias, as GET /v1/models shows them."""
        cards = {name: self._dated(found[0][1]) for name, found in self._cards.items()}
        for name in [*self._routes, *self._presets, *self._exact]:
            plan = None if name in cards else self._find(name, 0)
            if plan is not None:  # else it has the name of a model, or leads nowhere at the moment
                cards[name] = msgspec.structs.replace(self._dated(plan.groups[0][0].target.card), id=name)
        return list(cards.values())

    def card(self, model: str) -> ModelCard:
        """The card for a name, under that name. Raises ModelNotFound."""
        return msgspec.structs.replace(self._dated(self.find(model).card), id=model)

    def _dated(self, card: ModelCard) -> ModelCard:
        return card if card.created else msgspec.structs.replace(card, created=self._started)


def serves(card: ModelCard, kind: str) -> bool:
    """Whether the model can be the default for chat (completions count) or embeddings; of a far one nobody knows."""
    if card.source.startswith("upstream:"):
        return True
    kinds = (EMBEDDING,) if kind == EMBEDDING else (CHAT, "completion")
    return card.kind in kinds or any(one in card.capabilities for one in kinds)


def wrong_kind(name: str, card: ModelCard, kind: str) -> str:
    """What to say of a default model that cannot do what it is the default for."""
    right = "embedding_model" if card.kind == EMBEDDING else "chat_model"
    return f"{name!r} is no model for {'embeddings' if kind == EMBEDDING else 'chat'}; did you mean {right}?"


def _is_far(card: ModelCard) -> bool:
    return card.source.startswith("upstream:")


def _longest(group: Sequence[Leg]) -> int | None:
    """Tokens that the largest of these holds; None if one's are not known, or are its own to count."""
    lengths = [leg.target.card.context_length for leg in group if _is_far(leg.target.card)]
    known = [length for length in lengths if length is not None]
    return max(known) if len(known) == len(group) else None


def may_list(upstreams: Mapping[str, Upstream], model: str) -> str | None:
    """The upstream that may list a model of that name when it is asked; None if there is none such."""
    fits = (name for name, one in upstreams.items() if one.discover and model.startswith(one.prefix))
    return next(fits, None)


def engine_name(engine: Any, card: ModelCard) -> str:
    """The name of the upstream that has a model; none for an engine of ours, whose models' names are theirs alone."""
    return str(engine.name) if _is_far(card) else ""


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _merge(inner: Preset | None, outer: Preset) -> Preset:
    """A preset of a preset: the outer one's words win."""
    if inner is None:
        return outer
    return Preset(
        model=inner.model,
        system=outer.system if outer.system is not None else inner.system,
        examples=[*inner.examples, *outer.examples],
        parameters={**inner.parameters, **outer.parameters},
    )


def _apply(call: Call, preset: Preset) -> None:
    """Rewrites the body: the preset's messages first, its parameters where the caller gives none; then checks again."""
    body = msgspec.json.decode(call.body)
    if call.task.name == CHAT:
        turns = [{"role": "system", "content": preset.system}] if preset.system else []
        for example in preset.examples:
            turns += [{"role": role, "content": example[role]} for role in ("user", "assistant") if role in example]
        body["messages"] = turns + body["messages"]
    elif preset.system and isinstance(body.get("prompt"), str):
        body["prompt"] = preset.system + "\n\n" + body["prompt"]
    for name, value in preset.parameters.items():
        if all(body.get(same) is None for same in (name, *SAME.get(name, ()))):
            body[name] = value
    asked, target, plan = call.model, call.target, call.plan
    assert target is not None
    body["model"] = target.model
    call.body = msgspec.json.encode(body)
    call.task.check(call)  # resolves the base model, which has no preset
    call.model, call.target, call.plan = asked, target, plan
