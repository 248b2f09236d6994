"""What a run of the micro-benchmarks gave, and the baseline to compare it with (baseline.json). Pure.

The baseline holds ratios alone, each benchmark's least time over its calibration's in the same run (calibration.py), so
it serves on every machine. Nothing here passes or fails: whoever changed something reads the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from bench.markdown import Table

#: The key of what pytest-benchmark keeps for us beside a figure.
CALIBRATION: Final = "calibration_s"
_FOLDER: Final = "bench/micro/"
_ROUNDED: Final = 4
_UNITS: Final = ((1e-3, "ms", 1e3), (0.0, "us", 1e6))


@dataclass(frozen=True, slots=True)
class Figure:
    """median_s: of one call. ratio: the least of it over the least of its calibration."""

    group: str
    median_s: float
    ratio: float


def name_of(full_name: str) -> str:
    """As the baseline has it, such as test_nbd.py::test_parse[1 read]."""
    return full_name.rpartition(_FOLDER)[2]


def read_run(document: Mapping[str, Any]) -> dict[str, Figure]:
    """document: the JSON of pytest-benchmark. The figures, by name."""
    return {
        name_of(each["fullname"]): Figure(
            each["group"], each["stats"]["median"], each["stats"]["min"] / each["extra_info"][CALIBRATION]
        )
        for each in document["benchmarks"]
    }


def make_baseline(figures: Mapping[str, Figure]) -> dict[str, float]:
    """For baseline.json: ratios by name, in order, so that two of them are compared line by line."""
    return {name: float(f"{figures[name].ratio:.{_ROUNDED}g}") for name in sorted(figures)}


def compare(figures: Mapping[str, Figure], baseline: Mapping[str, float]) -> Table:
    """A row for each figure; then one for each that the baseline has and the run has not."""
    rows = [_row(name, figure, baseline.get(name)) for name, figure in figures.items()]
    rows += [[name, "not run", "", f"{ratio:.4g}", ""] for name, ratio in baseline.items() if name not in figures]
    return ["what", "median", "over its calibration", "baseline", "now / baseline"], rows


def _row(name: str, figure: Figure, before: float | None) -> list[str]:
    then = ["", "new"] if before is None else [f"{before:.4g}", f"{figure.ratio / before:.2f}"]
    return [f"{figure.group}{_case(name)}", _time(figure.median_s), f"{figure.ratio:.4g}", *then]


def _case(name: str) -> str:
    """What tells it from the others of its group; empty where it is the only one."""
    case = name.partition("[")[2].removesuffix("]")
    return f": {case}" if case else ""


def _time(seconds: float) -> str:
    unit, scale = next((unit, scale) for least, unit, scale in _UNITS if seconds >= least)
    return f"{seconds * scale:.3g} {unit}"
