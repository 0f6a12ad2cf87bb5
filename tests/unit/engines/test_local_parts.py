"""The parts of the local engine that need no model: parameters, shapes, streams cut anywhere, memory, token tables."""

from __future__ import annotations

import asyncio
import json
import math
from array import array
from base64 import b64encode
from typing import Any

import msgspec
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from tertulia.api.chat import Chat
from tertulia.core import CLIENT_LEFT, ModelCard, Reply, Usage
from tertulia.engines.base import Collector
from tertulia.engines.local import chat as local_chat
from tertulia.engines.local.control import Defuser, refuse_in_schemas
from tertulia.engines.local.embeddings import shortened
from tertulia.engines.local.exchange import Events, Refused, translate
from tertulia.engines.local.messages import joined, native
from tertulia.engines.local.request import RANDOM_SEED, extras, sampling, seed
from tertulia.engines.local.room import Room, need
from tertulia.engines.local.shapes import ChatStream, ContentLogprob, Stamp
from tertulia.engines.local.tables import CL100K_SHA256, Table, cl100k
from tertulia.engines.local.text import prompts_of, scoring, spelled
from tertulia.errors import BadRequest, ContextLengthExceeded, EngineFailed, Overloaded, TertuliaError

CARD = ModelCard(id="m", kind="chat", source="file:", sampling={"temperature": 0.2, "top_k": 40})


def asked(**body: Any) -> Chat:
    return msgspec.convert({"model": "m", "messages": [{"role": "user", "content": "x"}], **body}, Chat)


def parameters(**body: Any) -> dict[str, Any]:
    raw = {"model": "m", "messages": [], **body}
    chat = asked(**{name: value for name, value in body.items() if name in Chat.__struct_fields__})
    return sampling(chat, extras(raw, Chat.__struct_fields__), CARD)


# parameters
def test_who_gives_no_sampling_gets_what_suits_the_model() -> None:
    found = parameters()
    assert (found["temperature"], found["top_p"], found["top_k"], found["min_p"]) == (0.2, 1.0, 40, 0.0)


def test_who_gives_temperature_or_top_p_gets_openais_sampling() -> None:
    for body in ({"temperature": 0.7}, {"top_p": 0.5}):
        found = parameters(**body)
        assert (found["top_k"], found["min_p"], found["repeat_penalty"]) == (0, 0.0, 1.0)
        assert found["temperature"] == body.get("temperature", 1.0) and found["top_p"] == body.get("top_p", 1.0)


def test_extras_overrule_and_penalties_see_the_whole_text() -> None:
    found = parameters(temperature=1, top_k=5, repeat_last_n=7)
    assert found["top_k"] == 5 and found["repeat_last_n"] == 7
    assert parameters(presence_penalty=1)["repeat_last_n"] == -1


def test_unknown_arguments_and_bad_extras_are_named() -> None:
    for body, param, code in (
        ({"bogus": 1}, "bogus", "unknown_parameter"),
        ({"min_p": 3}, "min_p", "invalid_value"),
        ({"top_k": "x"}, "top_k", "invalid_value"),
    ):
        with pytest.raises(BadRequest) as refused:
            parameters(**body)
        assert (refused.value.param, refused.value.code) == (param, code)
    assert extras({"bogus": None}, ()).top_k is None  # null means not given


def test_seeds_stay_within_32_bits_and_never_mean_any() -> None:
    assert seed(None, 3) == RANDOM_SEED
    for given in (0, -1, 2**31, RANDOM_SEED, 2**63 - 1, -(2**63)):
        found = [seed(given, index) for index in range(4)]
        assert all(0 <= one < RANDOM_SEED for one in found) and len(set(found)) == 4


# messages
def test_messages_for_a_template_that_knows_tools() -> None:
    call = {"name": "f", "arguments": "{}"}
    found = native(
        [
            {"role": "developer", "content": "A"},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "f", "content": "1"},
        ]
    )
    assert found[0] == {"role": "system", "content": "A"}
    assert found[1] == {"role": "user", "content": "Ann: x\ny"}
    assert found[2]["tool_calls"] == [{"id": "call_1", "type": "function", "function": call}]
    assert found[3] == {"role": "tool", "tool_call_id": "call_1", "name": "f", "content": "1"}


def test_leading_system_messages_become_one() -> None:
    a, b, user = (
        {"role": "system", "content": "A"},
        {"role": "system", "content": "B"},
        {"role": "user", "content": "u"},
    )
    assert joined([a, b, user, a]) == [{"role": "system", "content": "A\n\nB"}, user, a]
    assert joined([user, a, b]) == [user, a, b]


# streams
class Heard(Events):
    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.flushes = 0

    def see(self, event: bytes) -> None:
        self.events.append(event)

    def flush(self) -> None:
        self.flushes += 1


def test_events_are_whole_wherever_the_pieces_are_cut() -> None:
    stream = 'data: {"a":"é"}\n\n: ping\n\ndata: {"b":2}\n\ndata: {"c":3}\n\ndata: [DONE]\n\n'.encode()
    for cut in range(len(stream)):
        heard = Heard()
        heard.piece(stream[:cut])
        heard.piece(stream[cut:])
        heard.end()
        assert heard.events == ['{"a":"é"}'.encode(), b'{"b":2}', b'{"c":3}']
        assert heard.flushes == 2


def test_a_stream_that_breaks_off_or_tells_of_an_error_is_an_error() -> None:
    heard = Heard()
    heard.piece(b'data: {"a":')
    with pytest.raises(EngineFailed):
        heard.end()
    with pytest.raises(Refused):
        Heard().piece(b'data: {"error":{"code":500,"message":"x","type":"server_error"}}\n\n')


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (
            400,
            {"type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 5},
            ContextLengthExceeded,
        ),
        (500, {"message": "input (9 tokens) is too large to process. (current batch size: 5)"}, ContextLengthExceeded),
        (400, {"message": "bad grammar"}, BadRequest),
        (503, {"message": "Loading model"}, Overloaded),
        (500, {"message": "Context size has been exceeded."}, Overloaded),
        (500, {"message": "anything"}, EngineFailed),
        (401, {"message": "Invalid API Key"}, EngineFailed),
    ],
)
def test_what_a_child_refuses_has_a_meaning(status: int, error: dict[str, Any], kind: type[TertuliaError]) -> None:
    found = translate(status, json.dumps({"error": error}).encode(), "messages", local_chat.too_long)
    assert type(found) is kind
    if kind is ContextLengthExceeded:
        assert "length is 5 tokens" in found.message and "in 9 tokens" in found.message
    assert type(translate(status, b"<html>", "messages", local_chat.too_long)) is EngineFailed


def stream(count: int = 1, *, tooled: bool = False, legacy: bool = False) -> tuple[ChatStream, Collector]:
    sink = Collector()
    reply = Reply(sink, True)
    return ChatStream(reply, Stamp.new("chatcmpl-", "m", "fp_1"), None, count, tooled=tooled, legacy=legacy), sink


def deltas(sink: Collector) -> list[tuple[int, dict[str, Any], str | None]]:
    found = []
    for part in b"".join(sink.pieces).decode().split("\n\n")[:-2]:
        choice = json.loads(part.removeprefix("data: "))["choices"][0]
        found.append((choice["index"], choice["delta"], choice["finish_reason"]))
    return found


def test_choices_appear_in_order_though_the_last_speaks_first() -> None:
    writer, sink = stream(3)
    writer.text(2, "c")
    writer.text(0, "a")
    for index in range(3):
        writer.finish(index, "stop")
    writer.end(Usage(1, 2))
    found = deltas(sink)
    assert [index for index, delta, _ in found if "role" in delta] == [0, 1, 2]
    assert len(sink.pieces) == 1 and sink.outcome == "finished"
    state: Any = ChatCompletionStreamState()
    for part in sink.pieces[0].decode().split("\n\n")[:-2]:
        state.handle_chunk(ChatCompletionChunk.model_validate_json(part.removeprefix("data: ")))
    assert [choice.message.content for choice in state.get_final_completion().choices] == ["a", "", "c"]


def test_calls_of_a_template_with_tools_become_openais_fragments() -> None:
    """The events are llama.cpp's, recorded with a chat template that knows tools."""
    writer, sink = stream(tooled=True)
    answer = object.__new__(local_chat.ChatAnswer)
    answer.writer, answer._readers, answer._kinds = writer, None, {}
    answer._plan = local_chat.plan([{"type": "function", "function": {"name": "f"}}])
    answer._tokens = answer._reasoning = 0
    for delta, reason in (
        ({"role": "assistant", "content": None}, None),
        (
            {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "f", "arguments": "{"}}]},
            None,
        ),
        ({"tool_calls": [{"index": 0, "function": {"arguments": '"a":'}}]}, None),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}, None),
        ({}, "tool_calls"),
    ):
        answer.see(0, json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}).encode())
    writer.end(Usage())
    found = deltas(sink)
    call = found[0][1]["tool_calls"][0]
    assert found[0][1]["content"] is None and call["function"] == {"name": "f", "arguments": ""}
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert [delta for _, delta, _ in found[1:4]] == [
        {"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ("{", '"a":', "1}")
    ]
    assert found[4][1:] == ({}, "tool_calls")


# memory
def test_calls_enter_in_turn_and_one_that_leaves_lets_the_next_in() -> None:
    async def part() -> None:
        room, entered = Room(10), []

        async def call(name: str, tokens: int, reply: Reply) -> int:
            held = await room.enter(tokens, reply)
            entered.append((name, held))
            return held

        replies = [Reply(Collector()) for _ in range(5)]
        tasks = [
            asyncio.ensure_future(call(name, tokens, reply))
            for name, tokens, reply in zip("abcde", (6, 6, 2, 2, 50), replies, strict=True)
        ]
        await asyncio.sleep(0)
        assert entered == [("a", 6)]  # c would fit, but b was first
        replies[1].close(CLIENT_LEFT)
        await asyncio.sleep(0.01)
        assert entered == [("a", 6), ("b", 0), ("c", 2), ("d", 2)]
        tasks[4].cancel()
        await asyncio.sleep(0.01)
        for tokens in (6, 2, 2):
            room.leave(tokens)
        assert await room.enter(50, Reply(Collector())) == 10  # what can never fit gets all there is

    asyncio.run(part())


def test_what_a_call_needs_is_bounded_by_the_context() -> None:
    assert need(300, 10, 2, 4096) == 101 + 20
    assert need(300, None, 1, 4096) == 101 + 1024
    assert need(300, 9000, 1, 512) == 512


# completions, embeddings
def test_the_four_forms_of_a_prompt() -> None:
    assert prompts_of(None) == prompts_of("") == [""]
    assert prompts_of("a") == ["a"] and prompts_of(["a", "b"]) == ["a", "b"]
    assert prompts_of([1, 2]) == [[1, 2]] and prompts_of([[1], [2]]) == [[1], [2]]


def test_scoring_asks_for_exactly_the_rest_of_the_prompt() -> None:
    body = scoring([5, 6, 7], 3)
    assert body["prompt"] == [5] and body["grammar"] == "root ::= <[6]> <[7]>"
    assert body["n_predict"] == 2 and body["n_probs"] == 3


def test_a_token_that_is_half_a_character_is_spelled_in_bytes() -> None:
    assert spelled(ContentLogprob("a", 0.0, [97])) == "a"
    assert spelled(ContentLogprob("\ufffd", 0.0, [0xE2, 0x80])) == "bytes:\\xe2\\x80"


def test_a_shortened_vector_has_length_one() -> None:
    found = shortened(array("f", [3, 4, 12]), 2)
    assert [round(value, 6) for value in found] == [0.6, 0.8]
    assert shortened(array("f", [0, 0, 1]), 2).tolist() == [0, 0]
    with pytest.raises(BadRequest) as refused:
        shortened(array("f", [1]), 2)
    assert refused.value.param == "dimensions"
    assert math.isclose(sum(v * v for v in shortened(array("f", range(1, 9)), 5)), 1, abs_tol=1e-6)


def test_a_table_gives_back_the_bytes_of_each_token() -> None:
    tokens = [b"a", b"bc", b"\xc3", b"\xa9"]
    table = Table(b"".join(b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    assert len(table) == 4 and [table.token(rank) for rank in range(4)] == tokens
    assert table.text([0, 1, 2, 3]) == "abcé" and table.text([2]) == "\ufffd"
    with pytest.raises(BadRequest):
        table.text([4])


def test_the_ids_of_openais_tokenizer_are_known() -> None:
    assert len(CL100K_SHA256) == 64 and len(cl100k()) == 100_256
    assert cl100k().text([15339, 1917]) == "hello world"
    assert cl100k().text([9906, 11, 220, 98220, 3574, 244, 0]) == "Hello, 界世!"
    assert cl100k().text([100257]) == "<|endoftext|>"


# control tokens
def test_every_spelling_of_a_control_token_is_defused_and_counted() -> None:
    defuser = Defuser(("<|a|>", "[A]", "A][B"))
    assert defuser.text("x<|a|>[A][B<|b|>") == "x<\u200b|a|>[\u200bA\u200b][B<|b|>" and defuser.found == 3
    assert Defuser(()).all([{"a": "<|a|>"}, 1, None]) == [{"a": "<|a|>"}, 1, None]


def test_escapes_in_the_arguments_of_a_call_hide_nothing() -> None:
    calls = [{"function": {"name": "f", "arguments": '{"a":"\\u003c|a|>"}'}}]
    assert json.loads(Defuser(("<|a|>",)).all(calls)[0]["function"]["arguments"]) == {"a": "<\u200b|a|>"}
    innocent = [{"function": {"name": "f", "arguments": '{"a": "\\n"}'}}]
    assert Defuser(("<|a|>",)).all(innocent) == innocent


def test_a_description_demands_no_control_token() -> None:
    node = {"type": "object", "description": "<|a|>", "properties": {"b": {"title": "<|a|>"}}}
    refuse_in_schemas(("<|a|>",), {"response_format": node})
    with pytest.raises(BadRequest):
        refuse_in_schemas(("<|a|>",), {"response_format": {"const": {"description": "<|a|>"}}})
