"""What the daemon says to control, and hears from it."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from blockstore.errors import QuorumUnavailable
from blockstore.grpc_endpoint import open_control_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.rpc import snapshot_pb2_grpc
from snapshotd.root import Statistics
from snapshotd.roots import ControlCatalog


class ControlClient:
    """Calls of one daemon (its id) as one instance (of its process). control: HOST:PORT.

    Every call raises errors of the tree; QuorumUnavailable where control does not answer in time.
    """

    def __init__(self, control: str, daemon: str, instance: str, call_timeout_s: float) -> None:
        self.daemon = daemon
        self.instance = instance
        self._peer = f"control at {control}"
        self._call_timeout_s = call_timeout_s
        self._channel = open_control_channel(control)
        self._stub: Any = snapshot_pb2_grpc.SnapshotsStub(self._channel)
        self.catalog = ControlCatalog(self._stub, daemon)
        """For what needs no more of control than its list of snapshots."""

    async def register(self, address: str, store: str, repository: str) -> pb.RegisterDaemonResponse:
        """Raises Conflict where the cluster's snapshots are in another repository."""
        response: pb.RegisterDaemonResponse = await self._call(
            "RegisterDaemon",
            pb.RegisterDaemonRequest(
                daemon=self.daemon, instance=self.instance, address=address, store=store, repository=repository
            ),
        )
        return response

    async def announce(self, store: str, why: str) -> None:
        """It is started, and cannot register yet. Where control is away nobody is told: that is no reason to wait."""
        request = pb.RegisterDaemonRequest(daemon=self.daemon, instance=self.instance, store=store, why=why)
        with suppress(QuorumUnavailable):
            await self._call("RegisterDaemon", request)

    async def report(
        self, address: str, snapshots: Iterable[pb.SnapshotReport], known: Iterable[str], wait_s: float, why: str
    ) -> pb.DaemonHeartbeatResponse:
        """Answered when the answer names other snapshots than `known`, or after wait_s.

        why: what keeps it from writing to the object store, empty where nothing does.
        Raises NotFound where control does not know this daemon, Fenced where another process goes by its id.
        """
        request = pb.DaemonHeartbeatRequest(
            daemon=self.daemon,
            instance=self.instance,
            address=address,
            snapshots=snapshots,
            known=known,
            wait_s=wait_s,
            why=why,
        )
        response: pb.DaemonHeartbeatResponse = await self._call("DaemonHeartbeat", request, wait_s)
        return response

    async def complete(
        self, snapshot: str, root: bytes, statistics: Statistics, prune_number: int, retries: int
    ) -> None:
        """Raises Fenced where the prune number has moved, or another daemon or another try (`retries`) ships it by now.

        Raises AlreadyExists where it is completed with another root.
        """
        await self._call(
            "CompleteSnapshot",
            pb.CompleteSnapshotRequest(
                daemon=self.daemon,
                instance=self.instance,
                snapshot=snapshot,
                root=root,
                statistics=statistics_message(statistics),
                prune_number=prune_number,
                retries=retries,
            ),
        )

    async def fail(self, snapshot: str, reason: str, retries: int) -> None:
        """It will not come to be without a retry. Raises Fenced as `complete`."""
        await self._call(
            "FailSnapshot",
            pb.FailSnapshotRequest(
                daemon=self.daemon, instance=self.instance, snapshot=snapshot, reason=reason, retries=retries
            ),
        )

    async def drop(self, snapshot: str) -> None:
        """Its root is gone from the object store."""
        await self._call("DropSnapshot", pb.DropSnapshotRequest(daemon=self.daemon, snapshot=snapshot))

    async def close(self) -> None:
        await self._channel.close(None)

    async def _call(self, name: str, request: Any, wait_s: float = 0.0) -> Any:
        with cairn_errors(self._peer):
            return await getattr(self._stub, name)(request, timeout=wait_s + self._call_timeout_s)


def statistics_message(statistics: Statistics) -> pb.SnapshotStatistics:
    return pb.SnapshotStatistics(
        logical_bytes=statistics.logical_bytes,
        changed_bytes=statistics.changed_bytes,
        deduplicated_bytes=statistics.deduplicated_bytes,
        stored_bytes=statistics.stored_bytes,
    )
