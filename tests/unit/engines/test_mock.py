"""The mock engine, asked as the pipeline asks it; its answers are read by the official SDK's types and accumulators."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tertulia.api.chat import task as chat_task
from tertulia.core import CLIENT_LEFT, FAILED, FINISHED, NOBODY, Call, Reply, Target, Task, Usage
from tertulia.engines.base import Collector
from tertulia.engines.mock import Mock, embedding
from tertulia.engines.sample import NoInstance, smallest
from tertulia.errors import BadRequest

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "embedding": "/v1/embeddings"}
HELLO: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello there, my friend."},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "minLength": 1}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["location", "unit"],
            "additionalProperties": False,
        },
    },
}


def prepare(body: dict[str, Any], task: str = "chat") -> tuple[Call, Collector]:
    sink = Collector()
    stream = bool(body.get("stream"))
    kind = Task(name=task, path=PATHS[task], check=lambda call: None)
    call = Call("req_1", NOBODY, kind, json.dumps(body).encode(), Reply(sink, stream), 0)
    call.stream = stream
    call.model = "mock"
    call.target = Target(engine=None, model="mock", card=Mock().models()[0])
    return call, sink


def ask(task: str = "chat", **body: Any) -> tuple[Call, Collector, bytes]:
    if task == "chat":
        body.setdefault("messages", HELLO)

    async def run() -> tuple[Call, Collector, bytes]:
        call, sink = prepare(body, task)
        await Mock().answer(call)
        return call, sink, await asyncio.wait_for(sink.done(), 5)

    return asyncio.run(run())


def chat(**body: Any) -> ChatCompletion:
    call, sink, data = ask(**body)
    assert (sink.status, sink.outcome) == (200, FINISHED)
    answer = ChatCompletion.model_validate_json(data, strict=True)
    assert answer.usage is not None and call.reply.usage is not None
    assert call.reply.usage.completion_tokens == answer.usage.completion_tokens
    return answer


def events(pieces: list[bytes]) -> list[Any]:
    """The events of a stream; each piece is whole events, and the last is [DONE]."""
    lines = []
    for piece in pieces:
        assert piece.startswith(b"data: ") and piece.endswith(b"\n\n")
        lines += [event.removeprefix(b"data: ") for event in piece.split(b"\n\n")[:-1]]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


def streamed(**body: Any) -> tuple[ChatCompletion, list[Any]]:
    """What the SDK makes of the stream, and its chunks."""
    _, sink, _ = ask(stream=True, **body)
    assert (sink.status, sink.outcome) == (200, FINISHED)
    chunks = events(sink.pieces)
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in chunks:
        list(state.handle_chunk(ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)))
    whole = state.current_completion_snapshot
    return ChatCompletion.model_validate(whole.model_dump()), chunks


def text(answer: ChatCompletion, index: int = 0) -> str | None:
    return answer.choices[index].message.content


# saying ---------------------------------------------------------------------------------------------------------------


def test_it_echoes_the_last_user_message() -> None:
    answer = chat()
    assert text(answer) == "Hello there, my friend."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 4, 10)
    assert answer.id.startswith("chatcmpl-") and answer.model == "mock"


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert text(chat(messages=[{"role": "user", "content": parts}])) == "one\ntwo"


def test_it_says_the_same_thing_twice_under_two_ids() -> None:
    one, other = chat(mock={"text": "Yes."}), chat(mock={"text": "Yes."})
    assert one.choices == other.choices and one.id != other.id


@pytest.mark.parametrize("script", [{}, {"text": " a  b\nc ", "chunk": 2}, {"text": ""}, {"refusal": "I will not."}])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(script: dict[str, Any], n: int) -> None:
    whole = chat(mock=script, n=n)
    joined, chunks = streamed(mock=script, n=n, stream_options={"include_usage": True})
    for one, other in zip(whole.choices, joined.choices, strict=True):
        assert (one.message.content or None) == (other.message.content or None)
        assert one.message.refusal == other.message.refusal
        assert one.finish_reason == other.finish_reason
    assert joined.usage is not None and whole.usage is not None
    assert joined.usage.total_tokens == whole.usage.total_tokens
    assert [chunk["choices"][0]["index"] for chunk in chunks[:n]] == list(range(n))


def test_the_order_of_chunks_is_openais() -> None:
    _, chunks = streamed(mock={"text": "one two"}, stream_options={"include_usage": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "one"},
        {"content": " two"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2
    for key in ("id", "created", "model", "object", "service_tier", "system_fingerprint"):
        assert len({chunk[key] for chunk in chunks}) == 1
    assert all("obfuscation" in chunk for chunk in chunks[:-1])


def test_without_stream_options_there_is_no_usage_and_padding_can_be_switched_off() -> None:
    _, chunks = streamed()
    assert all("usage" not in chunk for chunk in chunks)
    _, chunks = streamed(stream_options={"include_obfuscation": False})
    assert all("obfuscation" not in chunk for chunk in chunks)


def test_stop_and_max_tokens_end_the_text() -> None:
    stopped = chat(mock={"text": "one two three"}, stop=["three", "two"])
    assert (text(stopped), stopped.choices[0].finish_reason) == ("one ", "stop")
    for name in ("max_tokens", "max_completion_tokens"):
        short = chat(mock={"text": "one two three"}, **{name: 2})
        assert (text(short), short.choices[0].finish_reason) == ("one two", "length")
        assert short.usage is not None and short.usage.completion_tokens == 2
    exact = chat(mock={"text": "one two three"}, max_tokens=3)
    assert (text(exact), exact.choices[0].finish_reason) == ("one two three", "stop")


def test_finish_reason_and_usage_can_be_scripted() -> None:
    answer = chat(mock={"finish_reason": "content_filter", "usage": {"prompt_tokens": 1000, "cached_tokens": 7}})
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.usage is not None and answer.usage.prompt_tokens == 1000 and answer.usage.completion_tokens == 4
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 7


def test_logprobs_cover_the_text_streamed_or_not() -> None:
    whole = chat(logprobs=True, top_logprobs=3)
    joined, _ = streamed(logprobs=True, top_logprobs=3)
    for answer in (whole, joined):
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert "".join(one.token for one in logprobs.content) == "Hello there, my friend."
        for one in logprobs.content:
            assert one.bytes == list(one.token.encode()) and one.logprob < 0
            assert [top.logprob for top in one.top_logprobs] == sorted(
                (t.logprob for t in one.top_logprobs), reverse=True
            )
            assert len(one.top_logprobs) == 3 and one.top_logprobs[0].token == one.token
    assert whole.choices[0].logprobs == joined.choices[0].logprobs
    assert chat().choices[0].logprobs is None


# calling --------------------------------------------------------------------------------------------------------------

CALLS = [{"name": "get_weather", "arguments": {"location": "Boston, MA"}}, {"name": "now", "arguments": "{}"}]


def test_scripted_calls_come_whole_and_in_fragments() -> None:
    whole = chat(mock={"tool_calls": CALLS}, tools=[WEATHER])
    joined, chunks = streamed(mock={"tool_calls": CALLS}, tools=[WEATHER])
    for answer in (whole, joined):
        calls = answer.choices[0].message.tool_calls
        assert calls is not None and answer.choices[0].finish_reason == "tool_calls"
        assert [call.type for call in calls] == ["function", "function"]
        assert [(call.function.name, call.function.arguments) for call in calls if call.type == "function"] == [
            ("get_weather", '{"location":"Boston, MA"}'),
            ("now", "{}"),
        ]
        assert answer.choices[0].message.content is None
    first = chunks[0]["choices"][0]["delta"]
    assert first["role"] == "assistant" and first["content"] is None
    assert first["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}
    fragments = [chunk["choices"][0]["delta"] for chunk in chunks[1:4]]
    assert all(set(delta["tool_calls"][0]) == {"index", "function"} for delta in fragments)
    assert len({call.id for call in whole.choices[0].message.tool_calls or ()}) == 2


def test_text_may_come_before_calls() -> None:
    joined, chunks = streamed(mock={"text": "Let me see.", "tool_calls": CALLS[:1]}, tools=[WEATHER])
    assert text(joined) == "Let me see." and joined.choices[0].message.tool_calls is not None
    assert "tool_calls" not in chunks[0]["choices"][0]["delta"]


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "get_weather"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]},
        },
    ],
)
def test_a_demanded_tool_is_called_with_the_smallest_valid_arguments(choice: Any) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    tools = [WEATHER, other] if choice == "required" else [other, WEATHER]
    for answer in (chat(tools=tools, tool_choice=choice), streamed(tools=tools, tool_choice=choice)[0]):
        calls = answer.choices[0].message.tool_calls
        assert calls is not None and calls[0].type == "function" and calls[0].function.name == "get_weather"
        jsonschema.validate(json.loads(calls[0].function.arguments), WEATHER["function"]["parameters"])  # type: ignore[index]


@pytest.mark.parametrize(
    "choice", ["auto", "none", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}]
)
def test_a_tool_that_is_not_demanded_is_not_called(choice: Any) -> None:
    assert text(chat(tools=[WEATHER], tool_choice=choice)) == "Hello there, my friend."


def test_custom_tools_get_text() -> None:
    custom = {"type": "custom", "custom": {"name": "shell"}}
    named = {"type": "custom", "custom": {"name": "shell"}}
    call = (chat(tools=[custom], tool_choice=named).choices[0].message.tool_calls or [])[0]
    assert call.type == "custom" and (call.custom.name, call.custom.input) == ("shell", "Hello there, my friend.")
    with pytest.raises(BadRequest) as refused:
        grammar = {"type": "custom", "custom": {"name": "shell", "format": {"type": "grammar", "grammar": {}}}}
        ask(tools=[grammar], tool_choice=named)
    assert refused.value.param == "tools"


def test_legacy_functions_are_called_in_the_legacy_way() -> None:
    function = WEATHER["function"]
    asked = {"functions": [function], "function_call": {"name": "get_weather"}}
    for answer in (chat(**asked), streamed(**asked)[0]):
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "function_call" and message.tool_calls is None
        assert message.function_call is not None and message.function_call.name == "get_weather"
        jsonschema.validate(json.loads(message.function_call.arguments), function["parameters"])  # type: ignore[index]
    assert text(chat(functions=[function], function_call="auto")) == "Hello there, my friend."


def test_a_list_of_scripts_plays_a_tool_loop() -> None:
    script = [{"tool_calls": CALLS[:1]}, {"text": "Sunny."}]
    messages = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "old"}, *HELLO]
    first = chat(messages=messages, mock=script, tools=[WEATHER]).choices[0].message
    assert first.tool_calls is not None
    messages += [first.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sun"}]
    assert text(chat(messages=messages, mock=script, tools=[WEATHER])) == "Sunny."
    messages += [{"role": "assistant", "content": "Sunny."}]
    assert text(chat(messages=messages, mock=script)) == "Sunny."


# JSON -----------------------------------------------------------------------------------------------------------------

SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
    {"type": "integer", "exclusiveMinimum": 3, "multipleOf": 5},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "minimum": -3, "maximum": -2.5},
    {"type": "number", "minimum": 0.1, "multipleOf": 0.25},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 4, "uniqueItems": True},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "uniqueItems": True},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "minItems": 2},
    {"type": "string", "pattern": "^[A-Z]{3}-\\d{4}$"},
    {"type": "string", "pattern": "^(foo|bar)+$", "minLength": 7},
    {"type": "string", "pattern": "[^a-z0-9]+@\\w+", "maxLength": 9},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "email"},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {
        "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["next"]}}},
    {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}, "required": ["children"]},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"allOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]}, {"required": ["b"]}], "type": "object"},
    {"type": "object", "minProperties": 2, "properties": {"x": {"const": 1}}, "additionalProperties": {"type": "null"}},
    {"type": ["null", "boolean"]},
    {},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_the_smallest_instance_is_valid_and_always_the_same(schema: Any) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    said = text(chat(response_format=format))
    assert said is not None and said == text(streamed(response_format=format)[0]) == text(chat(response_format=format))
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(said))


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "string", "pattern": "("},
        {"type": "array", "items": {"type": "null"}, "minItems": 2, "uniqueItems": True},
        {"type": "array", "minItems": 10**9},
        {"type": "banana"},
    ],
    ids=str,
)
def test_a_schema_without_instance_is_refused(schema: Any) -> None:
    with pytest.raises(NoInstance):
        smallest(schema)
    with pytest.raises(BadRequest) as refused:
        ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert refused.value.param == "response_format"


def test_json_object_and_scripted_text_in_json_mode() -> None:
    assert text(chat(response_format={"type": "json_object"})) == "{}"
    assert text(chat(response_format={"type": "json_object"}, mock={"text": '{"a":1}'})) == '{"a":1}'


# breaking -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_error_is_an_ordinary_status(stream: bool) -> None:
    error = {"status": 429, "message": "Slow down.", "retry_after": 1.5}
    call, sink, data = ask(stream=stream, mock={"error": error})
    assert (sink.status, sink.outcome) == (429, FAILED)
    told = json.loads(data)["error"]
    assert told == {"message": "Slow down.", "type": "requests", "param": None, "code": "rate_limit_exceeded"}
    assert b"retry-after-ms: 1500\r\n" in call.reply.headers and b"x-should-retry: true\r\n" in call.reply.headers


def test_a_quota_error_is_not_worth_another_try_and_odd_statuses_are_kept() -> None:
    call, sink, _ = ask(mock={"error": {"status": 429, "code": "insufficient_quota"}})
    assert sink.status == 429 and b"x-should-retry: false\r\n" in call.reply.headers
    _, sink, data = ask(mock={"error": {"status": 418, "type": "teapot"}})
    assert sink.status == 418 and json.loads(data)["error"]["type"] == "teapot"


def test_an_error_after_some_pieces_is_an_event() -> None:
    _, sink, _ = ask(stream=True, mock={"text": "a b c d", "cut": 2, "error": {"status": 500}})
    assert (sink.status, sink.outcome) == (200, FAILED)
    said = [json.loads(piece.removeprefix(b"data: ")) for piece in sink.pieces]
    assert [one["choices"][0]["delta"].get("content") for one in said[:-1]] == ["", "a", " b"]
    assert said[-1]["error"]["type"] == "server_error"


def test_a_cut_stream_just_ends() -> None:
    call, sink, data = ask(stream=True, mock={"text": "a b c d", "cut": 1})
    assert sink.outcome == FAILED and b"[DONE]" not in data and b'"error"' not in data
    assert len(sink.pieces) == 2 and call.reply.usage == Usage(prompt_tokens=6, completion_tokens=1)
    _, sink, _ = ask(mock={"text": "a b c d", "cut": 1})
    assert (sink.status, sink.outcome) == (502, FAILED)


@pytest.mark.parametrize(
    ("script", "param"),
    [
        ({"txt": "a"}, "mock"),
        ({"chunk": 0}, "mock.chunk"),
        ("text", "mock"),
        ({"error": {"status": 200}}, "mock.error.status"),
        ([{"delay": -1}], "mock[0].delay"),
        ({"finish_reason": "eos"}, "mock.finish_reason"),
    ],
)
def test_a_wrong_script_is_a_400_that_names_the_field(script: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        ask(mock=script)
    assert refused.value.param == param and "Invalid" in refused.value.message


# timing ---------------------------------------------------------------------------------------------------------------


def test_delays_come_before_the_first_byte_and_between_pieces() -> None:
    async def run(stream: bool) -> tuple[list[float], list[tuple[float, int]]]:
        """When each piece came, and the delays that were asked of the loop, each with the pieces that came before."""
        loop = asyncio.get_running_loop()
        call, sink = prepare(
            {"messages": HELLO, "stream": stream, "mock": {"text": "a b c", "first_delay": 0.05, "delay": 0.02}}
        )
        began = loop.time()
        times: list[float] = []
        waits: list[tuple[float, int]] = []
        later = loop.call_later

        def noted(delay: float, *what: Any, **context: Any) -> asyncio.TimerHandle:
            waits.append((delay, len(times)))
            return later(delay, *what, **context)

        call.reply.tap(lambda piece: times.append(loop.time() - began))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_later", noted)
            await Mock().answer(call)
            assert not call.reply.begun
            await sink.done()
        return times, waits

    times, waits = asyncio.run(run(True))
    assert len(times) == 6  # role, a, b, c, finish, [DONE]
    assert waits == [(0.05, 0), (0.02, 2), (0.02, 3)]  # none before a, nor before the finish
    assert times[0] >= 0.049 and times[2] - times[1] >= 0.019 and times[3] - times[2] >= 0.019
    times, waits = asyncio.run(run(False))
    assert waits == [(pytest.approx(0.09), 0)] and times[0] >= 0.089


def test_it_stops_when_the_client_leaves() -> None:
    async def run() -> None:
        call, sink = prepare({"messages": HELLO, "stream": True, "mock": {"text": "a b c", "delay": 0.01}})
        await Mock().answer(call)
        seen = len(sink.pieces)
        call.reply.close(CLIENT_LEFT)
        await asyncio.sleep(0.05)
        assert len(sink.pieces) == seen == 2 and sink.outcome == CLIENT_LEFT
        assert call.reply.usage == Usage(prompt_tokens=6, completion_tokens=1)

    asyncio.run(run())


def test_it_stops_when_the_client_leaves_before_the_first_byte() -> None:
    async def run() -> None:
        call, sink = prepare({"messages": HELLO, "mock": {"first_delay": 0.01}})
        await Mock().answer(call)
        call.reply.close(CLIENT_LEFT)
        await asyncio.sleep(0.03)
        assert sink.status == 0 and not sink.pieces

    asyncio.run(run())


@pytest.mark.parametrize("delay", [0, 0.001])
def test_a_slow_reader_pauses_it(delay: float) -> None:
    async def run() -> None:
        call, sink = prepare({"messages": HELLO, "stream": True, "mock": {"text": "a b c d e f", "delay": delay}})
        pieces = 0

        def see(piece: bytes) -> None:
            nonlocal pieces
            pieces += 1
            if pieces == 3:
                call.reply.pause()

        call.reply.tap(see)
        await Mock().answer(call)
        async with asyncio.timeout(10):
            while pieces < 3:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert pieces == 3 and sink.outcome is None
        call.reply.resume()
        await asyncio.wait_for(sink.done(), 10)
        assert len(events(sink.pieces)) == 8

    asyncio.run(run())


def test_a_long_stream_lets_others_in() -> None:
    async def run() -> None:
        call, sink = prepare({"messages": HELLO, "stream": True, "mock": {"text": "word " * 5000}})
        await Mock().answer(call)
        assert sink.outcome is None and len(sink.pieces) < 200
        await asyncio.wait_for(sink.done(), 5)
        assert sink.outcome == FINISHED and len(sink.pieces) == 5000 + 3  # role, words, finish, [DONE]

    asyncio.run(run())


# completions ----------------------------------------------------------------------------------------------------------


def complete(**body: Any) -> Completion:
    _, sink, data = ask("completion", **body)
    assert sink.status == 200, data
    return Completion.model_validate_json(data, strict=True)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("a b", ["a b"]), (["a b", "c"], ["a b", "c"]), ([1, 2, 3], ["1 2 3"]), ([[1], [2, 3]], ["1", "2 3"])],
)
def test_prompts_of_every_form_give_n_choices_each(prompt: Any, said: list[str]) -> None:
    answer = complete(prompt=prompt, n=2)
    assert [choice.text for choice in answer.choices] == [one for one in said for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(said)))
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(len(one.split()) for one in said)
    _, sink, _ = ask("completion", prompt=prompt, n=2, stream=True, stream_options={"include_usage": True})
    chunks = events(sink.pieces)
    joined = [""] * len(answer.choices)
    for chunk in chunks:
        for choice in chunk["choices"]:
            joined[choice["index"]] += choice["text"]
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # OpenAI sends null; the SDK's type has none
        Completion.model_validate_json(json.dumps(chunk), strict=True)
    assert joined == [choice.text for choice in answer.choices]
    assert chunks[-1]["usage"]["total_tokens"] == answer.usage.total_tokens


def test_completions_echo_suffix_limit_and_logprobs() -> None:
    answer = complete(prompt="one two", mock={"text": " three four"}, max_tokens=1, echo=True, suffix=" end")
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("one two three end", "length")
    plain = complete(prompt="one two", mock={"text": " three four"}, logprobs=2).choices[0].logprobs
    assert plain is not None and plain.tokens == [" three", " four"] and plain.text_offset == [0, 6]
    assert plain.top_logprobs is not None and all(len(one) == 2 for one in plain.top_logprobs)


def test_scoring_a_prompt_gives_its_logprobs_only() -> None:
    _, _, data = ask("completion", prompt="one two", max_tokens=0, echo=True, logprobs=1)
    choice = json.loads(data)["choices"][0]
    assert choice["text"] == "one two" and choice["logprobs"]["tokens"] == ["one", " two"]
    first, second = choice["logprobs"]["token_logprobs"]
    assert first is None and second < 0 and choice["logprobs"]["text_offset"] == [0, 3]


def test_completions_stop_after_sixteen_tokens_by_default() -> None:
    choice = complete(prompt="word " * 20).choices[0]
    assert len(choice.text.split()) == 16 and choice.finish_reason == "length"


# embeddings -----------------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_in_order() -> None:
    _, _, data = ask("embedding", input=["the quick fox", "a slow dog", "The fox, quick"])
    answer = CreateEmbeddingResponse.model_validate_json(data, strict=True)
    vectors = [one.embedding for one in answer.data]
    assert [one.index for one in answer.data] == [0, 1, 2] and answer.usage.prompt_tokens == 9
    assert all(len(vector) == 384 and math.isclose(sum(x * x for x in vector), 1) for vector in vectors)
    assert vectors[0] == vectors[2] != vectors[1]


def test_texts_that_share_words_are_nearer() -> None:
    def near(one: str, other: str) -> float:
        return sum(a * b for a, b in zip(embedding(one), embedding(other), strict=True))

    assert (
        near("the cat sat on the mat", "a cat on a mat") > 0.4 > 0.2 > near("the cat sat", "quarterly budget figures")
    )


@pytest.mark.parametrize("size", [1, 8, 384, 1536])
def test_embeddings_in_base64_are_the_same_numbers(size: int) -> None:
    _, _, coded = ask("embedding", input="a fox", dimensions=size, encoding_format="base64")
    _, _, plain = ask("embedding", input="a fox", dimensions=size, encoding_format="float")
    raw = base64.b64decode(json.loads(coded)["data"][0]["embedding"])
    numbers = struct.unpack(f"<{size}f", raw)
    assert numbers == pytest.approx(json.loads(plain)["data"][0]["embedding"], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "count", "tokens"), [([1, 2], 1, 2), ([[1], [2, 3]], 2, 3), ("", 1, 0), ("...", 1, 1)]
)
def test_embeddings_of_token_ids_and_of_no_words(given: Any, count: int, tokens: int) -> None:
    _, _, data = ask("embedding", input=given)
    answer = json.loads(data)
    assert len(answer["data"]) == count and answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert all(math.isclose(sum(x * x for x in one["embedding"]), 1) for one in answer["data"])


@pytest.mark.parametrize("make", [lambda: ask("embedding", input="a", mock={"error": {"status": 503}})])
def test_embeddings_break_as_told(make: Callable[[], tuple[Call, Collector, bytes]]) -> None:
    _, sink, data = make()
    assert sink.status == 503 and json.loads(data)["error"]["code"] == "server_is_overloaded"


def test_it_offers_two_models_and_is_ready() -> None:
    assert [(card.id, card.kind) for card in Mock().models()] == [("mock", "chat"), ("mock-embedding", "embedding")]
    assert asyncio.run(Mock().ready("mock"))


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"banana": 1}, "banana"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
    ],
)
def test_what_it_cannot_do_is_a_400_that_names_the_parameter(wrong: dict[str, Any], param: str) -> None:
    call, _ = prepare({"model": "mock", "messages": HELLO, **wrong})
    chat_task(lambda call, model: None).check(call)
    with pytest.raises(BadRequest) as refused:
        asyncio.run(Mock().answer(call))
    assert refused.value.param == param


def test_the_embedding_model_does_not_chat() -> None:
    call, _ = prepare({"model": "mock-embedding", "messages": HELLO})
    call.target = Target(engine=None, model="mock-embedding", card=Mock().models()[1])
    with pytest.raises(BadRequest) as refused:
        asyncio.run(Mock().answer(call))
    assert refused.value.param == "model"
