"""The goals, and how far one run reached them. Pure: a run's document in, judgements out; nothing fails.

A goal sets one figure of Cairn against a peer's in the same run, or against a number. What a run did not measure (a
peer that is not installed, a workload that was left out) is said to be so, and is not counted as met. The goals of
scale are those of bench.scale, which sets a small case beside a large one.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

_CEPH, _QEMU, _RESTIC = "ceph-rbd", "qemu-nbd-directsync", "restic"
_CAIRN: Final = "cairn"

Spread = tuple[float, float, float]
"""The lowest, the median and the highest of the rounds."""
Found = tuple[str, Spread] | None
"""What Cairn reached, for people, and that over the peer's; None where one of the two was not measured."""


@dataclass(frozen=True)
class Goal:
    """find: takes a run's document. limit: what it finds is to be at most, or at least, so much."""

    name: str
    peer: str
    limit: float
    at_most: bool
    find: Callable[[Mapping[str, Any]], Found]

    def meets(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True, slots=True)
class Judged:
    """goal: in words. reached: Cairn's figure. ratio: over the peer's, with the spread of the rounds.

    ratio is empty where the goal is a number; met is None where it was not measured.
    """

    goal: str
    reached: str
    ratio: str
    met: bool | None


def judge(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Judged, for each goal, for JSON. document: as bench.report makes it, save this."""
    return [asdict(_judge(goal, goal.find(document))) for goal in GOALS]


def _judge(goal: Goal, found: Found) -> Judged:
    bound = f"at {'most' if goal.at_most else 'least'} {goal.limit:g}"
    name = f"{goal.name}: {bound} times {goal.peer}" if goal.peer else f"{goal.name}: {bound} us"
    if found is None:
        return Judged(name, "", "", None)
    reached, (low, median, high) = found
    ratio = f"{median:.2f}" if low == high else f"{median:.2f} ({low:.2f} to {high:.2f})"
    return Judged(name, reached, ratio if goal.peer else "", goal.meets(median))


# ---- where each figure is found


def _iops(workload: str, peer: str, times: float) -> Goal:
    return Goal(f"{workload}, rate", peer, times, False, lambda run: _compared(run, workload, "iops", peer))


def _p50(workload: str, peer: str, times: float) -> Goal:
    return Goal(f"{workload}, p50", peer, times, True, lambda run: _compared(run, workload, "p50_us", peer))


def _compared(run: Mapping[str, Any], workload: str, figure: str, peer: str) -> Found:
    spread = run["ratios"].get(peer, {}).get(workload)
    if spread is None or not all(spread[figure]):
        return None
    value = run["medians"][_CAIRN][workload][figure]
    reached = f"{value / 1000:.2f} ms" if figure == "p50_us" else f"{value:,.0f}"
    low, median, high = spread[figure]
    return reached, (low, median, high)


def _cpu(workload: str, limit_us: float) -> Goal:
    def find(run: Mapping[str, Any]) -> Found:
        medians = run["medians"].get(_CAIRN, {}).get(workload)
        return None if medians is None else (f"{medians['cpu_us']:,.0f} us", (medians["cpu_us"],) * 3)

    return Goal(f"{workload}, CPU of all processes for each", "", limit_us, True, find)


def _sustained(peer: str, times: float) -> Goal:
    def find(run: Mapping[str, Any]) -> Found:
        ours, theirs = (run["sustained"].get(each) for each in (_CAIRN, peer))
        if ours is None or theirs is None:
            return None
        return f"{ours['mib_s']:,.0f} MiB/s", (ours["mib_s"] / theirs["mib_s"],) * 3

    return Goal("sequential write with checkpoints (--sustained)", peer, times, False, find)


def _backup(figure: str, times: float) -> Goal:
    """Speed: their time over ours."""

    def find(run: Mapping[str, Any]) -> Found:
        ours, theirs = (run["backup_seconds"].get(each, {}).get(figure) for each in (_CAIRN, _RESTIC))
        return None if ours is None or theirs is None else (f"{ours:.2f} s", (theirs / ours,) * 3)

    return Goal(f"{figure}, speed (--backups)", _RESTIC, times, False, find)


GOALS: Final = (
    _p50("randwrite-4k-1", _CEPH, 0.35),
    _iops("randwrite-4k-32", _CEPH, 10),
    _iops("randwrite-4k-128", _CEPH, 10),
    _iops("randwrite-4k-32", _QEMU, 1),
    _iops("randwrite-4k-128", _QEMU, 1),
    _p50("randread-4k-1", _CEPH, 0.5),
    _iops("randread-4k-32", _CEPH, 3),
    _iops("randrw-4k-32", _CEPH, 8),
    _sustained(_CEPH, 1.2),
    _iops("read-1m-8", _CEPH, 1),
    *(_cpu(f"randwrite-4k-{depth}", 100) for depth in (1, 32, 128)),
    _backup("full", 1.5),
    _backup("increment", 20),
    _backup("restore to a file", 1.5),
)
