"""Walks through a grammar byte by byte: whatever a grammar admits may come, and nothing else can.

A random walk is an adversary that no model is: at each byte any byte that the grammar admits may come.
"""

from __future__ import annotations

import random

from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

END = 256


class Bytes:
    """A tokenizer whose tokens are the 256 bytes and an end."""

    eos_token_id, bos_token_id, special_token_ids = END, None, [END]
    tokens = [bytes([byte]) for byte in range(256)] + [b"<end>"]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = LLTokenizer(TokenizerWrapper(Bytes()))


def walk(grammar: str, source: random.Random, limit: int = 3000, soon: int = 80) -> bytes | None:
    """A random text that the grammar admits, None if it did not end within the limit."""
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    out = bytearray()
    while len(out) < limit:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(END + 1) if mask >> token & 1]
        if END in allowed and (len(allowed) == 1 or len(out) > soon or source.random() < 0.3):
            return bytes(out)
        bytes_ = [byte for byte in allowed if byte != END]
        closing = [byte for byte in bytes_ if byte in b'"}]']
        plain = [byte for byte in bytes_ if 32 <= byte < 127]
        if closing and source.random() < (0.9 if len(out) > soon else 0.3):
            bytes_ = closing
        elif plain and source.random() < 0.8:
            bytes_ = plain
        byte = source.choice(bytes_)
        assert matcher.consume_token(byte)
        out.append(byte)
        if matcher.is_stopped():
            return bytes(out)
    return None


def admits(grammar: str | None, text: str) -> bool:
    """Whether the grammar admits exactly this text."""
    assert grammar is not None
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()
