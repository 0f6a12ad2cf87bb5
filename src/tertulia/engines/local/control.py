"""Callers' text against the tokens that steer a model: what marks turns is defused in text, refused in schemas, and a
text that cannot fit is refused before the child spends seconds on counting it.

llama.cpp tokenises a rendered conversation as one text, so a message that spells out `<|im_end|>` would end its turn.
A zero-width space after the first character keeps such a text readable and makes it plain text. In a schema that would
be another schema, and as it is the engine cannot obey it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec

from ...errors import BadRequest
from .exchange import Child

COUNTED = 65_536  # bytes of a request up to which tokens are always counted, so that a refusal can tell their number
BREAK = "\u200b"
MESSAGE_LEAST = 3  # tokens that any chat template makes of a message: two marks and a role
_ANNOTATIONS = ("description", "title", "$comment")
_VERBATIM = ("const", "enum")
_CODED = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})")
_BLANK = bytes((*range(33), 127))


@lru_cache(64)
def _spelling(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the first character of every token spelled out, overlapping ones too."""
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    ways = (f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
    return re.compile("|".join(ways) or r"(?!)")


class Defuser:
    """Makes control tokens in text plain text; counts them in `found`."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self._pattern = _spelling(tokens)
        self.found = 0

    def text(self, text: str) -> str:
        text, found = self._pattern.subn(lambda first: first[0] + BREAK, text)
        self.found += found
        return text

    def all(self, value: Any) -> Any:
        """The same JSON value with every text in it defused."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.all(each) for each in value]
        if isinstance(value, dict):
            return {
                self.text(key): self._arguments(each) if key == "arguments" else self.all(each)
                for key, each in value.items()
            }
        return value

    def _arguments(self, value: Any) -> Any:
        """Arguments of a call are JSON in a text, which some templates take apart: escapes are looked through."""
        if not isinstance(value, str) or "\\" not in value:
            return self.all(value)
        try:
            inner = msgspec.json.decode(value)
        except msgspec.DecodeError:
            return self.text(value)
        before = self.found
        clean = self.all(inner)
        return value if self.found == before else msgspec.json.encode(clean).decode()


def refuse_in_schemas(tokens: tuple[str, ...], raw: Mapping[str, Any]) -> None:
    """Raises BadRequest if a schema or grammar of the request demands a control token as text. Descriptions are not
    looked at: they demand nothing."""
    pattern = _spelling(tokens)
    for name in ("response_format", "tools", "functions"):
        for text in _texts(raw.get(name)):
            if any(pattern.search(reading) for reading in _readings(text)):
                raise BadRequest(
                    f"Invalid '{name}': it contains a control token of the model, which cannot be written as text.",
                    param=name,
                    code="invalid_value",
                )


def _texts(value: Any, verbatim: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, verbatim)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key in _ANNOTATIONS and isinstance(each, str) and not verbatim:
                continue
            yield key
            yield from _texts(each, verbatim or key in _VERBATIM)


def _readings(text: str) -> Iterable[str]:
    """What a text, perhaps a pattern, may stand for."""
    if not any(mark in text for mark in "\\[("):
        return (text,)
    plain = _CODED.sub(lambda code: chr(int(code[1] or code[2], 16)), text).replace("\\", "")
    return text, plain, re.sub(r"[\[\]()]", "", plain)


def least_tokens(text: str, child: Child) -> int:
    """A number of tokens that the text cannot have less of, without counting."""
    if not child.longest_token:
        return 0
    data = text.strip().encode()
    if _spelling(child.control_tokens).search(text):
        data = data.translate(None, _BLANK)  # some control tokens swallow the blanks beside them
    return len(data) // child.longest_token


def least_tokens_of_messages(messages: Iterable[Any], child: Child) -> int:
    """The same of a conversation of decoded messages. Of earlier answers only the turn counts: templates cut them."""
    least = 0
    for message in messages:
        least += MESSAGE_LEAST
        if message.role == "assistant":
            continue
        parts = [message.content] if isinstance(message.content, str) else [p.text for p in message.content or ()]
        least += sum(least_tokens(part, child) for part in parts if part)
    return least


def least_tokens_of_input(text: str, child: Child) -> int:
    """The same of a text for an encoder, whose vocabulary may have one token for a whole unknown word: where all is
    ASCII, of which every such vocabulary has each character, by the bytes, else by the words."""
    words = len(text.split())
    if not text.isascii() or not child.longest_token:
        return words
    return max(words, len(text.encode().translate(None, _BLANK)) // child.longest_token)
