"""An answer printed while it is written; Ctrl-C stops the model, not only the printing.
Usage: python examples/streaming.py "Write a poem about programming"

Needs OPENAI_BASE_URL and OPENAI_API_KEY, which `tertulia serve` prints; CHAT_MODEL if another model shall answer.
"""

import os
import sys
import time

import openai


def main() -> None:
    question = " ".join(sys.argv[1:]) or "Write a poem about programming"
    began = time.monotonic()
    first = None
    stream = openai.OpenAI().chat.completions.create(
        model=os.environ.get("CHAT_MODEL", "gpt-3.5-turbo"),
        messages=[{"role": "user", "content": question}],
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
    )
    with stream:  # closes the connection however we leave, which tells the server to stop
        try:
            for chunk in stream:
                for choice in chunk.choices:  # none in the last chunk, which has the usage
                    if choice.delta.content:
                        first = first or time.monotonic()
                        print(choice.delta.content, end="", flush=True)
                if chunk.usage and first:
                    took, wait = time.monotonic() - began, first - began
                    tokens = chunk.usage.completion_tokens
                    print(f"\n({tokens} tokens in {took:.1f} s, the first after {wait:.2f} s)", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
    print()


if __name__ == "__main__":
    try:
        main()
    except openai.APIStatusError as error:
        sys.exit(f"The server refused ({error.status_code}): {error.message}")
    except openai.APIConnectionError:
        sys.exit("The server cannot be reached. Is it running, and is OPENAI_BASE_URL right?")
    except openai.APIError as error:  # an error in the middle of the stream
        sys.exit(f"\nThe answer broke off: {error.message}")
    except openai.OpenAIError as error:  # no key at all
        sys.exit(str(error))
