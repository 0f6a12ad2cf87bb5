"""Prometheus' text format, read back by an independent reader of it."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tertulia.gateway.metrics import PAUSES, SECONDS, Histogram, family, histogram

LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')


def read(line: str) -> tuple[str, dict[str, str], float]:
    """One sample, as Prometheus would take it."""
    found = LINE.fullmatch(line)
    assert found, line
    name, inside, value = found.groups()
    labels, at = {}, 0
    while inside and at < len(inside):
        label = LABEL.match(inside, at)
        assert label, line
        labels[label[1]] = re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), label[2])
        at = label.end()
    return name, labels, float(value)


def test_a_family_has_its_head_and_a_line_for_each_sample() -> None:
    lines = family("tertulia_calls_total", "counter", "Calls.", [({"task": "chat", "status": "200"}, 3), ({}, 4)])
    assert lines == [
        "# HELP tertulia_calls_total Calls.",
        "# TYPE tertulia_calls_total counter",
        'tertulia_calls_total{task="chat",status="200"} 3',
        "tertulia_calls_total 4",
    ]


def test_a_family_without_samples_is_known_to_exist() -> None:
    assert family("x", "gauge", "X.", []) == ["# HELP x X.", "# TYPE x gauge"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2**63 + 1, "9223372036854775809"), (True, "1"), (False, "0"), (0.25, "0.25"), (1e300, "1e+300"),
     (math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN")],
)  # fmt: skip
def test_numbers_as_prometheus_reads_them(value: float, text: str) -> None:
    assert family("x", "gauge", "", [({}, value)])[-1] == f"x {text}"


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_any_text_may_be_a_label(first: str, second: str) -> None:
    line = family("x", "gauge", "", [({"a": first, "b": second}, 1)])[-1]
    assert "\n" not in line
    assert read(line) == ("x", {"a": first, "b": second}, 1.0)


def test_help_stays_on_its_line() -> None:
    assert family("x", "gauge", "a\nb\\c", [])[0] == "# HELP x a\\nb\\\\c"


@given(st.lists(st.floats(0, 1000)))
def test_a_histogram_counts_what_is_at_or_below_each_bound(values: list[float]) -> None:
    seen = Histogram((0.1, 1.0, 10.0))
    for value in values:
        seen.observe(value)
    samples = [read(line) for line in histogram("h", "H.", [({"task": "chat"}, seen)])[2:]]
    for name, labels, value in samples[:4]:
        assert name == "h_bucket" and labels["task"] == "chat"
        assert value == sum(one <= float(labels["le"]) for one in values)
    assert [labels["le"] for _, labels, _ in samples[:4]] == ["0.1", "1.0", "10.0", "+Inf"]
    assert samples[4] == ("h_sum", {"task": "chat"}, pytest.approx(sum(values)))
    assert samples[5] == ("h_count", {"task": "chat"}, len(values))
    assert seen.count == len(values)


@pytest.mark.parametrize("bounds", [SECONDS, PAUSES])
def test_bounds_rise_and_are_inclusive(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))
    for at, bound in enumerate(bounds):
        seen = Histogram(bounds)
        seen.observe(bound)
        seen.observe(math.nextafter(bound, math.inf))
        assert seen.counts[at] == 1 and seen.counts[at + 1] == 1
