"""Search by meaning: texts and a question become vectors, the nearest texts come first.
Usage: python examples/embeddings_search.py "Which animal purrs?"

Needs OPENAI_BASE_URL and OPENAI_API_KEY, which `tertulia serve` prints; EMBEDDING_MODEL if another model shall embed.
"""

import os
import sys

import openai

TEXTS = [
    "The cat sat on the mat and purred.",
    "Interest rates were raised by a quarter of a percent.",
    "Python is a programming language that reads like pseudocode.",
    "A kitten drinks its milk and falls asleep.",
    "The train to Lisbon leaves at nine in the morning.",
]


def vectors(client: openai.OpenAI, texts: list[str]) -> list[list[float]]:
    """A vector of length one for each text."""
    model = os.environ.get("EMBEDDING_MODEL", "text-embedding-ada-002")
    return [one.embedding for one in client.embeddings.create(model=model, input=texts).data]


def nearest(question: list[float], texts: list[list[float]]) -> list[tuple[float, int]]:
    """(cosine, index) of every text, best first; vectors of length one have their product as cosine."""
    products = [sum(a * b for a, b in zip(question, text, strict=True)) for text in texts]
    return sorted(((product, index) for index, product in enumerate(products)), reverse=True)


def main() -> None:
    question = " ".join(sys.argv[1:]) or "Which animal purrs?"
    first, *others = vectors(openai.OpenAI(), [question, *TEXTS])
    for cosine, index in nearest(first, others):
        print(f"{cosine:6.3f}  {TEXTS[index]}")


if __name__ == "__main__":
    try:
        main()
    except openai.APIStatusError as error:
        sys.exit(f"The server refused ({error.status_code}): {error.message}")
    except openai.APIConnectionError:
        sys.exit("The server cannot be reached. Is it running, and is OPENAI_BASE_URL right?")
    except openai.OpenAIError as error:  # no key at all
        sys.exit(str(error))
