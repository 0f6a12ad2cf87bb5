"""What a program of some years ago does, run inside an environment with an older SDK.

Usage: python old_sdk_program.py CHAT_MODEL COMPLETION_MODEL EMBEDDING_MODEL, with OPENAI_BASE_URL and OPENAI_API_KEY
set. Prints one JSON line a check: {"check": NAME, "ok": true} or with "error". Exit code 0 if all are ok.

The clients validate strictly, so an answer that differs from the SDK's types is an error. Two exceptions, where the SDK
contradicts itself or OpenAI: the stream of the legacy completions (OpenAI sends a null finish_reason, which the type
does not allow), and embeddings in base64 (which the SDK asks for, and decodes only after it has validated floats).
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

CHAT, COMPLETION, EMBEDDING = sys.argv[1:4]
client = OpenAI(_strict_response_validation=True, max_retries=0, timeout=120)
lenient = OpenAI(max_retries=0, timeout=120)
MESSAGES: Any = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Say hello, please."},
]
FUNCTION: Any = {
    "name": "get_weather",
    "description": "Get the current weather in a given location",
    "parameters": {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["unit", "days"],
        "additionalProperties": False,
    },
}
TOOL: Any = {"type": "function", "function": FUNCTION}
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def valid_arguments(text: str) -> None:
    given = json.loads(text)
    assert set(given) == {"unit", "days"}, given
    assert given["unit"] in ("celsius", "fahrenheit") and 1 <= given["days"] <= 9, given


class Colour(BaseModel):
    name: Literal["red", "blue"]  # bounded, so that no model can talk until its limit, which the SDK's helpers refuse
    warm: bool


COLOUR: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "colour",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "enum": ["red", "blue"]}, "warm": {"type": "boolean"}},
            "required": ["name", "warm"],
            "additionalProperties": False,
        },
    },
}


@check
def models_list() -> None:
    names = [model.id for model in client.models.list()]
    assert names and len(names) == len(set(names)), names


@check
def models_retrieve() -> None:
    name = next(iter(client.models.list())).id
    model = client.models.retrieve(name)
    assert model.id == name and model.object == "model"


@check
def chat() -> None:
    answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=16, temperature=0)
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


@check
def chat_n() -> None:
    answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]


@check
def chat_logprobs() -> None:
    answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and all(len(one.top_logprobs) == 2 for one in logprobs.content)


@check
def chat_stream() -> None:
    stream = client.chat.completions.create(
        model=CHAT, messages=MESSAGES, max_tokens=16, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.completion_tokens


@check
def chat_raw_response() -> None:
    raw = client.chat.completions.with_raw_response.create(model=CHAT, messages=MESSAGES, max_tokens=4)
    assert raw.headers["x-request-id"] and raw.parse().choices


@check
def chat_tools() -> None:
    answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, tools=[TOOL], tool_choice="required")
    call: Any = (answer.choices[0].message.tool_calls or [])[0]
    assert call.function.name == "get_weather" and call.id and call.type == "function"
    valid_arguments(call.function.arguments)
    again = [
        *MESSAGES,
        answer.choices[0].message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
        {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'},
    ]
    after = client.chat.completions.create(model=CHAT, messages=again, tools=[TOOL], tool_choice="none", max_tokens=8)
    assert after.choices[0].message.tool_calls is None


@check
def chat_tools_stream() -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    name, arguments = "", ""
    for chunk in client.chat.completions.create(
        model=CHAT, messages=MESSAGES, tools=[TOOL], tool_choice=named, stream=True
    ):
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.index == 0 and part.function
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert name == "get_weather", name
    valid_arguments(arguments)


@check
def chat_functions() -> None:
    forced: Any = {"name": "get_weather"}
    answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, functions=[FUNCTION], function_call=forced)
    call = answer.choices[0].message.function_call
    assert call and call.name == "get_weather"
    valid_arguments(call.arguments)


@check
def chat_json_object() -> None:
    messages: Any = [{"role": "user", "content": "Answer with an empty JSON object."}]
    answer = client.chat.completions.create(
        model=CHAT, messages=messages, response_format={"type": "json_object"}, max_tokens=64, temperature=0
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@check
def chat_json_schema() -> None:
    answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, response_format=COLOUR)
    said = json.loads(answer.choices[0].message.content or "")
    assert said["name"] in ("red", "blue") and isinstance(said["warm"], bool) and len(said) == 2, said


@check
def chat_parse() -> None:
    home: Any = client.chat.completions if hasattr(client.chat.completions, "parse") else client.beta.chat.completions
    asked: Any = [{"role": "user", "content": "A warm colour, one word."}]
    answer = home.parse(model=CHAT, messages=asked, response_format=Colour, max_tokens=200, temperature=0)
    assert isinstance(answer.choices[0].message.parsed, Colour)


@check
def chat_stream_helper() -> None:
    home: Any = client.chat.completions if hasattr(client.chat.completions, "stream") else client.beta.chat.completions
    with home.stream(model=CHAT, messages=MESSAGES, response_format=Colour, max_tokens=200) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and isinstance(final.choices[0].message.parsed, Colour)


@check
def chat_async() -> None:
    async def both() -> None:
        async with AsyncOpenAI(_strict_response_validation=True, max_retries=0, timeout=120) as other:
            answer = await other.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=8)
            assert answer.choices[0].message.content
            text = ""
            stream = await other.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=8, stream=True)
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            assert text
            assert [model async for model in other.models.list()]

    asyncio.run(both())


@check
def completions() -> None:
    answer = client.completions.create(model=COMPLETION, prompt=["Once upon a time", "Hello"], max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.usage
    echoed = client.completions.create(
        model=COMPLETION, prompt="Once upon a time", max_tokens=4, echo=True, logprobs=None
    )
    assert echoed.choices[0].text.startswith("Once upon a time")


@check
def completions_stream() -> None:
    chunks = list(lenient.completions.create(model=COMPLETION, prompt="Once upon a time", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] in (
        ["length"],
        ["stop"],
    )


@check
def embeddings() -> None:
    by_default = lenient.embeddings.create(model=EMBEDDING, input=["a cat", "a dog"])
    coded = lenient.embeddings.create(model=EMBEDDING, input="a cat", encoding_format="base64")
    assert isinstance(coded.data[0].embedding, str)
    plain = client.embeddings.create(model=EMBEDDING, input=["a cat", "a dog"], encoding_format="float")
    assert [one.index for one in plain.data] == [0, 1] and plain.usage.prompt_tokens
    for one, other in zip(by_default.data, plain.data, strict=True):
        assert len(one.embedding) == len(other.embedding) > 1
        # two runs of a model may differ by rounding, as they are batched differently
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-3
        assert abs(sum(value * value for value in plain.data[0].embedding) - 1) < 1e-3


def refused(kind: type[openai.APIStatusError], status: int, ask: Callable[[], object]) -> Any:
    try:
        ask()
    except kind as error:
        assert error.status_code == status, error.status_code
        assert error.request_id, "no x-request-id"
        assert isinstance(error.body, dict) and set(error.body) == {"message", "type", "param", "code"}, error.body
        return error
    raise AssertionError(f"no {kind.__name__}")


@check
def errors() -> None:
    stranger = OpenAI(api_key="sk-nobody-knows-this-key", max_retries=0)
    error = refused(openai.AuthenticationError, 401, lambda: stranger.models.list())
    assert error.code == "invalid_api_key" and "Incorrect API key provided" in error.message
    create = client.chat.completions.create
    error = refused(openai.NotFoundError, 404, lambda: create(model="no-such-model", messages=MESSAGES))
    assert error.code == "model_not_found"
    error = refused(openai.BadRequestError, 400, lambda: create(model=CHAT, messages=MESSAGES, temperature=9))
    assert error.param == "temperature" and error.code == "decimal_above_max_value"
    refused(openai.NotFoundError, 404, lambda: client.get("/no/such/url", cast_to=object))
    refused(openai.NotFoundError, 404, lambda: client.models.retrieve("no-such-model"))
    refused(openai.BadRequestError, 400, lambda: client.embeddings.create(model=EMBEDDING, input=""))


@check
def forced_errors() -> None:
    kinds = {
        403: openai.PermissionDeniedError, 409: openai.ConflictError, 422: openai.UnprocessableEntityError,
        429: openai.RateLimitError, 500: openai.InternalServerError, 503: openai.InternalServerError,
    }  # fmt: skip
    for status, kind in kinds.items():
        for stream in (False, True):
            script = {"mock": {"error": {"status": status, "message": "As you wish."}}}
            asked: Any = {"model": "mock", "messages": MESSAGES, "stream": stream, "extra_body": script}
            error = refused(kind, status, partial(client.chat.completions.create, **asked))
            assert "As you wish." in error.message


@check
def error_in_a_stream() -> None:
    script = {"mock": {"text": "one two three", "cut": 2, "error": {"status": 500, "message": "Broken."}}}
    said = ""
    try:
        for chunk in client.chat.completions.create(model="mock", messages=MESSAGES, stream=True, extra_body=script):
            said += chunk.choices[0].delta.content or ""
    except openai.APIError as error:
        assert "Broken." in error.message and said == "one two", (error, said)
    else:
        raise AssertionError("no APIError")


def main() -> int:
    failed = 0
    for name, function in CHECKS.items():
        line: dict[str, Any] = {"check": name, "ok": True}
        try:
            function()
        except Exception as error:  # each check is reported, whatever breaks it
            failed += 1
            line = {
                "check": name,
                "ok": False,
                "error": f"{type(error).__name__}: {error}",
                "trace": traceback.format_exc(),
            }
        print(json.dumps(line), flush=True)
    print(json.dumps({"sdk": openai.__version__, "checks": len(CHECKS), "failed": failed}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
