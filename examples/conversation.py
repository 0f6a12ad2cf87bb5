"""A conversation that remembers, on the terminal; an empty line ends it. When it has grown too long for the model, the
oldest turns are forgotten, and it says so. Usage: python examples/conversation.py

Needs OPENAI_BASE_URL and OPENAI_API_KEY, which `tertulia serve` prints; CHAT_MODEL if another model shall answer.
"""

import os
import sys

import openai
from openai.types.chat import ChatCompletionMessageParam


class Conversation:
    """A system message and the turns so far."""

    def __init__(self, client: openai.OpenAI, system: str) -> None:
        self.client = client
        self.system: ChatCompletionMessageParam = {"role": "system", "content": system}
        self.turns: list[ChatCompletionMessageParam] = []

    def say(self, text: str) -> str:
        """The answer. If the request fails, the conversation is as it was before."""
        turns: list[ChatCompletionMessageParam] = [*self.turns, {"role": "user", "content": text}]
        while True:
            try:
                answer = self._answer(turns)
                break
            except openai.BadRequestError as error:
                if error.code != "context_length_exceeded" or len(turns) == 1:
                    raise
                del turns[:2]  # the oldest question and its answer
        if len(turns) <= len(self.turns):
            print("(the oldest turns were forgotten)", file=sys.stderr)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def _answer(self, turns: list[ChatCompletionMessageParam]) -> str:
        answer = self.client.chat.completions.create(
            model=os.environ.get("CHAT_MODEL", "gpt-3.5-turbo"), messages=[self.system, *turns], max_tokens=100
        )
        return answer.choices[0].message.content or ""


def main() -> None:
    conversation = Conversation(openai.OpenAI(), "You are a helpful assistant. Answer briefly.")
    while text := ask_human():
        try:
            print(conversation.say(text), flush=True)
        except openai.APIStatusError as error:
            print(f"(the server refused, {error.status_code}: {error.message})", file=sys.stderr)


def ask_human() -> str:
    try:
        return input("you> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return ""


if __name__ == "__main__":
    try:
        main()
    except openai.APIConnectionError:
        sys.exit("The server cannot be reached. Is it running, and is OPENAI_BASE_URL right?")
    except openai.OpenAIError as error:  # no key at all
        sys.exit(str(error))
