"""Which nodes get the replicas of a new segment. Pure: what is known of the nodes in, a choice out.

Three replicas on three nodes in three zones, so that no one failure takes two of them. Within that
the least loaded node first, load being what is stored plus what is promised to the volumes placed
there, over the capacity. Where loads are about the same, a volume is spread over as many nodes as
there are. Two replicas never share a node: one disk would then take the quorum.
"""

from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final

from blockstore.config import Placement
from blockstore.domain import NodeId
from blockstore.errors import Conflict, NoSpace, QuorumUnavailable

REPLICAS: Final = 3
"""Of each segment: the fewest of which a quorum outlives the loss of any one."""

SAME_LOAD: Final = 0.01
"""Loads that differ by less count as the same: other users of a disk move it by as much from beat to beat."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that is up.

    promised_bytes: the sizes of the segments placed on it. replicas: those of the volume that is being placed.
    """

    id: NodeId
    zone: str
    capacity_bytes: int
    used_bytes: int = 0
    promised_bytes: int = 0
    full: bool = False
    replicas: int = 0

    @property
    def load(self) -> float:
        return (self.used_bytes + self.promised_bytes) / max(self.capacity_bytes, 1)


@dataclass(frozen=True, slots=True)
class Placed:
    """REPLICAS nodes, and what is not as it should be about them."""

    nodes: tuple[NodeId, ...]
    warnings: tuple[str, ...] = ()


def place(candidates: Seq[Candidate], policy: Placement) -> Placed:
    """The nodes for one segment's replicas.

    Raises QuorumUnavailable with fewer than three nodes up, NoSpace where too many are full, and
    Conflict with fewer than three zones under the strict policy.
    """
    if len(candidates) < REPLICAS:
        raise QuorumUnavailable(
            f"a volume needs {REPLICAS} nodes that are up, and there are {len(candidates)}: "
            "start more, see `cairn node list`"
        )
    free = [candidate for candidate in candidates if not candidate.full]
    if len(free) < REPLICAS:
        raise NoSpace(
            f"a volume needs {REPLICAS} nodes with free space, and {len(candidates) - len(free)} of "
            f"{len(candidates)} are full: add nodes or delete volumes"
        )
    chosen = _spread(free)
    zones = [candidate.zone for candidate in chosen]
    finding = warning(zones)
    if finding and policy is Placement.STRICT:
        raise Conflict(
            f"only {_spread_of(zones)} are possible: give the nodes {REPLICAS} zones (`cairn node run --zone`), "
            "or run control with --placement warn"
        )
    return Placed(tuple(candidate.id for candidate in chosen), (finding,) if finding else ())


def warning(zones: Collection[str]) -> str:
    """What is not as it should be about a segment's replicas that are in these zones; empty where nothing is."""
    shared = len(set(zones)) < len(zones)
    return f"{_spread_of(zones)}: losing one zone can stop the volume, or lose it" if shared else ""


def _spread_of(zones: Collection[str]) -> str:
    found = sorted(set(zones))
    return f"{len(zones)} replicas in {len(found)} zone{'s' if len(found) > 1 else ''} ({', '.join(found)})"


def _spread(candidates: Seq[Candidate]) -> list[Candidate]:
    """REPLICAS of them: each next one in the zone least chosen so far, and the best there."""
    chosen: list[Candidate] = []
    for _ in range(REPLICAS):
        taken = Counter(candidate.zone for candidate in chosen)
        rest = [candidate for candidate in candidates if candidate not in chosen]
        fewest = min(taken[each.zone] for each in rest)
        chosen.append(_best([each for each in rest if taken[each.zone] == fewest]))
    return chosen


def _best(candidates: Seq[Candidate]) -> Candidate:
    """Of those about as loaded as the least loaded one, that with the fewest replicas of the volume."""
    least = min(each.load for each in candidates)
    return min(
        (each for each in candidates if each.load - least < SAME_LOAD),
        key=lambda each: (each.replicas, each.load, each.id),
    )
