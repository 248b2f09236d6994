"""What people ask of the moving of replicas: drains, rebalancing, and what it all goes by."""

import asyncio
from collections.abc import Collection
from dataclasses import replace

import structlog

from blockstore.config import MAX_REBUILDS, MAX_TIME_S
from blockstore.control.catalog import Catalog, replicas_by_node
from blockstore.control.clock import now_ms
from blockstore.control.membership import is_movable, segment_of
from blockstore.control.moving import rebalance
from blockstore.control.placement import REPLICAS
from blockstore.control.placing import promised_bytes
from blockstore.control.records import Draining, MovePlan, PlannedMove, Volume
from blockstore.control.replacing import Replacing
from blockstore.control.roster import Roster
from blockstore.domain import NodeId
from blockstore.errors import Conflict, InvalidRequest
from blockstore.rpc import control_pb2

_log = structlog.get_logger(__name__)


class RepairRequests:
    """Each call changes the catalog and returns; the work is done by the passes of Replacing."""

    def __init__(self, catalog: Catalog, replacing: Replacing) -> None:
        self._catalog = catalog
        self._replacing = replacing
        #: Two drains at once might each count on the other one's node.
        self._drains = asyncio.Lock()

    async def drain(self, request: control_pb2.DrainNodeRequest) -> NodeId:
        """Raises NotFound, and Conflict where its replicas could not go anywhere."""
        node = (await self._catalog.node(request.node)).record.id
        async with self._drains:
            if request.undo:
                await self._catalog.undrain(node)
            elif node not in (draining := await self._catalog.draining()):
                await self._check_drain(node, draining)
                await self._catalog.drain(Draining(node, now_ms()))
        _log.info("node is drained no more" if request.undo else "node is drained", node=node)
        return node

    async def _check_drain(self, node: NodeId, draining: Collection[NodeId]) -> None:
        """A drain that can never end only looks like one; a node without replicas is at its end already."""
        if not replicas_by_node(await self._catalog.volumes()).get(node):
            return
        nodes = [each.record.id for each in await self._catalog.nodes()]
        left = [each for each in nodes if each not in (node, *draining)]
        if len(left) < REPLICAS:
            undo = f", or take back the drain of {', '.join(sorted(draining))} (--undo)" if draining else ""
            raise Conflict(
                f"node {node} cannot be drained: that leaves {len(left)} nodes that are not drained, and each volume "
                f"needs {REPLICAS}: start another one first{undo}"
            )

    async def settings(self) -> control_pb2.RepairSettings:
        """As they are now."""
        now = await self._replacing.limits()
        return control_pb2.RepairSettings(
            replace_after_s=now.replace_after_s,
            rebuild_rate_bytes=now.rebuild_rate_bytes,
            rebuilds=now.rebuilds,
            rebuilds_per_node=now.rebuilds_per_node,
        )

    async def set(self, request: control_pb2.SetRepairRequest) -> control_pb2.RepairSettings:
        """Raises InvalidRequest."""
        given = {name: getattr(request, name) for name in _FIELDS if request.HasField(name)}  # type: ignore[arg-type]
        if not 0.0 <= given.get("replace_after_s", 0.0) <= MAX_TIME_S:
            raise InvalidRequest(
                f"replicas cannot be replaced after {request.replace_after_s} s: say 0 for never, {MAX_TIME_S} at most"
            )
        for name in ("rebuilds", "rebuilds_per_node"):
            if given.get(name) == 0:
                raise InvalidRequest(f"{name} 0 would fill no replica ever: say 1 or more")
            if given.get(name, 1) > MAX_REBUILDS:
                raise InvalidRequest(f"{name} {given[name]} is above {MAX_REBUILDS}")
        await self._catalog.put_repair_choices(replace(await self._catalog.repair_choices(), **given))
        _log.info("repair goes by other settings", **given)
        return await self.settings()

    async def rebalance(self, request: control_pb2.RebalanceRequest) -> control_pb2.RebalanceResponse:
        """The moves; unless it is a dry run, in place of those that were asked for before and have not begun."""
        volumes = await self._catalog.volumes()
        only = {(await self._catalog.volume(request.volume)).id} if request.volume else {each.id for each in volumes}
        cluster = await self._replacing.cluster(Roster(volumes), promised_bytes(volumes))
        movable = [each for each in volumes if each.id in only and is_movable(each)]
        moves = rebalance(movable, cluster)
        if not request.dry_run:
            await self._catalog.change_moves(
                lambda now: MovePlan((*(each for each in now.moves if each.volume not in only), *moves))
            )
        by_id = {each.id: each for each in volumes}
        return control_pb2.RebalanceResponse(moves=[_message(by_id[each.volume], each) for each in moves])


_FIELDS = ("replace_after_s", "rebuild_rate_bytes", "rebuilds", "rebuilds_per_node")


def _message(volume: Volume, move: PlannedMove) -> control_pb2.Move:
    segment = segment_of(volume, move.segment)
    source = next(each.node for each in segment.configuration.members if each.replica == move.replica)
    return control_pb2.Move(
        volume=move.volume,
        segment=move.segment,
        replica=move.replica,
        from_node=source,
        to_node=move.to_node,
        why=move.why,
        size_bytes=segment.size_bytes,
    )
