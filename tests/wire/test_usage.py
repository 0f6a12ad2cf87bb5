"""`client.admin.organization.usage`, by the official SDK in strict mode, of a real server. On both databases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import Served, serve

DAY, HOUR, MINUTE = 86400, 3600, 60
CONFIG = """
database = "{database}"
chat_model = "mock"
embedding_model = "mock-embedding"
cache = "off"
fold_seconds = 3600
[prices.mock]
input = 1.5
output = 2000.001
"""
KINDS = (
    "completions", "embeddings", "moderations", "decisions", "images", "audio_speeches", "audio_transcriptions",
    "vector_stores", "code_interpreter_sessions", "file_search_calls", "web_search_calls",
)  # fmt: skip
EVERY = (*KINDS, "costs")
EMPTY = set(KINDS) - {"completions", "embeddings"}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that was asked 6 times: 3 chats, 1 of them a stream, a completion and two embeddings."""
    data: Path = tmp_path_factory.mktemp("usage")
    if request.param == "sqlite":
        yield from asked(serve(data, CONFIG.format(database=f"sqlite:///{data / 'given.db'}")))
        return
    with request.getfixturevalue("cluster").database() as url:
        yield from asked(serve(data, CONFIG.format(database=url)))


def asked(served: Served) -> Iterator[Served]:
    try:
        client = served.client()
        for _ in range(2):
            client.chat.completions.create(model="mock", messages=[{"role": "user", "content": "hello"}])
        list(client.chat.completions.create(model="mock", messages=[{"role": "user", "content": "hi"}], stream=True))
        client.completions.create(model="mock", prompt="once upon")
        for _ in range(2):
            client.embeddings.create(model="mock-embedding", input="hello", encoding_format="float")
        yield served
    finally:
        served.stop()


def usage_of(served: Served) -> Any:
    return served.client(admin_api_key=served.admin_key).admin.organization.usage


def today() -> int:
    return int(time.time()) // DAY * DAY


def only(page: Any) -> Any:
    """The one result there is."""
    [result] = [result for bucket in page.data for result in bucket.results]
    return result


def test_completions_and_embeddings_are_counted_at_once(gateway: Served) -> None:
    usage = usage_of(gateway)
    for width in ("1d", "1h", "1m"):
        start = int(time.time()) - 600
        done = usage.completions(start_time=start, bucket_width=width)
        results = [result for bucket in done.data for result in bucket.results]
        assert sum(result.num_model_requests for result in results) == 4
        assert sum(result.output_tokens for result in results) > 4
        assert all(result.object == "organization.usage.completions.result" for result in results)
        assert all(result.project_id is result.model is result.batch is None for result in results)
        embedded = [result for bucket in usage.embeddings(start_time=start, bucket_width=width).data
                    for result in bucket.results]  # fmt: skip
        assert sum(result.num_model_requests for result in embedded) == 2
        assert sum(result.input_tokens for result in embedded) > 0


def test_there_is_no_other_kind() -> None:
    resource = openai.resources.admin.organization.Usage
    methods = {name for name, value in vars(resource).items() if callable(value) and not name.startswith("_")}
    assert methods == set(EVERY)


def asked_sync(served: Served, kind: str, **params: Any) -> Any:
    return getattr(usage_of(served), kind)(**params)


def asked_async(served: Served, kind: str, **params: Any) -> Any:
    async def ask() -> Any:
        async with served.async_client(admin_api_key=served.admin_key) as client:
            return await getattr(client.admin.organization.usage, kind)(**params)

    return asyncio.run(ask())


@pytest.mark.parametrize("ask", [asked_sync, asked_async])
@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_answers_in_its_own_shape(gateway: Served, kind: str, ask: Callable[..., Any]) -> None:
    page = ask(gateway, kind, start_time=today() - 3 * DAY, end_time=today() + DAY, limit=10)
    assert (page.object, page.has_more, page.next_page) == ("page", False, None)
    assert [bucket.start_time for bucket in page.data] == [today() + at * DAY for at in (-3, -2, -1, 0)]
    assert [bucket.end_time for bucket in page.data] == [today() + at * DAY for at in (-2, -1, 0, 1)]
    assert all(bucket.results == [] for bucket in page.data[:3])
    assert len(page.data[3].results) == (0 if kind in EMPTY else 1)
    for result in page.data[3].results:
        if kind == "costs":
            assert result.amount.value > 0
        else:
            assert result.num_model_requests == {"completions": 4, "embeddings": 2}[kind]


def test_grouped_and_filtered(gateway: Served) -> None:
    usage, start = usage_of(gateway), today()
    everything = ["project_id", "user_id", "api_key_id", "model", "batch", "service_tier", "api_source"]
    one = only(usage.completions(start_time=start, group_by=everything))
    assert one.project_id.startswith("proj_") and one.api_key_id.startswith("key_") and one.model == "mock"
    assert (one.batch, one.service_tier, one.api_source, one.num_model_requests) == (False, "default", "unlabeled", 4)
    same: dict[str, Any] = {"project_ids": [one.project_id], "api_key_ids": [one.api_key_id], "models": ["mock", "x"]}
    if one.user_id is not None:
        same["user_ids"] = [one.user_id]
    assert only(usage.completions(start_time=start, batch=False, **same)).num_model_requests == 4
    for other in ({"project_ids": ["proj_x"]}, {"api_key_ids": ["key_x"]}, {"user_ids": ["u"]}, {"models": ["x"]}):
        assert [bucket.results for bucket in usage.completions(start_time=start, **other).data] == [[]], other
    assert [bucket.results for bucket in usage.completions(start_time=start, batch=True).data] == [[]]


def test_costs_are_exact(gateway: Served) -> None:
    usage = usage_of(gateway)
    tokens = only(usage.completions(start_time=today()))
    one = only(usage.costs(start_time=today(), group_by=["line_item", "project_id", "api_key_id"], line_items=["mock"]))
    nano = tokens.input_tokens * 1500 + tokens.output_tokens * 2_000_001
    assert one.amount.currency == "usd" and round(one.amount.value * 10**9) == nano
    assert (one.line_item, one.quantity_unit) == ("mock", "tokens")
    assert one.quantity == tokens.input_tokens + tokens.output_tokens
    whole = only(usage.costs(start_time=today()))
    assert (whole.line_item, whole.project_id, whole.quantity) == (None, None, None)
    raw = usage.with_raw_response.costs(start_time=today()).text
    assert f'"value":{nano // 10**9}.{nano % 10**9:09d}'.rstrip("0") in raw


def test_pages_lead_to_the_last_bucket(gateway: Served) -> None:
    usage, start = usage_of(gateway), int(time.time()) - 5 * HOUR - 17
    seen, page = [], None
    while True:
        more = {} if page is None else {"page": page}
        found = usage.completions(start_time=start, bucket_width="1h", limit=2, **more)
        seen += [(bucket.start_time, bucket.end_time) for bucket in found.data]
        page = found.next_page
        assert found.has_more == (page is not None)
        if page is None:
            break
        assert len(found.data) == 2
    assert seen[0][0] == start and seen[-1][1] > time.time()
    assert all(one[1] == other[0] and one[1] % HOUR == 0 for one, other in pairwise(seen))


def test_how_many_buckets_there_are_unless_told(gateway: Served) -> None:
    usage, start = usage_of(gateway), today() - 200 * DAY
    for width, usual, most in (("1d", 7, 31), ("1h", 24, 168), ("1m", 60, 1440)):
        assert len(usage.completions(start_time=start, bucket_width=width).data) == usual
        assert len(usage.completions(start_time=start, bucket_width=width, limit=most).data) == most
    assert len(usage.costs(start_time=start, limit=180).data) == 180
    assert usage.completions(start_time=int(time.time()) + DAY).data == []


@pytest.mark.parametrize(
    ("kind", "given", "param"),
    [
        ("completions", {}, "start_time"),
        ("completions", {"start_time": "yesterday"}, "start_time"),
        ("completions", {"start_time": -1}, "start_time"),
        ("completions", {"start_time": 10**17}, "start_time"),
        ("completions", {"start_time": 100, "end_time": 100}, "end_time"),
        ("completions", {"start_time": 100, "bucket_width": "1w"}, "bucket_width"),
        ("completions", {"start_time": 100, "limit": 0}, "limit"),
        ("completions", {"start_time": 100, "limit": 32}, "limit"),
        ("completions", {"start_time": 100, "bucket_width": "1m", "limit": 1441}, "limit"),
        ("completions", {"start_time": 100, "group_by": ["project_id", "size"]}, "group_by"),
        ("completions", {"start_time": 100, "page": "page_x"}, "page"),
        ("completions", {"start_time": 100, "page": "page_AAAAAAAAAAE="}, "page"),
        ("completions", {"start_time": 100, "batch": "perhaps"}, "batch"),
        ("completions", {"start_time": 100, "models": ["a\0b"]}, "models"),
        ("completions", {"start_time": "1700000000.5"}, "start_time"),
        ("completions", {"start_time": "1e9"}, "start_time"),
        ("costs", {"start_time": "yesterday"}, "start_time"),
        ("costs", {"start_time": 100, "end_time[lt]": 200}, "end_time[lt]"),
        ("completions", {"start_time": 10**30}, "start_time"),
        ("completions", {"start_time": 100, "sizes": ["1x1"]}, "sizes"),
        ("images", {"start_time": 100, "sizes": ["1x1"]}, "sizes"),
        ("web_search_calls", {"start_time": 100, "context_levels": ["huge"]}, "context_levels"),
        ("vector_stores", {"start_time": 100, "user_ids": ["u"]}, "user_ids"),
        ("vector_stores", {"start_time": 100, "group_by": ["model"]}, "group_by"),
        ("costs", {"start_time": 100, "bucket_width": "1h"}, "bucket_width"),
        ("costs", {"start_time": 100, "limit": 181}, "limit"),
        ("costs", {"start_time": 100, "group_by": ["model"]}, "group_by"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(gateway: Served, kind: str, given: dict[str, Any], param: str) -> None:
    path = "/organization/costs" if kind == "costs" else f"/organization/usage/{kind}"
    client = gateway.client(admin_api_key=gateway.admin_key)
    with pytest.raises(openai.BadRequestError) as refused:
        client.get(path, cast_to=object, options={"params": given, "security": {"admin_api_key_auth": True}})
    assert refused.value.param in (param, f"{param}[]"), refused.value.message


def test_a_project_key_may_not_ask(gateway: Served) -> None:
    client = gateway.client(admin_api_key=gateway.api_key)
    for ask in (client.admin.organization.usage.completions, client.admin.organization.usage.costs):
        with pytest.raises(openai.PermissionDeniedError):
            ask(start_time=100)
