"""The Control service: each call of control.proto, checked, then carried out on the catalog.

A call of a user changes the catalog first and then waits for the step that the change asks for
(blockstore/control/reconcile.py); who stops waiting stops nothing. Nodes' and front-ends' calls go to
the registrar. Errors are those of blockstore.errors; the endpoint's interceptor tells them.
"""

import asyncio
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

import structlog

from blockstore.config import Placement
from blockstore.control import transitions
from blockstore.control.catalog import Catalog, attached_to, nodes_of
from blockstore.control.placement import Candidate, Placed, place
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.record_store import MAX_TRIES, Stored
from blockstore.control.records import (
    FrontEnd,
    Node,
    Segment,
    Volume,
    check_name,
    check_size,
    check_tags,
    check_token,
)
from blockstore.control.registrar import Registrar, now_ms
from blockstore.control.status import Observer
from blockstore.domain import (
    Configuration,
    Member,
    NodeId,
    ReplicaId,
    SegmentNumber,
    VolumeId,
    VolumeState,
    check_id,
    make_id,
)
from blockstore.errors import CairnError, Conflict, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2, control_pb2_grpc

_log = structlog.get_logger(__name__)

#: How long CreateVolume waits for the volume to be available before it answers `creating`.
CREATE_WAIT_S: Final = 5.0

_Context = Any


class ControlService(control_pb2_grpc.ControlServicer):
    """Serves the calls of control.proto."""

    def __init__(
        self,
        catalog: Catalog,
        presence: Presence,
        reconciler: Reconciler,
        registrar: Registrar,
        *,
        placement: Placement,
    ) -> None:
        self._catalog = catalog
        self._presence = presence
        self._reconciler = reconciler
        self._registrar = registrar
        self._placement = placement

    # ---- volumes

    async def CreateVolume(self, request: control_pb2.CreateVolumeRequest, context: _Context) -> control_pb2.Volume:
        check_size(request.size_bytes)
        check_name(request.name)
        check_tags(request.tags)
        check_token(request.client_token)
        volume = await self._enter_volume(request)
        with suppress(TimeoutError):
            async with asyncio.timeout(CREATE_WAIT_S):
                volume = await self._until_created(volume)
        if volume.state is VolumeState.ERROR:
            raise Conflict(f"volume {volume.id} is in error: {volume.reason}; delete it and create another")
        return await self._message(volume)

    async def GetVolume(self, request: control_pb2.GetVolumeRequest, context: _Context) -> control_pb2.Volume:
        return await self._message(await self._catalog.volume(request.volume))

    async def ListVolumes(
        self, request: control_pb2.ListVolumesRequest, context: _Context
    ) -> control_pb2.ListVolumesResponse:
        messages = await self._reconciler.messages()
        return control_pb2.ListVolumesResponse(volumes=map(messages.volume, await self._catalog.volumes()))

    async def DeleteVolume(
        self, request: control_pb2.DeleteVolumeRequest, context: _Context
    ) -> control_pb2.DeleteVolumeResponse:
        found = await self._catalog.volume(request.volume)
        volume = await self._catalog.change_volume(found.id, transitions.delete)
        _log.info("volume is to be deleted", volume=volume.id)
        try:
            await self._reconciler.settle(volume)
        except CairnError as error:
            _log.info("a volume is deleted in the background", volume=volume.id, error=str(error))
            return control_pb2.DeleteVolumeResponse(deleted=False, id=volume.id)
        return control_pb2.DeleteVolumeResponse(deleted=await self._is_gone(volume.id), id=volume.id)

    async def ResizeVolume(self, request: control_pb2.ResizeVolumeRequest, context: _Context) -> control_pb2.Volume:
        found = await self._catalog.volume(request.volume)
        volume = await self._catalog.change_volume(found.id, lambda now: transitions.resize(now, request.size_bytes))
        await self._reconciler.show_size(volume)
        return await self._message(volume)

    async def AttachVolume(self, request: control_pb2.AttachVolumeRequest, context: _Context) -> control_pb2.Volume:
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
            ),
        )
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
        node = (await self._catalog.node(request.node)).record
        return (await self._reconciler.messages()).node(node, await self._catalog.volumes())

    async def ListNodes(
        self, request: control_pb2.ListNodesRequest, context: _Context
    ) -> control_pb2.ListNodesResponse:
        messages, volumes = await self._reconciler.messages(), await self._catalog.volumes()
        nodes = await self._catalog.nodes()
        return control_pb2.ListNodesResponse(nodes=[messages.node(each.record, volumes) for each in nodes])

    async def RemoveNode(
        self, request: control_pb2.RemoveNodeRequest, context: _Context
    ) -> control_pb2.RemoveNodeResponse:
        node = (await self._catalog.node(request.node)).record
        if self._presence.is_up(node.id) or (self._presence.node(node.id) is None and self._presence.settling_s()):
            raise Conflict(f"node {node.id} is up, or was a moment ago: stop it first")
        await self._catalog.remove_node(node.id)
        self._presence.node_removed(node.id)
        _log.info("node removed", node=node.id)
        return control_pb2.RemoveNodeResponse()

    async def Status(self, request: control_pb2.StatusRequest, context: _Context) -> control_pb2.StatusResponse:
        observer = Observer(
            await self._reconciler.messages(),
            self._presence,
            {each.record.id: each.record for each in await self._catalog.nodes()},
            {each.id: each for each in await self._catalog.front_ends()},
        )
        return observer.status(await self._catalog.volumes(), await self._catalog.tombstones())

    # ---- from nodes and front-ends

    async def RegisterNode(
        self, request: control_pb2.RegisterNodeRequest, context: _Context
    ) -> control_pb2.RegisterNodeResponse:
        return await self._registrar.register_node(request)

    async def NodeHeartbeat(
        self, request: control_pb2.NodeHeartbeatRequest, context: _Context
    ) -> control_pb2.NodeHeartbeatResponse:
        return await self._registrar.node_heartbeat(request)

    async def RegisterFrontEnd(
        self, request: control_pb2.RegisterFrontEndRequest, context: _Context
    ) -> control_pb2.RegisterFrontEndResponse:
        return await self._registrar.register_front_end(request)

    async def FrontEndHeartbeat(
        self, request: control_pb2.FrontEndHeartbeatRequest, context: _Context
    ) -> control_pb2.FrontEndHeartbeatResponse:
        return await self._registrar.front_end_heartbeat(request)

    async def RenewAttachment(
        self, request: control_pb2.RenewAttachmentRequest, context: _Context
    ) -> control_pb2.OpenTicket:
        return await self._registrar.renew_attachment(request)

    async def GetAttachment(
        self, request: control_pb2.GetAttachmentRequest, context: _Context
    ) -> control_pb2.OpenTicket:
        return await self._registrar.get_attachment(request)

    # ---- creating

    async def _enter_volume(self, request: control_pb2.CreateVolumeRequest) -> Volume:
        """A new volume in the catalog, or that of an earlier request with the same token."""
        for _ in range(MAX_TRIES):
            if earlier := await self._catalog.volume_of_token(request.client_token):
                if (earlier.size_bytes, earlier.name) != (request.size_bytes, request.name):
                    raise Conflict(f"client token {request.client_token!r} was used for another volume, {earlier.id}")
                return earlier
            placed, nodes = await self._place()
            volume = _new_volume(request, placed)
            if await self._catalog.add_volume(volume, [nodes[node] for node in placed.nodes]):
                _log.info("volume is to be created", volume=volume.id, nodes=placed.nodes)
                return volume
        raise Conflict("the catalog is changed by too many at once: try again")

    async def _place(self) -> tuple[Placed, dict[NodeId, Stored[Node]]]:
        """Where a volume goes. Right after a start of control, nodes that are up may not have been heard yet."""
        while True:
            nodes = {each.record.id: each for each in await self._catalog.nodes()}
            candidates = self._candidates((each.record for each in nodes.values()), await self._catalog.volumes())
            settling_s = self._presence.settling_s()
            try:
                placed = place(candidates, self._placement)
                if not settling_s or (len(candidates) == len(nodes) and not placed.warnings):
                    return placed, nodes
            except CairnError:
                if not settling_s:
                    raise
            await self._presence.next_beat(settling_s)

    def _candidates(self, nodes: Iterable[Node], volumes: tuple[Volume, ...]) -> list[Candidate]:
        found = []
        for node in nodes:
            word = self._presence.node(node.id)
            if word is None or not self._presence.is_up(node.id):
                continue
            promised = sum(volume.size_bytes for volume in volumes if node.id in nodes_of(volume))
            found.append(Candidate(node.id, node.zone, word.capacity_bytes, word.used_bytes, promised, word.full))
        return found

    async def _until_created(self, volume: Volume) -> Volume:
        """The volume when it is no longer being created. A node that is away may come back meanwhile."""
        while volume.state is VolumeState.CREATING:
            try:
                await self._reconciler.settle(volume)
            except CairnError:
                _log.debug("not created yet", volume=volume.id)
            volume = await self._catalog.volume(volume.id)
            if volume.state is VolumeState.CREATING:
                await self._presence.next_beat(CREATE_WAIT_S)
        return volume

    # ---- attaching and detaching

    async def _choose_front_end(self, volume: Volume, request: control_pb2.AttachVolumeRequest) -> FrontEnd:
        """The one asked for, the one that has the volume, or the one with the fewest. It is up."""
        if request.front_end:
            wanted = [await self._catalog.front_end(check_id("fe", request.front_end))]
        elif volume.attachment and not request.force:
            wanted = [await self._catalog.front_end(volume.attachment.front_end)]
        else:
            wanted = list(await self._catalog.front_ends())
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

    # ---- answers

    async def _message(self, volume: Volume) -> control_pb2.Volume:
        return (await self._reconciler.messages()).volume(volume)

    async def _is_gone(self, volume: VolumeId) -> bool:
        try:
            await self._catalog.volume(volume)
        except NotFound:
            return True
        return False


def _new_volume(request: control_pb2.CreateVolumeRequest, placed: Placed) -> Volume:
    members = tuple(Member(ReplicaId(_random_id("rep")), node) for node in placed.nodes)
    return Volume(
        id=VolumeId(_random_id("vol")),
        name=request.name,
        size_bytes=request.size_bytes,
        state=VolumeState.CREATING,
        created_at_ms=now_ms(),
        segments=(Segment(SegmentNumber(0), request.size_bytes, Configuration(1, members)),),
        tags=dict(request.tags),
        warnings=placed.warnings,
        client_token=request.client_token,
    )


def _random_id(prefix: str) -> str:
    return make_id(prefix, secrets.token_bytes(9))
