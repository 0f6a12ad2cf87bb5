"""Server-sent events as bytes: cutting a stream into whole events, and reading one. It knows not what they mean."""

from __future__ import annotations

from ..errors import BadUpstreamAnswer

EVENT_LIMIT = 4 * 2**20  # bytes of one event
BOM = b"\xef\xbb\xbf"  # a stream may begin with it, and it means nothing


class Framer:
    """Cuts what comes in any pieces into pieces of whole events, without changing a byte. Lines may end in LF, CR LF or
    CR, as the standard allows."""

    __slots__ = ("_parts", "_size", "_tail")

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # what waits for the end of its event
        self._tail = b""  # its last bytes: a blank line may come in two pieces
        self._size = 0

    def feed(self, data: bytes) -> bytes:
        """The whole events there are now, b"" for none. Raises BadUpstreamAnswer for too long an event."""
        parts = self._parts
        if not parts and data.endswith(b"\n\n"):
            return data
        tail = self._tail
        cut = _last_blank_line(tail + data) - len(tail)
        if cut <= 0:
            parts.append(data)
            self._size += len(data)
            self._tail = (tail + data[-3:])[-3:]
            if self._size > EVENT_LIMIT:
                raise BadUpstreamAnswer("The upstream sent too long an event.")
            return b""
        parts.append(data[:cut])
        whole = b"".join(parts)
        rest = data[cut:]
        self._parts = [rest] if rest else []
        self._tail, self._size = rest[-3:], len(rest)
        return whole

    def rest(self) -> bytes:
        """What waits still; it is forgotten."""
        rest = b"".join(self._parts)
        self._parts, self._tail, self._size = [], b"", 0
        return rest


def _last_blank_line(data: bytes) -> int:
    """Where the last event in data ends, 0 if none does."""
    at = data.rfind(b"\n\n")
    end = at + 2 if at >= 0 else 0
    if b"\r" in data:
        for mark in (b"\n\r\n", b"\r\r"):
            at = data.rfind(mark)
            if at >= 0:
                end = max(end, at + len(mark))
    return end


def split(piece: bytes) -> list[bytes]:
    """The events of a piece that holds whole ones, with lines that end in LF and without their blank lines."""
    if b"\r" in piece:
        piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return [event for event in (part.strip(b"\n") for part in piece.split(b"\n\n")) if event]


def data_of(event: bytes) -> bytes | None:
    """The data of one event as split() gives it, None if it has none (a comment).

    Fields that nobody knows are passed over, as the standard wants it. But what has no data and is not made of fields
    either (HTML, JSON, a sentence) is an answer that was not meant to be a stream: raises ValueError.
    """
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    data, odd = [], False
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            data.append(b"")
        elif not line.startswith(b":"):
            name = line.partition(b":")[0]
            odd = odd or not name.replace(b"-", b"").replace(b"_", b"").isalnum()
    if data:
        return b"\n".join(data)
    if odd:
        raise ValueError("not a server-sent event")
    return None
