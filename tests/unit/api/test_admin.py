"""The table of the Admin API, how its bodies are read, and pages: without a server."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tertulia.api.admin.door import routes
from tertulia.api.admin.kinds import World
from tertulia.api.admin.table import ELSEWHERE, ROWS
from tertulia.api.pages import LAST, NEXT, Paging, Query, Window, cut
from tertulia.errors import BadRequest

DOCS = Path(__file__).resolve().parents[3] / "docs"


def build() -> Any:
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_docs_say_of_every_method_of_the_sdk_whether_it_works() -> None:
    from openai import OpenAI

    organization = OpenAI(api_key="none", admin_api_key="none").admin.organization
    methods = set(build().sdk_methods(organization))
    text = (DOCS / "admin-api.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([a-z_.]+)` \| (yes|no) \|", text, re.MULTILINE))
    assert told.keys() == methods and len(methods) > 140
    missing = tuple(f"{sdk}." for sdk, _, _ in ELSEWHERE)
    assert {name for name, works in told.items() if works == "no"} == {
        name for name in methods if name.startswith(missing)
    }


def test_a_method_that_is_new_in_the_sdk_cannot_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = build()
    monkeypatch.setattr(docs, "sdk_methods", lambda part: iter(["projects.create", "projects.dissolve"]))
    with pytest.raises(LookupError, match=r"projects\.dissolve"):
        docs.admin_methods()


def test_no_two_rows_are_the_same_and_every_row_has_a_route() -> None:
    calls = [(row.method, row.path) for row in ROWS]
    assert len(set(calls)) == len(calls)
    world: Any = World(None, None, None, None)  # type: ignore[arg-type]  # of which making routes needs nothing
    found = {(method, route.path) for route in routes(world) for method in route.methods or ()}  # type: ignore[attr-defined]
    assert {(method, f"/v1{path}") for method, path in calls} <= found


def rows() -> list[Any]:
    return [pytest.param(row, id=f"{row.kind.sdk}.{row.verb}") for row in ROWS if row.method == "POST"]


@pytest.mark.parametrize("row", rows())
def test_every_body_refuses_what_it_does_not_know(row: Any) -> None:
    taken = row.kind.takes.get(row.verb, {})
    assert "nonsense" not in taken
    with pytest.raises(BadRequest) as refused:
        row.body.read(b'{"nonsense": 1}')
    assert refused.value.code in ("unknown_parameter", "missing_required_parameter")
    for raw in (b"[]", b"1", b'"a"', b"null", b"{", b"\xff", b"{} {}"):
        with pytest.raises(BadRequest):
            row.body.read(raw)
    optional = [name for name, kind in taken.items() if kind is None or type(None) in getattr(kind, "__args__", ())]
    if len(optional) == len(taken):
        assert row.body.read(b"") == {}  # the SDK sends no body where there is nothing to say
        everything = "{" + ", ".join(f'"{name}": null' for name in optional) + "}"
        assert set(row.body.read(everything.encode()).values()) <= {None}


@pytest.mark.parametrize(
    ("method", "given", "param", "said"),
    [
        *(
            ("invites.create", {"email": email, "role": "reader"}, "email", "this is not a valid e-mail address.")
            for email in ("nobody", "", "a@", "@b.c", "a b@c.d", "a@b@c.d", "<a@b.c>", "a@.b", "a\n@b.c", "a,b@c.d")
        ),
        ("users.update", {"email": "nobody"}, "email", "this is not a valid e-mail address."),
        ("projects.users.create", {"role": "member", "email": "x"}, "email", "this is not a valid e-mail address."),
        (
            "spend_alerts.create",
            {"currency": "USD", "interval": "month", "threshold_amount": 1,
             "notification_channel": {"type": "email", "recipients": ["ada@example.org", "nobody"]}},
            "notification_channel.recipients[1]", "this is not a valid e-mail address.",
        ),
        ("projects.create", {"name": "a\nb"}, "name", "control characters and invisible ones are not allowed."),
        ("groups.create", {"name": "a\u202eb"}, "name", "control characters and invisible ones are not allowed."),
        ("users.update", {"developer_persona": "a\0b"}, "developer_persona", "a null character is in it."),
    ],
)  # fmt: skip
def test_what_a_pattern_refuses_is_said_in_words(method: str, given: dict[str, Any], param: str, said: str) -> None:
    [row] = [row for row in ROWS if row.sdk == method]
    with pytest.raises(BadRequest) as refused:
        row.body.read(json.dumps(given).encode())
    assert (refused.value.message, refused.value.param) == (f"Invalid '{param}': {said}", param)
    assert refused.value.code == "invalid_value"


@pytest.mark.parametrize("email", ["ada@example.org", "owner@localhost", "a+b.c@d-e.f", "müller@exämple.org"])
def test_addresses_that_are_addresses(email: str) -> None:
    [row] = [row for row in ROWS if row.sdk == "users.update"]
    assert row.body.read(json.dumps({"email": email}).encode()) == {"email": email}


@pytest.mark.parametrize(
    ("raw", "name", "values"),
    [
        (b"a=1&a=2", "a", ["1", "2"]), (b"a[]=1&a[]=2", "a", ["1", "2"]), (b"a%5B%5D=1", "a", ["1"]),
        (b"a=%C3%A9", "a", ["\u00e9"]), (b"", "a", []), (b"a=", "a", [""]), (b"b=1", "a", []),
    ],
)  # fmt: skip
def test_arrays_of_a_query(raw: bytes, name: str, values: list[str]) -> None:
    assert Query(raw, ("a", "b")).texts(name) == values


@pytest.mark.parametrize(
    "raw", [b"c=1", b"A=1", b"a[b][c]=1", b"=1", b"a%00=1", b"a=%ff", b"a=1&" * 600, b"a" * 20_000]
)
def test_a_query_that_cannot_be_meant_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        Query(raw, ("a", "b"))


@pytest.mark.parametrize(
    "raw",
    [b"n=x", b"n=1.0", b"n=1e2", b"n=-1", b"n=101", b"n=%D9%A1", b"n=1&n=2", b"n=" + b"9" * 4001, b"n=nan"],
)
def test_numbers_of_a_query(raw: bytes) -> None:
    assert Query(b"n=100", ("n",)).number("n", 1, 100) == 100
    assert Query(b"n=", ("n",)).number("n", 1, 100) is None
    with pytest.raises(BadRequest) as refused:
        Query(raw, ("n",)).number("n", 1, 100)
    assert refused.value.param == "n"


def test_a_number_of_a_query_says_what_came_instead() -> None:
    for given in ("1700000000.5", "1e9", "yesterday"):
        with pytest.raises(BadRequest) as refused:
            Query(f"start_time={given}".encode(), ("start_time",)).number("start_time")
        assert refused.value.message == (
            f"Invalid type for 'start_time': expected an integer, but got '{given}' instead."
        )
    with pytest.raises(BadRequest, match="Expected a value <= 10, but got 99999999999999999999999 instead"):
        Query(b"n=99999999999999999999999", ("n",)).number("n", 0, 10)


def test_an_object_in_the_place_of_a_value_is_refused_and_not_overlooked() -> None:
    for read in (Query.number, Query.text, Query.texts):
        with pytest.raises(BadRequest) as refused:
            read(Query(b"at[gt]=1", ("at",)), "at")
        assert (refused.value.param, refused.value.code) == ("at[gt]", "unknown_parameter")


def test_an_object_of_a_query() -> None:
    query = Query(b"at[gt]=1&at%5Blte%5D=20", ("at",))
    assert query.numbers("at", ("gt", "lte")) == {"gt": 1, "lte": 20}
    with pytest.raises(BadRequest) as refused:
        query.numbers("at", ("gt",))
    assert refused.value.param == "at[lte]"


KEYS = [f"k{number}" for number in range(7)]


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
def test_pages_of_a_list_in_memory_hold_everything_once(order: str, limit: int) -> None:
    expected = KEYS if order == "asc" else KEYS[::-1]
    for direction in ("after", "before"):
        cursor, found = None, list[str]()
        more = True
        while more:
            window = Window(cursor, None, limit, order) if direction == "after" else Window(None, cursor, limit, order)
            if direction == "before" and cursor is None:
                window = Window(None, "zz" if order == "asc" else "a", limit, order)
            part, more = cut(KEYS, window)
            page = KEYS[part] if order == "asc" else KEYS[part][::-1]
            assert len(page) == limit or not more
            found = found + page if direction == "after" else page + found
            cursor = page[-1] if direction == "after" else page[0]
        assert found == expected


def test_a_cursor_that_is_gone_still_marks_its_place() -> None:
    assert cut(KEYS, Window("k2x", None, 2, "asc")) == (slice(3, 5), True)
    assert cut(KEYS, Window("k2x", None, 2, "desc")) == (slice(1, 3), True)
    assert cut([], Window("k", None, 2, "asc")) == (slice(0, 0), False)


def test_a_page_says_where_it_ends() -> None:
    shown = [{"id": "a"}, {"id": "b"}]
    assert Paging(LAST).page(shown, True, ["a", "b"]) == {
        "object": "list", "data": shown, "first_id": "a", "last_id": "b", "has_more": True
    }  # fmt: skip
    assert Paging(LAST).page([], False, [])["last_id"] is None
    assert Paging(NEXT).page(shown, True, ["a", "b"])["next"] == "b"
    assert Paging(NEXT).page(shown, False, ["a", "b"])["next"] is None


def test_a_window_is_one_or_the_other() -> None:
    paging = Paging(ordered=True, backward=True)
    query = Query(b"after=a&before=b", paging.parameters)
    with pytest.raises(BadRequest):
        paging.window(query)
    assert paging.window(Query(b"", paging.parameters)) == Window(None, None, 20, "asc")
    with pytest.raises(BadRequest):
        Paging(order="desc").window(Query(b"order=asc", Paging().parameters))
