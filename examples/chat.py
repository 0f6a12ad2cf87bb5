"""One question, one answer. Usage: python examples/chat.py "What does API stand for?"

Needs OPENAI_BASE_URL and OPENAI_API_KEY, which `tertulia serve` prints; CHAT_MODEL if another model shall answer.
"""

import os
import sys

import openai


def main() -> None:
    question = " ".join(sys.argv[1:]) or "Can you explain what API stands for?"
    client = openai.OpenAI()  # reads both variables, and tries again by itself if the server is busy
    answer = client.chat.completions.create(
        model=os.environ.get("CHAT_MODEL", "gpt-3.5-turbo"),
        messages=[
            {"role": "system", "content": "You are a helpful assistant. Answer in two sentences."},
            {"role": "user", "content": question},
        ],
        max_tokens=200,
        temperature=0.2,
    )
    print(answer.choices[0].message.content)
    if answer.choices[0].finish_reason == "length":
        print("(cut after 200 tokens)", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except openai.APIStatusError as error:
        sys.exit(f"The server refused ({error.status_code}): {error.message}")
    except openai.APIConnectionError:
        sys.exit("The server cannot be reached. Is it running, and is OPENAI_BASE_URL right?")
    except openai.OpenAIError as error:  # no key at all
        sys.exit(str(error))
