"""Charts as SVG, to stand in a page: for each workload a bar for each target, with the spread of the rounds."""

import io
import statistics
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_CAIRN_COLOUR, _PEER_COLOUR, _SPREAD_COLOUR = "#1f6f8b", "#b8c4c9", "#30383b"
_WIDTH_IN, _BAR_IN, _FRAME_IN = 5.6, 0.28, 0.9
_UNITS: Final = {"iops": "requests a second", "mib_s": "MiB a second", "p99_us": "99th percentile of latency, us"}


def rate_chart(workload: str, results: dict[str, Any]) -> str:
    """results: rounds by target and workload. Requests a second, or MiB where it is sequential."""
    return _chart(workload, "iops" if workload.startswith("rand") else "mib_s", results)


def latency_chart(workload: str, results: dict[str, Any]) -> str:
    """The latency that one in a hundred requests exceeds."""
    return _chart(workload, "p99_us", results)


def _chart(workload: str, figure: str, results: dict[str, Any]) -> str:
    drawing = Figure(figsize=(_WIDTH_IN, _FRAME_IN + _BAR_IN * len(results)), layout="constrained")
    axes = drawing.add_subplot()
    targets = list(results)[::-1]
    _bars(axes, targets, [[each[figure] for each in results[target][workload]] for target in targets])
    axes.set_title(workload, loc="left", fontsize=10)
    axes.set_xlabel(_UNITS[figure], fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    written = io.StringIO()
    drawing.savefig(written, format="svg", metadata={"Date": None})
    # Without the XML head, which has no place inside a page.
    return written.getvalue().partition("<svg")[1] + written.getvalue().partition("<svg")[2]


def _bars(axes: Axes, targets: list[str], rounds: list[list[float]]) -> None:
    medians = [statistics.median(each) for each in rounds]
    spread = [
        [middle - min(each) for middle, each in zip(medians, rounds, strict=True)],
        [max(each) - middle for middle, each in zip(medians, rounds, strict=True)],
    ]
    colours = [_CAIRN_COLOUR if target == "cairn" else _PEER_COLOUR for target in targets]
    bars = axes.barh(targets, medians, xerr=spread, color=colours, ecolor=_SPREAD_COLOUR, capsize=2)
    axes.bar_label(bars, fmt="{:,.0f}", padding=4, fontsize=8)
    axes.margins(x=0.15)
