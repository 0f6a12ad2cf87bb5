"""What a server tells of itself, as docs/how-to/monitoring.md has it."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from conftest import ROOT, Served, serve
from tertulia.accounts.entry import Entry

PAGE = (ROOT / "docs" / "how-to" / "monitoring.md").read_text(encoding="utf-8")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "the prompt that nobody may see"


class Collector(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.bodies: list[bytes] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def spans(self) -> dict[str, Any]:
        requests = map(ExportTraceServiceRequest.FromString, self.bodies)
        spans = [s for one in requests for r in one.resource_spans for scope in r.scope_spans for s in scope.spans]
        return {said(span)["tertulia.request.id"]: span for span in spans}


class Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def said(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    it = Collector()
    yield it
    it.shutdown()
    it.server_close()


@pytest.fixture
def served(tmp_path: Path, collector: Collector) -> Iterator[Served]:
    address = f"http://127.0.0.1:{collector.server_address[1]}"
    it = serve(
        tmp_path, f'traces = "{address}"\naccess_log = "{tmp_path}/access.log"\n',
        "--chat-model", "mock", "--embedding-model", "mock-embedding",
    )  # fmt: skip
    yield it
    it.stop()


def ask(served: Served, **more: Any) -> Any:
    asked = {"model": "mock", "messages": [{"role": "user", "content": SECRET}], **more}
    return served.client().chat.completions.with_raw_response.create(**asked)


def test_every_figure_is_documented_with_its_type_and_labels_and_every_documented_one_exists(served: Served) -> None:
    for _ in ask(served, stream=True).parse():
        pass
    with urllib.request.urlopen(f"{served.root}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    documented = re.findall(r"^\| `(tertulia_\w+)` \| (\w+) \| ([\w, ]*) ?\|", PAGE, re.MULTILINE)
    assert {name: kind for name, kind, _ in documented} == kinds
    assert set(re.findall(r"^# HELP (\S+) \S", text, re.MULTILINE)) == set(kinds)
    labels = {name: {label for label in given.replace(" ", "").split(",") if label} for name, _, given in documented}
    for name, inside in re.findall(r"^(tertulia_\w+?)(?:_bucket|_sum|_count)?(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        found = set(re.findall(r'(\w+)="', inside)) - {"le"}
        assert found == labels[name], name


def test_every_field_of_the_log_is_documented() -> None:
    table = PAGE.partition("## One line a call")[2].partition("## Traces")[0]
    fields = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert fields == set(Entry.__struct_fields__)


def test_log_and_trace_tell_of_the_same_call_and_not_what_was_said(served: Served, collector: Collector) -> None:
    first = ask(served, temperature=0.5, extra_headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
    with pytest.raises(openai.NotFoundError) as missing:
        ask(served, model="nobody")
    streamed = ask(served, stream=True)
    for _ in streamed.parse():
        pass
    served.stop()  # sends and writes what waits
    lines = {line["id"]: line for line in map(json.loads, (served.data / "access.log").read_text().splitlines())}
    spans = collector.spans()
    ids = [
        first.headers["x-request-id"],
        missing.value.response.headers["x-request-id"],
        streamed.headers["x-request-id"],
    ]
    assert list(lines) == ids and set(spans) == set(ids)
    one, two, three = (said(spans[id]) for id in ids)
    assert (spans[ids[0]].trace_id.hex(), spans[ids[0]].parent_span_id.hex()) == (TRACE, SPAN)
    assert spans[ids[0]].name == "chat mock" and one["gen_ai.request.temperature"] == 0.5
    assert one["gen_ai.usage.input_tokens"] == lines[ids[0]]["prompt_tokens"] > 0
    assert (two["error.type"], two["http.response.status_code"]) == ("model_not_found", 404)
    assert (lines[ids[1]]["error"], lines[ids[1]]["status"]) == ("model_not_found", 404)
    assert three["gen_ai.request.stream"] is True and 0 < three["gen_ai.response.time_to_first_chunk"] < 10
    everything = b"".join(collector.bodies) + (served.data / "access.log").read_bytes()
    for kept_out in (SECRET, served.api_key):
        assert kept_out.encode() not in everything
    documented = set(re.findall(r"`((?:gen_ai|tertulia|server|http|error)\.[a-z_.]+)`", PAGE))
    assert set(one) | set(two) | set(three) <= documented


def test_a_rotated_log_goes_on_in_a_new_file(served: Served) -> None:
    ask(served)
    path = served.data / "access.log"
    end = time.monotonic() + 5
    while not path.stat().st_size:
        assert time.monotonic() < end
        time.sleep(0.05)
    path.rename(served.data / "access.log.1")
    ask(served)
    served.stop()
    assert len((served.data / "access.log.1").read_text().splitlines()) == 1
    assert len(path.read_text().splitlines()) == 1 and path.stat().st_mode & 0o777 == 0o600


def figures(served: Served, key: str | None = None) -> int:
    """The status of /metrics."""
    request = urllib.request.Request(
        f"{served.root}/metrics", headers={"authorization": f"Bearer {key}"} if key else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert b"tertulia_calls_in_flight" in answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        assert json.load(error)["error"].keys() == {"message", "type", "param", "code"}
        return error.code


def test_who_can_be_reached_from_elsewhere_shows_figures_to_those_who_may_see_them(tmp_path: Path) -> None:
    models = ("--chat-model", "mock", "--embedding-model", "mock-embedding")
    served = serve(tmp_path, "", *models, "--host", "0.0.0.0")
    try:
        assert [figures(served, key) for key in (None, "sk-nobody", served.api_key)] == [401, 401, 403]
        assert figures(served, served.admin_key) == 200
        organization = served.client(admin_api_key=served.admin_key).admin.organization
        assert organization.projects.list().data
        for path in ("/healthz", "/readyz"):
            with urllib.request.urlopen(served.root + path, timeout=10) as answer:
                assert answer.status == 200
    finally:
        served.stop()


@pytest.mark.parametrize(
    ("arguments", "status"), [(("--host", "0.0.0.0", "--metrics-open"), 200), (("--no-metrics-open",), 401)]
)
def test_the_setting_has_the_last_word_on_figures(tmp_path: Path, arguments: tuple[str, ...], status: int) -> None:
    served = serve(tmp_path, "", "--chat-model", "mock", "--embedding-model", "mock-embedding", *arguments)
    try:
        assert figures(served) == status and figures(served, served.admin_key) == 200
    finally:
        served.stop()
