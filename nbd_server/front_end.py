"""The front-end as control sees it: the FrontEnd service, and the word that it sends to control.

After a start it takes a new epoch for every volume that is attached to it, and serves it again. An
attempt that failed is made anew with another epoch; one that was fenced is not.
"""

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog

from blockstore.config import MAX_LEASE_S, FrontEndSettings
from blockstore.domain import FrontEndId, SnapshotId, VolumeId, check_id, make_id
from blockstore.durable_files import make_directory, write_durably
from blockstore.errors import CairnError, Conflict, Corrupt, Fenced, NotFound
from blockstore.grpc_endpoint import open_control_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.heartbeat import beat
from blockstore.replication.leader import LeaderSettings
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import control_pb2_grpc, snapshot_pb2, snapshot_pb2_grpc
from blockstore.units import Generation
from nbd_server.attachments import Attachments
from nbd_server.attempt import Attempt
from nbd_server.clone_overlay import CloneSpace
from nbd_server.command_counts import CommandCounts
from nbd_server.exports import Exports
from nbd_server.pace import Pace
from nbd_server.sealing import sealed_message
from nbd_server.server import NbdServer
from nbd_server.snapshot_exports import SnapshotExports

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext

_log = structlog.get_logger(__name__)
#: Between two attempts to open a volume. Each takes an epoch, and what keeps one away is often over at once: a
#: control that has just been started, an election in etcd.
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


def front_end_id(state: Path) -> FrontEndId:
    """The id in `state`, made at the first start. Raises InvalidRequest where the file holds something else."""
    make_directory(state)
    path = state / "id"
    if not path.exists():
        write_durably(path, make_id("fe", secrets.token_bytes(9)))
    return FrontEndId(check_id("fe", path.read_text().strip()))


def _may_be_tried_again(attempt: Attempt) -> bool:
    return attempt.failure is not None and not isinstance(attempt.failure, Fenced | Corrupt)


class FrontEnd(control_pb2_grpc.FrontEndServicer):
    """One process. `address` is where control dials, `uris` where NBD clients connect; both are set before `run`."""

    def __init__(self, settings: FrontEndSettings, server: NbdServer) -> None:
        self.id = front_end_id(settings.state)
        self.instance = secrets.token_hex(8)
        self.address = ""
        self.uris: list[str] = []
        self._settings = settings
        self._pace = Pace(settings.heartbeat_s)
        self._channel = open_control_channel(settings.control)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._attachments = Attachments(
            server,
            LeaderSettings(
                lease_s=settings.lease_s,
                drift_s=settings.drift_s,
                older_lease_s=MAX_LEASE_S,
                retry_limit_s=settings.retry_limit_s,
            ),
            settings.call_timeout_s,
            self._get_attachment,
            short_circuit=settings.short_circuit,
        )
        self._snapshot_catalog = snapshot_pb2_grpc.SnapshotsStub(self._channel)
        self._snapshots = self._show_snapshots(server.exports)
        self._attachments.snapshot_names = self._get_snapshot_names
        self._opening: dict[VolumeId, asyncio.Task[None]] = {}
        self._growing: set[asyncio.Task[None]] = set()
        self._closing: dict[tuple[VolumeId, int], asyncio.Task[bool]] = {}
        """Volumes that control took away, until their clients are gone; with the epochs that are over."""

    @property
    def attempts(self) -> Iterator[Attempt]:
        """The latest of each volume that is attached here."""
        return iter(self._attachments)

    @property
    def snapshot_counts(self) -> CommandCounts:
        """What clients asked of snapshots and clones."""
        return CommandCounts() if self._snapshots is None else self._snapshots.counts

    # ---- control calls

    async def OpenVolume(self, request: pb.OpenVolumeRequest, context: Context) -> pb.OpenVolumeResponse:
        if (request.front_end, request.instance) != (self.id, self.instance):
            raise Conflict(f"this is {self.id}, instance {self.instance}: look up the front-end's address again")
        await self._attachments.open(request.ticket)
        return pb.OpenVolumeResponse()

    async def CloseVolume(self, request: pb.CloseVolumeRequest, context: Context) -> pb.CloseVolumeResponse:
        self._check_name(request.front_end)
        volume = VolumeId(check_id("vol", request.volume))
        opening = self._opening.pop(volume, None)
        if opening is not None:
            opening.cancel()
        # Who asks gives up sooner than clients go, and asks again: that joins it, and does not begin it anew.
        return pb.CloseVolumeResponse(closed=await asyncio.shield(self._close_volume(volume, request.epoch)))

    async def ResizeVolume(self, request: pb.ResizeExportRequest, context: Context) -> pb.ResizeExportResponse:
        self._check_name(request.front_end)
        attempt = self._attachments.find(VolumeId(request.volume))
        if attempt is None or attempt.epoch != request.epoch:
            raise NotFound(f"{request.volume} is not open here at epoch {request.epoch}")
        await self._attachments.grow(attempt, request.size_bytes)
        return pb.ResizeExportResponse()

    async def HoldWrites(self, request: pb.HoldWritesRequest, context: Context) -> pb.HoldWritesResponse:
        self._check_name(request.front_end)
        await self._attachments.served(request.volume, request.epoch).barriers.hold(request.barrier, request.limit_s)
        return pb.HoldWritesResponse()

    async def ReleaseWrites(self, request: pb.ReleaseWritesRequest, context: Context) -> pb.ReleaseWritesResponse:
        self._check_name(request.front_end)
        attempt = self._attachments.served(request.volume, request.epoch)
        held = attempt.barriers.release(request.barrier)
        await attempt.sealing.until_known()
        return pb.ReleaseWritesResponse(held=held)

    async def SealVolume(self, request: pb.SealVolumeRequest, context: Context) -> pb.SealVolumeResponse:
        self._check_name(request.front_end)
        attempt = self._attachments.served(request.volume, request.epoch)
        number = len(attempt.volume.segments)
        if number > 1 and not (attempt.barriers.holding or request.given_up):
            raise Conflict(f"{request.volume} has {number} segments: it is sealed while its writes are held")
        sealed = await attempt.sealing.seal(check_id("snap", request.snapshot), again=request.again)
        if not attempt.barriers.holding:
            await attempt.sealing.until_known()
        return sealed_message(sealed)

    async def UnpinGeneration(self, request: pb.UnpinGenerationRequest, context: Context) -> pb.UnpinGenerationResponse:
        self._check_name(request.front_end)
        attempt = self._attachments.served(request.volume, request.epoch)
        snapshot = check_id("snap", request.snapshot).encode()
        generations = list(request.generations) or [request.generation]
        if len(generations) > len(attempt.volume.segments):
            raise NotFound(f"{request.volume} has {len(attempt.volume.segments)} segments here, not {len(generations)}")
        pinned = zip(attempt.volume.segments, generations, strict=False)
        await asyncio.gather(*(segment.unpin(Generation(number), snapshot) for segment, number in pinned if number))
        return pb.UnpinGenerationResponse()

    def _check_name(self, name: str) -> None:
        if name != self.id:
            raise Conflict(f"this is {self.id}, not {name}: look up the front-end's address again")

    # ---- calls to control

    async def run(self) -> None:
        """Keep control informed, until cancelled. Raises Fenced where another process has this front-end's id."""
        await beat(self._settings.heartbeat_s, self._register, self._report)

    def end_holds(self) -> None:
        """Answers that are kept for a snapshot's barrier are given, and the barrier fails: the process ends."""
        for attempt in self._attachments:
            attempt.barriers.close()

    async def close(self) -> None:
        """Answer what is in flight, then let go of every volume; each stays attached to this front-end."""
        for task in (*self._opening.values(), *self._growing):
            task.cancel()
        await self._attachments.close_all()

    async def end(self) -> None:
        """All clients are gone."""
        if self._snapshots is not None:
            await self._snapshots.end()
        await self._channel.close(None)

    async def _register(self) -> None:
        request = pb.RegisterFrontEndRequest(
            front_end=self.id, instance=self.instance, address=self.address, uris=self.uris
        )
        with self._calling_control():
            response: pb.RegisterFrontEndResponse = await self._control.RegisterFrontEnd(
                request, timeout=self._settings.call_timeout_s
            )
        for volume in response.volumes:
            if self._attachments.find(VolumeId(volume)) is None:
                self._open_again(VolumeId(volume))

    async def _report(self) -> float:
        began = asyncio.get_running_loop().time()
        reported = {attempt.volume.volume: attempt.epoch for attempt in self._attachments}
        request = pb.FrontEndHeartbeatRequest(
            front_end=self.id,
            instance=self.instance,
            address=self.address,
            uris=self.uris,
            volumes=self._attachments.reports(),
            reading=self._snapshots.reading if self._snapshots is not None else (),
            shows_snapshots=self._snapshots is not None,
        )
        with self._calling_control():
            response: pb.FrontEndHeartbeatResponse = await self._control.FrontEndHeartbeat(
                request, timeout=self._settings.call_timeout_s
            )
        await self._heed({VolumeId(each.volume): each for each in response.attachments}, reported)
        now = asyncio.get_running_loop().time()
        changes = {change for attempt in self._attachments for change in attempt.changes_of_members()}
        return self._pace.next_s(changes, now - began, now)

    async def _heed(self, current: dict[VolumeId, pb.CurrentAttachment], reported: dict[VolumeId, int]) -> None:
        """What control knew when it heard that report; a volume that was opened since is not in it."""
        for volume, epoch in reported.items():
            attempt = self._attachments.find(volume)
            if attempt is None or attempt.epoch != epoch:
                continue
            if volume in current:
                attempt.heed(current[volume])
                self._grow(attempt, current[volume].size_bytes)
                # Each attempt at maintenance is control's.
                if _may_be_tried_again(attempt) and not current[volume].maintenance:
                    self._open_again(volume)
            elif attempt.maintenance or not isinstance(attempt.fate, Fenced):
                self._close_volume(volume, epoch)

    def _close_volume(self, volume: VolumeId, epoch: int) -> "asyncio.Task[bool]":
        """In the background: its clients may take their time, and the heartbeat speaks for all other volumes."""
        key = volume, epoch
        if key not in self._closing:
            _log.info("volume is taken away", volume=volume, epoch=epoch)
            self._closing[key] = asyncio.get_running_loop().create_task(self._attachments.close(volume, epoch))
            self._closing[key].add_done_callback(lambda _: self._closing.pop(key))
        return self._closing[key]

    def _grow(self, attempt: Attempt, size_bytes: int) -> None:
        """In the background: control is asked, and the heartbeat must not wait for that."""
        if size_bytes <= attempt.volume.size_bytes or attempt.growing.locked() or not attempt.is_served:
            return
        task = asyncio.get_running_loop().create_task(self._grow_quietly(attempt, size_bytes))
        self._growing.add(task)
        task.add_done_callback(self._growing.discard)

    async def _grow_quietly(self, attempt: Attempt, size_bytes: int) -> None:
        try:
            await self._attachments.grow(attempt, size_bytes)
        except CairnError as error:  # the next heartbeat brings it up again
            _log.warning("a volume's new size cannot be shown yet", volume=attempt.volume.volume, error=str(error))

    def _open_again(self, volume: VolumeId) -> None:
        """With a new epoch, again and again until it is served or somebody else's."""
        if volume not in self._opening:
            task = asyncio.get_running_loop().create_task(self._open_until_served(volume))
            self._opening[volume] = task
            task.add_done_callback(lambda ended: self._forget_opening(volume, ended))

    def _forget_opening(self, volume: VolumeId, ended: "asyncio.Task[None]") -> None:
        """Unless another one took its place."""
        if self._opening.get(volume) is ended:
            del self._opening[volume]

    async def _open_until_served(self, volume: VolumeId) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._attachments.open(await self._renew(volume))
                return
            except (Fenced, Corrupt, NotFound) as error:
                _log.warning("volume is not served here", volume=volume, error=str(error))
                return
            except CairnError as error:
                _log.warning("volume cannot be opened yet", volume=volume, error=str(error))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _renew(self, volume: VolumeId) -> pb.OpenTicket:
        request = pb.RenewAttachmentRequest(volume=volume, front_end=self.id, instance=self.instance)
        with self._calling_control():
            ticket: pb.OpenTicket = await self._control.RenewAttachment(request, timeout=self._settings.call_timeout_s)
        return ticket

    def _show_snapshots(self, exports: Exports) -> SnapshotExports | None:
        """From now on clients may ask for snapshots, unless that is switched off."""
        if not self._settings.open_snapshots:
            return None
        exports.on_demand = snapshots = SnapshotExports(
            self._open_snapshot,
            limit=self._settings.open_snapshots,
            patience_s=self._settings.retry_limit_s,
            call_timeout_s=self._settings.call_timeout_s,
            directory=self._settings.state,
            space=CloneSpace(self._settings.clone_space_bytes),
        )
        return snapshots

    async def _open_snapshot(self, snapshot: SnapshotId, again: bool) -> snapshot_pb2.OpenSnapshotResponse:
        request = snapshot_pb2.OpenSnapshotRequest(
            snapshot=snapshot, front_end=self.id, instance=self.instance, again=again
        )
        with self._calling_control():
            found: snapshot_pb2.OpenSnapshotResponse = await self._snapshot_catalog.OpenSnapshot(
                request, timeout=self._settings.call_timeout_s
            )
        return found

    async def _get_attachment(self, volume: VolumeId, epoch: int) -> pb.OpenTicket:
        request = pb.GetAttachmentRequest(volume=volume, front_end=self.id, epoch=epoch)
        with self._calling_control():
            ticket: pb.OpenTicket = await self._control.GetAttachment(request, timeout=self._settings.call_timeout_s)
        return ticket

    async def _get_snapshot_names(self, volume: VolumeId) -> dict[str, int]:
        """What clients may call the volume's snapshots, and their generations: ids, and tags `Name` where one has it.

        Empty while control is away: they go by what was sealed for them then, which is the id but for a few.
        """
        names: dict[str, int] = {}
        request = snapshot_pb2.ListSnapshotsRequest(volume=volume)
        try:
            with self._calling_control():
                async for response in self._snapshot_catalog.ListSnapshots(
                    request, timeout=self._settings.call_timeout_s
                ):
                    for each in response.snapshots:
                        names[each.id] = each.generation
                        if each.tags.get("Name"):
                            names.setdefault(each.tags["Name"], each.generation)
        except CairnError as error:
            _log.warning("control does not tell what snapshots are called", volume=volume, error=str(error))
        return names

    def _calling_control(self) -> Any:
        return cairn_errors(f"control at {self._settings.control}")
