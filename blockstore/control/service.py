"""The Control service: each call of control.proto, checked, then carried out on the catalog.

A call of a user changes the catalog first and then waits for the step that the change asks for
(blockstore/control/reconcile.py); who stops waiting stops nothing. Nodes' and front-ends' calls go to
the registrar. Errors are those of blockstore.errors; the endpoint's interceptor tells them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog

from blockstore.control import transitions
from blockstore.control.catalog import Catalog, attached_to, replicas_by_node
from blockstore.control.clock import now_ms
from blockstore.control.creation import CREATE_WAIT_S, Creation
from blockstore.control.growth import Growth
from blockstore.control.leadership import ControlPlace
from blockstore.control.maintenance import subject_of
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.records import FrontEnd, Volume, check_client
from blockstore.control.registrar import Registrar
from blockstore.control.repair_requests import RepairRequests
from blockstore.control.replacing import Replacing
from blockstore.control.scrubbing import Scrubbing
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_records import Snapshot, SnapshotState
from blockstore.control.snapshot_status import StoreObserver
from blockstore.control.status import Observer
from blockstore.domain import VolumeState, check_id
from blockstore.errors import CairnError, Conflict, QuorumUnavailable
from blockstore.grpc_parts import in_parts
from blockstore.rpc import control_pb2, control_pb2_grpc

_log = structlog.get_logger(__name__)

_Context = Any

Controls = Callable[[], Sequence[ControlPlace]]
"""The control processes of the cluster, the active one first."""


class ControlService(control_pb2_grpc.ControlServicer):
    """Serves the calls of control.proto."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: SnapshotCatalog,
        presence: Presence,
        reconciler: Reconciler,
        registrar: Registrar,
        *,
        creation: Creation,
        scrubbing: Scrubbing,
        controls: Controls,
        replacing: Replacing,
        growth: Growth,
    ) -> None:
        self._scrubbing = scrubbing
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._reconciler = reconciler
        self._registrar = registrar
        self._creation = creation
        self._controls = controls
        self._replacing = replacing
        self._repair = RepairRequests(catalog, replacing)
        self._growth = growth

    # ---- volumes

    async def CreateVolume(self, request: control_pb2.CreateVolumeRequest, context: _Context) -> control_pb2.Volume:
        volume = await self._creation.enter(request)
        with suppress(TimeoutError):
            async with asyncio.timeout(CREATE_WAIT_S):
                volume = await self._creation.until_created(volume)
        if volume.state is VolumeState.ERROR:
            raise Conflict(f"volume {volume.id} is in error: {volume.reason}; delete it and create another")
        return await self._message(volume)

    async def GetVolume(self, request: control_pb2.GetVolumeRequest, context: _Context) -> control_pb2.Volume:
        return await self._message(await self._catalog.volume(request.volume))

    async def ListVolumes(
        self, request: control_pb2.ListVolumesRequest, context: _Context
    ) -> AsyncIterator[control_pb2.ListVolumesResponse]:
        messages, volumes = await self._reconciler.messages(), await self._catalog.volumes()
        for part in in_parts(control_pb2.ListVolumesResponse(), volumes=map(messages.volume, volumes)):
            yield part

    async def DeleteVolume(
        self, request: control_pb2.DeleteVolumeRequest, context: _Context
    ) -> control_pb2.DeleteVolumeResponse:
        found = await self._catalog.volume(request.volume)
        volume = await self._catalog.change_volume(found.id, transitions.delete, self._check_shipped)
        _log.info("volume is to be deleted", volume=volume.id)
        try:
            await self._reconciler.settle(volume)
        except CairnError as error:
            _log.info("a volume is deleted in the background", volume=volume.id, error=str(error))
            return control_pb2.DeleteVolumeResponse(deleted=False, id=volume.id)
        return control_pb2.DeleteVolumeResponse(deleted=not await self._catalog.has_volume(volume.id), id=volume.id)

    async def ResizeVolume(self, request: control_pb2.ResizeVolumeRequest, context: _Context) -> control_pb2.Volume:
        found = await self._catalog.volume(request.volume)
        return await self._message(await self._growth.resize(found.id, request.size_bytes))

    async def AttachVolume(self, request: control_pb2.AttachVolumeRequest, context: _Context) -> control_pb2.Volume:
        check_client(request.client)
        found = await self._catalog.volume(request.volume)
        front_end = await self._choose_front_end(found, request)
        volume = await self._catalog.change_volume(
            found.id,
            lambda now: transitions.attach(
                now,
                front_end,
                read_only=request.read_only,
                force=request.force,
                accept_loss=request.accept_loss,
                now_ms=now_ms(),
                client=request.client,
            ),
        )
        if volume.attachment == found.attachment:
            await self._reconciler.check_served(volume)
        await self._reconciler.settle(volume)
        now = await self._catalog.volume(volume.id)
        if now.attachment is None or now.attachment.front_end != front_end.id:
            raise Conflict(f"volume {volume.id} was attached to {front_end.id} and taken away meanwhile")
        return await self._message(now)

    async def DetachVolume(self, request: control_pb2.DetachVolumeRequest, context: _Context) -> control_pb2.Volume:
        found = await self._catalog.volume(request.volume)
        if request.force:
            await self._cut_off(found)
        else:
            await self._reconciler.settle(await self._catalog.change_volume(found.id, transitions.detach))
        return await self._message(await self._catalog.volume(found.id))

    # ---- nodes and status

    async def GetNode(self, request: control_pb2.GetNodeRequest, context: _Context) -> control_pb2.Node:
        return await self._node_message(request.node)

    async def ListNodes(
        self, request: control_pb2.ListNodesRequest, context: _Context
    ) -> AsyncIterator[control_pb2.ListNodesResponse]:
        messages, counts = await self._reconciler.messages(), replicas_by_node(await self._catalog.volumes())
        draining = await self._catalog.draining()
        nodes = (messages.node(each.record, counts, draining) for each in await self._catalog.nodes())
        for part in in_parts(control_pb2.ListNodesResponse(), nodes=nodes):
            yield part

    async def RemoveNode(
        self, request: control_pb2.RemoveNodeRequest, context: _Context
    ) -> control_pb2.RemoveNodeResponse:
        node = (await self._catalog.node(request.node)).record
        if self._presence.may_be_up(node.id):
            raise Conflict(f"node {node.id} is up, or was a moment ago: stop it first")
        await self._catalog.remove_node(node.id)
        self._presence.node_removed(node.id)
        _log.info("node removed", node=node.id)
        return control_pb2.RemoveNodeResponse()

    async def DrainNode(self, request: control_pb2.DrainNodeRequest, context: _Context) -> control_pb2.Node:
        return await self._node_message(await self._repair.drain(request))

    async def GetRepair(self, request: control_pb2.GetRepairRequest, context: _Context) -> control_pb2.RepairSettings:
        return await self._repair.settings()

    async def SetRepair(self, request: control_pb2.SetRepairRequest, context: _Context) -> control_pb2.RepairSettings:
        return await self._repair.set(request)

    async def Rebalance(
        self, request: control_pb2.RebalanceRequest, context: _Context
    ) -> control_pb2.RebalanceResponse:
        return await self._repair.rebalance(request)

    async def Status(
        self, request: control_pb2.StatusRequest, context: _Context
    ) -> AsyncIterator[control_pb2.StatusResponse]:
        observer = await self._observer()
        for part in observer.status(await self._catalog.volumes(), await self._catalog.tombstones()):
            yield part
        places = self._controls()
        for part in in_parts(
            control_pb2.StatusResponse(),
            controls=(control_pb2.ControlInfo(address=each.address, active=each.active) for each in places),
        ):
            yield part

    async def GetVolumeHealth(
        self, request: control_pb2.GetVolumeRequest, context: _Context
    ) -> control_pb2.VolumeHealth:
        return (await self._observer()).volume(await self._catalog.volume(request.volume))

    async def ScrubVolume(
        self, request: control_pb2.ScrubVolumeRequest, context: _Context
    ) -> control_pb2.ScrubVolumeResponse:
        return await self._scrubbing.begin(request)

    # ---- from nodes and front-ends

    async def RegisterNode(
        self, request: control_pb2.RegisterNodeRequest, context: _Context
    ) -> control_pb2.RegisterNodeResponse:
        return await self._registrar.register_node(request)

    async def NodeHeartbeat(
        self, request: control_pb2.NodeHeartbeatRequest, context: _Context
    ) -> control_pb2.NodeHeartbeatResponse:
        with self._catalog.as_of_now():
            return await self._registrar.node_heartbeat(request)

    async def RegisterFrontEnd(
        self, request: control_pb2.RegisterFrontEndRequest, context: _Context
    ) -> control_pb2.RegisterFrontEndResponse:
        return await self._registrar.register_front_end(request)

    async def FrontEndHeartbeat(
        self, request: control_pb2.FrontEndHeartbeatRequest, context: _Context
    ) -> control_pb2.FrontEndHeartbeatResponse:
        with self._catalog.as_of_now():
            return await self._registrar.front_end_heartbeat(request)

    async def RenewAttachment(
        self, request: control_pb2.RenewAttachmentRequest, context: _Context
    ) -> control_pb2.OpenTicket:
        return await self._registrar.renew_attachment(request)

    async def GetAttachment(
        self, request: control_pb2.GetAttachmentRequest, context: _Context
    ) -> control_pb2.OpenTicket:
        return await self._registrar.get_attachment(request)

    # ---- for metrics, beside Status

    async def snapshots(self) -> Sequence[Snapshot]:
        """All of the catalog."""
        return await self._snapshots.snapshots()

    @property
    def store_daemons_up(self) -> int:
        """How many snapshotd are up."""
        return len(self._presence.daemons_up())

    # ---- attaching and detaching

    async def _choose_front_end(self, volume: Volume, request: control_pb2.AttachVolumeRequest) -> FrontEnd:
        """The one asked for, the one that has the volume, or the one with the fewest. It is up.

        For a client that has the volume, another one than the one that has it, where that is down or to be avoided.
        """
        holder = volume.attachment.front_end if volume.attachment and not request.force else None
        if holder and request.client and (holder == request.avoid or not self._presence.may_be_up(holder)):
            holder = None
        if request.front_end:
            wanted = [await self._catalog.front_end(check_id("fe", request.front_end))]
        elif holder:
            wanted = [await self._catalog.front_end(holder)]
        else:
            wanted = [each for each in await self._catalog.front_ends() if each.id != request.avoid]
        while not (up := [each for each in wanted if self._presence.is_up(each.id)]):
            if not (settling_s := self._presence.settling_s()):
                name = f"front-end {wanted[0].id}" if len(wanted) == 1 else f"each of {len(wanted)} front-ends"
                raise QuorumUnavailable(f"{name} is down: start one with `cairn nbd run`")
            await self._presence.next_beat(settling_s)
        volumes = await self._catalog.volumes()
        return min(up, key=lambda each: (len(attached_to(volumes, each.id)), each.id))

    async def _cut_off(self, before: Volume) -> None:
        volume = await self._catalog.change_volume(before.id, transitions.cut_off)
        attachment = before.attachment
        if attachment and volume.attachment is None:
            _log.info("volume detached by force", volume=volume.id, front_end=attachment.front_end)
            if self._presence.is_up(attachment.front_end):
                await self._reconciler.close_quietly(attachment.front_end, volume.id, attachment.epoch)

    async def _check_shipped(self, volume: Volume) -> None:
        """Raises Conflict while a snapshot needs the volume's replicas: its content is nowhere else yet."""
        for each in await self._snapshots.unfinished():
            if each.volume == volume.id and each.state is SnapshotState.PENDING:
                raise Conflict(
                    f"snapshot {each.id} of volume {volume.id} is not whole in the object store yet: "
                    "wait until it is completed, or delete it"
                )

    # ---- answers

    async def _observer(self) -> Observer:
        return Observer(
            await self._reconciler.messages(),
            self._presence,
            {each.record.id: each.record for each in await self._catalog.nodes()},
            {each.id: each for each in await self._catalog.front_ends()},
            StoreObserver(self._presence, await self._snapshots.snapshots(), await self._snapshots.daemons()),
            rebuilds=self._replacing.rebuilds,
            waits=self._replacing.waits,
            maintenance_trouble=lambda volume: self._reconciler.steps.why(subject_of(volume)),
            draining=await self._catalog.draining(),
        )

    async def _node_message(self, name: str) -> control_pb2.Node:
        node = (await self._catalog.node(name)).record
        counts, draining = replicas_by_node(await self._catalog.volumes()), await self._catalog.draining()
        return (await self._reconciler.messages()).node(node, counts, draining)

    async def _message(self, volume: Volume) -> control_pb2.Volume:
        return (await self._reconciler.messages()).volume(volume)
