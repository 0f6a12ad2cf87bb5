"""Figures in Prometheus' text format (version 0.0.4): how a family of samples is written, and histograms that cost next
to nothing to observe. What is measured is known only to those who measure.

Each part with figures offers metrics() -> list[str], made of family() and histogram(); the meter joins them all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTER, GAUGE = "counter", "gauge"
Sample = tuple[Mapping[str, str], Any]  # labels, and an int, a float or a bool
# Upper bounds in seconds: of what a caller waits for, and of the pauses inside an answer.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
PAUSES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


def family(name: str, kind: str, help: str, samples: Iterable[Sample]) -> list[str]:
    """The lines of one counter or gauge: # HELP, # TYPE, then a line per (labels, value), as they come.

    A value may be an int, a float or a bool. Without samples the two comment lines are all: the family is known to
    exist, and nothing has happened yet.
    """
    lines = _head(name, kind, help)
    lines += [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    return lines


class Histogram:
    """Counts of values by upper bound, and their sum. observe() is for hot paths: a bisection and two additions."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        """bounds: upper bounds, inclusive, rising; what is beyond the last goes to +Inf."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # each bucket by itself; they are summed up when shown
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


def histogram(name: str, help: str, samples: Iterable[tuple[Mapping[str, str], Histogram]]) -> list[str]:
    """The lines of one histogram family: buckets, sum and count per (labels, Histogram)."""
    lines = _head(name, "histogram", help)
    for labels, seen in samples:
        below = 0
        for bound, inside in zip((*seen.bounds, float("inf")), seen.counts, strict=True):
            below += inside
            lines.append(f"{name}_bucket{_labels({**labels, 'le': _number(bound)})} {below}")
        lines.append(f"{name}_sum{_labels(labels)} {_number(seen.sum)}")
        lines.append(f"{name}_count{_labels(labels)} {below}")
    return lines


def _head(name: str, kind: str, help: str) -> list[str]:
    text = help.replace("\\", "\\\\").replace("\n", "\\n")
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}"


def escaped(text: str) -> str:
    """A label's value as it stands between quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: Any) -> str:  # Any: compiled code would make a float of an int that is called one
    if isinstance(value, int):  # counters stay exact, however large; True is 1
        return str(int(value))
    if value != value or value in (float("inf"), float("-inf")):
        return {"inf": "+Inf", "-inf": "-Inf"}.get(str(value), "NaN")
    return repr(value)
