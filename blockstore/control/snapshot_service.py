"""The Snapshots service, as users see it: each call of snapshot.proto, checked, then carried out on the catalog.

A call changes the catalog first and then waits for the step that the change asks for; who stops
waiting stops nothing. What daemons say goes to the warden (blockstore/control/store_warden.py).
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, Final

import structlog

from blockstore.control import snapshot_transitions, transitions
from blockstore.control.catalog import Catalog
from blockstore.control.clock import now_ms
from blockstore.control.hydration import NO_DAEMON
from blockstore.control.placing import random_id
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.record_store import MAX_TRIES, Stored
from blockstore.control.records import AttachmentState, Volume, check_tags, check_token
from blockstore.control.sealing import Sealing
from blockstore.control.shipping import Shipping, next_of_each_volume, users_by_source
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_messages import daemon_message, full_message
from blockstore.control.snapshot_reading import SnapshotReading
from blockstore.control.snapshot_records import MAX_VOLUMES, Snapshot, SnapshotState, check_description
from blockstore.control.snapshot_transitions import Phase, phase_of
from blockstore.control.store_warden import StoreWarden
from blockstore.domain import SnapshotId, VolumeId
from blockstore.errors import Conflict, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.grpc_parts import in_parts
from blockstore.rpc import control_pb2, snapshot_pb2, snapshot_pb2_grpc

_log = structlog.get_logger(__name__)

#: A daemon that falls silent changes what is known without a word.
WATCH_S: Final = 1.0

_Context = Any


class SnapshotService(snapshot_pb2_grpc.SnapshotsServicer):
    """Serves the calls of snapshot.proto's Snapshots."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: SnapshotCatalog,
        presence: Presence,
        reconciler: Reconciler,
        *,
        sealing: Sealing,
        shipping: Shipping,
        warden: StoreWarden,
        reading: SnapshotReading,
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._reconciler = reconciler
        self._sealing = sealing
        self._shipping = shipping
        self._warden = warden
        self._reading = reading

    # ---- from users

    async def CreateSnapshot(
        self, request: snapshot_pb2.CreateSnapshotRequest, context: _Context
    ) -> snapshot_pb2.CreateSnapshotResponse:
        check_description(request.description)
        check_tags(request.tags)
        check_token(request.client_token)
        if not 0 < len(request.volumes) <= MAX_VOLUMES:
            raise InvalidRequest(f"{len(request.volumes)} volumes: a snapshot is of 1 to {MAX_VOLUMES}")
        entered = await self._enter(request)
        sealed = await self._sealing.wait([each.id for each in entered])
        return snapshot_pb2.CreateSnapshotResponse(snapshots=await self._messages(sealed))

    async def GetSnapshot(self, request: snapshot_pb2.GetSnapshotRequest, context: _Context) -> snapshot_pb2.Snapshot:
        return await self._message(await self._snapshots.snapshot(request.snapshot))

    async def WatchSnapshot(
        self, request: snapshot_pb2.GetSnapshotRequest, context: _Context
    ) -> AsyncIterator[snapshot_pb2.Snapshot]:
        last = None
        snapshot = await self._snapshots.snapshot(request.snapshot)
        while True:
            changed = self._snapshots.next_change()
            try:
                snapshot = await self._snapshots.snapshot(snapshot.id)
            except NotFound:
                return
            message = await self._message(snapshot)
            if message != last:
                last = message
                yield message
            if snapshot.state is not SnapshotState.PENDING:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await changed.wait()

    async def ListSnapshots(
        self, request: snapshot_pb2.ListSnapshotsRequest, context: _Context
    ) -> AsyncIterator[snapshot_pb2.ListSnapshotsResponse]:
        snapshots = await self._snapshots.snapshots()
        newest_first = reversed(snapshots)
        if request.volume:
            wanted = await self._volume_id(request.volume, snapshots)
            newest_first = (each for each in newest_first if each.volume == wanted)
        listed = [*islice(newest_first, request.limit or None)]
        for part in in_parts(snapshot_pb2.ListSnapshotsResponse(), snapshots=await self._messages(reversed(listed))):
            yield part

    async def DeleteSnapshot(
        self, request: snapshot_pb2.DeleteSnapshotRequest, context: _Context
    ) -> snapshot_pb2.Snapshot:
        found = await self._snapshots.snapshot(request.snapshot)
        (snapshot,) = await self._snapshots.change([found.id], snapshot_transitions.deleting)
        _log.info("snapshot is to be deleted", snapshot=snapshot.id)
        return await self._message(snapshot)

    async def RetrySnapshot(
        self, request: snapshot_pb2.RetrySnapshotRequest, context: _Context
    ) -> snapshot_pb2.Snapshot:
        found = await self._snapshots.snapshot(request.snapshot)
        (snapshot,) = await self._snapshots.change([found.id], snapshot_transitions.retried)
        return await self._message(snapshot)

    async def SetHydration(self, request: snapshot_pb2.SetHydrationRequest, context: _Context) -> control_pb2.Volume:
        found = await self._catalog.volume(request.volume)

        def change(now: Volume) -> Volume:
            if now.source is None:
                raise Conflict(f"volume {now.id} has all its blocks already: there is nothing to be copied")
            source = now.source
            if request.HasField("paused"):
                source = replace(source, paused=request.paused)
            if request.HasField("rate_bytes"):
                source = replace(source, rate_bytes=request.rate_bytes)
            return replace(now, source=source)

        volume = await self._catalog.change_volume(found.id, change)
        return (await self._reconciler.messages()).volume(volume)

    async def OpenSnapshot(
        self, request: snapshot_pb2.OpenSnapshotRequest, context: _Context
    ) -> snapshot_pb2.OpenSnapshotResponse:
        return await self._reading.open(request)

    async def GetStore(
        self, request: snapshot_pb2.GetStoreRequest, context: _Context
    ) -> AsyncIterator[snapshot_pb2.GetStoreResponse]:
        daemons = await self._snapshots.daemons()
        messages = (daemon_message(each, self._presence.is_up(each.id)) for each in daemons)
        for part in in_parts(snapshot_pb2.GetStoreResponse(), daemons=messages):
            yield part

    async def ForgetDaemon(
        self, request: snapshot_pb2.ForgetDaemonRequest, context: _Context
    ) -> snapshot_pb2.ForgetDaemonResponse:
        await self._warden.forget(request)
        return snapshot_pb2.ForgetDaemonResponse()

    # ---- from daemons

    async def RegisterDaemon(
        self, request: snapshot_pb2.RegisterDaemonRequest, context: _Context
    ) -> snapshot_pb2.RegisterDaemonResponse:
        return await self._warden.register(request)

    async def DaemonHeartbeat(
        self, request: snapshot_pb2.DaemonHeartbeatRequest, context: _Context
    ) -> snapshot_pb2.DaemonHeartbeatResponse:
        return await self._warden.heartbeat(request)

    async def CompleteSnapshot(
        self, request: snapshot_pb2.CompleteSnapshotRequest, context: _Context
    ) -> snapshot_pb2.Snapshot:
        return await self._message(await self._warden.complete(request))

    async def FailSnapshot(self, request: snapshot_pb2.FailSnapshotRequest, context: _Context) -> snapshot_pb2.Snapshot:
        return await self._message(await self._warden.fail(request))

    async def DropSnapshot(
        self, request: snapshot_pb2.DropSnapshotRequest, context: _Context
    ) -> snapshot_pb2.DropSnapshotResponse:
        await self._warden.drop(request)
        return snapshot_pb2.DropSnapshotResponse()

    async def GetRoots(
        self, request: snapshot_pb2.GetRootsRequest, context: _Context
    ) -> AsyncIterator[snapshot_pb2.GetRootsResponse]:
        for part in await self._warden.roots():
            yield part

    async def FindDeleted(
        self, request: snapshot_pb2.FindDeletedRequest, context: _Context
    ) -> snapshot_pb2.FindDeletedResponse:
        return await self._warden.find_deleted(request)

    async def GetPruneNumber(
        self, request: snapshot_pb2.GetPruneNumberRequest, context: _Context
    ) -> snapshot_pb2.GetPruneNumberResponse:
        return snapshot_pb2.GetPruneNumberResponse(prune_number=await self._snapshots.prune_number())

    async def RaisePruneNumber(
        self, request: snapshot_pb2.RaisePruneNumberRequest, context: _Context
    ) -> snapshot_pb2.RaisePruneNumberResponse:
        return snapshot_pb2.RaisePruneNumberResponse(prune_number=await self._warden.raise_prune_number(request))

    async def AddSnapshot(self, request: snapshot_pb2.AddSnapshotRequest, context: _Context) -> snapshot_pb2.Snapshot:
        return await self._message(await self._warden.add(request))

    # ---- creating

    async def _enter(self, request: snapshot_pb2.CreateSnapshotRequest) -> Sequence[Snapshot]:
        """New snapshots in the catalog, or those of an earlier request with the same token."""
        for _ in range(MAX_TRIES):
            if earlier := await self._snapshots.of_token(request.client_token):
                return await self._checked_earlier(earlier, request)
            volumes = await self._volumes(request.volumes)
            snapshots = _new_snapshots(request, [each.record for each in volumes])
            self._sealing.expect(snapshots)
            if await self._snapshots.enter(snapshots, volumes):
                _log.info("snapshots are to be made", snapshots=[each.id for each in snapshots])
                return snapshots
            self._sealing.forget(snapshots)
        raise Conflict("the catalog is changed by too many at once: try again")

    async def _checked_earlier(
        self, earlier: Sequence[Snapshot], request: snapshot_pb2.CreateSnapshotRequest
    ) -> Sequence[Snapshot]:
        named = [{each.volume, each.volume_name} for each in earlier]
        if len(named) != len(request.volumes) or any(
            asked not in names for asked, names in zip(request.volumes, named, strict=True)
        ):
            raise Conflict(f"client token {request.client_token!r} was used for other snapshots, {earlier[0].id}")
        return earlier

    async def _volumes(self, names: Sequence[str]) -> list[Stored[Volume]]:
        """All of them, each in a state that allows a snapshot, and with somebody there to seal it."""
        found = [await self._catalog.stored_volume(name) for name in names]
        if len({each.record.id for each in found}) < len(found):
            raise InvalidRequest(f"a volume is named twice in {', '.join(names)}")
        for each in found:
            transitions.check_snapshot(each.record)
            await self._check_front_end(each.record)
        return found

    async def _check_front_end(self, volume: Volume) -> None:
        """Raises QuorumUnavailable where nobody can seal it, and that is known."""
        if self._presence.settling_s():
            return
        attachment = volume.attachment
        if attachment and attachment.state is AttachmentState.ATTACHED:
            if not self._presence.is_up(attachment.front_end):
                raise QuorumUnavailable(
                    f"front-end {attachment.front_end} is down, which has volume {volume.id}: start it, or detach "
                    "the volume with --force"
                )
            return
        front_ends = await self._catalog.front_ends()
        if not any(self._presence.is_up(each.id) for each in front_ends):
            raise QuorumUnavailable("no front-end is up, and it takes one to seal: start one with `cairn nbd run`")

    # ---- answers

    async def _volume_id(self, name_or_id: str, snapshots: Sequence[Snapshot]) -> VolumeId:
        try:
            return (await self._catalog.volume(name_or_id)).id
        except NotFound:
            if any(each.volume == name_or_id for each in snapshots):
                return VolumeId(name_or_id)
            raise

    async def _message(self, snapshot: Snapshot) -> snapshot_pb2.Snapshot:
        (message,) = await self._messages([snapshot])
        message.uris.extend(await self._reading.uris(snapshot))
        return message

    async def _messages(self, snapshots: Iterable[Snapshot]) -> Iterator[snapshot_pb2.Snapshot]:
        """Each of them, made when it is asked for, with what is in the catalog now."""
        users = users_by_source(await self._catalog.volumes())
        first = {each.volume: each.id for each in next_of_each_volume(await self._snapshots.unfinished())}
        return (full_message(each, self._progress(each, first), users.get(each.id, ())) for each in snapshots)

    def _progress(self, snapshot: Snapshot, first: Mapping[VolumeId, SnapshotId]) -> snapshot_pb2.ShipProgress | None:
        """How far a pending one is, and why it stands still if it does. first: the one of each volume that is next."""
        phase = phase_of(snapshot)
        if phase is Phase.SEALING:
            return snapshot_pb2.ShipProgress(why=self._sealing.why([snapshot]))
        if phase is not Phase.SHIPPING:
            return None
        if said := self._shipping.progress(snapshot.id):
            return said
        if not self._presence.daemons_up():
            return snapshot_pb2.ShipProgress(why=NO_DAEMON)
        before = first.get(snapshot.volume, snapshot.id)
        return snapshot_pb2.ShipProgress(why=f"waits until {before} is shipped" if before != snapshot.id else "")


def _new_snapshots(request: snapshot_pb2.CreateSnapshotRequest, volumes: Sequence[Volume]) -> list[Snapshot]:
    at_ms = now_ms()
    several = len(volumes) > 1 or any(len(volume.segments) > 1 for volume in volumes)
    barrier = random_id("snap").replace("snap-", "barrier-") if several else ""
    return [
        Snapshot(
            id=SnapshotId(random_id("snap")),
            volume=volume.id,
            volume_name=volume.name,
            size_bytes=volume.size_bytes,
            state=SnapshotState.PENDING,
            created_at_ms=at_ms,
            description=request.description,
            tags=dict(request.tags),
            client_token=request.client_token,
            barrier=barrier,
            source=volume.source.snapshot if volume.source else "",
        )
        for volume in volumes
    ]
