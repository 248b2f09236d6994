"""The lineage of snapshots, drawn. Pure.

A snapshot's parent is the one that it was shipped as a change of, or its volume's source. The snapshots of
one volume stand below each other as one line, however many they are; what was restored from one of them and
snapshotted again branches off to the right:

    ┌ snap-1   db
    ├─┬ snap-2   copy, which was made from snap-1
    │ └ snap-3   copy
    └ snap-4   db
    ─ snap-5   another
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blockstore.rpc import snapshot_pb2 as pb


@dataclass(frozen=True, slots=True)
class Row:
    """One snapshot, and what is drawn before it."""

    snapshot: pb.Snapshot
    drawing: str
    depth: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    """lead: what stands before it in its own row; rest: in the rows below it. first: it begins its line."""

    snapshot: pb.Snapshot
    lead: str
    rest: str
    first: bool
    depth: int


def lineage(snapshots: Sequence[pb.Snapshot]) -> Iterator[Row]:
    """All of `snapshots`, each below its parent; one whose parent is gone begins a line."""
    known = {each.id for each in snapshots}
    children: dict[str, list[pb.Snapshot]] = defaultdict(list)
    for each in sorted(snapshots, key=lambda one: (one.created_at_ms, one.id)):
        children[each.parent if each.parent in known else ""].append(each)
    # A stack, for a chain of restores may be longer than Python's.
    waiting = [_Waiting(each, "", "", True, 0) for each in reversed(children[""])]
    while waiting:
        row = waiting.pop()
        below = _below(row, children[row.snapshot.id])
        yield Row(row.snapshot, row.lead + _glyph(row, bool(below)), row.depth)
        waiting += reversed(below)


def _below(row: _Waiting, children: Sequence[pb.Snapshot]) -> list[_Waiting]:
    """The children in the order in which they are drawn: branches, then the one that goes on with the line."""
    next_in_line = next((each for each in children if each.volume == row.snapshot.volume), None)
    branches = [each for each in children if each is not next_in_line]
    below = []
    for number, each in enumerate(branches, 1):
        ends = next_in_line is None and number == len(branches)
        lead, rest = (row.rest + "└─", row.rest + "  ") if ends else (row.rest + "├─", row.rest + "│ ")
        below.append(_Waiting(each, lead, rest, True, row.depth + 1))
    if next_in_line is not None:
        below.append(_Waiting(next_in_line, row.rest, row.rest, False, row.depth))
    return below


def _glyph(row: _Waiting, has_more: bool) -> str:
    if not row.first:
        return "├ " if has_more else "└ "
    if not has_more:
        return "─ "
    return "┬ " if row.lead else "┌ "
