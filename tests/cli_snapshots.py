"""Snapshots of control and the SnapshotStore of snapshotd with canned state behind a real gRPC server, for tests of
the `cairn` command.

with canned_cluster() as cluster:
    cluster.snapshots["snap-…"] = …
    run(["snapshot", "list", "--control", cluster.address])
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from blockstore.errors import CairnError, NotFound
from blockstore.grpc_errors import status_of
from blockstore.grpc_parts import in_parts
from blockstore.rpc import control_pb2, snapshot_pb2_grpc
from blockstore.rpc import snapshot_pb2 as pb
from tests.cli_control import CREATED_MS, VOLUME, CannedControl, canned_control, make_volume

MIB = 1 << 20
DAEMON = "sd-00000000000000001"


def snapshot_id(number: int) -> str:
    return f"snap-{number:017x}"


def make_snapshot(
    number: int, state: pb.SnapshotState.ValueType = pb.SNAPSHOT_STATE_COMPLETED, **values: Any
) -> pb.Snapshot:
    """A snapshot of the volume db, 1 GiB, `number` ms after the first."""
    given: dict[str, Any] = {
        "id": snapshot_id(number),
        "volume": VOLUME,
        "volume_name": "db",
        "size_bytes": 1 << 30,
        "created_at_ms": CREATED_MS + number,
        "sealed_at_ms": CREATED_MS + number,
        "generation": number,
    }
    if state == pb.SNAPSHOT_STATE_COMPLETED:
        given["statistics"] = pb.SnapshotStatistics(
            logical_bytes=100 * MIB, changed_bytes=10 * MIB, deduplicated_bytes=4 * MIB, stored_bytes=3 * MIB
        )
        given["root"] = bytes(range(32))
    return pb.Snapshot(state=state, **{**given, **values})


def make_progress(done: int, total: int = 10 * MIB, **values: Any) -> pb.ShipProgress:
    return pb.ShipProgress(bytes_done=done, bytes_total=total, bytes_stored=done // 2, rate_bytes=2 * MIB, **values)


class CannedSnapshots(snapshot_pb2_grpc.SnapshotsServicer, snapshot_pb2_grpc.SnapshotStoreServicer):
    """Answers both services; remembers each request. `error`: what every call ends with.

    watched: what a watch tells before the snapshot as it is. stands_still: it tells no more, then.
    answers: what each streaming method of snapshotd answers, by its name; an exception among them ends
    the stream. imported: what came with Import.
    """

    def __init__(self) -> None:
        self.address = ""
        self.control: CannedControl | None = None
        self.snapshots = {snapshot_id(n): make_snapshot(n) for n in (1, 2)}
        self.created_state = pb.SNAPSHOT_STATE_PENDING
        self.watched: list[pb.Snapshot] = []
        self.stands_still = False
        self.daemons_up = True
        self.error: CairnError | None = None
        self.undeletable: dict[str, CairnError] = {}
        self.answers: dict[str, Iterable[Any]] = {}
        self.imported: list[pb.ImportRequest] = []
        self.requests: list[Any] = []

    def last(self, kind: type[Any]) -> Any:
        """The last request of that type."""
        return next(each for each in reversed(self.requests) if isinstance(each, kind))

    # ---- control

    def CreateSnapshot(self, request: pb.CreateSnapshotRequest, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        made = [
            make_snapshot(10 + n, self.created_state, description=request.description, tags=dict(request.tags))
            for n, _ in enumerate(request.volumes)
        ]
        self.snapshots |= {each.id: each for each in made}
        return pb.CreateSnapshotResponse(snapshots=made)

    def GetSnapshot(self, request: pb.GetSnapshotRequest, context: grpc.ServicerContext) -> pb.Snapshot:
        self._note(request, context)
        return self._find(request.snapshot, context)

    def WatchSnapshot(self, request: pb.GetSnapshotRequest, context: grpc.ServicerContext) -> Iterator[pb.Snapshot]:
        self._note(request, context)
        found = self._find(request.snapshot, context)
        while self.watched:
            yield self.watched.pop(0)
        if self.stands_still:
            yield found
            ended = threading.Event()
            context.add_callback(ended.set)
            ended.wait(60)
        if found.state == pb.SNAPSHOT_STATE_PENDING:
            found.CopyFrom(make_snapshot(found.generation))
        yield found

    def ListSnapshots(self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        self._note(request, context)
        yield from in_parts(pb.ListSnapshotsResponse(), snapshots=self.snapshots.values())

    def DeleteSnapshot(self, request: pb.DeleteSnapshotRequest, context: grpc.ServicerContext) -> pb.Snapshot:
        self._note(request, context)
        found = self._find(request.snapshot, context)
        if found.id in self.undeletable:
            self._end(self.undeletable[found.id], context)
        found.state = pb.SNAPSHOT_STATE_DELETING
        return found

    def RetrySnapshot(self, request: pb.RetrySnapshotRequest, context: grpc.ServicerContext) -> pb.Snapshot:
        self._note(request, context)
        found = self._find(request.snapshot, context)
        found.state = pb.SNAPSHOT_STATE_PENDING
        return found

    def SetHydration(self, request: pb.SetHydrationRequest, context: grpc.ServicerContext) -> control_pb2.Volume:
        self._note(request, context)
        return make_restored(paused=request.paused, rate_bytes=request.rate_bytes)

    def GetStore(self, request: pb.GetStoreRequest, context: grpc.ServicerContext) -> Iterator[pb.GetStoreResponse]:
        self._note(request, context)
        daemon = pb.StoreDaemon(
            id=DAEMON, address=self.address, up=self.daemons_up, store="s3://bucket/x", repository="r1"
        )
        yield pb.GetStoreResponse(daemons=[daemon])

    def ForgetDaemon(self, request: pb.ForgetDaemonRequest, context: grpc.ServicerContext) -> pb.ForgetDaemonResponse:
        self._note(request, context)
        return pb.ForgetDaemonResponse()

    # ---- snapshotd

    def Verify(self, request: pb.VerifyRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._stream("Verify", request, context)

    def Diff(self, request: pb.DiffRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._stream("Diff", request, context)

    def Export(self, request: pb.ExportRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._stream("Export", request, context)

    def Prune(self, request: pb.PruneRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._stream("Prune", request, context)

    def CheckStore(self, request: pb.CheckStoreRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._stream("CheckStore", request, context)

    def StoreStatistics(self, request: pb.StoreStatisticsRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._stream("StoreStatistics", request, context)

    def Adopt(self, request: pb.AdoptRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._stream("Adopt", request, context)

    def Import(self, request_iterator: Iterator[pb.ImportRequest], context: grpc.ServicerContext) -> pb.Snapshot:
        for each in request_iterator:
            self.imported.append(each)
            if self.error is not None:
                self._end(self.error, context)
        return make_snapshot(7, volume="", volume_name="", size_bytes=self.imported[0].size_bytes)

    def RotateKey(self, request: pb.RotateKeyRequest, context: grpc.ServicerContext) -> pb.RotateKeyResponse:
        self._note(request, context)
        return pb.RotateKeyResponse(key="the keyring /x", rewrapped=1)

    # ---- inside

    def _stream(self, method: str, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self._note(request, context)
        for each in self.answers.get(method, []):
            if isinstance(each, CairnError):
                self._end(each, context)
            yield each

    def _note(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.error is not None:
            self._end(self.error, context)

    def _find(self, snapshot: str, context: grpc.ServicerContext) -> pb.Snapshot:
        if snapshot not in self.snapshots:
            self._end(NotFound(f"no snapshot {snapshot!r}: `cairn snapshot list` shows all"), context)
        return self.snapshots[snapshot]

    def _end(self, error: CairnError, context: grpc.ServicerContext) -> AssertionError:
        context.abort(status_of(error), str(error))
        return AssertionError("abort raises")


def make_restored(**hydration: Any) -> control_pb2.Volume:
    """A volume that comes from a snapshot, half of it hydrated."""
    given = {"blocks_total": 1000, "blocks_done": 500, "rate_now_bytes": 50 * MIB, **hydration}
    source = control_pb2.Source(snapshot=snapshot_id(1), root=bytes(32), size_bytes=1 << 30, addresses=["[::1]:1"])
    return make_volume(name="copy", source=source, hydration=control_pb2.Hydration(**given))


@contextmanager
def canned_cluster() -> Iterator[CannedSnapshots]:
    """All three services at one free port, until the block ends."""
    canned = CannedSnapshots()  # type: ignore[abstract]  # the rest is for daemons and front-ends

    def register(server: grpc.Server) -> None:
        snapshot_pb2_grpc.add_SnapshotsServicer_to_server(canned, server)
        snapshot_pb2_grpc.add_SnapshotStoreServicer_to_server(canned, server)

    with canned_control(register) as control:
        canned.address, canned.control = control.address, control
        yield canned
