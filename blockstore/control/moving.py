"""Which replicas should be elsewhere, and where. Pure: what is known of nodes and volumes in, moves out.

A replica moves because its node is away for longer than is waited for, because nothing else makes it good again
(blockstore/control/unfit.py), because somebody drains the node, or to make zones and load even. Invariants: at most
one change in a volume at a time; none begins unless a quorum of the others is whole, so that the change never waits
for, or rests on, the replica that it takes away; a node gets no second replica of a segment (but in the place of its
own), and none while it drains, is full or is away.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from blockstore.control.membership import is_changing
from blockstore.control.records import PlannedMove, Segment, Volume
from blockstore.control.unfit import DAMAGED, LEFT_OUT
from blockstore.domain import Member, NodeId, ReplicaId

#: A load that differs by less than this share of a node's capacity is even: moving more only wears disks.
_EVEN: Final = 0.05

AWAY: Final = "away"
DRAIN: Final = "drain"
REBALANCE: Final = "rebalance"
#: Why a replica is due, the most urgent first; all else are moves that somebody asked for.
WHY_DUE: Final = (AWAY, LEFT_OUT, DAMAGED, DRAIN)


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as control sees it. away_s: since it was heard, 0 while it is up.

    promised_bytes: the sizes of the segments that are placed on it.
    """

    id: NodeId
    zone: str
    away_s: float = 0.0
    draining: bool = False
    full: bool = False
    capacity_bytes: int = 0
    used_bytes: int = 0
    promised_bytes: int = 0

    @property
    def takes_replicas(self) -> bool:
        return not self.away_s and not self.draining and not self.full

    @property
    def load(self) -> float:
        return (self.used_bytes + self.promised_bytes) / max(self.capacity_bytes, 1)


@dataclass(frozen=True, slots=True)
class Limits:
    """replace_after_s: 0 is never. rebuilds: that are under way at once, in all and on one new node.

    rebuild_rate_bytes: a second that a node takes in for replicas it fills, 0 without a limit.
    """

    replace_after_s: float
    rebuild_rate_bytes: int
    rebuilds: int
    rebuilds_per_node: int


class Cluster:
    """Nodes, who is whole, and what holds no replica any more though its node is up.

    whole: whether a member has everything, by the last word of its front-end or node. emptied: seconds for
    which a node that is up has said that it does not have them. unfit: members that only another replica makes good,
    and why.
    """

    def __init__(
        self,
        nodes: Iterable[NodeView],
        whole: Callable[[Volume, Member], bool],
        emptied: Mapping[ReplicaId, float],
        unfit: Mapping[ReplicaId, str],
    ) -> None:
        self.nodes = {node.id: node for node in nodes}
        self._is_whole = whole
        self._emptied = emptied
        self._unfit = unfit

    def all_well(self, replace_after_s: float) -> bool:
        """No member can be due: looking at each of them would be for nothing."""
        gone = any(node.draining or 0 < replace_after_s < node.away_s for node in self.nodes.values())
        return not gone and not self._emptied and not self._unfit

    def due(self, member: Member, replace_after_s: float) -> str:
        """Why this member should be replaced; empty where it should not."""
        node = self.nodes.get(member.node)
        if node is None:
            return AWAY  # removed from the catalog
        if node.draining:
            return DRAIN
        away_s = node.away_s or self._emptied.get(member.replica, 0.0)
        return AWAY if replace_after_s and away_s > replace_after_s else self._unfit.get(member.replica, "")

    def others_are_whole(self, volume: Volume, segment: Segment, replica: ReplicaId) -> bool:
        """Whether a quorum is whole without that one."""
        members = segment.configuration.members
        whole = sum(self._is_whole(volume, each) for each in members if each.replica != replica)
        return 2 * whole > len(members)

    def target(self, segment: Segment, leaving: ReplicaId, busy: Collection[NodeId] = ()) -> NodeId | None:
        """The node for a replica in that one's place: in a zone of its own where there is one, the least loaded.

        busy: nodes that take no more just now. None where no node can have it.
        """
        others = [each.node for each in segment.configuration.members if each.replica != leaving]
        zones = Counter(self.nodes[node].zone for node in others if node in self.nodes)
        free = (
            node
            for node in self.nodes.values()
            if node.takes_replicas and node.id not in others and node.id not in busy
        )
        best = min(free, key=lambda node: (zones[node.zone], node.load, node.id), default=None)
        return best.id if best else None


def next_moves(
    volumes: Iterable[Volume],
    cluster: Cluster,
    limits: Limits,
    asked: Iterable[PlannedMove] = (),
    waits: dict[ReplicaId, str] | None = None,
) -> Iterator[PlannedMove]:
    """What is to begin now, within the limits: who is away first, then drains, then what was asked for.

    waits: is told what stands in the way of the others, where somebody has to do something about it.
    """
    waits = {} if waits is None else waits
    volumes = tuple(volumes)
    changing = {volume.id for volume in volumes if any(map(is_changing, volume.segments))}
    filling = Counter(newcomers(volumes))
    under_way = sum(is_changing(segment) for volume in volumes for segment in volume.segments)
    for move in (*_due(volumes, cluster, limits), *asked):
        if under_way >= limits.rebuilds:
            return
        volume = next((each for each in volumes if each.id == move.volume), None)
        segment = _segment(volume, move)
        if volume is None or segment is None or volume.id in changing:
            continue
        if not cluster.others_are_whole(volume, segment, move.replica):
            waits[move.replica] = "too few of the others are whole"
            continue
        busy = [node for node, count in filling.items() if count >= limits.rebuilds_per_node]
        target = _fitting(segment, move, cluster, busy)
        if target is None:
            if not busy:
                waits[move.replica] = "no other node that is up, with room and not drained, is without a replica of it"
            continue
        changing.add(volume.id)
        filling[target] += 1
        under_way += 1
        yield PlannedMove(move.volume, move.segment, move.replica, target, move.why)


def newcomers(volumes: Iterable[Volume]) -> list[NodeId]:
    """The nodes on which replicas are filled for a change of members."""
    changes = (segment.configuration.replacement for volume in volumes for segment in volume.segments)
    return [change.newcomer.node for change in changes if change]


def is_void(move: PlannedMove, volumes: Mapping[str, Volume]) -> bool:
    """Whether a move that was asked for can be no more: its volume, or that replica in it, is gone."""
    return _segment(volumes.get(move.volume), move) is None


def _due(volumes: Iterable[Volume], cluster: Cluster, limits: Limits) -> list[PlannedMove]:
    if cluster.all_well(limits.replace_after_s):
        return []
    found = [
        PlannedMove(volume.id, segment.number, member.replica, NodeId(""), why)
        for volume in volumes
        for segment in volume.segments
        for member in segment.configuration.members
        if (why := cluster.due(member, limits.replace_after_s))
    ]
    return sorted(found, key=lambda move: WHY_DUE.index(move.why))


def _segment(volume: Volume | None, move: PlannedMove) -> Segment | None:
    """The segment of the move, while its replica is a member."""
    for segment in volume.segments if volume else ():
        if segment.number == move.segment and any(
            each.replica == move.replica for each in segment.configuration.members
        ):
            return segment
    return None


def _fitting(segment: Segment, move: PlannedMove, cluster: Cluster, busy: Collection[NodeId]) -> NodeId | None:
    """The node that was asked for, where it takes replicas and has none of the segment; else the best one."""
    if not move.to_node:
        return cluster.target(segment, move.replica, busy)
    node = cluster.nodes.get(move.to_node)
    held = any(each.node == move.to_node for each in segment.configuration.members)
    return move.to_node if node and node.takes_replicas and not held and move.to_node not in busy else None


# ---- rebalancing


def rebalance(volumes: Iterable[Volume], cluster: Cluster) -> list[PlannedMove]:
    """Moves after which zones are as different, and loads as even, as one move of each segment can make them."""
    nodes = dict(cluster.nodes)
    moves = []
    for volume in volumes:
        for segment in volume.segments:
            if is_changing(segment):
                continue
            move = _into_a_zone_of_its_own(volume, segment, nodes) or _to_a_lighter_node(volume, segment, nodes)
            if move is not None:
                moves.append(move)
                _account(nodes, segment, move)
    return moves


def _into_a_zone_of_its_own(volume: Volume, segment: Segment, nodes: Mapping[NodeId, NodeView]) -> PlannedMove | None:
    members = [each for each in segment.configuration.members if each.node in nodes]
    zones = Counter(nodes[each.node].zone for each in members)
    crowded = [each for each in members if zones[nodes[each.node].zone] > 1]
    free = [node for node in nodes.values() if node.takes_replicas and node.zone not in zones]
    if not crowded or not free:
        return None
    leaving = max(crowded, key=lambda each: (nodes[each.node].load, each.replica))
    target = min(free, key=lambda node: (node.load, node.id))
    why = f"{zones[nodes[leaving.node].zone]} replicas are in zone {nodes[leaving.node].zone}"
    return PlannedMove(volume.id, segment.number, leaving.replica, target.id, why)


def _to_a_lighter_node(volume: Volume, segment: Segment, nodes: Mapping[NodeId, NodeView]) -> PlannedMove | None:
    """From the most loaded member to the least loaded node, where that stays the less loaded of the two."""
    members = [each for each in segment.configuration.members if each.node in nodes]
    held = {each.node for each in members}
    for leaving in sorted(members, key=lambda each: (-nodes[each.node].load, each.replica)):
        zones = {nodes[each.node].zone for each in members if each is not leaving}
        spread = nodes[leaving.node].zone not in zones
        free = (
            node
            for node in nodes.values()
            if node.takes_replicas and node.id not in held and not (spread and node.zone in zones)
        )
        target = min(free, key=lambda node: (node.load, node.id), default=None)
        if target is None:
            continue
        gap = nodes[leaving.node].load - target.load
        if gap > _EVEN + 2 * segment.size_bytes / max(target.capacity_bytes, 1):
            why = f"load {nodes[leaving.node].load:.0%}, there {target.load:.0%}"
            return PlannedMove(volume.id, segment.number, leaving.replica, target.id, why)
    return None


def _account(nodes: dict[NodeId, NodeView], segment: Segment, move: PlannedMove) -> None:
    """The loads as they are after the move."""
    source = next(each.node for each in segment.configuration.members if each.replica == move.replica)
    for node, change in ((source, -segment.size_bytes), (move.to_node, segment.size_bytes)):
        nodes[node] = replace(nodes[node], promised_bytes=nodes[node].promised_bytes + change)
