"""The calls that control makes, to nodes and to front-ends: each with a deadline.

One channel for each address, closed when nobody lives there any more. Every error is one of
blockstore.errors; who cannot be reached or answers too late raises QuorumUnavailable. Source:
proto/cairn/v1, services Replica and FrontEnd.
"""

import asyncio
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import grpc

from blockstore.config import ControlSettings
from blockstore.control.records import FrontEnd, Node, Tombstone
from blockstore.domain import SnapshotId, VolumeId
from blockstore.errors import QuorumUnavailable
from blockstore.grpc_connections import Connections
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import control_pb2, control_pb2_grpc, replica_pb2, replica_pb2_grpc
from blockstore.units import Epoch


class Peers:
    """Channels to nodes and front-ends."""

    def __init__(self, settings: ControlSettings) -> None:
        self._call_timeout_s = settings.call_timeout_s
        self._open_timeout_s = settings.open_timeout_s
        # While writes are held for a seal, its answer counts until they are released.
        self._seal_timeout_s = max(settings.call_timeout_s, settings.hold_limit_s)
        self._connections = Connections(lambda channel: channel)

    async def create(
        self, node: Node, replica: Tombstone, configuration: int, source: str = "", *, filling: bool = False
    ) -> None:
        """Make a replica there; it may be there already. source: the snapshot that absent blocks come from.

        filling: not of a volume that is being created; it is to get its content from its peers.
        """
        target = target_of(replica, configuration)
        request = replica_pb2.CreateRequest(target=target, source=source.encode(), filling=filling)
        with _call(_name(node)):
            await self._node(node).Create(request, timeout=self._call_timeout_s)

    async def delete(self, node: Node, replica: Tombstone) -> None:
        """Delete the replica there; it may be gone already."""
        request = replica_pb2.DeleteRequest(target=target_of(replica))
        with _call(_name(node)):
            await self._node(node).Delete(request, timeout=self._call_timeout_s)

    async def scrub(self, node: Node, replica: Tombstone, peers: Iterable[replica_pb2.Peer], rate_bytes: int) -> int:
        """Begin to read and compare all of it; the pass's number."""
        request = replica_pb2.ScrubRequest(target=target_of(replica), peers=peers, rate_bytes=rate_bytes)
        with _call(_name(node)):
            return (await self._node(node).Scrub(request, timeout=self._call_timeout_s)).number

    async def open_volume(self, front_end: FrontEnd, ticket: control_pb2.OpenTicket) -> None:
        """Returns once the volume is served; raises how the attempt ended."""
        request = control_pb2.OpenVolumeRequest(front_end=front_end.id, instance=front_end.instance, ticket=ticket)
        with _call(_name(front_end)):
            await self._front_end(front_end).OpenVolume(request, timeout=self._open_timeout_s)

    async def close_volume(self, front_end: FrontEnd, volume: VolumeId, epoch: Epoch) -> bool:
        """The front-end lets go of it; it may have done so already. False where it still waits for its clients."""
        request = control_pb2.CloseVolumeRequest(front_end=front_end.id, volume=volume, epoch=epoch)
        with _call(_name(front_end)):
            try:
                await self._front_end(front_end).CloseVolume(request, timeout=self._call_timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise
                return False
        return True

    async def resize_export(self, front_end: FrontEnd, volume: VolumeId, epoch: Epoch, size_bytes: int) -> None:
        """The front-end shows the new size."""
        request = control_pb2.ResizeExportRequest(
            front_end=front_end.id, volume=volume, epoch=epoch, size_bytes=size_bytes
        )
        with _call(_name(front_end)):
            await self._front_end(front_end).ResizeVolume(request, timeout=self._call_timeout_s)

    async def hold_writes(
        self, front_end: FrontEnd, volume: VolumeId, epoch: Epoch, barrier: str, limit_s: float
    ) -> None:
        """No write of the volume is acknowledged from the answer on, `limit_s` seconds at most."""
        request = control_pb2.HoldWritesRequest(
            front_end=front_end.id, volume=volume, epoch=epoch, barrier=barrier, limit_s=limit_s
        )
        with _call(_name(front_end)):
            await self._front_end(front_end).HoldWrites(request, timeout=self._call_timeout_s)

    async def release_writes(self, front_end: FrontEnd, volume: VolumeId, epoch: Epoch, barrier: str) -> bool:
        """Writes go on. True where none was acknowledged since the answer to hold_writes."""
        request = control_pb2.ReleaseWritesRequest(front_end=front_end.id, volume=volume, epoch=epoch, barrier=barrier)
        with _call(_name(front_end)):
            return (await self._front_end(front_end).ReleaseWrites(request, timeout=self._call_timeout_s)).held

    async def seal_volume(
        self,
        front_end: FrontEnd,
        volume: VolumeId,
        epoch: Epoch,
        snapshot: SnapshotId,
        *,
        again: bool,
        given_up: bool = False,
    ) -> control_pb2.SealVolumeResponse:
        """Fix the content for the snapshot. again: wherever an earlier call for it may have been made.

        given_up: only its generations are wanted, to be unpinned.
        """
        request = control_pb2.SealVolumeRequest(
            front_end=front_end.id, volume=volume, epoch=epoch, snapshot=snapshot, again=again, given_up=given_up
        )
        with _call(_name(front_end)):
            return await self._front_end(front_end).SealVolume(request, timeout=self._seal_timeout_s)

    async def unpin_generations(
        self,
        front_end: FrontEnd,
        volume: VolumeId,
        epoch: Epoch,
        generations: Sequence[int],
        snapshot: SnapshotId,
    ) -> None:
        """The snapshot keeps these no more, one in each segment; it may be so already."""
        request = control_pb2.UnpinGenerationRequest(
            front_end=front_end.id,
            volume=volume,
            epoch=epoch,
            generation=generations[0],
            snapshot=snapshot,
            generations=generations if len(generations) > 1 else (),
        )
        with _call(_name(front_end)):
            await self._front_end(front_end).UnpinGeneration(request, timeout=self._call_timeout_s)

    async def keep_only(self, addresses: Collection[str]) -> None:
        """Close the channels to all other addresses."""
        await self._connections.keep_only(addresses)

    def _node(self, node: Node) -> "replica_pb2_grpc.ReplicaAsyncStub":
        return replica_pb2_grpc.ReplicaStub(self._channel(node.address, node.id))

    def _front_end(self, front_end: FrontEnd) -> "control_pb2_grpc.FrontEndAsyncStub":
        return control_pb2_grpc.FrontEndStub(self._channel(front_end.address, front_end.id))

    def _channel(self, address: str, whose: str) -> grpc.aio.Channel:
        if not address:
            raise QuorumUnavailable(f"{whose} has never said where it listens")
        return self._connections.to(address)


@contextmanager
def _call(peer: str) -> Iterator[None]:
    """Errors of the tree; also where the channel is closed under the call because its peer has moved."""
    try:
        with cairn_errors(peer):
            yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise QuorumUnavailable(f"{peer} has moved to another address") from None


def target_of(replica: Tombstone, configuration: int = 0) -> replica_pb2.Target:
    """Epoch 0: control never touches a log."""
    return replica_pb2.Target(
        volume=replica.volume, segment=replica.segment, replica=replica.replica, epoch=0, configuration=configuration
    )


def _name(process: Node | FrontEnd) -> str:
    kind = "node" if isinstance(process, Node) else "front-end"
    return f"{kind} {process.id} at {process.address}"
