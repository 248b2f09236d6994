"""Where new segments go: placement, fed with what the catalog and the heartbeats say of the nodes now."""

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from blockstore.config import Placement
from blockstore.control.catalog import Catalog
from blockstore.control.placement import Candidate, Placed, place
from blockstore.control.presence import Presence
from blockstore.control.record_store import Stored
from blockstore.control.records import Node, Segment, Volume
from blockstore.domain import Configuration, Member, NodeId, ReplicaId, SegmentNumber, make_id
from blockstore.errors import CairnError


@dataclass(frozen=True, slots=True)
class PlacedSegments:
    """nodes: of each segment. warnings: what is not as it should be. on: the nodes' records, each once."""

    nodes: tuple[tuple[NodeId, ...], ...]
    warnings: tuple[str, ...]
    on: tuple[Stored[Node], ...]


class Placing:
    """Chooses nodes; what is chosen counts once it is in the catalog."""

    def __init__(self, catalog: Catalog, presence: Presence, policy: Placement) -> None:
        self._catalog = catalog
        self._presence = presence
        self._policy = policy

    async def place(self, sizes: Sequence[int], beside: Iterable[Segment] = ()) -> PlacedSegments:
        """Nodes for further segments of these sizes, beside those that the volume has.

        Right after a start of control, nodes that are up may not have been heard.
        Raises as blockstore.control.placement.place does.
        """
        placed_before = Counter(member.node for each in beside for member in each.configuration.everyone)
        while True:
            nodes = {each.record.id: each for each in await self._catalog.nodes()}
            draining = await self._catalog.draining()
            open_nodes = [each.record for each in nodes.values() if each.record.id not in draining]
            candidates = self._candidates(open_nodes, await self._catalog.volumes(), placed_before)
            settling_s = self._presence.settling_s()
            try:
                placed = spread(candidates, sizes, self._policy)
                warnings = tuple(dict.fromkeys(text for each in placed for text in each.warnings))
                if not settling_s or (len(candidates) == len(open_nodes) and not warnings):
                    chosen = dict.fromkeys(node for each in placed for node in each.nodes)
                    return PlacedSegments(
                        tuple(each.nodes for each in placed), warnings, tuple(nodes[node] for node in chosen)
                    )
            except CairnError:
                if not settling_s:
                    raise
            await self._presence.next_beat(settling_s)

    def _candidates(
        self, nodes: Iterable[Node], volumes: tuple[Volume, ...], placed_before: "Counter[NodeId]"
    ) -> list[Candidate]:
        promised = promised_bytes(volumes)
        found = []
        for each in nodes:
            word = self._presence.node(each.id)
            if word is None or not self._presence.is_up(each.id):
                continue
            found.append(
                Candidate(
                    each.id,
                    each.zone,
                    word.capacity_bytes,
                    word.used_bytes,
                    promised[each.id],
                    word.full,
                    placed_before[each.id],
                )
            )
        return found


def spread(candidates: Sequence[Candidate], sizes: Iterable[int], policy: Placement) -> list[Placed]:
    """Nodes for one segment after the other, each counted as load for the next. Raises as `place` does."""
    placed = []
    now = list(candidates)
    for size_bytes in sizes:
        chosen = place(now, policy)
        placed.append(chosen)
        now = [
            replace(each, promised_bytes=each.promised_bytes + size_bytes, replicas=each.replicas + 1)
            if each.id in chosen.nodes
            else each
            for each in now
        ]
    return placed


def new_segments(nodes: Sequence[Sequence[NodeId]], sizes: Sequence[int], first: int = 0) -> tuple[Segment, ...]:
    """Segments numbered from `first` on, with new replicas on these nodes."""
    return tuple(
        Segment(
            SegmentNumber(number),
            size_bytes,
            Configuration(1, tuple(Member(ReplicaId(random_id("rep")), node) for node in on)),
        )
        for number, (on, size_bytes) in enumerate(zip(nodes, sizes, strict=True), first)
    )


def promised_bytes(volumes: Iterable[Volume]) -> "Counter[NodeId]":
    """The sizes of the segments that are placed on each node."""
    promised: Counter[NodeId] = Counter()
    for volume in volumes:
        for segment in volume.all_segments:
            for member in segment.configuration.everyone:
                promised[member.node] += segment.size_bytes
    return promised


def random_id(prefix: str) -> str:
    """A new id of that kind."""
    return make_id(prefix, secrets.token_bytes(9))
