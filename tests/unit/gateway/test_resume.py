"""on_break = "continue": a stream that breaks off is gone on with, and the client sees one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tertulia.core import CLIENT_LEFT, FAILED, FINISHED, Usage
from tertulia.errors import BadRequest, EngineFailed, UpstreamRefused
from tertulia.gateway import resume
from tertulia.gateway.resume import CONTINUES, events
from unit.gateway.scripted import Far, House, Near, Step, Wire, fails, hangs, streams
from unit.gateway.test_route import no_calls_left, runs

CUT = EngineFailed("cut")


def chunk(id: str, *, finish: str | None = None, usage: Any = None, choices: bool = True, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    said: dict[str, Any] = {
        "id": id, "object": "chat.completion.chunk", "created": int(id), "model": f"model {id}",
        "choices": [choice] if choices else [],
    }  # fmt: skip
    if usage is not None:
        said["usage"] = usage
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def text(id: str, word: str, finish: str | None = None) -> bytes:
    said = {"id": id, "object": "text_completion", "choices": [{"index": 0, "text": word, "finish_reason": finish}]}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def first(*, then: EngineFailed | None = CUT) -> Step:
    return streams(
        chunk("1", role="assistant", content=""), chunk("1", content="Once "), chunk("1", content="upon "), then=then
    )


def second(usage: Any = None) -> Step:
    last = [chunk("2", usage=usage, choices=False)] if usage else []
    return streams(
        chunk("2", role="assistant", content=""), chunk("2", content="a time"), chunk("2", finish="stop"), *last
    )


def said(wire: Wire) -> Iterator[dict[str, Any]]:
    """The chunks the client got; there must be one [DONE], at the end."""
    got = events(wire.body)
    assert got[-1] == b"[DONE]" and got.count(b"[DONE]") == 1
    for event in got[:-1]:
        yield json.loads(event)


def house(*engines: Any, **settings: Any) -> House:
    it = House(*engines, on_break="continue", **settings)
    it.route.random = lambda: 0.0
    return it


@runs
async def test_the_next_target_goes_on_and_the_client_sees_one_stream() -> None:
    one, two = Far("a", first()), Far("b", second())
    it = house(one, two)
    call, wire = await it.ask(stream=True, temperature=0.5)
    chunks = list(said(wire))
    assert wire.outcome == FINISHED and {(c["id"], c["created"], c["model"]) for c in chunks} == {("1", 1, "model 1")}
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Once upon a time"
    assert sum("role" in delta for delta in deltas) == 1 and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    messages = two.bodies[0]["messages"]
    assert messages == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Once upon "}]
    assert two.bodies[0]["temperature"] == 0.5 and CONTINUES not in two.bodies[0]
    assert call.attempts == 2 and call.model == "m" and it.route.continued == 1
    assert it.live("a/m").counts == {"failed": 1} and it.live("b/m").finished == 1
    no_calls_left(it)


@runs
async def test_an_only_target_is_asked_again_as_long_as_it_is_not_broken() -> None:
    it = house(Far("a", first(), second()))
    _, wire = await it.ask(stream=True)
    assert len(list(said(wire))) == 5 and wire.outcome == FINISHED
    it = house(Far("a", first(), second()), breaker_failures=1)
    _, wire = await it.ask(stream=True)
    assert wire.outcome == FAILED and wire.error["message"] == "cut"


@runs
async def test_a_fallback_of_this_machine_goes_on() -> None:
    near = Near(second())
    it = house(Far("a", first()), near, fallback=["local"], retries=2)
    call, wire = await it.ask(stream=True)
    assert call.attempts == 2  # whose stream broke off is not asked again where there is somebody else
    assert wire.outcome == FINISHED and call.target is not None and call.target.model == "local"
    assert near.bodies[0]["messages"][-1]["content"] == "Once upon " and near.bodies[0][CONTINUES] is True


@runs
async def test_it_breaks_twice() -> None:
    third = Far("c", streams(chunk("3", content=" ago"), chunk("3", finish="stop")))
    again = streams(chunk("2", role="assistant", content=""), chunk("2", content="a time"), then=CUT)
    it = house(Far("a", first()), Far("b", again), third)
    _, wire = await it.ask(stream=True)
    contents = [c["choices"][0]["delta"].get("content") or "" for c in said(wire)]
    assert "".join(contents) == "Once upon a time ago"
    assert third.bodies[0]["messages"][1:] == [{"role": "assistant", "content": "Once upon a time"}]


@runs
async def test_who_fails_before_it_has_said_anything_leaves_it_to_the_next() -> None:
    it = house(Far("a", first()), Far("b", fails(UpstreamRefused(503))), Far("c", second()))
    _, wire = await it.ask(stream=True)
    assert wire.outcome == FINISHED and len(list(said(wire))) == 5


@runs
async def test_when_nobody_can_go_on_the_break_is_the_error() -> None:
    it = house(Far("a", first()), Near(fails(BadRequest("cannot"))), fallback=["local"], retries=0)
    _, wire = await it.ask(stream=True)
    assert wire.outcome == FAILED and wire.error["message"] == "cut"


@runs
async def test_without_room_for_the_longer_prompt_the_break_is_the_error() -> None:
    asked: list[int] = []

    class Strict:
        def sending(self, call: Any) -> None: ...

        def lost(self, call: Any, error: Any) -> bool:
            return True

        def continues(self, call: Any, more: int) -> bool:
            asked.append(more)
            return False

    it = house(Far("a", first()), Near(second()), fallback=["local"], retries=0)
    call, wire = it.call(stream=True)
    call.watch = Strict()
    it.send(call)
    await asyncio.wait_for(wire.done(), 5)
    assert wire.outcome == FAILED and wire.error["message"] == "cut" and asked == [len("Once upon ")]


@pytest.mark.parametrize(
    "asked",
    [
        {"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}},
    ],
)  # fmt: skip
def test_what_is_not_safe_to_go_on_with_ends_with_the_error(asked: dict[str, Any]) -> None:
    async def run() -> None:
        two = Far("b", second())
        messages = [{"role": "user", "content": "json"}]
        _, wire = await house(Far("a", first()), two).ask(stream=True, messages=messages, **asked)
        assert wire.outcome == FAILED and wire.error["message"] == "cut" and not two.calls

    asyncio.run(run())


@pytest.mark.parametrize(
    "piece",
    [
        chunk("1", tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]),
        chunk("1", refusal="I"), chunk("1", reasoning_content="hm"), b'data: {"what": 1}\n\n', b"data: {\n\n",
    ],
)  # fmt: skip
def test_what_has_come_may_not_be_safe_either(piece: bytes) -> None:
    async def run() -> None:
        two = Far("b", second())
        _, wire = await house(Far("a", streams(piece, then=CUT)), two).ask(stream=True)
        assert wire.outcome == FAILED and wire.error["message"] == "cut" and not two.calls

    asyncio.run(run())


@runs
async def test_a_thought_that_is_over_is_no_hindrance() -> None:
    thinks = streams(chunk("1", reasoning_content="hm"), chunk("1", content="Once upon "), then=CUT)
    two = Far("b", second())
    _, wire = await house(Far("a", thinks), two).ask(stream=True)
    assert wire.outcome == FINISHED and two.bodies[0]["messages"][-1]["content"] == "Once upon "


@runs
async def test_a_stream_too_long_to_keep_is_not_gone_on_with() -> None:
    limit, resume.LIMIT = resume.LIMIT, 200
    try:
        two = Far("b", second())
        _, wire = await house(Far("a", first()), two).ask(stream=True)
        assert wire.outcome == FAILED and not two.calls
    finally:
        resume.LIMIT = limit


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_is_less_by_what_has_come(name: str) -> None:
    async def run() -> None:
        two = Far("b", second())
        await house(Far("a", first()), two).ask(stream=True, **{name: 10})
        assert two.bodies[0][name] == 8 and set(two.bodies[0]) == {"model", "messages", "stream", name}

    asyncio.run(run())


@runs
async def test_where_the_limit_is_reached_only_the_end_is_missing() -> None:
    two = Far("b", second())
    _, wire = await house(Far("a", first()), two).ask(stream=True, max_tokens=2)
    last = list(said(wire))[-1]
    assert wire.outcome == FINISHED and not two.calls and last["choices"][0]["finish_reason"] == "length"
    assert last["id"] == "1" and last["object"] == "chat.completion.chunk"


@runs
async def test_a_break_after_the_finish_reason_is_none() -> None:
    done = streams(chunk("1", content="Hi"), chunk("1", finish="stop"), then=CUT)
    two = Far("b", second())
    _, wire = await house(Far("a", done), two).ask(stream=True)
    assert wire.outcome == FINISHED and len(list(said(wire))) == 2 and not two.calls


@runs
async def test_usage_is_that_of_the_whole_answer() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    it = house(Far("a", first()), Far("b", second(usage)))
    _, wire = await it.ask(stream=True, stream_options={"include_usage": True})
    assert list(said(wire))[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


@runs
async def test_usage_that_the_client_does_not_see_is_whole_too() -> None:
    def counts(call: Any) -> None:
        call.reply.usage = Usage(7, 3)
        second()(call)

    def breaks(call: Any) -> None:
        call.reply.usage = Usage(5, 2, estimated=True)
        first()(call)

    call, _ = await house(Far("a", breaks), Far("b", counts)).ask(stream=True)
    assert call.reply.usage == Usage(7, 5)
    it = house(Far("a", breaks), Far("b", hangs))
    call, wire = it.call(stream=True)
    it.send(call)
    await asyncio.sleep(0.02)
    assert call.attempts == 2
    call.reply.close(CLIENT_LEFT)
    assert call.reply.usage == Usage(5, 2, estimated=True) and wire.outcome == CLIENT_LEFT


@runs
async def test_text_completions_go_on_with_prompt_and_text() -> None:
    two = Far("b", streams(text("2", " time"), text("2", "", "stop")))
    it = house(Far("a", streams(text("1", "upon"), text("1", " a"), then=CUT)), two)
    _, wire = await it.ask(task="completions", prompt="Once ", stream=True, max_tokens=9)
    chunks = list(said(wire))
    assert "".join(c["choices"][0]["text"] for c in chunks) == "upon a time" and {c["id"] for c in chunks} == {"1"}
    assert (two.bodies[0]["prompt"], two.bodies[0]["max_tokens"]) == ("Once upon a", 7)
    one = Far("a", streams(text("1", "x"), then=CUT))
    for asked in ({"prompt": ["a"]}, {"prompt": "a", "echo": True}, {"prompt": "a", "suffix": "b"}):
        _, wire = await house(one, Far("b")).ask(task="completions", stream=True, **asked)
        assert wire.outcome == FAILED


@runs
async def test_an_answer_the_caller_began_itself_stays_one_message() -> None:
    two = Far("b", second())
    begun = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Well: "}]
    await house(Far("a", first()), two).ask(stream=True, messages=begun)
    assert two.bodies[0]["messages"] == [begun[0], {"role": "assistant", "content": "Well: Once upon "}]


@runs
async def test_who_wants_to_be_told_is_told() -> None:
    two = Far("b", second())
    two.cards[0] = msgspec.structs.replace(two.cards[0], capabilities=(CONTINUES,))
    await house(Far("a", first()), two).ask(stream=True)
    assert two.bodies[0][CONTINUES] is True and two.bodies[0]["add_generation_prompt"] is False


@runs
async def test_heartbeats_while_a_broken_stream_waits() -> None:
    it = house(Far("a", first(), second()), heartbeat=0.04)
    it.route.random = lambda: 0.5  # a pause of 125 ms before the only target is asked again
    _, wire = await it.ask(stream=True)
    assert wire.outcome == FINISHED and wire.pieces.count(b": waiting\n\n") >= 2


@runs
async def test_a_preset_stays_applied_once() -> None:
    two = Far("b", second())
    it = house(Far("a", first()), two, presets={"poet": {"model": "m", "system": "Rhyme."}})
    call, wire = await it.ask("poet", stream=True)
    assert wire.outcome == FINISHED and call.model == "poet"
    assert [message["role"] for message in two.bodies[0]["messages"]] == ["system", "user", "assistant"]


def tells(*pieces: bytes, usage: dict[str, Any], then: EngineFailed | None = None) -> Step:
    """Pieces, then the usage as the upstream's engine has it: noted, and passed on."""

    def step(call: Any) -> None:
        for piece in pieces:
            call.reply.push(piece)
        call.reply.usage = Usage(usage["prompt_tokens"], usage["completion_tokens"], 1, 2)
        call.reply.push(chunk("2", usage=usage, choices=False))
        streams(then=then)(call)

    return step


@pytest.mark.parametrize("then", [None, CUT])
def test_what_is_accounted_is_what_the_client_is_told(then: EngineFailed | None) -> None:
    """Whether or not the second one breaks off as well once it has said its usage."""

    async def run() -> None:
        details = {"prompt_tokens_details": {"cached_tokens": 1}, "completion_tokens_details": {"reasoning_tokens": 2}}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, **details}
        rest = (chunk("2", content="a time"), chunk("2", finish="stop"))
        it = house(Far("a", first()), Far("b", tells(*rest, usage=usage, then=then)))
        call, wire = await it.ask(stream=True, stream_options={"include_usage": True})
        told = list(said(wire))[-1]["usage"]
        assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (7, 5, 12)
        assert wire.outcome == FINISHED and call.reply.usage == Usage(7, 5, 1, 2)

    asyncio.run(run())


@runs
async def test_usage_that_was_told_before_another_went_on_is_not_the_last_word() -> None:
    early = tells(chunk("2", content="a "), usage={"prompt_tokens": 7, "completion_tokens": 1}, then=CUT)
    last = tells(chunk("3", content="time"), usage={"prompt_tokens": 8, "completion_tokens": 1})
    it = house(Far("a", first()), Far("b", early), Far("c", last))
    call, wire = await it.ask(stream=True, stream_options={"include_usage": True})
    told = list(said(wire))[-1]["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"]) == (8, 4)
    assert call.attempts == 3 and call.reply.usage == Usage(8, 4)
