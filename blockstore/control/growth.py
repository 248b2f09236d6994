"""Resizing: the last segment grows at once, further segments once their replicas exist.

    resize ── fits the last segment ──────────────────────────────────────────> one swap of the record, done
           ── does not ── placed, `growing` in the record ── Create at each node ── one swap: they belong to it

Until the last swap the volume is as before, for everybody: whatever stops in between is gone on with by the next pass
of the reconcile loop. Whole, empty replicas are made only before that swap, when nothing was ever acknowledged
for them; what `growing` names has tombstones, positions and nodes that are not removed, like any replica. So a plan
may be dropped: where a node of it is away for longer than repair waits, and at once where somebody asks again while
one is down. A front-end that has the volume attached learns of its size at once, or with its next heartbeat. Source:
design, section 3, rule 1.
"""

import asyncio

import structlog

from blockstore.control import segment_plan, transitions
from blockstore.control.catalog import Catalog, growing_on, tombstones_of
from blockstore.control.creating import lost_nodes
from blockstore.control.peers import Peers
from blockstore.control.placing import Placing, new_segments
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.record_store import MAX_TRIES, Stored
from blockstore.control.records import Growing, Node, Tombstone, Volume
from blockstore.control.repair_limits import LimitsNow
from blockstore.control.roster import Roster
from blockstore.control.steps import growth_key
from blockstore.control.transitions import Phase, phase_of
from blockstore.domain import NodeId, VolumeId
from blockstore.errors import Conflict, QuorumUnavailable

_log = structlog.get_logger(__name__)

_GROWS_IN: frozenset[Phase] = frozenset({Phase.AVAILABLE, Phase.ATTACHING, Phase.ATTACHED, Phase.DETACHING})


class Growth:
    """Makes volumes larger. segment_size_bytes: of volumes whose record does not say it."""

    def __init__(
        self,
        catalog: Catalog,
        presence: Presence,
        peers: Peers,
        reconciler: Reconciler,
        placing: Placing,
        *,
        limits: LimitsNow,
        segment_size_bytes: int,
    ) -> None:
        self._catalog = catalog
        self._presence = presence
        self._peers = peers
        self._reconciler = reconciler
        self._placing = placing
        self._limits = limits
        self._segment_size_bytes = segment_size_bytes

    async def resize(self, volume: VolumeId, size_bytes: int) -> Volume:
        """The volume with its new size. Raises InvalidRequest, Conflict; QuorumUnavailable where nodes are away."""
        begun = await self._begin(volume, size_bytes)
        if begun.growing:
            if earlier := self._reconciler.steps.running(growth_key(volume)):
                await asyncio.wait([earlier])  # Of a plan that this request may have dropped.
            await asyncio.shield(self._start(begun))
        grown = await self._catalog.volume(volume)
        await self._reconciler.show_size(grown)
        return grown

    async def reconcile(self, roster: Roster) -> None:
        """Go on with what was begun; on other nodes where one of it is away for longer than is waited for."""
        for volume in roster.active:
            if volume.growing and phase_of(volume) in _GROWS_IN and (self._all_up(volume) or await self._lost(volume)):
                self._start(volume)

    async def _begin(self, name: VolumeId, size_bytes: int) -> Volume:
        """Grown, or with further segments that are to be created."""
        for _ in range(MAX_TRIES):
            stored = await self._catalog.stored_volume(name)
            volume = stored.record
            transitions.check_resize(volume, size_bytes)
            if volume.growing and (self._all_up(volume) or self._presence.settling_s()):
                return volume
            changed, placed, left = await self._plan(volume, size_bytes)
            if changed == volume or await self._catalog.place_more(stored, changed, placed, left):
                _log.info("volume is to grow", volume=volume.id, size_bytes=size_bytes)
                return changed
        raise Conflict(f"volume {name} is changed by too many at once: try again")

    async def _plan(
        self, volume: Volume, size_bytes: int
    ) -> tuple[Volume, tuple[Stored[Node], ...], tuple[Tombstone, ...]]:
        """The volume to be, the nodes that it needs more of, and the replicas of an earlier plan that it drops.

        An earlier plan is dropped where a node of it is down: nothing was written there.
        """
        sizes = [each.size_bytes for each in volume.segments]
        plan = segment_plan.grow(sizes, size_bytes, volume.segment_size_bytes or self._segment_size_bytes)
        if not plan.further_bytes:
            return transitions.resize(volume, size_bytes), (), ()
        dropped = {each.number for each in volume.growing.segments} if volume.growing else set()
        left = tuple(each for each in tombstones_of(volume) if each.segment in dropped)
        placed = await self._placing.place(plan.further_bytes, volume.segments)
        further = new_segments(placed.nodes, plan.further_bytes, len(sizes))
        growing = Growing(size_bytes, plan.last_size_bytes, further)
        return transitions.begin_growth(volume, growing), placed.on, left

    def _start(self, volume: Volume) -> "asyncio.Task[None]":
        return self._reconciler.steps.start(
            growth_key(volume.id), f"growth of {volume.id}", lambda: self._carry_on(volume.id)
        )

    def _all_up(self, volume: Volume) -> bool:
        return all(self._presence.is_up(node) for node in growing_on(volume))

    async def _lost(self, volume: Volume) -> list[NodeId]:
        return lost_nodes(self._presence, growing_on(volume), (await self._limits()).replace_after_s)

    async def _carry_on(self, name: VolumeId) -> None:
        volume = await self._catalog.volume(name)
        if volume.growing and await self._lost(volume):
            volume = await self._begin(name, volume.growing.size_bytes)
        if volume.growing is None:
            return
        if not self._all_up(volume):
            raise QuorumUnavailable(
                f"volume {volume.id} cannot be enlarged while a node is down that further segments were placed on: "
                "it goes on when all are up, see `cairn node list`"
            )
        await self._create(volume, volume.growing)

    async def _create(self, volume: Volume, growing: Growing) -> None:
        nodes = {each.record.id: each.record for each in await self._catalog.nodes()}
        numbers = {each.number: each.configuration.number for each in growing.segments}
        new = [each for each in tombstones_of(volume) if each.segment in numbers]
        # All are waited for: none may be on its way to a node when the volume has them, or is deleted.
        outcomes = await asyncio.gather(
            *(self._peers.create(nodes[each.node], each, numbers[each.segment], "") for each in new),
            return_exceptions=True,
        )
        for error in outcomes:
            if error is not None:
                raise error
        for each in new:
            self._presence.replica_created(each.replica)
        grown = await self._catalog.change_volume(volume.id, lambda now: transitions.grown(now, growing))
        _log.info("volume has grown", volume=volume.id, size_bytes=grown.size_bytes, segments=len(grown.segments))
        await self._reconciler.show_size(grown)
