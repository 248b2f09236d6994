"""What nodes and front-ends say of themselves, and what they are told in return.

Registration enters a process into the catalog; heartbeats keep its lease and bring its reports.
Nothing reported here moves a log: it feeds the status, the positions of rule 10 (design, section 3),
and the two ends of opening a volume that only the front-end can know. A front-end, and a node, is one instance of
a process at a time: what an older one says is Fenced. Which one a node is need not be kept: after a restart of control
it is the one that is heard first. A node with replicas is of the cluster that it got them from: another one would count
on room that is taken, and show a stranger's volumes as lost.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import replace

import structlog

from blockstore.config import split_address
from blockstore.control import transitions
from blockstore.control.catalog import Catalog, attached_to, maintained_by, replicas_on
from blockstore.control.floors import Floors
from blockstore.control.hydration import Hydrations
from blockstore.control.messages import position_message, to_position
from blockstore.control.peers import target_of
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.records import (
    AttachmentState,
    FrontEnd,
    Maintenance,
    MaintenanceState,
    Node,
    Volume,
    check_front_end,
    check_zone,
)
from blockstore.control.replacing import Replacing
from blockstore.control.scrubbing import Scrubbing
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.domain import FrontEndId, NodeId, Position, ReplicaId, SnapshotId, VolumeId, check_id
from blockstore.errors import Conflict, Fenced, NotFound
from blockstore.rpc import control_pb2, replica_pb2
from blockstore.units import Epoch

_log = structlog.get_logger(__name__)


class Registrar:
    """The calls of nodes and front-ends."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: SnapshotCatalog,
        presence: Presence,
        floors: Floors,
        reconciler: Reconciler,
        *,
        hydrations: Hydrations,
        scrubbing: Scrubbing,
        replacing: Replacing,
        lease_s: float,
    ) -> None:
        self._scrubbing = scrubbing
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._floors = floors
        self._reconciler = reconciler
        self._hydrations = hydrations
        self._replacing = replacing
        self._lease_s = lease_s
        self._node_instances: dict[NodeId, str] = {}

    # ---- nodes

    async def register_node(self, request: control_pb2.RegisterNodeRequest) -> control_pb2.RegisterNodeResponse:
        """Raises InvalidRequest, Conflict where it is of another cluster. From here on any other instance is Fenced."""
        node = Node(
            NodeId(check_id("node", request.node)),
            checked_address(request.address),
            request.zone,
            request.capacity_bytes,
        )
        check_zone(node.zone)
        cluster = (await self._snapshots.ensure_store()).cluster
        if request.cluster not in ("", cluster):
            raise Conflict(
                f"the replicas of {node.id} are of cluster {request.cluster}, and this one is {cluster}: "
                "name the control of that cluster, or start the node with an empty data directory"
            )
        await self._catalog.put_node(node)
        self._node_instances[node.id] = request.instance
        self._presence.node_registered(node.id, node.capacity_bytes)
        _log.info("node registered", node=node.id, address=node.address, zone=node.zone)
        rate_bytes = (await self._replacing.limits()).rebuild_rate_bytes
        return control_pb2.RegisterNodeResponse(
            lease_s=self._lease_s,
            known=await self._known_at(node.id),
            rebuild_rate_bytes=rate_bytes,
            cluster=cluster,
        )

    async def node_heartbeat(self, request: control_pb2.NodeHeartbeatRequest) -> control_pb2.NodeHeartbeatResponse:
        """Raises NotFound where the node has to register, Fenced where another instance has."""
        node = (await self._catalog.node(request.node)).record
        if self._node_instances.setdefault(node.id, request.instance) != request.instance:
            raise Fenced(
                f"another process has registered as node {node.id}: this one must stop; if both run, one has a copy "
                "of the other's data directory, and only the newer data may be started"
            )
        if request.address != node.address:
            await self._catalog.put_node(replace(node, address=checked_address(request.address)))
        replicas = {ReplicaId(each.target.replica): each for each in request.replicas}
        broken = {each.place: ReplicaId(each.replica) for each in request.broken}
        self._presence.node_reported(
            node.id, request.capacity_bytes, request.used_bytes, request.full, replicas, broken=broken
        )
        known = await self._learn_from_node(node.id, replicas)
        buried = [each for each in await self._catalog.tombstones() if each.node == node.id]
        return control_pb2.NodeHeartbeatResponse(
            delete=[target_of(each) for each in buried if each.replica in replicas],
            known=known,
            peers=await self._scrubbing.peers_of(request.replicas),
            rebuild_rate_bytes=(await self._replacing.limits()).rebuild_rate_bytes,
        )

    async def _known_at(self, node: NodeId) -> list[control_pb2.KnownPosition]:
        return [
            _known_message(replica, self._floors.of(volume.id, replica))
            for volume in await self._catalog.volumes()
            for replica in replicas_on(node, volume)
        ]

    async def _learn_from_node(
        self, node: NodeId, replicas: dict[ReplicaId, replica_pb2.ReplicaStatus]
    ) -> list[control_pb2.KnownPosition]:
        """Take in where its replicas' logs end; those that say less than was known before."""
        below = []
        for volume in await self._catalog.volumes():
            for replica in replicas_on(node, volume):
                status = replicas.get(replica)
                if status is None or not status.whole:
                    continue
                known, end = self._floors.of(volume.id, replica), to_position(status.end)
                if end < known:
                    below.append(_known_message(replica, known))
                self._floors.learn(volume, replica, end)
        return below

    # ---- front-ends

    async def register_front_end(
        self, request: control_pb2.RegisterFrontEndRequest
    ) -> control_pb2.RegisterFrontEndResponse:
        """Raises InvalidRequest. From here on any other instance is Fenced."""
        front_end = FrontEnd(
            FrontEndId(check_id("fe", request.front_end)),
            request.instance,
            checked_address(request.address),
            tuple(request.uris),
        )
        check_front_end(front_end.instance, front_end.uris)
        await self._catalog.put_front_end(front_end)
        self._presence.front_end_registered(front_end.id)
        _log.info("front-end registered", front_end=front_end.id, address=front_end.address)
        volumes = attached_to(await self._catalog.volumes(), front_end.id)
        attached = [each.id for each in volumes if _attachment_state(each) is AttachmentState.ATTACHED]
        return control_pb2.RegisterFrontEndResponse(volumes=attached, lease_s=self._lease_s)

    async def front_end_heartbeat(
        self, request: control_pb2.FrontEndHeartbeatRequest
    ) -> control_pb2.FrontEndHeartbeatResponse:
        """Raises NotFound where it has to register, Fenced where another instance has."""
        front_end = await self.instance(request.front_end, request.instance)
        now = replace(front_end, address=checked_address(request.address), uris=tuple(request.uris))
        if now != front_end:
            check_front_end(now.instance, now.uris)
            await self._catalog.put_front_end(now)
        self._presence.front_end_reported(
            front_end.id,
            {VolumeId(each.volume): each for each in request.volumes},
            shows_snapshots=request.shows_snapshots,
        )
        self._presence.snapshots_read(SnapshotId(check_id("snap", each)) for each in request.reading)
        await self._take_in(request.volumes)
        volumes, messages = await self._catalog.volumes(), await self._reconciler.messages()
        held = (*attached_to(volumes, front_end.id), *maintained_by(volumes, front_end.id))
        reports = {VolumeId(each.volume): each for each in request.volumes}
        return control_pb2.FrontEndHeartbeatResponse(
            attachments=[messages.current(volume, reports.get(volume.id)) for volume in held]
        )

    async def renew_attachment(self, request: control_pb2.RenewAttachmentRequest) -> control_pb2.OpenTicket:
        """Raises Fenced where the volume is not attached there, or the instance is an older one."""
        front_end = await self.instance(request.front_end, request.instance)
        try:
            volume = await self._catalog.change_volume(
                VolumeId(request.volume), lambda now: transitions.renew(now, front_end)
            )
        except NotFound as error:
            raise Fenced(str(error)) from error
        _log.info("attachment renewed", volume=volume.id, front_end=front_end.id, epoch=volume.epoch)
        return (await self._reconciler.messages()).ticket(volume)

    async def get_attachment(self, request: control_pb2.GetAttachmentRequest) -> control_pb2.OpenTicket:
        """Raises Fenced where that epoch is over."""
        volumes, front_end = await self._catalog.volumes(), FrontEndId(request.front_end)
        for volume in (*attached_to(volumes, front_end), *maintained_by(volumes, front_end)):
            if volume.id == request.volume and transitions.place_epoch(volume) == request.epoch:
                return (await self._reconciler.messages()).ticket(volume)
        raise Fenced(f"volume {request.volume} is not attached to {request.front_end} in epoch {request.epoch}")

    async def instance(self, front_end: str, instance: str) -> FrontEnd:
        """That front-end. Raises NotFound where it has to register, Fenced where another instance has."""
        registered = await self._catalog.front_end(front_end)
        if registered.instance != instance:
            raise Fenced(f"another process has registered as front-end {front_end}: this one must stop")
        return registered

    async def _take_in(self, reports: Iterable[control_pb2.VolumeReport]) -> None:
        volumes = {volume.id: volume for volume in await self._catalog.volumes()}
        for report in reports:
            volume = volumes.get(VolumeId(report.volume))
            if volume is None:
                continue
            for member in report.members:
                self._replacing.rebuilds.learn(member, asyncio.get_running_loop().time())
                if member.whole:
                    self._floors.learn(volume, ReplicaId(member.replica), to_position(member.matched))
            if transitions.place_epoch(volume) == report.epoch:
                await self._take_in_state(volume, report)
                await self._take_in_hydration(volume, report)
                if self._replacing.may_go_on(volume):
                    self._reconciler.look()

    async def _take_in_hydration(self, volume: Volume, report: control_pb2.VolumeReport) -> None:
        if volume.source is None:
            return
        self._hydrations.learn(volume.id, report.hydration)
        if report.hydrated:
            epoch = Epoch(report.epoch)
            await self._reconciler.end_attempt(volume.id, lambda now: transitions.hydrated(now, epoch))
            _log.info("volume is hydrated", volume=volume.id, source=volume.source.snapshot)

    async def _take_in_state(self, volume: Volume, report: control_pb2.VolumeReport) -> None:
        epoch = Epoch(report.epoch)
        state = _attachment_state(volume)
        if volume.maintenance:
            await self._take_in_maintenance(volume.maintenance, volume, report)
            return
        if report.state == control_pb2.SERVING_STATE_SERVING and state is AttachmentState.ATTACHING:
            await self._reconciler.end_attempt(volume.id, lambda now: transitions.opened(now, epoch))
        if report.state == control_pb2.SERVING_STATE_LOST and state is not AttachmentState.DETACHING:
            _log.error("acknowledged records may be lost", volume=volume.id, why=report.why)
            await self._reconciler.end_attempt(volume.id, lambda now: transitions.lost(now, epoch, report.why))

    async def _take_in_maintenance(self, held: Maintenance, volume: Volume, report: control_pb2.VolumeReport) -> None:
        """What control began itself, and how it went on or ended."""
        match report.state:
            case control_pb2.SERVING_STATE_SERVING if held.state is MaintenanceState.OPENING:
                await self._reconciler.end_attempt(volume.id, lambda now: transitions.maintained(now, held.epoch))
            case control_pb2.SERVING_STATE_LOST:
                _log.error("acknowledged records may be lost", volume=volume.id, why=report.why)
                await self._reconciler.end_attempt(volume.id, lambda now: transitions.lost(now, held.epoch, report.why))
            case control_pb2.SERVING_STATE_FAILED | control_pb2.SERVING_STATE_FENCED:
                _log.info("maintenance of a volume failed", volume=volume.id, why=report.why)
                await self._reconciler.end_attempt(volume.id, lambda now: transitions.end_maintenance(now, held.epoch))


def _attachment_state(volume: Volume) -> AttachmentState | None:
    return volume.attachment.state if volume.attachment else None


def checked_address(address: str) -> str:
    """`address`, if it is HOST:PORT. Raises InvalidRequest."""
    split_address(address)
    return address


def _known_message(replica: ReplicaId, position: Position) -> control_pb2.KnownPosition:
    return control_pb2.KnownPosition(replica=replica, position=position_message(position))
