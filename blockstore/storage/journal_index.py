"""Where each replica's records lie in the journal, in memory, for peers that catch up.

A run is a stretch of one file whose groups hold consecutive sequences of one replica. The index
follows the log: a record at a sequence that was there before cuts what it replaces, a filling
entry drops all. It is built from group headers alone, so a start needs no bodies for it. A run
never spans a record that was replaced, so its groups can be read in order and stopped at any one.
Invariants: a replica's runs ascend, in sequence and in the log; no two share a sequence. Bounded:
consecutive groups share a run up to RUN_BYTES, and runs go with their file when it is reused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockstore.domain import ReplicaId
from blockstore.storage.journal_format import Items
from blockstore.units import MIB
from blockstore.values import value

RUN_BYTES: Final = MIB
"""A read takes in a run whole: long enough for few runs, short enough for one read's buffer."""


@value
class Place:
    """A file in its present life: a later life's groups fail checksums seeded with this salt."""

    path: Path
    salt: int


@dataclass(slots=True)
class Run:
    """The sequences first to last, in the groups between two offsets of a file."""

    first: int
    last: int
    place: Place
    start: int
    end: int


class RecordIndex:
    """The runs of all replicas. Not thread-safe."""

    def __init__(self) -> None:
        self._runs: dict[ReplicaId, list[Run]] = {}

    def add(self, items: Items, place: Place, start: int, end: int) -> None:
        """Take in a group that lies from start to end of a file."""
        for item in items:
            if item.restarts:
                self.drop(item.replica)
            if item.first:
                self._append(item.replica, Run(item.first, item.last, place, start, end))

    def drop(self, replica: ReplicaId) -> None:
        """Forget a replica's runs."""
        self._runs.pop(replica, None)

    def drop_place(self, place: Place) -> None:
        """Forget a file that is reused; it holds the oldest runs of each replica."""
        for replica in list(self._runs):
            kept = [run for run in self._runs[replica] if run.place is not place]
            if kept:
                self._runs[replica] = kept
            else:
                del self._runs[replica]

    def find(self, replica: ReplicaId, after: int, up_to: int) -> list[Run] | None:
        """Where after + 1 and on lie, without a gap, up to `up_to`; None where after + 1 is not held."""
        found: list[Run] = []
        expected = after + 1
        for run in self._runs.get(replica, ()):
            if run.last < expected:
                continue
            if run.first > expected or expected > up_to:
                break
            found.append(Run(expected, min(run.last, up_to), run.place, run.start, run.end))
            expected = run.last + 1
        return found or None

    def replicas(self) -> Iterable[ReplicaId]:
        """Those with any run."""
        return self._runs.keys()

    def _append(self, replica: ReplicaId, new: Run) -> None:
        runs = self._runs.setdefault(replica, [])
        if runs and _continues(runs[-1], new):
            runs[-1].last, runs[-1].end = new.last, new.end
            return
        while runs and runs[-1].first >= new.first:
            runs.pop()
        if runs:
            runs[-1].last = min(runs[-1].last, new.first - 1)
        runs.append(new)


def _continues(run: Run, new: Run) -> bool:
    return run.place is new.place and run.last + 1 == new.first and run.end - run.start < RUN_BYTES
