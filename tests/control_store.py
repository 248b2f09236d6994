"""A snapshotd in memory: it registers, beats, and keeps roots; what it ships is up to the test, or done at once."""

import hashlib
from typing import Any

from blockstore.rpc import snapshot_pb2
from tests.control_beating import LIMIT_S, Beating

STATISTICS = snapshot_pb2.SnapshotStatistics(
    logical_bytes=4096, changed_bytes=4096, deduplicated_bytes=0, stored_bytes=100
)


def root_of(snapshot: str) -> bytes:
    return hashlib.sha256(snapshot.encode()).digest()


class MemoryDaemon(Beating):
    """ships: whether it completes what it is given in the very next beat, and drops what it is told to."""

    def __init__(self, number: int, instance: int = 1) -> None:
        super().__init__()
        self.id = f"sd-{number:017x}"
        self.instance = f"instance-{instance}"
        self.repository = "the-repository"
        self.ships = True
        self.why = ""
        self.cluster = ""
        self.tasks: dict[str, snapshot_pb2.ShipTask] = {}
        self.progress: dict[str, snapshot_pb2.ShipProgress] = {}
        self.shipped: list[snapshot_pb2.ShipTask] = []
        self.roots: set[str] = set()
        self.dropped: list[str] = []

    async def restart(self) -> "MemoryDaemon":
        """The same daemon in a new process, at another address."""
        await self.stop()
        again = MemoryDaemon(int(self.id[3:], 16), int(self.instance.split("-")[1]) + 1)
        again.control, again.roots = self.control, self.roots
        await again.start()
        return again

    async def register(self, stub: Any) -> None:
        request = snapshot_pb2.RegisterDaemonRequest(
            daemon=self.id,
            instance=self.instance,
            address=self.endpoint.address,
            store="memory://",
            repository=self.repository,
        )
        self.cluster = (await stub.RegisterDaemon(request, timeout=LIMIT_S)).cluster

    async def report(self, stub: Any) -> None:
        request = snapshot_pb2.DaemonHeartbeatRequest(
            daemon=self.id, instance=self.instance, address=self.endpoint.address, why=self.why
        )
        for snapshot in self.tasks:
            request.snapshots.add(snapshot=snapshot, progress=self.progress.get(snapshot))
        answer = await stub.DaemonHeartbeat(request, timeout=LIMIT_S)
        self.tasks = {task.snapshot.id: task for task in answer.ship}
        if self.ships:
            for task in answer.ship:
                await self.ship(stub, task)
            for snapshot in answer.drop:
                await self.drop(stub, snapshot)

    async def ship(self, stub: Any, task: snapshot_pb2.ShipTask, prune_number: int | None = None) -> Any:
        """All that it takes, in the order of writes: the root, then control."""
        if prune_number is None:
            asked = snapshot_pb2.GetPruneNumberRequest()
            prune_number = (await stub.GetPruneNumber(asked, timeout=LIMIT_S)).prune_number
        snapshot = task.snapshot.id
        self.roots.add(snapshot)
        request = snapshot_pb2.CompleteSnapshotRequest(
            daemon=self.id,
            instance=self.instance,
            snapshot=snapshot,
            root=root_of(snapshot),
            statistics=STATISTICS,
            prune_number=prune_number,
            retries=task.retries,
        )
        # Before the answer: others may see it completed earlier than this one hears of it.
        self.shipped.append(task)
        try:
            completed = await stub.CompleteSnapshot(request, timeout=LIMIT_S)
        except BaseException:
            self.shipped.remove(task)
            raise
        self.tasks.pop(snapshot, None)
        return completed

    async def drop(self, stub: Any, snapshot: str) -> None:
        self.roots.discard(snapshot)
        request = snapshot_pb2.DropSnapshotRequest(daemon=self.id, snapshot=snapshot)
        self.dropped.append(snapshot)  # as above
        try:
            await stub.DropSnapshot(request, timeout=LIMIT_S)
        except BaseException:
            self.dropped.remove(snapshot)
            raise
