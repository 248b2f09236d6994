"""All snapshots in memory, in the orders in which they are asked for. Pure.

Each change of a snapshot's record costs about the same, however many there are: what is asked for with every change is
kept, and not looked for among all of them. Invariant: it is what it would be if it were made of all records anew.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

from blockstore.control.snapshot_records import Snapshot, SnapshotState
from blockstore.domain import SnapshotId, VolumeId


class SnapshotIndex:
    """Of these snapshots, to begin with."""

    def __init__(self, snapshots: Iterable[Snapshot] = ()) -> None:
        self._by_age = sorted(snapshots, key=_age)
        self._by_id = {each.id: each for each in self._by_age}
        self._all: tuple[Snapshot, ...] | None = None
        self._unfinished: dict[SnapshotId, Snapshot] = {}
        self._kept: dict[SnapshotId, Snapshot] = {}
        self._completed: dict[VolumeId, dict[SnapshotId, int]] = {}
        """Their generations."""
        self._newest: dict[VolumeId, int] = {}
        """The highest of these."""
        for each in self._by_age:
            self._enter(each)

    @property
    def all(self) -> tuple[Snapshot, ...]:
        """The oldest first; one object while nothing changes."""
        if self._all is None:
            self._all = tuple(self._by_age)
        return self._all

    @property
    def unfinished(self) -> tuple[Snapshot, ...]:
        """Those that are not completed, the oldest first."""
        return tuple(sorted(self._unfinished.values(), key=_age))

    @property
    def kept(self) -> tuple[Snapshot, ...]:
        """Completed ones whose generations are pinned: one of each volume, and what is just being given up."""
        return tuple(self._kept.values())

    def find(self, snapshot: str) -> Snapshot | None:
        """None where there is none of that id."""
        return self._by_id.get(SnapshotId(snapshot))

    def superseded(self) -> list[Snapshot]:
        """Completed ones that are pinned, although a newer one of their volume is completed."""
        return [each for each in self._kept.values() if each.generation < self._newest[each.volume]]

    def put(self, snapshot: Snapshot) -> None:
        """It is new, or has changed."""
        self.remove(snapshot.id)
        insort(self._by_age, snapshot, key=_age)
        self._by_id[snapshot.id] = snapshot
        self._enter(snapshot)

    def remove(self, snapshot: SnapshotId) -> None:
        """It may be gone already."""
        held = self._by_id.pop(snapshot, None)
        if held is None:
            return
        self._all = None
        del self._by_age[bisect_left(self._by_age, _age(held), key=_age)]
        self._unfinished.pop(snapshot, None)
        self._kept.pop(snapshot, None)
        if held.state is SnapshotState.COMPLETED:
            self._take_completed(held)

    def _enter(self, snapshot: Snapshot) -> None:
        self._all = None
        if snapshot.state is not SnapshotState.COMPLETED:
            self._unfinished[snapshot.id] = snapshot
            return
        if snapshot.pinned:
            self._kept[snapshot.id] = snapshot
        self._completed.setdefault(snapshot.volume, {})[snapshot.id] = snapshot.generation
        self._newest[snapshot.volume] = max(snapshot.generation, self._newest.get(snapshot.volume, 0))

    def _take_completed(self, snapshot: Snapshot) -> None:
        left = self._completed[snapshot.volume]
        del left[snapshot.id]
        if not left:
            del self._completed[snapshot.volume], self._newest[snapshot.volume]
        elif snapshot.generation == self._newest[snapshot.volume]:
            self._newest[snapshot.volume] = max(left.values())


def _age(snapshot: Snapshot) -> tuple[int, str]:
    return snapshot.created_at_ms, snapshot.id
