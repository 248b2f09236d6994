"""Scrub, as control sees it: it starts passes that a person asked for, tells nodes where the members of a segment are,
and makes problems of what the nodes found.

Nodes do the work, and keep how far it is; control keeps nothing, so a pass goes on whatever happens to control. A pass
has a number at its replica: whoever asked waits until the node says that this one, or a later one, is over.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from blockstore.control.catalog import Catalog, tombstones_of
from blockstore.control.peers import Peers
from blockstore.control.presence import Presence
from blockstore.control.records import Node, Tombstone
from blockstore.domain import NodeId, ReplicaId, VolumeState
from blockstore.errors import CairnError, Conflict
from blockstore.rpc import control_pb2, replica_pb2
from blockstore.rpc.control_pb2 import Problem
from blockstore.rpc.replica_pb2 import ReplicaStatus
from blockstore.units import BLOCK_SIZE, MAX_GENERATION

#: Of one replica; `cairn volume scrub --output json` has more.
_MOST_TOLD: Final = 3
_WHAT_TO_DO: Final = (
    "nothing was changed, because nobody may choose by counting: keep copies of both replicas' directories, and see "
    '"Replicas that differ" in docs/storage.md'
)


class Scrubbing:
    """What users and nodes ask of it."""

    def __init__(self, catalog: Catalog, presence: Presence, peers: Peers) -> None:
        self._catalog = catalog
        self._presence = presence
        self._peers = peers

    async def begin(self, request: control_pb2.ScrubVolumeRequest) -> control_pb2.ScrubVolumeResponse:
        """A pass of each replica whose node can be reached. Raises NotFound, Conflict."""
        volume = await self._catalog.volume(request.volume)
        if volume.state in (VolumeState.CREATING, VolumeState.DELETING):
            raise Conflict(f"volume {volume.id} is {volume.state.value}: there is nothing to scrub")
        replicas = tombstones_of(volume)
        nodes = {each.record.id: each.record for each in await self._catalog.nodes()}
        started = await asyncio.gather(*(self._begin(each, replicas, nodes, request.rate_bytes) for each in replicas))
        return control_pb2.ScrubVolumeResponse(volume=volume.id, replicas=started)

    async def _begin(
        self, replica: Tombstone, replicas: Iterable[Tombstone], nodes: Mapping[NodeId, Node], rate_bytes: int
    ) -> control_pb2.StartedScrub:
        node = nodes.get(replica.node)
        if node is None or not self._presence.may_be_up(replica.node):
            return control_pb2.StartedScrub(replica=replica.replica, why=f"node {replica.node} is down")
        try:
            number = await self._peers.scrub(node, replica, _others(replica, replicas, nodes), rate_bytes)
        except CairnError as error:
            return control_pb2.StartedScrub(replica=replica.replica, why=str(error))
        return control_pb2.StartedScrub(replica=replica.replica, number=number)

    async def peers_of(self, statuses: Iterable[ReplicaStatus]) -> list[control_pb2.ReplicaPeers]:
        """For those replicas whose node does not know where the other members are."""
        asking = {each.target.replica for each in statuses if each.needs_peers}
        if not asking:
            return []
        nodes = {each.record.id: each.record for each in await self._catalog.nodes()}
        return [
            control_pb2.ReplicaPeers(replica=each.replica, peers=_others(each, replicas, nodes))
            for replicas in map(tombstones_of, await self._catalog.volumes())
            for each in replicas
            if each.replica in asking
        ]


def _others(replica: Tombstone, replicas: Iterable[Tombstone], nodes: Mapping[NodeId, Node]) -> list[replica_pb2.Peer]:
    """The other members of its segment; without an address where their node has never said where it is."""
    return [
        replica_pb2.Peer(
            replica=each.replica, node=each.node, address=nodes[each.node].address if each.node in nodes else ""
        )
        for each in replicas
        if each.segment == replica.segment and each.replica != replica.replica
    ]


def scrub_problems(
    node: NodeId, status: ReplicaStatus, severity: "control_pb2.Severity.ValueType"
) -> Iterator[Problem]:
    """What the last scrub of a replica left as it is, each with its place and what to do."""
    scrub, replica = status.scrub, ReplicaId(status.target.replica)
    for each in scrub.divergences[:_MOST_TOLD]:
        place = _place(each, status.target.segment)
        message = f"replica {replica} on {node} and {each.peer} differ in {place}: {each.what}; {_WHAT_TO_DO}"
        yield Problem(severity=severity, subject=status.target.volume, message=message)
    more = scrub.extents_differing - min(_MOST_TOLD, len(scrub.divergences))
    if more > 0:
        message = f"replica {replica} on {node} differs from its peer in {more} more extents"
        yield Problem(severity=severity, subject=status.target.volume, message=message)
    if scrub.extents_bad and not scrub.running and not status.damage:
        message = (
            f"scrub left {scrub.extents_bad} extents of replica {replica} damaged: no other whole member has them "
            "good; bring back the nodes that are down, and scrub the volume again"
        )
        yield Problem(severity=severity, subject=node, message=message)


def _place(found: replica_pb2.Divergence, segment: int) -> str:
    """In the volume, or in the segment where that is not its first: blocks are counted from the segment's."""
    shows = (
        "the current content"
        if found.generation == MAX_GENERATION
        else f"the snapshot of generation {found.generation}"
    )
    inside = f" in segment {segment}" if segment else ""
    return f"block {found.block} (byte {found.block * BLOCK_SIZE}){inside} of {shows}, as of record {found.sequence}"
