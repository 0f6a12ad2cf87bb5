"""A model that uses tools: it asks for a call, we make the call, it goes on with the result, until it answers in words.
Usage: python examples/function_calling.py "What's the weather like in Boston?"

Needs OPENAI_BASE_URL and OPENAI_API_KEY, which `tertulia serve` prints; CHAT_MODEL if another model shall answer.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import openai
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

MOST_ROUNDS = 4  # after so many rounds of calls the model has to answer

WEATHER = {"boston": 7, "madrid": 22, "oslo": -3}  # degrees celsius; a real program would ask somebody


def get_weather(location: str, unit: str = "celsius") -> dict[str, Any]:
    known = [degrees for city, degrees in WEATHER.items() if city in location.lower()]
    if not known:
        return {"error": f"there is no weather for {location!r}; known are: {', '.join(WEATHER)}"}
    degrees = known[0] if unit == "celsius" else round(known[0] * 9 / 5 + 32)
    return {"location": location, "degrees": degrees, "unit": unit}


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {"get_weather": get_weather}
TOOLS: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather in a given location",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["location", "unit"],
                "additionalProperties": False,
            },
        },
    }
]


def call(name: str, arguments: str) -> str:
    """The result for the model to read. What goes wrong is told to the model too: it may do better the next time."""
    try:
        return json.dumps(FUNCTIONS[name](**json.loads(arguments)))
    except (KeyError, TypeError, ValueError) as error:
        return json.dumps({"error": f"{name}({arguments}) cannot be called: {error}"})


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What's the weather like in Boston?"
    client = openai.OpenAI()
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
    for round in range(MOST_ROUNDS + 1):
        answer = client.chat.completions.create(
            model=os.environ.get("CHAT_MODEL", "gpt-3.5-turbo"),
            messages=messages,
            tools=TOOLS,
            # a small model needs telling that it must look first; after that it may choose, and in the end it must talk
            tool_choice="required" if round == 0 else "auto" if round < MOST_ROUNDS else "none",
            max_tokens=200,
            temperature=0,
        )
        message = answer.choices[0].message
        if not message.tool_calls:
            print(message.content)
            return
        messages.append(message.model_dump(include={"role", "content", "tool_calls"}))  # type: ignore[arg-type]
        for wanted in message.tool_calls:
            if wanted.type == "function":
                result = call(wanted.function.name, wanted.function.arguments)
                print(f"{wanted.function.name}({wanted.function.arguments}) = {result}", file=sys.stderr)
                messages.append({"role": "tool", "tool_call_id": wanted.id, "content": result})


if __name__ == "__main__":
    try:
        main()
    except openai.APIStatusError as error:
        sys.exit(f"The server refused ({error.status_code}): {error.message}")
    except openai.APIConnectionError:
        sys.exit("The server cannot be reached. Is it running, and is OPENAI_BASE_URL right?")
    except openai.OpenAIError as error:  # no key at all
        sys.exit(str(error))
