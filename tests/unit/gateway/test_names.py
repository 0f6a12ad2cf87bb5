"""What a model name means, and what a preset puts into a body."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tertulia import config
from tertulia.api import chat, completions, embeddings
from tertulia.config import load
from tertulia.core import NOBODY, Call, ModelCard, Plan, Preset, Reply, Task
from tertulia.engines.base import Collector
from tertulia.engines.upstream import Upstream
from tertulia.errors import BadRequest, ContextLengthExceeded, ModelNotFound, SettingsError
from tertulia.gateway.names import KNOWN_LIMIT, KNOWS, Names, engine_name

DEFAULTS = {"chat": "small", "embedding": "vectors"}


class Shelf:
    """An engine that only lists models."""

    name = "local"

    def __init__(self, *cards: ModelCard) -> None:
        self.cards = list(cards)

    async def answer(self, call: Call) -> None: ...

    def models(self) -> Sequence[ModelCard]:
        return self.cards

    async def ready(self, model: str) -> bool:
        return True

    async def close(self) -> None: ...


def card(id: str, kind: str = "chat", **more: Any) -> ModelCard:
    return ModelCard(id=id, kind=kind, source="mock:", **more)


SHELF = Shelf(card("small"), card("large"), card("vectors", "embedding"), card("org/model:7b", created=7))


def names(
    presets: Mapping[str, Preset] | None = None, aliases: Mapping[str, str] | None = None, strict: bool = False
) -> Names:
    return Names([SHELF], presets or {}, aliases or {}, DEFAULTS, strict)


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        ("small", "small"), ("org/model:7b", "org/model:7b"), ("gpt-4o", "small"), ("gpt-3.5-turbo-instruct", "small"),
        ("chatgpt-4o-latest", "small"), ("o1", "small"), ("o4-mini", "small"), ("codex-mini", "small"),
        ("text-davinci-003", "small"), ("davinci-002", "small"), ("text-embedding-3-small", "vectors"),
        ("text-embedding-ada-002", "vectors"),
    ],
)  # fmt: skip
def test_openais_names_lead_to_the_defaults(asked: str, model: str) -> None:
    target = names().find(asked)
    assert (target.model, target.card.id, target.engine, target.preset) == (model, model, SHELF, None)


@pytest.mark.parametrize(
    "asked", ["", "SMALL", "small ", "gpt", "ollama", "of-course", "claude-3", "*", "gpt-", "x" * 512]
)
def test_any_other_name_is_a_404_and_not_a_guess(asked: str) -> None:
    if asked == "gpt-":
        assert names().find(asked).model == "small"  # the pattern gpt-* takes it
        return
    with pytest.raises(ModelNotFound) as error:
        names().find(asked)
    assert error.value.message == f"The model `{asked}` does not exist or you do not have access to it."


def test_strict_knows_none_of_openais_names_but_ours() -> None:
    strict = names(aliases={"fast": "small", "my-*": "large"}, strict=True)
    assert [strict.find(name).model for name in ("small", "fast", "my-own")] == ["small", "small", "large"]
    with pytest.raises(ModelNotFound):
        strict.find("gpt-4o")


def test_the_order_model_preset_exact_pattern_openai() -> None:
    it = names(
        {"gpt-4o": Preset(model="large"), "small": Preset(model="large")},
        {"gpt-4": "large", "gpt-4o": "small", "gpt-4*": "vectors", "gpt-*": "large", "large": "small"},
    )
    assert it.find("small").preset is None  # a model's own name cannot be taken from it
    assert it.find("large").model == "large"
    assert it.find("gpt-4o").preset is not None
    assert it.find("gpt-4").model == "large"
    assert it.find("gpt-4.1").model == "vectors"  # the first pattern of the file that fits
    assert it.find("gpt-5").model == "large"
    assert it.find("o1").model == "small"


def test_aliases_of_aliases() -> None:
    assert names(aliases={"a": "b", "b": "c", "c": "large"}).find("a").model == "large"


@pytest.mark.parametrize(
    ("presets", "aliases", "said"),
    [
        ({}, {"a": "nowhere"}, "aliases.a: there is no model 'nowhere'"),
        ({}, {"a": "b", "b": "a"}, "aliases.a: it is a circle: a -> b -> a"),
        ({"p": Preset(model="nowhere")}, {}, "presets.p.model: there is no model 'nowhere'"),
        ({"p": Preset(model="q"), "q": Preset(model="p")}, {}, "presets.p.model: it is a circle: p -> q -> p"),
        ({"p": Preset(model="p")}, {}, "presets.p.model: it is a circle: p -> p"),
        ({"p": Preset(model="q"), "q": Preset(model="r")}, {}, "presets.p.model: there is no model 'q'"),
        ({"p": Preset(model="small", examples=[{"user": "a", "asistant": "b"}])}, {},
         "presets.p.examples[0].asistant: only user and assistant have turns"),
    ],
)  # fmt: skip
def test_what_leads_nowhere_is_refused_at_start(presets: Any, aliases: Any, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        names(presets, aliases)
    assert error.value.message == said


@pytest.mark.parametrize(
    ("defaults", "said"),
    [
        ({"chat": "vectors"}, "chat_model: 'vectors' is no model for chat; did you mean embedding_model?"),
        ({"embedding": "p"}, "embedding_model: 'p' is no model for embeddings; did you mean chat_model?"),
    ],
)
def test_a_default_of_the_wrong_kind_is_refused(defaults: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        Names([SHELF], {"p": Preset(model="small")}, {}, {**DEFAULTS, **defaults})
    assert error.value.message == said


def test_defaults_of_far_models_and_of_those_that_can_do_both_are_taken() -> None:
    both = card("both", capabilities=("chat", "embedding"))
    for name in ("far", "both"):
        upstream = Far("u", far="f")
        found = Names([Shelf(both), upstream], {}, {}, {"chat": name, "embedding": name})
        assert found.find("gpt-4o").model == found.find("text-embedding-3-small").model == name


def test_a_pattern_that_leads_to_itself_ends() -> None:
    it = names(aliases={"gpt-*": "gpt-4", "loop-*": "loop-a"})
    with pytest.raises(ModelNotFound):
        it.find("loop-b")
    assert it.find("gpt-5").model == "small"  # gpt-4 is no model; OpenAI's names come after


def test_what_was_resolved_is_kept_and_bounded() -> None:
    it = names()
    assert it.find("gpt-4o") is it.find("gpt-4o")
    for at in range(KNOWN_LIMIT + 10):
        it.find(f"gpt-{at}")
    assert len(it._known) <= KNOWN_LIMIT


def test_refresh_sees_new_models() -> None:
    shelf = Shelf(card("small"))
    it = Names([shelf], {}, {}, DEFAULTS)
    with pytest.raises(ModelNotFound):
        it.find("new")
    shelf.cards.append(card("new"))
    it.refresh()
    assert it.find("new").model == "new"


def test_the_list_shows_models_presets_and_exact_aliases() -> None:
    it = names({"poet": Preset(model="small")}, {"fast": "small", "x-*": "small"})
    assert [card.id for card in it.listed()] == ["small", "large", "vectors", "org/model:7b", "poet", "fast"]
    assert all(isinstance(card.created, int) and card.created > 0 for card in it.listed())
    assert it.card("org/model:7b").created == 7 and it.card("gpt-4o").id == "gpt-4o"
    with pytest.raises(ModelNotFound):
        it.card("nowhere")


# Presets ----------------------------------------------------------------------------------------------------------

POET = Preset(
    model="small",
    system="Rhyme.",
    examples=[{"user": "cat", "assistant": "hat"}],
    parameters={"temperature": 1.5, "stop": ["\n"], "max_tokens": 7},
)
TURNS = [
    {"role": "system", "content": "Rhyme."},
    {"role": "user", "content": "cat"},
    {"role": "assistant", "content": "hat"},
]  # fmt: skip
HELLO = [{"role": "user", "content": "dog"}]


def asked(make: Any, body: dict[str, Any], presets: Mapping[str, Preset] | None = None) -> tuple[Call, dict[str, Any]]:
    task: Task = make.task(names(presets or {"poet": POET}).resolve)
    call = Call("req_1", NOBODY, task, json.dumps(body).encode(), Reply(Collector()), 0)
    task.check(call)
    return call, json.loads(call.body)


def test_a_preset_speaks_first_and_fills_in_what_the_caller_leaves_out() -> None:
    call, body = asked(chat, {"model": "poet", "messages": HELLO, "temperature": 0.1, "stop": None, "stream": True})
    assert body == {
        "model": "small", "messages": TURNS + HELLO, "temperature": 0.1, "stop": ["\n"], "max_tokens": 7,
        "stream": True,
    }  # fmt: skip
    assert call.model == "poet" and call.stream is True
    assert call.target is not None and call.target.model == "small" and call.target.preset == POET
    assert len(call.asked.messages) == 4 and call.asked.stop == ["\n"]


def test_the_callers_spelling_of_a_limit_wins() -> None:
    _, body = asked(chat, {"model": "poet", "messages": HELLO, "max_completion_tokens": 3})
    assert body["max_completion_tokens"] == 3 and "max_tokens" not in body


def test_a_preset_of_a_preset() -> None:
    presets = {
        "poet": POET,
        "sad": Preset(model="poet", system="Weep.", examples=[{"user": "sun"}], parameters={"temperature": 0}),
    }
    call, body = asked(chat, {"model": "sad", "messages": HELLO}, presets)
    assert [message["content"] for message in body["messages"]] == ["Weep.", "cat", "hat", "sun", "dog"]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 7, "small")
    assert call.model == "sad"
    inherits = {"poet": POET, "same": Preset(model="poet")}
    assert asked(chat, {"model": "same", "messages": HELLO}, inherits)[1]["messages"] == TURNS + HELLO


def test_a_preset_behind_an_alias() -> None:
    it = Names([SHELF], {"poet": POET}, {"bard": "poet"}, DEFAULTS)
    assert it.find("bard").preset == POET


def test_a_preset_and_a_text_completion() -> None:
    _, body = asked(completions, {"model": "poet", "prompt": "dog"})
    assert (body["prompt"], body["model"], body["temperature"]) == ("Rhyme.\n\ndog", "small", 1.5)
    _, body = asked(completions, {"model": "poet", "prompt": ["dog"]})
    assert body["prompt"] == ["dog"]


def test_a_preset_does_not_embed() -> None:
    with pytest.raises(BadRequest) as error:
        asked(embeddings, {"model": "poet", "input": "dog"})
    assert error.value.param == "model"


def test_a_presets_own_mistake_names_its_parameter() -> None:
    with pytest.raises(BadRequest) as error:
        asked(chat, {"model": "p", "messages": HELLO}, {"p": Preset(model="small", parameters={"temperature": 9})})
    assert error.value.param == "temperature"


# Plans ------------------------------------------------------------------------------------------------------------


class Far(Shelf):
    """An upstream that only lists models: ours to theirs."""

    def __init__(self, name: str, **models: str) -> None:
        self.name, self.pairs, self.lists = name, dict(models), dict[str, str]()
        self.url, self.lengths = "http://h/v1", dict[str, int]()
        super().__init__()

    @property
    def named(self) -> frozenset[str]:
        return frozenset(self.pairs)

    def _card(self, ours: str) -> ModelCard:
        length = self.lengths.get(ours)
        return ModelCard(id=ours, kind="chat", source=f"upstream:{self.name}", context_length=length)

    def models(self) -> Sequence[ModelCard]:
        return [self._card(ours) for ours in self.lists | self.pairs]

    def offer(self, model: str) -> ModelCard:
        for ours, known in self.pairs.items():
            if model in (ours, known):
                return self._card(ours)
        return self._card(f"{self.name}/{model}")

    def identity(self, model: str) -> object:
        return self.name, self.pairs.get(model, model), self.url


def planned(engines: Sequence[Any], **settings: Any) -> Names:
    given = {"chat_model": "small", "embedding_model": "vectors", **settings}
    return Names.of(load(given, {}), engines)


def shape(plan: Plan) -> list[list[str]]:
    """Who may answer, as UPSTREAM:MODEL*WEIGHT."""
    return [
        [f"{engine_name(leg.target.engine, leg.target.card)}:{leg.target.model}*{leg.weight:g}" for leg in group]
        for group in plan.groups
    ]


def test_a_model_of_this_machine_has_itself_alone() -> None:
    it = planned([SHELF, Far("u", big="b")], fallback=["large"], retries=5, on_break="continue")
    plan = it.plan("gpt-4o")
    assert shape(plan) == [[":small*1"]] and (plan.name, plan.balance, plan.retries) == ("small", "weighted", 5)
    assert plan.on_break == "continue" and plan.timeout is None and plan.cache is None
    assert it.find("small") is it.plan("small").groups[0][0].target


def test_upstreams_that_list_the_same_model_share_it() -> None:
    it = planned([SHELF, Far("u", big="b"), Far("v", big="c")], fallback=["large", "big"])
    assert shape(it.plan("big")) == [["u:big*0.5", "v:big*0.5"], [":large*1"]]  # nobody is named twice
    clash = planned([Far("u", small="b"), SHELF])
    assert shape(clash.plan("small")) == [[":small*1"]]  # ours is nobody else's
    assert len(clash.listed()) == 4


def test_a_route_and_its_fallbacks() -> None:
    far, other = Far("u", big="b"), Far("v", big="c", huge="h")
    route = {
        "targets": [
            {"model": "huge", "weight": 3}, {"model": "b", "upstream": "u"}, {"model": "new", "upstream": "v"},
            {"model": "quick"}, {"model": "big"},
        ],
        "fallback": ["large"], "balance": "fastest", "retries": 0, "on_break": "continue", "timeout": 3.0,
        "cache": "off",
    }  # fmt: skip
    it = planned(
        [SHELF, far, other], routes={"r": route}, aliases={"quick": "small", "best": "r"}, fallback=["vectors"]
    )
    plan = it.plan("best")
    assert shape(plan) == [["v:huge*3", "u:big*1", "v:v/new*1", ":small*1", "v:big*0.5"], [":large*1"], [":vectors*1"]]
    assert (plan.name, plan.balance, plan.retries, plan.on_break) == ("r", "fastest", 0, "continue")
    assert (plan.timeout, plan.cache) == (3.0, "off")
    assert it.find("v/new").model == "v/new" and "r" in [card.id for card in it.listed()]


def test_a_route_may_have_the_name_of_its_model() -> None:
    far = Far("u", big="b")
    it = planned([SHELF, far], routes={"big": {"targets": [{"model": "big"}], "fallback": ["small"]}})
    assert shape(it.plan("big")) == [["u:big*1"], [":small*1"]]


def test_a_fallback_may_be_a_route_or_an_alias() -> None:
    routes = {"r": {"targets": [{"model": "small"}, {"model": "large"}]}}
    it = planned([SHELF, Far("u", big="b")], routes=routes, aliases={"a": "r"}, fallback=["a"])
    assert shape(it.plan("big")) == [["u:big*1"], [":small*1", ":large*1"]]
    far = planned([SHELF, Far("u", big="b", other="o")], aliases={"a": "other"}, fallback=["a"])
    assert shape(far.plan("big")) == [["u:big*1"], ["u:other*1"]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"routes": {"x": {"targets": [{"model": "no"}]}}}, "routes.x.targets[0].model: there is no model 'no'"),
        ({"routes": {"x": {"targets": [{"model": "small"}, {"model": "b", "upstream": "w"}]}}},
         "routes.x.targets[1].upstream: there is no upstream 'w'"),
        ({"routes": {"x": {"targets": [{"model": "small"}], "fallback": ["no"]}}},
         "routes.x.fallback[0]: there is no model 'no'"),
        ({"routes": {"x": {"targets": [{"model": "small"}], "fallback": ["x"]}}},
         "routes.x.fallback[0]: 'x' is this route itself"),
        ({"routes": {"x": {"targets": [{"model": "y"}]}, "y": {"targets": [{"model": "small"}]}}},
         "routes.x.targets[0].model: 'y' is a route; name its targets"),
        ({"routes": {"x": {"targets": [{"model": "y"}]}}, "aliases": {"y": "x"}},
         "routes.x.targets[0].model: 'y' is a route; name its targets"),
        ({"fallback": ["small", "no"]}, "fallback[1]: there is no model 'no'"),
        ({"fallback": ["p"], "presets": {"p": {"model": "small"}}},
         "fallback[0]: 'p' is a preset; name its model, 'small'"),
    ],
)  # fmt: skip
def test_what_a_route_names_must_be_there(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        planned([SHELF, Far("u", big="b")], **settings)
    assert error.value.message == said


def test_a_target_that_an_upstream_lists_no_longer_is_left_out() -> None:
    far = Far("u", big="b", old="o")
    routes = {"r": {"targets": [{"model": "old"}, {"model": "big"}]}, "s": {"targets": [{"model": "old"}]}}
    it = planned([SHELF, far], routes=routes)
    del far.pairs["old"]
    it.refresh()
    assert shape(it.plan("r")) == [["u:big*1"]]
    with pytest.raises(ModelNotFound):
        it.plan("s")


def test_a_preset_is_for_whoever_answers() -> None:
    routes = {"r": {"targets": [{"model": "big"}], "fallback": ["small"], "retries": 1}}
    it = planned([SHELF, Far("u", big="b")], routes=routes, presets={"poet": {"model": "r", "system": "Rhyme."}})
    plan = it.plan("poet")
    assert shape(plan) == [["u:big*1"], [":small*1"]] and plan.retries == 1
    assert all(leg.target.preset is not None for group in plan.groups for leg in group)
    task = chat.task(it.resolve)
    call = Call("req_1", NOBODY, task, json.dumps({"model": "poet", "messages": HELLO}).encode(), Reply(Collector()), 0)
    task.check(call)
    assert call.plan is plan and call.target is plan.groups[0][0].target


def test_the_revision_stands_for_what_an_answer_depends_on() -> None:
    def revision(name: str = "m", theirs: str = "b", preset: str | None = None, **settings: Any) -> str:
        presets = {"p": {"model": "m", "system": preset}} if preset else {}
        it = planned([SHELF, Far("u", m=theirs)], presets=presets, **settings)
        return it.plan("p" if preset else name).revision

    assert revision() == revision() != "" and revision(retries=5) == revision()
    others = [revision(theirs="c"), revision(preset="x"), revision(preset="y"), revision(fallback=["small"])]
    others.append(revision("small"))
    assert len({*others, revision()}) == 6


def test_the_revision_changes_with_whatever_changes_answers() -> None:
    def near(sampling: dict[str, float], **settings: Any) -> str:
        shelf = Shelf(card("small", sampling=sampling, sha256="1"), card("vectors", "embedding"))
        return planned([shelf], **settings).plan("small").revision

    revisions = [
        near({}), near({"temperature": 0.2}), near({"temperature": 0.3}), near({}, context_length=512),
        near({}, models={"small": {"source": "x", "lora": ["a.gguf"]}}),
    ]  # fmt: skip
    assert near({}) == near({}, models={"large": {"source": "x"}}) == revisions[0] and len(set(revisions)) == 5

    def far(**upstream: Any) -> str:
        given = config.Upstream(**{"base_url": "http://one/v1", "models": {"m": "b"}, **upstream})
        return planned([SHELF, Upstream("u", given, "sk-1", {})]).plan("m").revision

    revisions = [
        far(), far(base_url="http://two/v1"), far(kind="azure"), far(kind="azure", api_version="1"),
        far(kind="azure", api_version="2"), far(models={"m": "c"}), far(headers={"X-Which": "1"}), far(project="p"),
    ]  # fmt: skip
    assert len(set(revisions)) == 8
    assert far(connections=3, stall_timeout=5.0, max_concurrency=1) == revisions[0]  # which change no answer


def test_a_name_that_is_only_listed_hides_no_other() -> None:
    u, v, w = Far("u", big="b"), Far("v"), Far("w", big="c")
    v.lists = {"big": "x", "small": "y", "own": "z"}
    it = planned([v, u, SHELF, w])
    assert shape(it.plan("big")) == [["u:big*0.5", "w:big*0.5"]]  # explicit ones share
    assert shape(it.plan("small")) == [[":small*1"]] and shape(it.plan("own")) == [["v:own*1"]]
    t = Far("t")
    t.lists = {"own": "z"}
    assert shape(planned([v, t, SHELF]).plan("own")) == [["v:own*0.5", "t:own*0.5"]]
    routes = {"r": {"targets": [{"model": "v/big"}, {"model": "big", "upstream": "v"}]}}
    u.lists = {"v/big": "a listed name that looks like an offered one"}
    assert shape(planned([u, v, SHELF], routes=routes).plan("r")) == [["v:v/big*1"]]


EXPECTED: list[dict[str, Any]] = [
    {"aliases": {"fast": "q/new"}}, {"fallback": ["small", "q/new"]}, {"presets": {"p": {"model": "q/new"}}},
    {"routes": {"r": {"targets": [{"model": "q/new"}], "fallback": ["q/new"]}}, "aliases": {"s": "r"}},
    {"routes": {"r": {"targets": [{"model": "small"}, {"model": "q/new"}]}}}, {"chat_model": "q/new"},
    {"embedding_model": "q/new"},
]  # fmt: skip


@pytest.mark.parametrize("settings", EXPECTED)
def test_what_an_upstream_may_list_later_is_a_404_until_then(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def upstreams(discover: bool, prefix: str) -> dict[str, Any]:
        return {"u": {"base_url": "http://u/v1", "discover": discover, "prefix": prefix}}

    far = Far("u", big="b")
    it = planned([SHELF, far], upstreams=upstreams(True, "q/"), **settings)
    assert caplog.text.count("'q/new' is not known yet; upstreams.u may list it") >= 1
    names = [*settings.get("aliases", {}), *settings.get("presets", {}), "q/new"]
    for name in names:
        with pytest.raises(ModelNotFound):
            it.plan(name)
    listed = {card.id for card in it.listed()}
    assert not listed.intersection(names) and listed >= {"small", "big"}
    far.lists = {"q/new": "new"}
    it.refresh()
    assert all(it.find(name).model == "q/new" for name in names) and {card.id for card in it.listed()} >= {*names}
    if "routes" in settings:
        assert it.plan("r").groups[0][-1].target.model == "q/new"
    for wrong in (upstreams(False, "q/"), upstreams(True, "other/")):
        if not any(name.endswith("_model") for name in settings):  # defaults: check_models looks at them
            with pytest.raises(SettingsError):
                planned([SHELF, Far("u", big="b")], upstreams=wrong, **settings)


def test_names_that_are_refused_leave_nothing_behind() -> None:
    upstream = Upstream("u", config.Upstream(base_url="http://u/v1", models={"m": "b"}), None, {})
    routes = {"r": {"targets": [{"model": "new", "upstream": "u"}]}}
    before = planned([SHELF, upstream])
    with pytest.raises(SettingsError):
        planned([SHELF, upstream], routes=routes, fallback=["nobody"])
    before.refresh()
    assert "u/new" not in [card.id for card in before.listed()] and [card.id for card in upstream.models()] == ["m"]
    after = planned([SHELF, upstream], routes=routes)
    assert after.find("u/new").model == after.find("r").model == "u/new" and "u/new" in [c.id for c in after.listed()]
    assert after.targets() == {("", id) for id in ("small", "large", "vectors", "org/model:7b")} | {
        ("u", "m"), ("u", "u/new"),
    }  # fmt: skip


def test_how_much_a_plan_holds_is_known_if_it_is_of_every_target() -> None:
    u, v = Far("u", big="b", odd="o"), Far("v", big="b", huge="h")
    u.lengths, v.lengths = {"big": 10}, {"big": 20, "huge": 30}
    routes = {
        "both": {"targets": [{"model": "big"}, {"model": "huge"}], "fallback": ["small"]},
        "odd-too": {"targets": [{"model": "big"}, {"model": "odd"}]},
        "ours-too": {"targets": [{"model": "big"}, {"model": "small"}]},
    }
    it = planned([SHELF, u, v], routes=routes)
    longest = {name: it.plan(name).longest for name in ("big", "both", "odd-too", "ours-too", "small", "odd")}
    assert longest == {"big": 20, "both": 30, "odd-too": None, "ours-too": None, "small": None, "odd": None}
    task = chat.task(it.resolve)
    body = {"model": "both", "messages": [{"role": "user", "content": "word " * 31}]}
    with pytest.raises(ContextLengthExceeded) as error:
        task.check(Call("req_1", NOBODY, task, json.dumps(body).encode(), Reply(Collector()), 0))
    assert error.value.param == "messages"


def routes_page() -> list[str]:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "routes.md").read_text(encoding="utf-8")
    return re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", routes_page())
def test_the_examples_of_routes_name_what_is_there(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(text)
    settings = load({"config": str(tmp_path / "t.toml")}, {})
    shelf = Shelf(card(settings.chat_model), card(settings.embedding_model, "embedding"))
    far = [Upstream(name, upstream, None, {}) for name, upstream in settings.upstreams.items()]
    it = Names.of(settings, [shelf, *far])
    for name, route in settings.routes.items():
        assert len([leg for group in it.plan(name).groups for leg in group]) >= len(route.targets)


def test_names_are_replaced_under_way() -> None:
    it = planned([SHELF])
    resolve, old = it.resolve, it.plan("gpt-4o")
    it.replace(planned([SHELF], chat_model="large"))
    call = Call("req_1", NOBODY, chat.task(resolve), b"", Reply(Collector()), 0)
    resolve(call, "gpt-4o")
    assert call.target is not None and call.target.model == "large" and old.groups[0][0].target.model == "small"


def test_names_that_take_others_place_leave_nothing_behind() -> None:
    assert sorted(vars(names())) == sorted(KNOWS)
