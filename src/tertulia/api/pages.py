"""What a list is asked for and how it is answered: the query string, in both spellings of arrays, and pages with a
cursor. It knows no object and no database.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from ..errors import BadRequest
from .decode import not_a_choice, out_of_bounds

LAST, NEXT = "last_id", "next"  # where a page says where it ends: the SDK's ConversationCursorPage and NextCursorPage
LONGEST_QUERY = 16_384  # bytes
MOST_PARAMETERS = 512
NAME = re.compile(r"([a-z_]{1,64})(?:\[([a-z]{0,8})\])?$")


class Query:
    """The parameters of a query string: `a=1`, arrays as `b[]=1&b[]=2` or `b=1&b=2`, objects as `c[gt]=1`."""

    def __init__(self, raw: bytes, known: Collection[str]) -> None:
        """Raises BadRequest for a parameter that is not known: a filter that filters nothing would be wrong."""
        self._given: dict[str, dict[str, list[str]]] = {}
        if len(raw) > LONGEST_QUERY:
            raise BadRequest("The query string is too long.")
        try:
            pairs = parse_qsl(raw.decode("ascii"), True, errors="strict", max_num_fields=MOST_PARAMETERS)
        except ValueError:
            raise BadRequest("The query string cannot be read.") from None
        for spelled, value in pairs:
            found = NAME.match(spelled)
            if found is None or found[1] not in known:
                raise _unknown(spelled[:64])
            self._given.setdefault(found[1], {}).setdefault(found[2] or "", []).append(value)

    def texts(self, name: str) -> list[str]:
        """All values of an array. Raises BadRequest if an object is given in its place: `a[gt]=1`."""
        given = self._given.get(name, {})
        for key in given:
            if key:
                raise _unknown(f"{name}[{key}]")
        return given.get("", [])

    def text(self, name: str) -> str | None:
        """The value of a parameter that is given once; None for an empty one. Raises BadRequest."""
        found = self.texts(name)
        if len(found) > 1:
            raise BadRequest(f"'{name}' is given more than once.", param=name, code="invalid_value")
        return found[0] if found and found[0] else None

    def number(self, name: str, low: int = 0, high: int = 2**53) -> int | None:
        """Raises BadRequest, as `numbers` does."""
        text = self.text(name)
        return None if text is None else _number(name, text, low, high)

    def numbers(self, name: str, keys: Collection[str]) -> dict[str, int]:
        """The whole numbers of an object, by key. Raises BadRequest for others, and for other keys."""
        found = {}
        for key, values in self._given.get(name, {}).items():
            if key not in keys:
                raise _unknown(f"{name}[{key}]")
            found[key] = _number(f"{name}[{key}]", values[-1], 0, 2**53)
        return found

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """Raises BadRequest for anything else."""
        text = self.text(name)
        if text is not None and text not in choices:
            raise not_a_choice(text, list(choices), name)
        return text

    def flag(self, name: str) -> bool:
        """Raises BadRequest for what is neither true nor false."""
        return self.choice(name, ("true", "false")) == "true"


def _unknown(name: str) -> BadRequest:
    return BadRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")


def _number(name: str, text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"-?[0-9]{1,4000}", text, re.ASCII):
        raise BadRequest(
            f"Invalid type for '{name}': expected an integer, but got '{text[:32]}' instead.",
            param=name,
            code="invalid_type",
        )
    value = int(text)
    if value < low:
        raise out_of_bounds("int", ">=", str(low), text, name)
    if value > high:
        raise out_of_bounds("int", "<=", str(high), text, name)
    return value


class Window(NamedTuple):
    """What part of a list is asked for: up to limit objects behind the cursor `after`, or those that stand just before
    the cursor `before`."""

    after: str | None
    before: str | None
    limit: int
    order: str


class Paging(NamedTuple):
    """What a list allows: limits, and the order it has unless another is asked for."""

    style: str = LAST
    default: int = 20
    least: int = 1
    most: int = 100
    order: str = "asc"
    ordered: bool = False  # whether order may be asked for
    backward: bool = False  # whether before may be asked for

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("after", "limit", *(["order"] if self.ordered else []), *(["before"] if self.backward else []))

    def window(self, query: Query) -> Window:
        """Raises BadRequest."""
        limit = query.number("limit", self.least, self.most)
        after, before = query.text("after"), query.text("before")
        if after is not None and before is not None:
            raise BadRequest("Give either 'after' or 'before', not both.", param="before", code="invalid_value")
        order = query.choice("order", ("asc", "desc"))
        return Window(after, before, self.default if limit is None else limit, order or self.order)

    def page(self, shown: list[dict[str, Any]], more: bool, cursors: list[str]) -> dict[str, Any]:
        """The answer; cursors: of each object what `after` gives to go on behind it."""
        answer: dict[str, Any] = {"object": "list", "data": shown}
        last = cursors[-1] if cursors else None
        if self.style == NEXT:
            return answer | {"has_more": more, "next": last if more else None}
        return answer | {"first_id": cursors[0] if cursors else None, "last_id": last, "has_more": more}


def cut(keys: Sequence[str], window: Window) -> tuple[slice, bool]:
    """(where the window lies in a list that is in the order of its keys, from small to large, whether there is more).
    To be reversed by the caller for the order desc. A key that is gone still marks its place."""
    low, high = 0, len(keys)
    forward = (window.order == "asc") == (window.before is None)
    if window.after is not None:
        if window.order == "asc":
            low = bisect_right(keys, window.after)
        else:
            high = bisect_left(keys, window.after)
    if window.before is not None:
        if window.order == "asc":
            high = bisect_left(keys, window.before)
        else:
            low = bisect_right(keys, window.before)
    if not window.limit:  # of nothing there is no next page
        return slice(low, low), False
    more = high - low > window.limit
    if more and forward:
        high = low + window.limit
    elif more:
        low = high - window.limit
    return slice(low, high), more
