"""The GGUF file format, version 3, of llama.cpp: reads what a file says of itself, and writes a file.

It knows the layout (header, typed key-values, tensor table, aligned data), in plain Python so that neither numpy nor
the `gguf` package is needed; it does not know what a model is, and never reads a tensor's values. Layout after
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import TertuliaError

F32, F16, Q8_0 = 0, 1, 8

# ggml type -> (values in a block, bytes of a block)
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST_ARRAY_KEPT = 64
_ALIGNMENT = 32


class BadModelFile(TertuliaError):
    """The file is not a model that can be served."""


class Header(NamedTuple):
    """What a file says of itself. metadata leaves out arrays of more than 64 values (vocabularies, merges); size is
    the number of bytes the file must have for its tensors to be complete."""

    version: int
    metadata: dict[str, Any]
    tensors: int
    size: int


class Vocabulary(NamedTuple):
    """Of a model's tokens: those that a text must not spell out, since they steer the model, and the bytes of the
    longest one (0 if the file has none)."""

    control: tuple[str, ...]
    longest: int


class Tensor(NamedTuple):
    """One tensor to write: shape with the fastest dimension last, as in safetensors; data in pieces of wire bytes."""

    name: str
    shape: Sequence[int]
    type: int
    data: Iterable[bytes]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.shape, self.type)


def tensor_bytes(shape: Iterable[int], type: int) -> int:
    """Bytes that a tensor takes; of an unknown type, 0: at least it must start inside the file."""
    per_block, size = BLOCKS.get(type, (1, 0))
    count = 1
    for dimension in shape:
        count *= dimension
    return count // per_block * size


class _Cursor:
    """A place in a mapped file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.data):
            raise struct.error("string past the end")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, type: int) -> Any:
        """A value of the type, or None for an array too long to keep."""
        if type == _STRING:
            return self.string()
        if type != _ARRAY:
            return self.scalar(_SCALARS[type])
        inner, count = self.scalar("I"), self.scalar("Q")
        if count <= _LONGEST_ARRAY_KEPT:
            return [self.value(inner) for _ in range(count)]
        if inner == _STRING:
            self._skip_strings(count)
        elif inner == _ARRAY:
            for _ in range(count):
                self.value(inner)
        else:
            self.at += count * struct.calcsize("<" + _SCALARS[inner])
        return None

    def strings(self) -> list[bytes]:
        """An array of strings, however long."""
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner != _STRING:
            raise struct.error("not an array of strings")
        length_at, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        found = []
        for _ in range(count):
            begin = at + 8
            at = begin + length_at(data, at)[0]
            if at > len(data):
                raise struct.error("string past the end")
            found.append(data[begin:at])
        self.at = at
        return found

    def numbers(self) -> tuple[int, ...]:
        """An array of numbers, however long."""
        code, count = _SCALARS[self.scalar("I")], self.scalar("Q")
        self.at += count * struct.calcsize("<" + code)
        return struct.unpack_from(f"<{count}{code}", self.data, self.at - count * struct.calcsize("<" + code))

    def _skip_strings(self, count: int) -> None:
        length_at, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + length_at(data, at)[0]
        self.at = at


def read_header(path: Path) -> Header:
    """What the file at path says of itself, in some 10 ms; BadModelFile if it is no GGUF file or is cut short."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadModelFile(f"{path} is not a GGUF file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header, length = _parse(_Cursor(data)), len(data)
    except OSError as error:
        raise BadModelFile(f"{path} cannot be read: {error.strerror or error}.") from error
    except (struct.error, KeyError, OverflowError, ValueError) as error:
        raise BadModelFile(f"{path} is damaged: its header cannot be read to the end.") from error
    if header.version not in (2, 3):
        raise BadModelFile(f"{path} has GGUF version {header.version}; versions 2 and 3 are understood.")
    if length < header.size:
        raise BadModelFile(f"{path} is cut short: it has {length:,} bytes, its tensors need {header.size:,}.")
    return header


def _parse(cursor: _Cursor) -> Header:
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        return Header(version, {}, 0, 0)
    tensors, pairs = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.string()
        value = cursor.value(cursor.scalar("I"))
        if value is not None:
            metadata[key] = value
    end = 0
    for _ in range(tensors):
        cursor.string()
        shape = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
        type, offset = cursor.scalar("I"), cursor.scalar("Q")
        end = max(end, offset + tensor_bytes(shape, type))
    alignment = int(metadata.get("general.alignment", _ALIGNMENT)) or _ALIGNMENT
    return Header(version, metadata, tensors, -(-cursor.at // alignment) * alignment + end)


_CONTROL, _USER_DEFINED = 3, 4
_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_TURN_MARK = re.compile(r"<[|｜].+[|｜]>|</s>|<end_of_[a-z]+>")  # the engine takes such for control whatever their type
_HTML = re.compile(
    r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|[abipsu]|sub|sup|code|pre|[uo]l|li|div)>"
)  # some vocabularies have these whole; they steer nothing


def read_vocabulary(path: Path) -> Vocabulary:
    """What the file's vocabulary holds, in some 30 ms for 50,000 tokens; BadModelFile if the file cannot be read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _vocabulary(_Cursor(data))
    except OSError as error:
        raise BadModelFile(f"{path} cannot be read: {error.strerror or error}.") from error
    except (struct.error, KeyError, OverflowError, ValueError) as error:
        raise BadModelFile(f"{path} is damaged: its vocabulary cannot be read.") from error


def _vocabulary(cursor: _Cursor) -> Vocabulary:
    cursor.at = 8
    cursor.scalar("Q")
    tokens: list[bytes] = []
    types: Sequence[int] = ()
    for _ in range(cursor.scalar("Q")):
        key, type = cursor.string(), cursor.scalar("I")
        if key == "tokenizer.ggml.tokens" and type == _ARRAY:
            tokens = cursor.strings()
        elif key == "tokenizer.ggml.token_type" and type == _ARRAY:
            types = cursor.numbers()
        else:
            cursor.value(type)
    control = {text for text, type in zip(tokens, types, strict=False) if type != 1 and _steers(text, type)}
    control |= {text for text in tokens if text[:1] == b"<" and _TURN_MARK.fullmatch(text.decode("utf-8", "replace"))}
    found = tuple(sorted(text.decode("utf-8", "replace") for text in control))
    return Vocabulary(found, max(map(len, tokens), default=0))


def _steers(token: bytes, type: int) -> bool:
    text = token.decode("utf-8", "replace")
    if type == _CONTROL:
        return len(text) > 1 and not text.isalnum() and not text.isspace()
    return type == _USER_DEFINED and bool(_MARKUP.fullmatch(text)) and not _HTML.fullmatch(text)


def write(out: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Writes a GGUF file. Metadata is typed by its Python type: str, bool, int (uint32), float (float32), list of str
    or of int (int32). A tensor's data is asked for when its turn comes, so it may be a stream."""
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    written = 24
    for key, value in metadata.items():
        written += out.write(_string(key) + _typed(value))
    offset = 0
    for tensor in tensors:
        shape = list(reversed(tensor.shape))
        entry = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type, offset)
        written += out.write(_string(tensor.name) + entry)
        offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    out.write(bytes(-written % _ALIGNMENT))
    for tensor in tensors:
        length = sum(out.write(piece) for piece in tensor.data)
        if length != tensor.nbytes:
            raise ValueError(f"tensor {tensor.name} has {length} bytes, its shape needs {tensor.nbytes}")
        out.write(bytes(-length % _ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
    raise TypeError(f"GGUF metadata cannot hold {type(value).__name__}")
