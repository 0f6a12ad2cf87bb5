"""`client.admin.organization.usage.*`: what was used and what it cost, in buckets of time.

Kinds that nothing here feeds (images, ...) are answered with empty buckets: nothing of the kind was used, and that is
the truth. What a parameter filters by and this server does not distinguish (batch, service tier) has one value for all.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..accounts.directory import check_kind
from ..accounts.fold import DAY, HOUR
from ..accounts.usage import BY, MINUTE, Wanted, sums
from ..errors import BadRequest, Unavailable
from ..store.database import FAILURES, Database
from .decode import not_a_choice
from .pages import Query

WIDTHS = {"1m": MINUTE, "1h": HOUR, "1d": DAY}
LIMITS = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}  # buckets of a page, unless another number is given; most
COSTS_LIMIT = (7, 180)
SAME = {"batch": "false", "service_tier": '"default"', "api_source": '"unlabeled"'}  # of every call, when grouped by
LATEST = 2**40


class Kind(NamedTuple):
    """One method of the SDK. object: its result's; shows: name of a figure in the answer: the sum it is of, or None if
    it is zero here; by: what it can be grouped by; filters: parameters beside those that all have."""

    path: str
    object: str
    shows: dict[str, str | None]
    by: tuple[str, ...]
    filters: tuple[str, ...]
    fed: bool = False  # whether anything here can be of this kind


KEYED = ("user_ids", "api_key_ids")
TOKENS: dict[str, str | None] = {"input_tokens": "prompt_tokens", "num_model_requests": "requests"}
TEXT: dict[str, str | None] = {
    **TOKENS, "output_tokens": "completion_tokens", "input_cached_tokens": "cached_tokens", "input_audio_tokens": None,
    "output_audio_tokens": None,
}  # fmt: skip
ALL_BY = (*BY, "batch", "service_tier", "api_source")
ANSWERS = (*KEYED, "models", "batch")
CALLS: dict[str, str | None] = {"num_model_requests": None}
KINDS = (
    Kind("completions", "completions", TEXT, ALL_BY, ANSWERS, True),
    Kind("embeddings", "embeddings", TOKENS, BY, (*KEYED, "models"), True),
    Kind("moderations", "moderations", TOKENS, BY, (*KEYED, "models")),
    Kind("decisions", "decisions", TEXT, ALL_BY, ANSWERS),
    Kind("images", "images", {"images": None, **CALLS}, (*BY, "size", "source"),
         (*KEYED, "models", "sizes", "sources")),
    Kind("audio_speeches", "audio_speeches", {"characters": None, **CALLS}, BY, (*KEYED, "models")),
    Kind("audio_transcriptions", "audio_transcriptions", {"seconds": None, **CALLS}, BY, (*KEYED, "models")),
    Kind("vector_stores", "vector_stores", {"usage_bytes": None}, ("project_id",), ()),
    Kind("code_interpreter_sessions", "code_interpreter_sessions", {"num_sessions": None}, ("project_id",), ()),
    Kind("file_search_calls", "file_searches", {"num_requests": None},
         ("project_id", "user_id", "api_key_id", "vector_store_id"), (*KEYED, "vector_store_ids")),
    Kind("web_search_calls", "web_searches", {"num_requests": None, **CALLS}, (*BY, "context_level", "api_source"),
         (*KEYED, "models", "context_levels")),
)  # fmt: skip
CHOICES = {
    "sizes": ("256x256", "512x512", "1024x1024", "1792x1792", "1024x1792"),
    "sources": ("image.generation", "image.edit", "image.variation"), "context_levels": ("low", "medium", "high"),
}  # fmt: skip
COSTS_BY = ("project_id", "user_id", "line_item", "api_key_id", "api_source")
SPAN = ("start_time", "end_time", "bucket_width", "limit", "page", "group_by", "project_ids")


class Span(NamedTuple):
    """What part of time one page is about, in unix seconds; edges: where its buckets begin, and where the last ends."""

    width: int
    edges: list[int]
    next: str | None  # the page after it


def routes(database: Database, catch_up: Callable[[], None]) -> list[Route]:
    """catch_up has the database know all that has happened by now."""

    def read(wanted: Wanted) -> Rows:
        try:
            catch_up()
            return sums(database, wanted)
        except (*FAILURES, OSError):
            raise Unavailable() from None

    def usage(kind: Kind) -> Callable[[Request], Awaitable[Response]]:
        known = (*SPAN, *kind.filters)

        def answer(query: Query) -> bytes:
            span, by = _span(query, LIMITS), _chosen(query, "group_by", kind.by)
            wanted = _wanted(query, span, kind, by)
            rows = read(wanted) if wanted is not None else []
            return _page(span, rows, _results(kind, by, wanted))

        return _handler(known, answer)

    def costs(query: Query) -> bytes:
        span, by = _span(query, {"1d": COSTS_LIMIT}), _chosen(query, "group_by", COSTS_BY)
        names = tuple("model" if name == "line_item" else name for name in by if name not in SAME)
        wanted = Wanted(
            span.edges[0], span.edges[-1], DAY, names, ("cost", "prompt_tokens", "completion_tokens"),
            projects=_given(query, "project_ids"), keys=_given(query, "api_key_ids"),
            models=_given(query, "line_items"),
        )  # fmt: skip
        return _page(span, read(wanted), _costs(by, names))

    return [
        *(Route(f"/v1/organization/usage/{kind.path}", usage(kind), methods=["GET"]) for kind in KINDS),
        Route("/v1/organization/costs", _handler((*SPAN, "api_key_ids", "line_items"), costs), methods=["GET"]),
    ]


def _handler(known: tuple[str, ...], answer: Callable[[Query], bytes]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        check_kind(request.state.principal, "admin")
        query = Query(request.scope["query_string"], known)
        return Response(await asyncio.to_thread(answer, query), media_type="application/json")

    return handle


# what is asked
def _span(query: Query, limits: dict[str, tuple[int, int]]) -> Span:
    """Raises BadRequest."""
    start, end = query.number("start_time", 0, LATEST), query.number("end_time", 0, LATEST)
    if start is None:
        raise BadRequest(
            "Missing required parameter: 'start_time'.", param="start_time", code="missing_required_parameter"
        )
    name = query.choice("bucket_width", tuple(limits)) or "1d"
    width = WIDTHS[name]
    if end is None:  # up to now; the bucket that now is in is shown as long as it will be
        end = -(-(int(time.time()) + 1) // width) * width
    elif end <= start:
        raise BadRequest("'end_time' must be after 'start_time'.", param="end_time", code="invalid_value")
    usual, most = limits[name]
    limit = query.number("limit", 1, most) or usual
    page = query.text("page")
    at = start if page is None else _place(page)
    if page is not None and (at % width or not start < at < end):
        raise _no_page()
    edges = [at]
    while edges[-1] < end and len(edges) <= limit:
        edges.append(min(edges[-1] - edges[-1] % width + width, end))
    more = edges[-1] < end
    return Span(width, edges, _token(edges[-1]) if more else None)


def _token(at: int) -> str:
    return "page_" + base64.urlsafe_b64encode(struct.pack(">Q", at)).decode()


def _place(page: str) -> int:
    """Raises BadRequest for what is no page of ours."""
    try:
        (at,) = struct.unpack(">Q", base64.urlsafe_b64decode(page.removeprefix("page_")))
    except (ValueError, struct.error):
        raise _no_page() from None
    return int(at)


def _no_page() -> BadRequest:
    return BadRequest("Invalid 'page': it is not a page of this query.", param="page", code="invalid_value")


def _chosen(query: Query, name: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """The values of an array, each once. Raises BadRequest."""
    given = tuple(dict.fromkeys(query.texts(name)))
    for value in given:
        if value not in choices:
            raise not_a_choice(value, list(choices), name)
    return given


def _given(query: Query, name: str) -> tuple[str, ...] | None:
    """The values of an array that filters. Raises BadRequest for what no name can be, and not every database takes."""
    values = tuple(query.texts(name))
    if any("\0" in value for value in values):
        raise BadRequest(f"Invalid '{name}': a null character is in it.", param=name, code="invalid_value")
    return values or None


def _wanted(query: Query, span: Span, kind: Kind, by: tuple[str, ...]) -> Wanted | None:
    """None for what nothing feeds. Raises BadRequest."""
    for name, choices in CHOICES.items():
        if name in kind.filters:
            _chosen(query, name, choices)
    batch = query.choice("batch", ("true", "false"))
    if not kind.fed or batch == "true" or len(span.edges) < 2:
        return None
    figures = tuple(dict.fromkeys(figure for figure in kind.shows.values() if figure is not None))
    return Wanted(
        span.edges[0], span.edges[-1], span.width, tuple(name for name in by if name not in SAME), figures,
        kind=kind.path, projects=_given(query, "project_ids"), users=_given(query, "user_ids"),
        keys=_given(query, "api_key_ids"), models=_given(query, "models"),
    )  # fmt: skip


# what is answered
class _Quoted(dict[Any, str]):
    """Text as JSON, kept: the same few names are in thousands of results."""

    def __missing__(self, text: Any) -> str:
        quoted = self[text] = msgspec.json.encode(text).decode()
        return quoted


Rows = list[tuple[Any, ...]]
Results = Callable[[Rows], Iterable[str]]


def _results(kind: Kind, by: tuple[str, ...], wanted: Wanted | None) -> Results:
    """Rows of sums as the JSON of results; written by hand and column by column, as a month may have a hundred
    thousand."""
    if wanted is None:
        return lambda rows: ()
    names, place = wanted.by, {figure: at for at, figure in enumerate(wanted.figures, 1 + len(wanted.by))}
    fields = [f'"object":"organization.usage.{kind.object}.result"']
    numbers: list[int] = []
    for name, figure in kind.shows.items():
        if figure is None:
            fields.append(f'"{name}":0')
        else:
            fields.append(f'"{name}":%d')
            numbers.append(place[figure])
    texts = [name for name in kind.by if name in names]
    fields += [f'"{name}":%s' for name in texts]
    fields += [f'"{name}":{SAME[name] if name in by else "null"}' for name in kind.by if name not in names]
    template, quoted = "{" + ",".join(fields) + "}", _Quoted()

    def show(rows: Rows) -> Iterable[str]:
        columns = list(zip(*rows, strict=True))
        chosen: list[Iterable[Any]] = [columns[at] for at in numbers]
        chosen += [map(quoted.__getitem__, columns[1 + names.index(name)]) for name in texts]
        return map(template.__mod__, zip(*chosen, strict=True))

    return show


def _costs(by: tuple[str, ...], names: tuple[str, ...]) -> Results:
    quoted = _Quoted()

    def show(row: tuple[Any, ...]) -> str:
        found = dict(zip(("line_item" if name == "model" else name for name in names), row[1:], strict=False))
        cost, tokens = row[1 + len(names)], row[2 + len(names)] + row[3 + len(names)]
        fields = [f'"{name}":{quoted[found.get(name)] if name not in SAME else "null"}' for name in COSTS_BY]
        if "api_source" in by:
            fields[-1] = f'"api_source":{SAME["api_source"]}'
        itemized = "line_item" in by
        amount = f'"amount":{{"value":{dollars(cost)},"currency":"usd"}}'
        quantity = (
            f'"quantity":{tokens if itemized else "null"},"quantity_unit":{quoted["tokens" if itemized else None]}'
        )
        return f'{{"object":"organization.costs.result",{amount},{quantity},{",".join(fields)}}}'

    return lambda rows: map(show, rows)


def dollars(nano: int) -> str:
    """Nano-dollars as an exact decimal number of dollars."""
    whole, rest = divmod(abs(nano), 10**9)
    return f"{'-' if nano < 0 else ''}{whole}.{f'{rest:09d}'.rstrip('0') or '0'}"


def _page(span: Span, rows: Rows, show: Results) -> bytes:
    buckets, first = [], 0
    for start, end in pairwise(span.edges):
        last = bisect_right(rows, start - start % span.width, first, key=itemgetter(0))
        results = ",".join(show(rows[first:last])) if last > first else ""
        bucket = f'{{"object":"bucket","start_time":{start},"end_time":{end},"results":[{results}]}}'
        buckets.append(bucket.encode())
        first = last
    more, next = (b"true", f'"{span.next}"'.encode()) if span.next is not None else (b"false", b"null")
    return b'{"object":"page","data":[%b],"has_more":%b,"next_page":%b}' % (b",".join(buckets), more, next)
