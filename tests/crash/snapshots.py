"""Volumes and snapshots of a cluster of processes against a dumb model, while the processes are killed.

A volume is a list of blocks, and so is a snapshot: for each block the contents that it may have. That is one, but for
blocks whose write was in flight when a front-end was killed (it may have been done or not) or when the snapshot was
taken (it may be in it or not); the first read that shows such a block settles it.

The blocks lie around the end of a shard of the manifest, so that each snapshot has two of those. There are few
contents, so that all volumes and snapshots refer to each other's packs.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from random import Random
from typing import Final

import grpc

from blockstore.rpc import control_pb2, snapshot_pb2_grpc
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB
from tests.cluster import Cluster
from tests.daemons import Daemon, wait_for
from tests.nbd_client import Disconnected, NbdClient, NbdError

VOLUME_SIZE: Final = 160 * MIB
#: Of the user's volume: it has two, and the blocks lie around their boundary. Restored ones have a single segment.
SEGMENT_SIZE: Final = 128 * MIB
BLOCKS: Final = 512
CONTENTS: Final = 40
#: The first of them, in the volume.
_FIRST: Final = 32_768 - BLOCKS // 2
ZERO: Final = 0
_IN_FLIGHT: Final = 8
_LIMIT_S: Final = 60.0
_READ_BLOCKS: Final = 128

Possible = list[frozenset[int]]
"""By block: the contents that it may have."""
Event = Callable[[], None]


def content_of(number: int) -> bytes:
    return bytes(BLOCK_SIZE) if number == ZERO else Random(number).randbytes(BLOCK_SIZE)


_NUMBERS: Final = {content_of(number): number for number in range(CONTENTS)}


@dataclass
class Volume:
    id: str
    blocks: Possible


@dataclass(frozen=True)
class Begun:
    """A snapshot that is asked for. before: what its volume might have shown when it was."""

    volume: Volume
    request: pb.CreateSnapshotRequest
    before: Possible


class Wrong(AssertionError):
    """A volume or a snapshot shows what the model does not explain."""


class Play:
    """volumes: the first one is the user's, the others were restored. snapshots: those not deleted, by id."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        made = cluster.create(VOLUME_SIZE, segment_size_bytes=SEGMENT_SIZE)
        volume = Volume(made, [frozenset({ZERO})] * BLOCKS)
        self.volumes = [volume]
        self.snapshots: dict[str, Possible] = {}
        cluster.attach(volume.id)

    # ---- what a guest does

    def write(self, volume: Volume, changes: dict[int, int], event: Event | None = None, at: int = 0) -> None:
        """Write these contents (zero: trim), several at once; `event` runs when `at` of them are acknowledged."""
        asyncio.run(asyncio.wait_for(self._write(volume, changes, event, at), _LIMIT_S))

    async def _write(self, volume: Volume, changes: dict[int, int], event: Event | None, at: int) -> None:
        client = await self._connect(volume)
        turn = asyncio.Semaphore(_IN_FLIGHT)
        acknowledged = 0
        happening: asyncio.Task[None] | None = None

        async def one(block: int, number: int) -> None:
            nonlocal acknowledged, happening
            async with turn:
                old = volume.blocks[block]
                volume.blocks[block] = old | {number}
                with suppress(Disconnected):
                    offset = (_FIRST + block) * BLOCK_SIZE
                    if number == ZERO:
                        await client.trim(offset, BLOCK_SIZE)
                    else:
                        await client.write(offset, content_of(number))
                    volume.blocks[block] = frozenset({number})
                    acknowledged += 1
                if event is not None and happening is None and acknowledged >= at:
                    happening = asyncio.create_task(asyncio.to_thread(event))

        await asyncio.gather(*(one(*change) for change in changes.items()))
        if happening is not None:
            await happening
        await client.close()

    def check(self, volume: Volume, count: int = BLOCKS) -> None:
        """Read the first `count` blocks of it."""

        async def read() -> list[bytes]:
            client = await self._connect(volume)
            starts = range(_FIRST, _FIRST + count, _READ_BLOCKS)
            size = _READ_BLOCKS * BLOCK_SIZE
            shown = await asyncio.gather(*(client.read(start * BLOCK_SIZE, size) for start in starts))
            await client.close()
            return shown

        judge(volume.id, volume.blocks, b"".join(asyncio.run(asyncio.wait_for(read(), _LIMIT_S))))

    async def _connect(self, volume: Volume) -> NbdClient:
        """As soon as it is exported, by a front-end that may have been started just now."""
        while True:
            try:
                return await NbdClient.connect(self.cluster.uri_now(volume.id))
            except (Disconnected, NbdError):
                await asyncio.sleep(0.05)

    # ---- snapshots

    def snapshot(self, volume: Volume) -> None:
        """Take one now, also while the volume is written to."""
        self.finish(self.begin(volume))

    def begin(self, volume: Volume) -> Begun:
        """One of what the volume shows from here on; `finish` brings it about."""
        request = pb.CreateSnapshotRequest(volumes=[volume.id], client_token=secrets.token_hex(16))
        return Begun(volume, request, list(volume.blocks))

    def ask(self, begun: Begun) -> None:
        """Ask for it once, whatever becomes of that: control may be killed meanwhile."""
        with suppress(grpc.RpcError):
            self.cluster.call("CreateSnapshot", begun.request, _LIMIT_S)

    def finish(self, begun: Begun) -> str:
        """Its id once it is sealed. One that is in error right away is no snapshot: nothing then."""
        (made,) = self._create(begun.request)
        if made.state == pb.SNAPSHOT_STATE_ERROR and not made.sealed_at_ms:
            self._delete(made.id)
            return ""
        # A write that was acknowledged before is in it; one that was begun meanwhile may be.
        pairs = zip(begun.before, list(begun.volume.blocks), strict=True)
        self.snapshots[made.id] = [old if old == new else old | new for old, new in pairs]
        return str(made.id)

    def _create(self, request: pb.CreateSnapshotRequest) -> Sequence[pb.Snapshot]:
        """What it makes; a control that is killed meanwhile is asked again, with the same token, once it is there."""
        deadline = time.monotonic() + _LIMIT_S
        while True:
            try:
                made: Sequence[pb.Snapshot] = self.cluster.call("CreateSnapshot", request, _LIMIT_S).snapshots
                return made
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise

    def killed(self, work: Callable[[], object], daemon: Daemon, after_s: float) -> None:
        """Kill the process while the work goes on, and start it again."""
        with ThreadPoolExecutor(1) as threads:
            working = threads.submit(work)
            time.sleep(after_s)  # The instant of a crash is anybody's guess.
            self.kill(daemon)
            working.result()

    def kill(self, daemon: Daemon) -> None:
        """Kill it and start it again. In the main thread only: a daemon ends with the thread that started it."""
        daemon.kill()
        self.start_killed()

    def start_killed(self) -> None:
        """Start those that were killed, also while the main thread was busy."""
        self.cluster.start(*(each for each in self.cluster.daemons if not each.running))
        # What is asked next is asked on a connection to the control that runs now.
        self.cluster.status()

    def completed(self, snapshot: str) -> None:
        """Wait until it is; one in error is tried again."""

        def is_completed() -> bool:
            found = self.cluster.call("GetSnapshot", pb.GetSnapshotRequest(snapshot=snapshot))
            if found.state == pb.SNAPSHOT_STATE_ERROR:
                self.cluster.call("RetrySnapshot", pb.RetrySnapshotRequest(snapshot=snapshot))
            return bool(found.state == pb.SNAPSHOT_STATE_COMPLETED)

        wait_for(f"{snapshot} to be completed", is_completed, _LIMIT_S)

    def restore(self, snapshot: str) -> None:
        """A volume made from it, in place of the one restored before; it hydrates only where it is read."""
        self.completed(snapshot)
        while len(self.volumes) > 1:
            self._drop(self.volumes.pop())
        made = self.cluster.call("CreateVolume", control_pb2.CreateVolumeRequest(snapshot=snapshot)).id
        with suppress_hydrated():
            self.cluster.call("SetHydration", pb.SetHydrationRequest(volume=made, paused=True))
        available = control_pb2.VOLUME_STATE_AVAILABLE
        wait_for(f"{made} to be available", lambda: self.cluster.volume(made).state == available)
        self.cluster.attach(made)
        volume = Volume(made, self.snapshots[snapshot])
        self.check(volume, _READ_BLOCKS)
        self.volumes.append(Volume(made, list(volume.blocks)))

    def delete(self, snapshot: str) -> None:
        del self.snapshots[snapshot]
        self._delete(snapshot)

    def prune(self, daemon: Daemon) -> bool:
        """Whether it was carried out; False where the daemon was killed, or another prune began."""
        with grpc.insecure_channel(daemon.read_address()) as channel:
            stub = snapshot_pb2_grpc.SnapshotStoreStub(channel)
            try:
                answers = list(stub.Prune(pb.PruneRequest(repack_share=0.01), timeout=_LIMIT_S))
            except grpc.RpcError as error:
                code = error.code()
                if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED):
                    raise
                return False
        return bool(answers[-1].done)

    # ---- at the end

    def check_all(self) -> None:
        """Every snapshot completes, is sound, and is exactly its content; and so are the volumes."""
        for volume in self.volumes:
            self.check(volume)
        for snapshot in self.snapshots:
            self.completed(snapshot)
        wait_for("snapshotd to reach a control that was killed", self._are_heard, _LIMIT_S)
        with grpc.insecure_channel(self.cluster.snapshotds[0].read_address()) as channel:
            stub = snapshot_pb2_grpc.SnapshotStoreStub(channel)
            *_, verified = stub.Verify(pb.VerifyRequest(snapshots=list(self.snapshots)), timeout=_LIMIT_S)
            assert not verified.problems, verified.problems
            for snapshot, blocks in self.snapshots.items():
                judge(snapshot, blocks, exported(stub, snapshot))

    def _are_heard(self) -> bool:
        daemons = self.cluster.call("GetStore", pb.GetStoreRequest()).daemons
        return bool(sum(each.up for each in daemons) == len(self.cluster.snapshotds))

    def end(self) -> None:
        """Delete all. What then is left after a prune is left for ever."""
        for volume in self.volumes:
            self._drop(volume)
        for snapshot in list(self.snapshots):
            self.delete(snapshot)

        def are_gone() -> bool:
            return not self.cluster.call("ListSnapshots", pb.ListSnapshotsRequest()).snapshots

        wait_for("the snapshots to be gone", are_gone, _LIMIT_S)
        wait_for("a prune", lambda: self.prune(self.cluster.snapshotds[0]), _LIMIT_S)
        left = [path for path in (self.cluster.directory / "store" / "packs").rglob("*") if path.is_file()]
        assert not left, f"nothing refers to these packs, and they were not pruned: {left}"

    def _delete(self, snapshot: str) -> None:
        self.cluster.call("DeleteSnapshot", pb.DeleteSnapshotRequest(snapshot=snapshot))

    def _drop(self, volume: Volume) -> None:
        self.cluster.detach(volume.id)
        wait_for(f"{volume.id} to be deleted", lambda: self._is_deleted(volume.id), _LIMIT_S)

    def _is_deleted(self, volume: str) -> bool:
        """Now; one is refused while a snapshot of it is pending."""
        try:
            self.cluster.call("DeleteVolume", control_pb2.DeleteVolumeRequest(volume=volume))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            return False
        return True


@contextmanager
def suppress_hydrated() -> Iterator[None]:
    """One that was quicker than who wanted to pause it is refused, and has all its blocks."""
    try:
        yield
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
            raise


def exported(stub: snapshot_pb2_grpc.SnapshotStoreStub, snapshot: str) -> bytes:
    """The blocks of the model; all others must be zeroes, which an export leaves out."""
    first, end = _FIRST * BLOCK_SIZE, (_FIRST + BLOCKS) * BLOCK_SIZE
    shown = bytearray(end - first)
    for piece in stub.Export(pb.ExportRequest(snapshot=snapshot), timeout=_LIMIT_S):
        at = piece.offset - first
        if not 0 <= at <= at + len(piece.data) <= len(shown):
            raise Wrong(f"{snapshot} has {len(piece.data)} bytes at {piece.offset}, where nobody wrote")
        shown[at : at + len(piece.data)] = piece.data
    return bytes(shown)


def judge(what: str, blocks: Possible, shown: bytes) -> None:
    """`shown`: the first of the blocks. Raises Wrong for one that shows what it must not; others are settled by it."""
    for number, possible in enumerate(blocks[: len(shown) // BLOCK_SIZE]):
        found = _NUMBERS.get(shown[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE])
        if found not in possible:
            raise Wrong(f"block {number} of {what} shows content {found}, expected one of {sorted(possible)}")
        blocks[number] = frozenset({found})
