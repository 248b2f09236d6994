"""What is told of a volume's blocks without their content, and the question put to a member."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from blockstore.domain import Position
from blockstore.errors import InvalidRequest
from blockstore.replica_codec import from_position
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import FILL_GENERATION, Generation

ABSENT, DATA, ZERO = range(3)
"""As in BlockStatusResponse.kinds."""


class Shown(NamedTuple):
    """`length` blocks that are alike.

    data: they may hold anything; else they read as zeroes. depth: 0 where no layer has them, 1 where they were written
    since the newest snapshot that is kept, 2 since the one before, and so on; the source lies below all of them.
    here: no source is needed to read them.
    """

    length: int
    data: bool
    depth: int
    here: bool


class Changed(NamedTuple):
    """`length` blocks that are alike. changed: since the snapshot that was asked for, or perhaps; else surely not."""

    length: int
    changed: bool


@dataclass(frozen=True, slots=True)
class StatusQuery:
    """A question to a member. changed_since: which blocks changed in the generations above that; 0: what they are."""

    changed_since: int = 0

    def request(self, target: pb.Target, start: int, count: int, commit: Position) -> pb.BlockStatusRequest:
        """What it is asked by."""
        position = from_position(commit)
        return pb.BlockStatusRequest(
            target=target, commit=position, start=start, count=count, changed_since=self.changed_since
        )

    def check(self, response: pb.BlockStatusResponse, count: int) -> None:
        """Raises InvalidRequest where it answers another question."""
        runs = len(response.counts)
        generations = 0 if self.changed_since else runs
        if not runs or (len(response.kinds), len(response.generations)) != (runs, generations):
            raise InvalidRequest(f"a node answered with {runs} runs, and {len(response.kinds)} kinds of them")
        if 0 in response.counts or sum(response.counts) > count or max(response.kinds) > ZERO:
            raise InvalidRequest(f"a node answered with runs that are none of {count} blocks")


def changed_runs(response: pb.BlockStatusResponse) -> list[Changed]:
    """What a member said of changes."""
    return [Changed(count, bool(kind)) for count, kind in zip(response.counts, response.kinds, strict=True)]


def shown_runs(response: pb.BlockStatusResponse) -> list[Shown]:
    """What a member said, of a volume that needs no source."""
    depths = Depths(response.pinned)
    return merged(
        Shown(count, kind == DATA, depths.of(Generation(generation)) if kind != ABSENT else 0, True)
        for count, kind, generation in zip(response.counts, response.kinds, response.generations, strict=True)
    )


def merged(runs: Iterable[Shown]) -> list[Shown]:
    """Neighbours that are alike as one."""
    found: list[Shown] = []
    for run in runs:
        if found and found[-1][1:] == run[1:]:
            found[-1] = found[-1]._replace(length=found[-1].length + run.length)
        else:
            found.append(run)
    return found


class Depths:
    """How deep generations lie: each snapshot that is kept ends a layer. pinned: ascending."""

    def __init__(self, pinned: Iterable[int]) -> None:
        self._pinned = sorted(pinned)
        self._known: dict[Generation, int] = {}

    @property
    def of_source(self) -> int:
        """Below all that guests have written."""
        return len(self._pinned) + 2

    def of(self, generation: Generation) -> int:
        """1 for what was written since the newest snapshot."""
        depth = self._known.get(generation)
        if depth is None:
            above = sum(1 for pinned in self._pinned if pinned >= generation)
            depth = self._known[generation] = self.of_source if generation == FILL_GENERATION else 1 + above
        return depth
