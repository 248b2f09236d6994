"""The step of a volume that is being created: Create at each of its nodes, or other nodes where one is gone for good.

    creating    every replica is made                          -> available
                a node can never make it                       -> error
                a node is down, or has no room                 -> waits, and says what for
                a node is down for longer than --replace-after -> placed anew, on nodes that are up

Placing anew is safe because nothing was ever acknowledged for a volume that is being created. Invariants: all replicas
of the plan that is dropped get tombstones in the transaction that drops it; no Create of it is under way then, because
both belong to one step, which runs once at a time and begins with the record as it is now; and a volume is available
only with those replicas that were made. (What a control that was deposed has still sent may arrive later: at worst it
leaves a replica that `cairn status` tells of.) Source: design, section 3, rule 1.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import structlog

from blockstore.control import transitions
from blockstore.control.catalog import Catalog, nodes_of, tombstones_of
from blockstore.control.moving import Limits
from blockstore.control.peers import Peers
from blockstore.control.placing import Placing, new_segments
from blockstore.control.presence import Presence
from blockstore.control.records import Node, Tombstone, Volume, source_of
from blockstore.control.repair_limits import LimitsNow
from blockstore.control.transitions import Phase, phase_of
from blockstore.domain import NodeId, VolumeId
from blockstore.errors import AlreadyExists, CairnError, Conflict, Corrupt, InvalidRequest, NotFound, QuorumUnavailable

_log = structlog.get_logger(__name__)

#: What a node answers to Create and would answer again.
_HOPELESS: Final = (AlreadyExists, Conflict, Corrupt, InvalidRequest)


class Creating:
    """See the module."""

    def __init__(self, catalog: Catalog, presence: Presence, peers: Peers, placing: Placing, limits: LimitsNow) -> None:
        self._catalog = catalog
        self._presence = presence
        self._peers = peers
        self._placing = placing
        self._limits = limits

    async def carry_out(self, name: VolumeId) -> None:
        """One try. Raises why it is not created yet, or never will be."""
        volume = await self._catalog.volume(name)
        if phase_of(volume) is not Phase.CREATING:
            return  # whoever asked for this step knew an older record
        limits = await self._limits()
        if lost := lost_nodes(self._presence, nodes_of(volume), limits.replace_after_s):
            volume = await self._place_anew(volume, lost)
        await self._create(volume, limits)

    async def _create(self, volume: Volume, limits: Limits) -> None:
        nodes = {each.record.id: each.record for each in await self._catalog.nodes()}
        outcomes = await asyncio.gather(
            *(self._create_one(nodes.get(each.node), volume, each, limits) for each in tombstones_of(volume)),
            return_exceptions=True,
        )
        errors = [outcome for outcome in outcomes if outcome is not None]
        if not errors:
            await self._end(volume, lambda now: transitions.created(now, volume.segments))
            _log.info("volume created", volume=volume.id)
            return
        hopeless = [error for error in errors if isinstance(error, _HOPELESS)]
        first = (hopeless or errors)[0]
        end = transitions.failed if hopeless else transitions.waiting
        await self._end(volume, lambda now: end(now, f"cannot create a replica: {first}"))
        raise first

    async def _create_one(self, node: Node | None, volume: Volume, replica: Tombstone, limits: Limits) -> None:
        if node is None or not self._presence.is_up(replica.node):
            raise QuorumUnavailable(f"node {replica.node} is down; {_what_then(limits.replace_after_s)}")
        number = volume.segments[replica.segment].configuration.number
        await self._peers.create(node, replica, number, source_of(volume, replica.segment))
        self._presence.replica_created(replica.replica)

    async def _place_anew(self, volume: Volume, lost: list[NodeId]) -> Volume:
        """The volume with other replicas. Raises QuorumUnavailable where there are no other nodes for them."""
        stored = await self._catalog.stored_volume(volume.id)
        if stored.record != volume:
            raise Conflict(f"volume {volume.id} has changed meanwhile")
        sizes = [each.size_bytes for each in volume.segments]
        try:
            placed = await self._placing.place(sizes)
        except CairnError as error:
            reason = f"node {lost[0]} is down for long, and no others can have its replicas: {error}"
            await self._end(volume, lambda now: transitions.waiting(now, reason))
            raise QuorumUnavailable(reason) from error
        changed = transitions.place_anew(volume, new_segments(placed.nodes, sizes))
        if not await self._catalog.place_more(stored, changed, placed.on, tombstones_of(volume)):
            raise Conflict(f"volume {volume.id}, or a node of it, has changed meanwhile")
        nodes = [each.record.id for each in placed.on]
        _log.info("volume is to be created on other nodes", volume=volume.id, lost=lost, nodes=nodes)
        return changed

    async def _end(self, volume: Volume, end: Callable[[Volume], Volume]) -> None:
        """What the step ends in, unless the volume is being deleted meanwhile, or is gone."""
        with suppress(Conflict, NotFound):
            await self._catalog.change_volume(volume.id, end)


def lost_nodes(presence: Presence, nodes: Iterable[NodeId], replace_after_s: float) -> list[NodeId]:
    """Those that are not waited for any more. replace_after_s: 0 is never."""
    away = (each for each in nodes if not presence.is_up(each))
    return sorted(each for each in away if 0 < replace_after_s < presence.silent_s(each))


def _what_then(replace_after_s: float) -> str:
    if not replace_after_s:
        return "start it, or delete the volume and create another (--replace-after is 0: nothing is placed elsewhere)"
    return f"the volume is placed on other nodes where it is away for longer than {replace_after_s:g} s"
