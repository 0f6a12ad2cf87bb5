"""The cache: when two requests are the same, what is kept, who gets it, and for how long."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tertulia.api import chat, completions, embeddings
from tertulia.config import Policy, Settings
from tertulia.core import (
    CLIENT_LEFT,
    DEADLINE,
    FAILED,
    FINISHED,
    Call,
    ModelCard,
    Plan,
    Principal,
    Reply,
    Target,
    Usage,
    Wishes,
)
from tertulia.engines.base import Collector
from tertulia.errors import DeadlineExceeded, TertuliaError
from tertulia.gateway import cache as module
from tertulia.gateway.cache import Cache, Directives, NotCached, directives, portions, whole
from tertulia.gateway.canonical import KNOWN_LIMIT, Keys, canonical

# canonical form ------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=6)  # with lone surrogates excluded, as JSON bytes are
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
BODIES = st.dictionaries(st.sampled_from(["messages", "temperature", "tools", "x", "ü", ""]) | TEXT, VALUES, max_size=5)
PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck))  # machines that do other things too
SPACE = st.text(" \t\r\n", max_size=3)


@st.composite
def spelled(draw: Any, value: Any) -> str:
    """value as JSON in one of the many ways it can be written."""
    space = lambda: draw(SPACE)  # noqa: E731
    if isinstance(value, dict):
        items = draw(st.permutations(list(value.items())))
        inside = ",".join(
            f"{space()}{draw(spelled(k))}{space()}:{space()}{draw(spelled(v))}{space()}" for k, v in items
        )
        return "{" + (inside or space()) + "}"
    if isinstance(value, list):
        return "[" + (",".join(f"{space()}{draw(spelled(v))}{space()}" for v in value) or space()) + "]"
    if isinstance(value, str):
        return '"' + "".join(draw(character(one)) for one in value) + '"'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return draw(number(value))
    return json.dumps(value)


@st.composite
def character(draw: Any, one: str) -> str:
    ways = [json.dumps(one)[1:-1]]
    units = one.encode("utf-16-be")
    ways.append("".join(f"\\u{units[at]:02x}{units[at + 1]:02X}" for at in range(0, len(units), 2)))
    if one not in '"\\' and ord(one) >= 32:
        ways.append(one)
    return draw(st.sampled_from(ways))


@st.composite
def number(draw: Any, value: int | float) -> str:
    ways = [json.dumps(value)]
    if isinstance(value, int):
        if abs(value) < 2**53:
            ways += [f"{value}.0", f"{value}e0", f"{value}.00E+0", f"{value}0e-1"]
    else:
        ways += [f"{value:.17g}", f"{value:.25e}"]
        if float(value).is_integer():
            ways.append(str(int(value)))
    return draw(st.sampled_from(ways))


def meaning(value: Any, top: bool = True) -> Any:
    """What a body says, as something that can be compared: the test's own idea of it."""
    if isinstance(value, dict):
        return {k: meaning(v, False) for k, v in value.items() if not (top and (v is None or k in IGNORED))}
    if isinstance(value, list):
        return [meaning(one, False) for one in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return (type(value).__name__, value)
    return ("number", value)


IGNORED = {"model", "user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key"}


@PATIENT
@given(st.data())
def test_equal_meaning_equal_form(data: Any) -> None:
    body = data.draw(BODIES)
    one, other = (data.draw(spelled(body)).encode() for _ in range(2))
    assert json.loads(one) == json.loads(other) == body
    assert canonical(one) == canonical(other) is not None


@PATIENT
@given(BODIES, BODIES)
def test_different_meaning_different_form(one: dict[str, Any], other: dict[str, Any]) -> None:
    forms = [canonical(json.dumps(body).encode()) for body in (one, other)]
    assert (forms[0] == forms[1]) == (meaning(one) == meaning(other))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all leaves and empty containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in items for place in places(one, (*path, key))] or [path]


def with_leaf(value: Any, path: tuple[Any, ...], leaf: Any) -> Any:
    if not path:
        return leaf
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_leaf(value[path[0]], path[1:], leaf)
    return copy


@PATIENT
@given(st.data())
def test_any_leaf_that_differs_makes_a_difference(data: Any) -> None:
    body = data.draw(BODIES.filter(lambda body: bool(body)))
    path = data.draw(st.sampled_from(places(body)))
    leaf = data.draw(VALUES)
    other = with_leaf(body, path, leaf)
    assume(path and meaning(other) != meaning(body))
    assert canonical(json.dumps(body).encode()) != canonical(json.dumps(other).encode())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a":1}', '{"a":1.0}', True),
        ('{"a":1}', '{ "a" : 10e-1 }', True),
        ('{"a":100000000000000000000}', '{"a":1e20}', True),
        ('{"a":0}', '{"a":-0.0}', True),
        ('{"a":0.1}', '{"a":0.10000001}', False),
        ('{"a":9007199254740993}', '{"a":9007199254740992}', False),
        ('{"a":9007199254740993}', '{"a":9007199254740992.0}', False),
        ('{"a":1}', '{"a":true}', False),
        ('{"a":1}', '{"a":"1"}', False),
        ('{"a":"\\u00e9"}', '{"a":"é"}', True),
        ('{"a":"\\ud83d\\ude00"}', '{"a":"😀"}', True),
        ('{"a":"é"}', '{"a":"e\u0301"}', False),  # text is compared as it is written
        ('{"a":null}', "{}", True),
        ('{"a":{"b":null}}', '{"a":{}}', False),  # in a schema it may say something
        ('{"a":[null]}', '{"a":[]}', False),
        ('{"stream":false}', "{}", True),
        ('{"stream":true}', "{}", False),
        ('{"stream":true,"stream_options":{"include_usage":true}}', '{"stream":true}', False),
        ('{"user":"a","model":"x","metadata":{"k":"v"},"store":false,"service_tier":"flex"}', "{}", True),
        ('{"safety_identifier":"a","prompt_cache_key":"b","prompt_cache_retention":"24h"}', "{}", True),
        ('{"store":true}', "{}", False),
        ('{"store":true,"metadata":{"k":"v"}}', '{"store":true}', False),
        ('{"messages":[{"user":"a"}]}', '{"messages":[{}]}', False),
    ],
)  # fmt: skip
def test_what_is_the_same(one: str, other: str, same: bool) -> None:
    assert (canonical(one.encode()) == canonical(other.encode())) is same
    assert canonical(one.encode()) is not None


@pytest.mark.parametrize(
    "body",
    [
        b'{"temperature":0,"temperature":1}',
        b'{"a":[{"b":1,"b":1}]}',
        b'{"a":1e400}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":"\xff"}',
        b"[1]",
        b"1",
        b"{",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_readers_may_read_differently_stands_for_itself(body: bytes) -> None:
    assert canonical(body) is None
    keys = Keys()
    assert keys.of(call_of(body)) != keys.of(call_of(body + b" ")) and keys.of(call_of(body)) == keys.of(call_of(body))


# keys ----------------------------------------------------------------------------------------------------------------

CARD = ModelCard(id="m", kind="chat", source="mock:")
TASKS = {make.__name__.rsplit(".")[-1]: make.task(lambda call, model: None) for make in (chat, completions, embeddings)}


def call_of(body: bytes, project: str = "proj_1", task: str = "chat", plan: str = "m", revision: str = "1") -> Call:
    call = Call("req_1", Principal("key_1", "org-1", project), TASKS[task], body, Reply(Collector()), 0)
    call.target = Target(None, "m", CARD)
    call.plan = Plan(name=plan, groups=(), revision=revision)
    return call


def test_whose_what_and_by_whom_is_part_of_the_key() -> None:
    keys, body = Keys(), b'{"a":1}'
    found = {
        keys.of(call_of(body)),
        keys.of(call_of(body, project="proj_2")),
        keys.of(call_of(body, task="completions")),
        keys.of(call_of(body, plan="other")),
        keys.of(call_of(body, revision="2")),
        keys.of(call_of(body), "key_1"),
        keys.of(call_of(body, plan="m1", revision="")),
        keys.of(call_of(b'{"a":2}')),
    }
    assert len(found) == 8
    plain = call_of(body)
    plain.plan = None
    assert keys.of(plain) not in found
    assert keys.of(call_of(b' {"a": 1.0}')) == keys.of(call_of(body))


def test_memory_of_keys_is_bounded() -> None:
    keys = Keys()
    first = keys.of(call_of(b"{}"))
    for at in range(KNOWN_LIMIT + 10):
        keys.of(call_of(b'{"a":%d}' % at))
    assert len(keys._known) == KNOWN_LIMIT and keys.of(call_of(b"{}")) == first


# the stage -----------------------------------------------------------------------------------------------------------


class Wire(Collector):
    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        super().begin(status, headers)
        lines = b"".join(headers).decode().split("\r\n")
        self.headers = dict(line.split(": ", 1) for line in lines if line)

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


DONE = b"data: [DONE]\n\n"


class House:
    """A cache, and behind it who answers: everything asked is counted, and answered at once unless hold."""

    def __init__(self, data: Path, **settings: Any) -> None:
        self.cache = Cache(Settings(**settings), data)
        self.asked: list[Call] = []
        self.hold = False
        self.pieces: list[bytes] | None = None
        self.outcome: str | TertuliaError = FINISHED
        self.headers = [b"x-tertulia-model: m\r\n"]

    def answer(self, call: Call) -> None:
        self.asked.append(call)
        call.attempts += 1
        call.reply.headers += self.headers
        if not self.hold:
            self.say(call)

    def say(self, call: Call) -> None:
        number = len(self.asked)
        pieces = self.pieces
        if pieces is None:
            pieces = [b'data: {"n":%d}\n\n' % number, DONE] if call.stream else [b'{"n":%d}' % number]
        for piece in pieces:
            call.reply.push(piece)
        call.reply.usage = Usage(1, number)
        if isinstance(self.outcome, str):
            call.reply.close(self.outcome)
        else:
            call.reply.fail(self.outcome)

    def call(
        self, task: str = "chat", project: str = "proj_1", key: str = "key_1", plan: str | None = None,
        wishes: Wishes | None = None, **body: Any,
    ) -> tuple[Call, Wire]:  # fmt: skip
        wire = Wire()
        whole = {"model": "m", **({"input": "x"} if task == "embeddings" else {}), **body}
        if task == "chat":
            whole = {"messages": [{"role": "user", "content": "hi"}], **whole}
        elif task == "completions":
            whole = {"prompt": "hi", **whole}
        call = Call("r", Principal(key, "org-1", project), TASKS[task], json.dumps(whole).encode(), Reply(wire), 0)
        call.task.check(call)
        call.reply.stream = call.stream
        call.target = Target(None, "m", CARD)
        call.plan = Plan(name="m", groups=(), cache=plan, revision="1")
        if wishes is not None:
            call.wishes = wishes
        return call, wire

    def run(self, call: Call) -> Awaitable[None] | None:
        return self.cache(call, self.answer)

    def ask(self, **more: Any) -> tuple[Call, Wire]:
        call, wire = self.call(**more)
        assert self.run(call) is None
        return call, wire


@pytest.mark.parametrize("stream", [True, False])
def test_a_hit(tmp_path: Path, stream: bool) -> None:
    house = House(tmp_path)
    first, one = house.ask(temperature=0, stream=stream)
    again, other = house.ask(temperature=0.0, stream=stream, user="u")
    assert len(house.asked) == 1 and one.body == other.body and (one.status, other.status) == (200, 200)
    assert (first.cache, again.cache, again.attempts, other.outcome) == ("miss", "hit", 0, FINISHED)
    assert one.headers == {"x-tertulia-cache": "miss", "x-tertulia-model": "m"}
    assert other.headers == {"x-tertulia-cache": "hit", "x-tertulia-model": "m", "age": "0"}
    assert again.reply.usage == Usage(1, 1)
    cache = house.cache
    assert (cache.hits, cache.misses, cache.joined, cache.stored, cache.evicted) == (1, 1, 0, 1, 0)
    assert "tertulia_cache_hits_total 1" in cache.metrics()
    assert 'tertulia_cache_entries{tier="memory"} 1' in cache.metrics()


def test_a_hit_passes_the_taps_and_closers_of_the_stages_above(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.ask(temperature=0)
    call, wire = house.call(temperature=0)
    seen: list[Any] = []
    call.reply.tap(seen.append)
    call.reply.rewrite(lambda data: data.replace(b"n", b"N"))
    call.reply.on_close(lambda outcome: seen.append((outcome, call.cache)))
    house.run(call)
    assert seen == [b'{"N":1}', (FINISHED, "hit")]
    assert wire.body == b'{"N":1}'
    assert house.ask(temperature=0)[1].body == b'{"n":1}'  # what is kept is what came from further in


@pytest.mark.parametrize(
    ("settings", "request_", "kept"),
    [
        ({}, {"temperature": 0}, True),
        ({}, {"seed": 1}, True),
        ({}, {"temperature": 0.5, "seed": 1}, True),
        ({}, {}, False),
        ({}, {"temperature": 1}, False),
        ({}, {"task": "embeddings"}, True),
        ({}, {"task": "completions", "temperature": 0}, True),
        ({}, {"task": "completions"}, False),
        ({"cache": "off"}, {"temperature": 0}, False),
        ({"cache": "off"}, {"task": "embeddings"}, False),
        ({"cache": "all"}, {}, True),
        ({"cache": "off"}, {"plan": "all"}, True),
        ({"cache": "all"}, {"plan": "off"}, False),
        ({"cache": "all"}, {"plan": "deterministic"}, False),
        ({"policies": {"key_1": Policy(cache="all")}}, {"plan": "off"}, True),
        ({"policies": {"key_1": Policy(cache="off")}}, {"temperature": 0}, False),
        ({"policies": {"key_2": Policy(cache="off"), "key_1": Policy()}}, {"temperature": 0}, True),
        ({}, {"temperature": 0, "wishes": Wishes(cache_control="no-store")}, False),
    ],
)  # fmt: skip
def test_what_is_kept(tmp_path: Path, settings: dict[str, Any], request_: dict[str, Any], kept: bool) -> None:
    house = House(tmp_path, **settings)
    for _ in range(2):
        call, wire = house.ask(**request_)
        assert wire.status == 200
    assert len(house.asked) == (1 if kept else 2)
    assert ("x-tertulia-cache" in wire.headers) is kept and call.cache == ("hit" if kept else "")
    assert house.cache.stored == (1 if kept else 0)


def test_projects_do_not_share_but_keys_of_one_do(tmp_path: Path) -> None:
    house = House(tmp_path)
    for project, key in (("proj_1", "key_1"), ("proj_2", "key_2"), ("proj_1", "key_3")):
        call, _ = house.ask(project=project, key=key, temperature=0)
    assert len(house.asked) == 2 and call.cache == "hit"


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("no-store", Directives(store=False, read=False)),
        ("no-cache", Directives(read=False)),
        ("max-age=5, foo", Directives(max_age=5)),
        ('max-age="0"', Directives(read=False, max_age=0)),
        ("max-age=x", Directives()),
        ("only-if-cached,max-age=60", Directives(only=True, max_age=60)),
        ("private,, =", Directives()),
    ],
)
def test_cache_control(text: str, means: Directives) -> None:
    assert directives(text) == means


def test_no_cache_asks_again_and_keeps_the_new_answer(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.ask(temperature=0)
    call, wire = house.ask(temperature=0, wishes=Wishes(cache_control="no-cache"))
    assert call.cache == "miss" and wire.body == b'{"n":2}'
    assert house.ask(temperature=0)[1].body == b'{"n":2}' and len(house.asked) == 2


def test_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "_time", lambda: now)
    house = House(tmp_path, cache_ttl=100)
    house.ask(temperature=0)
    now += 50
    assert house.ask(temperature=0)[1].headers["age"] == "50"
    assert house.ask(temperature=0, wishes=Wishes(cache_control="max-age=60"))[1].headers["age"] == "50"
    assert house.ask(temperature=0, wishes=Wishes(cache_control="max-age=40"))[0].cache == "miss"
    now += 99
    assert house.ask(temperature=0)[0].cache == "hit"
    now += 2
    assert house.ask(temperature=0)[0].cache == "miss"


@pytest.mark.parametrize("more", [{"temperature": 0}, {}])
def test_only_if_cached(tmp_path: Path, more: dict[str, Any]) -> None:
    house = House(tmp_path)
    wishes = Wishes(cache_control="only-if-cached")
    call, _ = house.call(wishes=wishes, **more)
    with pytest.raises(NotCached):
        house.run(call)
    assert house.asked == []
    if more:
        house.ask(**more)
        assert house.ask(wishes=wishes, **more)[0].cache == "hit"


# only whole answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "pieces", "outcome"),
    [
        (False, [b'{"error":{"message":"no"}}'], FINISHED),
        (False, [b'{"n":'], FINISHED),
        (False, [b"garbage"], FINISHED),
        (False, [], FINISHED),
        (False, [b'{"n":1}'], FAILED),
        (True, [b'data: {"n":1}\n\n'], FINISHED),  # no [DONE]
        (True, [b'data: {"error":{"message":"no"}}\n\n', DONE], FINISHED),
        (True, [b'data: {"n":1}\n\ndata: {"error":{"message":"no"}}\r\n\r\n', DONE], FINISHED),
        (True, [b'data: {"n":1, "error" garbage\n\n', DONE], FINISHED),
        (True, [b'data: {"n":1}\n\n', DONE], FAILED),
        (True, [b'data: {"n":1}\n\n'], FAILED),
        (True, [], FINISHED),
        (True, [b'data: {"n":1}\n\n'], TertuliaError()),
        (False, [], TertuliaError()),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_not_kept(tmp_path: Path, stream: bool, pieces: list[bytes], outcome: Any) -> None:
    house = House(tmp_path)
    house.pieces, house.outcome = pieces, outcome
    house.ask(temperature=0, stream=stream)
    house.ask(temperature=0, stream=stream)
    assert len(house.asked) == 2 and house.cache.stored == 0 and house.cache.bytes == 0


@pytest.mark.parametrize(
    ("headers", "attempts", "kept"),
    [
        ([b"x-tertulia-fallback: m\r\n"], 1, False),
        ([b"x-tertulia-attempts: 2\r\n"], 2, True),
        ([], 2, False),  # another target continued the stream
    ],
)  # fmt: skip
def test_what_the_next_call_might_do_better_is_not_kept(
    tmp_path: Path, headers: list[bytes], attempts: int, kept: bool
) -> None:
    house = House(tmp_path)
    house.headers = [b"x-tertulia-model: m\r\nx-tertulia-defused: 1\r\n", *headers]
    call, _ = house.call(temperature=0)

    def answer(call: Call) -> None:
        call.attempts = attempts - 1
        house.answer(call)

    house.cache(call, answer)
    call, wire = house.ask(temperature=0)
    assert (call.cache == "hit") is kept
    if kept:
        assert wire.headers.keys() == {"x-tertulia-model", "x-tertulia-defused", "x-tertulia-cache", "age"}


def test_whole() -> None:
    assert whole([b'data: {"choices":[{"delta":{"content":"\\"error\\""}}],"error":null}\n\n', DONE], True)
    assert whole([b'{"a":[]}'], False) and not whole([DONE, b": bye\n\n"], True)


def test_a_client_that_leaves_leaves_nothing(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.hold = True
    call, _ = house.ask(temperature=0, stream=True)
    house.asked[0].reply.push(b'data: {"n":1}\n\n')
    call.reply.close(CLIENT_LEFT)
    assert house.asked[0].reply.outcome == CLIENT_LEFT and house.cache.stored == 0
    assert len(house.cache.flights) == 0


# room ----------------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_the_least_recently_used_goes(tmp_path: Path) -> None:
    house = House(tmp_path, cache_memory=1)
    house.pieces = [b'{"n":"%s"}' % (b"x" * 99_480)]  # with the rest about a tenth of the room
    for seed in range(8):
        house.ask(seed=seed)
    house.ask(seed=0)
    assert house.cache.hits == 1 and house.cache.evicted == 0
    for seed in range(8, 12):
        house.ask(seed=seed)
        assert house.cache.bytes <= 1_000_000
    assert house.cache.evicted > 0
    assert house.ask(seed=0)[0].cache == "hit" and house.ask(seed=1)[0].cache == "miss"
    house.pieces = [b'{"n":"%s"}' % (b"x" * 130_000)]  # more than an eighth
    before = len(house.cache._entries)
    house.ask(seed=99)
    assert len(house.cache._entries) == before and house.ask(seed=99)[0].cache == "miss"


def test_reload(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.ask(temperature=0)
    house.cache.reload(Settings(cache="off"))
    assert house.ask(temperature=0)[0].cache == ""
    house.cache.reload(Settings())
    assert house.ask(temperature=0)[0].cache == "hit"
    house.cache.reload(Settings(cache_memory=0))
    assert house.cache.bytes == 0 and house.ask(temperature=0)[0].cache == "miss"


# streams -------------------------------------------------------------------------------------------------------------


def test_a_stream_is_kept_in_fewer_pieces_of_whole_events() -> None:
    pieces = [b"data: %d\n\n" % n for n in range(10_000)]
    found = portions(pieces)
    assert b"".join(found) == b"".join(pieces) and all(one.endswith(b"\n\n") for one in found)
    assert 5 < len(found) < 20 and portions([]) == []


def slow_hit(house: House) -> tuple[Call, Wire]:
    """A long stream that is kept, on its way to a client that takes one piece and no more."""
    house.pieces = [b"data: %s\n\n" % (b"1" * 1000) for _ in range(200)] + [DONE]
    house.ask(temperature=0, stream=True)
    call, wire = house.call(temperature=0, stream=True)
    call.reply.tap(lambda data: call.reply.pause())
    house.run(call)
    assert call.cache == "hit" and len(wire.pieces) == 1
    return call, wire


def test_a_slow_reader_of_a_hit_is_waited_for(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path)
        call, wire = slow_hit(house)
        timer = call.reply.source._timer  # type: ignore[union-attr]
        steps = 1
        while wire.outcome is None:
            assert len(wire.pieces) == steps and not timer.cancelled()
            call.reply.resume()
            steps += 1
        assert steps == len(wire.pieces) > 5 and wire.body == b"".join(house.pieces or []) and wire.outcome == FINISHED
        assert timer.cancelled()
        call, wire = slow_hit(house)
        call.reply.close(CLIENT_LEFT)
        assert len(wire.pieces) == 1

    asyncio.run(run())


def test_a_reader_of_a_hit_that_never_reads_is_waited_for_until_its_deadline(tmp_path: Path) -> None:
    async def run() -> None:
        call, wire = slow_hit(House(tmp_path, request_timeout=0.05))
        await asyncio.sleep(0.01)
        assert wire.outcome is None
        await asyncio.wait_for(wire.done(), 5)
        assert wire.outcome == DEADLINE and isinstance(call.reply.error, DeadlineExceeded) and len(wire.pieces) == 2
        house = House(tmp_path)
        _, wire = slow_hit(house)  # a plan's own timeout counts, and from the request's first byte
        call, wire = house.call(temperature=0, stream=True)
        call.plan = Plan(name="m", groups=(), revision="1", timeout=5.0)
        call.began = perf_counter_ns() - 5_000_000_000
        call.reply.tap(lambda data: call.reply.pause())
        house.run(call)
        await asyncio.wait_for(wire.done(), 1)
        assert call.cache == "hit" and wire.outcome == DEADLINE and b"5 seconds" in wire.body

    asyncio.run(run())


# in flight -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_identical_calls_in_flight_share_one(tmp_path: Path, stream: bool) -> None:
    house = House(tmp_path)
    house.hold = True
    calls = [house.ask(temperature=0, stream=stream) for _ in range(5)]
    other = house.ask(temperature=0, stream=stream, project="proj_2")
    assert len(house.asked) == 2
    house.say(house.asked[0])
    assert [call.cache for call, _ in calls] == ["miss"] + ["joined"] * 4
    assert [wire.headers["x-tertulia-cache"] for _, wire in calls] == ["miss"] + ["joined"] * 4
    assert {wire.body for _, wire in calls} == {calls[0][1].body} and other[1].outcome is None
    assert house.cache.joined == 4 and house.cache.misses == 2
    assert house.ask(temperature=0, stream=stream)[0].cache == "hit"


def test_coalescing_may_be_off(tmp_path: Path) -> None:
    house = House(tmp_path, coalesce=False)
    house.hold = True
    for _ in range(3):
        house.ask(temperature=0)
    assert len(house.asked) == 3
    house.say(house.asked[0])
    assert house.ask(temperature=0)[0].cache == "hit"


@pytest.mark.parametrize("cache_control", ["no-cache", "no-store"])
def test_who_wants_a_fresh_answer_does_not_join(tmp_path: Path, cache_control: str) -> None:
    house = House(tmp_path)
    house.hold = True
    house.ask(temperature=0)
    house.ask(temperature=0, wishes=Wishes(cache_control=cache_control))
    assert len(house.asked) == 2
    house.say(house.asked[0])
    house.say(house.asked[1])
    assert len(house.cache.flights) == 0


def test_random_answers_are_not_shared(tmp_path: Path) -> None:
    house = House(tmp_path, retry_grace=5)
    house.hold = True
    sdk = Wishes(patience=600)
    for wishes in (sdk, sdk, None, Wishes(patience=600, retry_count=1)):
        house.ask(wishes=wishes)
    assert len(house.asked) == 4  # nobody has left: even the retry is a sample of its own
    for call in house.asked:
        call.reply.close(FAILED)
    assert len(house.cache.flights) == 0


def test_an_idempotency_key_finds_its_call_in_flight(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.hold = True
    wishes = Wishes(idempotency_key="abc")
    first, _ = house.ask(wishes=wishes)
    again, wire = house.ask(wishes=wishes)
    assert len(house.asked) == 1 and (first.cache, again.cache) == ("", "joined")
    for more in ({"key": "key_2"}, {"wishes": Wishes(idempotency_key="x")}, {"seed": None, "temperature": 1}):
        house.ask(**{"wishes": wishes, **more})
    assert len(house.asked) == 4
    house.say(house.asked[0])
    assert wire.body == b'{"n":4}' and house.cache.stored == 0


def test_an_sdks_retry_finds_the_call_it_left(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, retry_grace=5)
        house.hold = True
        first = [house.ask(wishes=Wishes(patience=600))[0] for _ in range(2)]
        first[0].reply.close(CLIENT_LEFT)
        assert house.asked[0].reply.outcome is None and first[0].cache == "joined"
        other, _ = house.ask(wishes=Wishes(patience=600, retry_count=1), key="key_2")
        again, wire = house.ask(wishes=Wishes(patience=600, retry_count=1))
        assert len(house.asked) == 3 and other.cache == "" and again.cache == "miss"
        third, _ = house.ask(wishes=Wishes(patience=600, retry_count=2))
        assert len(house.asked) == 4 and third.cache == ""  # the call left behind is taken, by one
        house.say(house.asked[0])
        assert wire.body == b'{"n":4}' and wire.headers["x-tertulia-cache"] == "joined"
        for call in house.asked[1:]:
            house.say(call)
        assert len(house.cache.flights) == 0

    asyncio.run(run())


def test_without_grace_leaving_cancels_at_once(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.hold = True
    call, _ = house.ask(wishes=Wishes(patience=600))
    assert house.asked[0] is call  # the call itself: nothing stands between
    call, _ = house.ask(temperature=0, wishes=Wishes(patience=600))
    call.reply.close(CLIENT_LEFT)
    assert house.asked[1].reply.outcome == CLIENT_LEFT


# disk ----------------------------------------------------------------------------------------------------------------


def test_answers_outlast_the_server(tmp_path: Path) -> None:
    async def ask(house: House, **more: Any) -> tuple[Call, Wire]:
        call, wire = house.call(**more)
        rest = house.run(call)
        if rest is not None:
            await rest
        return call, wire

    async def run() -> None:
        house = House(tmp_path, cache_disk=1)
        for stream in (True, False):
            assert (await ask(house, temperature=0, stream=stream))[0].cache == "miss"
        house.cache.close()
        other = House(tmp_path, cache_disk=1)
        for stream in (True, False):
            call, wire = await ask(other, temperature=0, stream=stream)
            assert call.cache == "hit" and call.reply.usage == Usage(1, 2 - stream) and wire.outcome == FINISHED
        assert other.asked == [] and other.cache.hits == 2
        call, _ = other.call(temperature=0)
        assert other.run(call) is None and call.cache == "hit"  # it is in memory now
        call, wire = other.call(temperature=0, seed=1)
        assert other.run(call) is None and call.cache == "miss"  # the disk is not asked for what it has not
        assert await other.cache._answers.get(b"") is None  # type: ignore[union-attr]  # after what is to be written
        assert 'tertulia_cache_entries{tier="disk"} 3' in other.cache.metrics()
        other.cache.close()

    asyncio.run(run())


def test_identical_calls_that_waited_for_the_disk_share_one(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, cache_disk=1, cache_memory=0)
        house.hold = True
        calls = [house.call(temperature=0) for _ in range(5)]  # what is on disk is not known yet
        waiting = [rest for rest in (house.run(call) for call, _ in calls) if rest is not None]
        await asyncio.gather(*waiting)
        assert len(house.asked) == 1
        house.say(house.asked[0])
        assert {wire.body for _, wire in calls} == {b'{"n":1}'}
        house.cache.close()

    asyncio.run(run())


def test_a_reload_without_the_disk_does_not_wait_for_it(tmp_path: Path) -> None:
    house = House(tmp_path, cache_disk=1)
    written = threading.Event()
    answers = house.cache._answers
    assert answers is not None
    answers._thread.submit(written.wait)
    house.ask(temperature=0, wishes=Wishes(cache_control="no-cache"))
    before = time.monotonic()
    house.cache.reload(Settings())  # the writing thread is busy for as long as we like
    assert time.monotonic() - before < 1 and house.cache._answers is None and not written.is_set()
    written.set()
    house.cache.close()  # but the end waits until everything is written
    assert len(answers) == 1 and answers._database is None
