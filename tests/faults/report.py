"""What a schedule of faults did and saw, as a table for docs/reliability.md."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Measured:
    """Of one kind of fault, one number for each time that it happened, in seconds.

    gaps_s: the longest time in which no request was answered. slowest_s: the slowest request that was answered.
    healthy_after_s: from its end until `cairn status` had nothing to complain about.
    """

    gaps_s: list[float] = field(default_factory=list)
    slowest_s: list[float] = field(default_factory=list)
    healthy_after_s: list[float] = field(default_factory=list)

    def row(self, kind: str) -> str:
        columns = (self.gaps_s, self.slowest_s, self.healthy_after_s)
        return f"| `{kind}` | {len(self.gaps_s)} | {' | '.join(map(_median_and_most, columns))} |"


@dataclass
class Report:
    """Of a whole schedule."""

    kinds: dict[str, Measured] = field(default_factory=dict)
    registers_checked: int = 0
    unknown: int = 0
    requests: int = 0
    fio_rounds: int = 0
    fio_interrupted: int = 0
    errors: Counter[int] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """A table in Markdown, with median and worst of each figure, and what the witnesses judged."""
        yield "| kind | times | longest without an answer, s | slowest request, s | healthy after, s |"
        yield "|---|---|---|---|---|"
        for kind, each in self.kinds.items():
            yield each.row(kind)
        yield ""
        yield (
            f"{self.registers_checked} requests linearizable ({self.unknown} writes of unknown outcome), "
            f"{self.requests} judged by the model, {self.fio_rounds} rounds of fio "
            f"({self.fio_interrupted} cut short); errors {dict(self.errors)}"
        )


def _median_and_most(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{median(values):.2f} (worst {max(values):.2f})"
