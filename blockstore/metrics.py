"""What daemons count, and how that is shown: metrics as Prometheus has them, without its library.

Where things happen, plain numbers grow: integers, and `Durations` where a spread matters. Nothing else is done for a
request. Each daemon declares its metrics in a module of its own (`metrics.py` beside it), which reads those numbers
into samples when somebody asks; blockstore/metrics_endpoint.py answers that.

Invariants: each metric is declared once, with its help, and docs/metrics.md has them all (a test compares). A name
ends in its unit (`_seconds`, `_bytes`), that of what only grows in `_total`. No label has values without bound: ids of
volumes, replicas and nodes, states and commands; never a client. Source: Prometheus, "Metric and label naming".
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

#: Upper bounds of the buckets of all durations, in seconds: from a write into a fast disk's cache to the 30 s after
#: which a guest's kernel gives a disk up.
BOUNDS_S: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Durations:
    """How long something took, each time: counts[i] took up to BOUNDS_S[i] and more than the bound before.

    The last count is of what took longer than any bound. One thread adds; any may look.
    """

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.seconds = 0.0
        """All together."""

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.seconds += seconds

    @classmethod
    def joined(cls, parts: Iterable["Durations"]) -> "Durations":
        """Those of all parts."""
        whole = cls()
        for part in parts:
            whole.counts = [mine + more for mine, more in zip(whole.counts, part.counts, strict=True)]
            whole.seconds += part.seconds
        return whole


class Kind(Enum):
    """What may be done with a metric's values."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """The declaration of one metric. labels: the names of what tells its samples apart."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    def __call__(self, value: "float | Durations", *labels: str) -> "Sample":
        """Its value for these values of its labels."""
        assert len(labels) == len(self.labels), f"{self.name} has the labels {self.labels}, not {labels}"
        assert isinstance(value, Durations) == (self.kind is Kind.HISTOGRAM), f"{self.name} is a {self.kind.value}"
        return Sample(self, labels, value)


class Sample(NamedTuple):
    """What a metric is now. value: Durations of a histogram, else a number. labels: in the declaration's order."""

    metric: Metric
    labels: tuple[str, ...]
    value: float | Durations


def counter(name: str, text: str, *labels: str) -> Metric:
    """Of what only grows until the process ends."""
    return Metric(f"cairn_{name}_total", Kind.COUNTER, text, labels)


def gauge(name: str, text: str, *labels: str) -> Metric:
    """Of what is as it is now."""
    return Metric(f"cairn_{name}", Kind.GAUGE, text, labels)


def histogram(name: str, text: str, *labels: str) -> Metric:
    """Of how long something took."""
    return Metric(f"cairn_{name}_seconds", Kind.HISTOGRAM, text, labels)
