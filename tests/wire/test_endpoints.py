"""Every endpoint x {sync, async} x {stream, not}, by the official SDK in strict mode, against the real local models.

`ask` runs the same call by both clients, so that each test below is two. Strict mode raises on any deviation from the
SDK's typed shapes, so a call that returns has been checked field by field; the tests assert what the values mean.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel, Field

from conftest import Served

QUESTION = [{"role": "user", "content": "Say hello."}]
WEATHER = {
    "type": "object",
    "properties": {"location": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
    "required": ["location", "unit"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather somewhere", "parameters": WEATHER},
}
TIME_TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}

Ask = Callable[..., Any]


def run_async(work: Callable[[], Any]) -> Any:
    return asyncio.run(work())


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, server: Served) -> Ask:
    """ask("chat.completions", "create", **parameters): the answer, or for a stream the list of its chunks."""

    def find(client: Any, resource: str) -> Any:
        for name in resource.split("."):
            client = getattr(client, name)
        return client

    def sync(resource: str, verb: str, *arguments: Any, **parameters: Any) -> Any:
        with server.client() as client:
            answer = getattr(find(client, resource), verb)(*arguments, **parameters)
            return list(answer) if parameters.get("stream") else answer

    def asynchronous(resource: str, verb: str, *arguments: Any, **parameters: Any) -> Any:
        async def work() -> Any:
            async with server.async_client() as client:
                answer = await getattr(find(client, resource), verb)(*arguments, **parameters)
                return [chunk async for chunk in answer] if parameters.get("stream") else answer

        return run_async(work)

    return sync if request.param == "sync" else asynchronous


def chat(ask: Ask, messages: Any = QUESTION, **parameters: Any) -> Any:
    return ask(
        "chat.completions", "create", **{"model": "gpt-4o-mini", "messages": messages, "max_tokens": 24, **parameters}
    )


def text_of(chunks: list[Any], index: int = 0) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index)


# ---- models


def test_models_are_listed_and_retrieved(ask: Ask) -> None:
    ids = [model.id for model in ask("models", "list").data]
    assert {"smollm2-135m-instruct", "all-minilm-l6-v2", "mock"} <= set(ids)
    for id in ids:
        assert ask("models", "retrieve", id).id == id


def test_an_openai_name_is_retrieved_under_that_name(ask: Ask) -> None:
    assert ask("models", "retrieve", "gpt-3.5-turbo").id == "gpt-3.5-turbo"


# ---- chat, whole and streamed


@pytest.mark.parametrize("stream", [False, True])
def test_chat_answers(ask: Ask, stream: bool) -> None:
    answer = chat(ask, temperature=0, stream=stream)
    if stream:
        assert len({chunk.id for chunk in answer}) == 1
        assert answer[0].choices[0].delta.role == "assistant"
        assert len([chunk for chunk in answer if chunk.choices[0].finish_reason]) == 1
        assert text_of(answer)
    else:
        assert answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.model == "smollm2-135m-instruct"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def test_stream_and_whole_say_the_same(ask: Ask) -> None:
    whole = chat(ask, seed=7, temperature=0.9)
    assert text_of(chat(ask, seed=7, temperature=0.9, stream=True)) == whole.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_usage_is_counted(ask: Ask, stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = chat(
        ask, max_tokens=6, stream=stream, messages=[{"role": "user", "content": "Tell a long story."}], **options
    )
    usage = answer[-1].usage if stream else answer.usage
    assert usage.completion_tokens == 6
    if stream:
        assert answer[-1].choices == []
        assert all(chunk.usage is None for chunk in answer[:-1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length_ends_an_answer(ask: Ask, stream: bool, name: str) -> None:
    parameters = {"max_tokens": None, name: 3}
    answer = chat(ask, [{"role": "user", "content": "Tell a long story."}], stream=stream, **parameters)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    assert choices[-1].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(ask: Ask, stream: bool) -> None:
    answer = chat(ask, n=3, seed=1, temperature=1, stream=stream, messages=[{"role": "user", "content": "Say a name."}])
    if stream:
        first_seen = list(dict.fromkeys(choice.index for chunk in answer for choice in chunk.choices))
        texts = [text_of(answer, index) for index in range(3)]
    else:
        first_seen = [choice.index for choice in answer.choices]
        texts = [choice.message.content for choice in answer.choices]
    assert first_seen == [0, 1, 2]
    assert all(texts) and len(set(texts)) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_ends_it_and_is_not_shown(ask: Ask, stream: bool) -> None:
    whole = chat(ask, temperature=0).choices[0].message.content
    word = whole.split()[2]
    answer = chat(ask, temperature=0, stop=[word], stream=stream)
    text = text_of(answer) if stream else answer.choices[0].message.content
    assert word not in text and text == whole[: whole.index(word)]


def test_the_same_seed_gives_the_same_text(ask: Ask) -> None:
    story = [{"role": "user", "content": "Invent a short story about a fox."}]
    texts = [chat(ask, story, seed=seed, temperature=1.2).choices[0].message.content for seed in (11, 11, 12)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(ask: Ask, stream: bool) -> None:
    answer = chat(ask, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0, stream=stream)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content or []]
    assert len(tokens) == 4
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].logprob == max(top.logprob for top in token.top_logprobs)


def test_logit_bias_forbids_a_token(ask: Ask) -> None:
    plain = chat(ask, max_tokens=1, temperature=0, logprobs=True, top_logprobs=1)
    # token ids are the model's own: found by trying the ids that the model writes this word with
    first = plain.choices[0].message.content
    completion = ask("completions", "create", model="smollm2-135m-instruct", prompt=first, max_tokens=1, temperature=0)
    assert completion.usage.prompt_tokens == 1
    biased = chat(ask, max_tokens=1, temperature=0, logit_bias={str(number): -100 for number in range(0, 30000)})
    assert biased.choices[0].message.content != first


def test_messages_of_every_role(ask: Ask) -> None:
    conversation = [
        {"role": "developer", "content": "You answer in one word."},
        {"role": "system", "content": "Be friendly."},
        {
            "role": "user",
            "name": "ana",
            "content": [{"type": "text", "text": "What is the weather in "}, {"type": "text", "text": "Rome?"}],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"location":"Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "assistant", "content": None, "function_call": {"name": "get_time", "arguments": "{}"}},
        {"role": "function", "name": "get_time", "content": "noon"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thank you. And Paris?"},
    ]
    assert chat(ask, conversation).choices[0].message.content


def test_parameters_that_only_travel_are_accepted(ask: Ask) -> None:
    answer = chat(
        ask, presence_penalty=0.5, frequency_penalty=0.5, top_p=0.9, metadata={"a": "b"}, user="u",
        safety_identifier="s",
        prompt_cache_key="k", service_tier="auto", parallel_tool_calls=None, store=False, max_tokens=4,
    )  # fmt: skip
    assert answer.service_tier == "default"


# ---- structured answers


class Person(BaseModel):
    """Bounded, so that no model can talk until its limit, which the SDK's helpers refuse."""

    name: Literal["Ana", "Bob"]
    age: Annotated[int, Field(ge=0, le=150)]


@pytest.mark.parametrize("stream", [False, True])
def test_json_mode(ask: Ask, stream: bool) -> None:
    answer = chat(
        ask, [{"role": "user", "content": "Describe Ana, aged 30, as JSON with name and age."}], max_tokens=120,
        temperature=0,
        response_format={"type": "json_object"}, stream=stream,
    )  # fmt: skip
    if stream:
        chunks = list(answer)
        text, reason = text_of(chunks), [c.finish_reason for chunk in chunks for c in chunk.choices][-1]
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    if reason == "length":  # the model would have said more: what there is, is the beginning of an object
        assert text.lstrip().startswith("{")
    else:
        assert isinstance(json.loads(text), dict)


def test_parse_gives_a_model(ask: Ask) -> None:
    answer = ask(
        "chat.completions", "parse", model="gpt-4o-mini", temperature=0, response_format=Person, max_tokens=80,
        messages=[{"role": "user", "content": "Ana is 30 years old. Who is she?"}],
    )  # fmt: skip
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)


def test_the_sdk_stream_helper(server: Served) -> None:
    with server.client().chat.completions.stream(
        model="gpt-4o-mini", temperature=0, response_format=Person, max_tokens=80,
        messages=[{"role": "user", "content": "Ana is 30 years old. Who is she?"}],
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Person)


def test_the_async_sdk_stream_helper(server: Served) -> None:
    async def work() -> Any:
        async with server.async_client().chat.completions.stream(
            model="gpt-4o-mini", temperature=0, max_tokens=80, tools=[pydantic_function_tool(Person)],
            tool_choice="required",
            messages=[{"role": "user", "content": "Ana is 30 years old. Who is she?"}],
        ) as stream:  # fmt: skip
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    final = run_async(work)
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Person)


# ---- tools


def calls_of(answer: Any, stream: bool) -> list[tuple[str, str]]:
    """(name, arguments) of each call, put together from fragments for a stream."""
    if not stream:
        return [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls or []]
    calls: dict[int, list[str]] = {}
    for chunk in answer:
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or []:
                if call.index not in calls:
                    assert call.id and call.function.name
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments or ""
    return [(name, arguments) for name, arguments in calls.values()]


def check_weather(arguments: str) -> None:
    given = json.loads(arguments)
    assert set(given) == {"location", "unit"} and given["unit"] in ("celsius", "fahrenheit")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_is_valid(ask: Ask, stream: bool, choice: Any) -> None:
    answer = chat(
        ask, [{"role": "user", "content": "What's the weather like in Boston?"}], tools=[TOOL], tool_choice=choice,
        parallel_tool_calls=False, max_tokens=100, stream=stream,
    )  # fmt: skip
    [(name, arguments)] = calls_of(answer, stream)
    assert name == "get_weather"
    check_weather(arguments)
    finish = (
        [c.finish_reason for chunk in answer for c in chunk.choices][-1] if stream else answer.choices[0].finish_reason
    )
    assert finish == "tool_calls"
    if not stream:
        assert answer.choices[0].message.content is None


@pytest.mark.parametrize("stream", [False, True])
def test_allowed_tools(ask: Ask, stream: bool) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    answer = chat(
        ask, [{"role": "user", "content": "What time is it?"}], tools=[TIME_TOOL, TOOL], max_tokens=200, stream=stream,
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    )  # fmt: skip
    assert {name for name, _ in calls_of(answer, stream)} == {"get_weather"}


@pytest.mark.parametrize("stream", [False, True])
def test_auto_and_none_may_answer_in_text(ask: Ask, stream: bool) -> None:
    for choice in ("auto", "none"):
        answer = chat(ask, tools=[TOOL], tool_choice=choice, max_tokens=60, temperature=0, stream=stream)
        calls = calls_of(answer, stream)
        text = text_of(answer) if stream else answer.choices[0].message.content
        assert bool(calls) != bool(text)
        assert not calls or choice == "auto"


CUSTOM = {
    "messages": [{"role": "user", "content": "Note: buy milk."}], "parallel_tool_calls": False, "max_tokens": 80,
    "tools": [{"type": "custom", "custom": {"name": "note", "description": "Takes a note"}}],
    "tool_choice": {"type": "custom", "custom": {"name": "note"}},
}  # fmt: skip


def test_a_custom_tool(ask: Ask) -> None:
    [call] = chat(ask, **CUSTOM).choices[0].message.tool_calls
    assert call.type == "custom" and call.custom.name == "note" and call.custom.input


def check_custom_chunks(chunks: list[Any]) -> None:
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert calls[0].type == "custom" and calls[0].custom["name"] == "note"
    assert "".join(call.custom.get("input", "") for call in calls)


# The SDK's type of a streamed call knows functions only, so OpenAI's own custom calls fail its strict mode too.
def test_a_custom_tool_streamed(server: Served) -> None:
    with server.client(_strict_response_validation=False) as client:
        check_custom_chunks(list(client.chat.completions.create(model="gpt-4o-mini", stream=True, **CUSTOM)))


def test_a_custom_tool_streamed_async(server: Served) -> None:
    async def work() -> list[Any]:
        async with server.async_client(_strict_response_validation=False) as client:
            stream = await client.chat.completions.create(model="gpt-4o-mini", stream=True, **CUSTOM)
            return [chunk async for chunk in stream]

    check_custom_chunks(asyncio.run(work()))


@pytest.mark.parametrize("stream", [False, True])
def test_legacy_functions(ask: Ask, stream: bool) -> None:
    answer = chat(
        ask, [{"role": "user", "content": "What's the weather like in Boston?"}], max_tokens=100, stream=stream,
        functions=[TOOL["function"]], function_call={"name": "get_weather"},
    )  # fmt: skip
    if stream:
        deltas = [
            choice.delta.function_call for chunk in answer for choice in chunk.choices if choice.delta.function_call
        ]
        assert deltas[0].name == "get_weather"
        check_weather("".join(delta.arguments or "" for delta in deltas))
    else:
        assert answer.choices[0].finish_reason == "function_call"
        assert answer.choices[0].message.function_call.name == "get_weather"
        check_weather(answer.choices[0].message.function_call.arguments)


# ---- completions


def complete(ask: Ask, prompt: Any, **parameters: Any) -> Any:
    return ask(
        "completions", "create", **{"model": "gpt-3.5-turbo-instruct", "prompt": prompt, "max_tokens": 5, **parameters}
    )


def test_completion_of_text(ask: Ask) -> None:
    answer = complete(ask, "Once upon a", temperature=0)
    assert answer.choices[0].text and answer.usage.completion_tokens == 5


def test_completion_default_length_is_sixteen(ask: Ask) -> None:
    answer = complete(ask, "One, two, three, four,", max_tokens=None, temperature=0)
    assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"


def test_completion_of_many_prompts(ask: Ask) -> None:
    answer = complete(ask, ["One, two,", "Red, green,"], n=2, temperature=1, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_completion_of_token_ids(ask: Ask) -> None:
    assert complete(ask, [28120, 905], model="smollm2-135m-instruct").usage.prompt_tokens == 2
    assert len(complete(ask, [[28120], [905]], model="smollm2-135m-instruct").choices) == 2


def test_completion_echo_and_logprobs(ask: Ask) -> None:
    answer = complete(ask, "Hello", echo=True, temperature=0)
    assert answer.choices[0].text.startswith("Hello")
    logprobs = complete(ask, "One, two,", logprobs=2, temperature=0).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5


def test_completion_best_of(ask: Ask) -> None:
    assert len(complete(ask, "The sky is", best_of=3, n=1, seed=1, temperature=1).choices) == 1


def test_completion_stream(server: Served) -> None:
    # The SDK's type of a streamed completion demands a finish_reason on every chunk, which OpenAI itself does not send:
    # this one shape cannot be streamed in strict mode by anybody.
    client = server.client(_strict_response_validation=False)
    chunks = list(
        client.completions.create(
            model="gpt-3.5-turbo-instruct", prompt="Once upon a", max_tokens=5, stream=True, temperature=0
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"

    async def work() -> str:
        async_client = server.async_client(_strict_response_validation=False)
        stream = await async_client.completions.create(
            model="gpt-3.5-turbo-instruct", prompt="Once upon a", max_tokens=5, stream=True, temperature=0
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    assert run_async(work) == "".join(chunk.choices[0].text for chunk in chunks)


# ---- embeddings


def embed(ask: Ask, given: Any, **parameters: Any) -> Any:
    # Floats, because the SDK validates before it decodes base64: what it asks for by default fails its own strict mode.
    return ask(
        "embeddings",
        "create",
        **{"model": "text-embedding-3-small", "input": given, "encoding_format": "float", **parameters},
    )


def similarity(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_embeddings_mean_something(ask: Ask) -> None:
    answer = embed(ask, ["How do I reset my password?", "I forgot my login credentials", "The cat sat on the mat"])
    first, second, third = (item.embedding for item in answer.data)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert len(first) == 384 and abs(similarity(first, first) - 1) < 1e-3
    assert similarity(first, second) > similarity(first, third) + 0.2
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10


def test_embedding_encodings_agree(ask: Ask, server: Served) -> None:
    floats = embed(ask, "hello").data[0].embedding
    client = server.client(_strict_response_validation=False)
    default = client.embeddings.create(model="text-embedding-3-small", input="hello").data[0].embedding
    assert isinstance(default, list) and similarity(floats, default) > 0.9999  # the SDK asked for base64 and decoded it


def test_base64_is_little_endian_float32(server: Served) -> None:
    raw = server.client().embeddings.with_raw_response.create(
        model="text-embedding-3-small", input="hello", encoding_format="base64"
    )
    packed = json.loads(raw.text)["data"][0]["embedding"]
    vector = struct.unpack("<384f", base64.b64decode(packed))
    assert abs(sum(x * x for x in vector) - 1) < 1e-3


def test_fewer_dimensions_are_a_renormalised_prefix(ask: Ask) -> None:
    whole = embed(ask, "hello").data[0].embedding
    short = embed(ask, "hello", dimensions=64).data[0].embedding
    assert len(short) == 64 and abs(similarity(short, short) - 1) < 1e-3
    assert similarity(short, whole[:64]) > 0


def test_embedding_of_token_ids(ask: Ask) -> None:
    own = embed(ask, [[7592]], model="all-minilm-l6-v2").data[0].embedding  # "hello" in the model's own vocabulary
    assert similarity(own, embed(ask, "hello").data[0].embedding) > 0.99


def test_embedding_of_cl100k_ids_as_langchain_sends_them(ask: Ask) -> None:
    by_ids = embed(ask, [[15339, 1917]]).data[0].embedding  # "hello world" in OpenAI's cl100k_base
    assert similarity(by_ids, embed(ask, "hello world").data[0].embedding) > 0.99


def test_many_inputs_keep_their_order(ask: Ask) -> None:
    texts = [f"number {number} " + "word " * (number % 7) for number in range(40)]
    together = [item.embedding for item in embed(ask, texts).data]
    for at in (0, 13, 39):
        assert similarity(together[at], embed(ask, texts[at]).data[0].embedding) > 0.99


@pytest.fixture(autouse=True)
def _no_leftovers(server: Served) -> Iterator[None]:
    """After each test the server must still be there."""
    yield
    assert server.process.poll() is None
