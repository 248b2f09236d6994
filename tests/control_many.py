"""A catalog with more records than one message could bring, put straight into the metastore."""

from dataclasses import replace
from pathlib import Path

from blockstore.control.codec import encode
from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.records import Segment, Source, Volume
from blockstore.control.snapshot_records import Snapshot, SnapshotState, Statistics, Store
from blockstore.domain import (
    Configuration,
    Member,
    NodeId,
    ReplicaId,
    SegmentNumber,
    SnapshotId,
    VolumeId,
    VolumeState,
)
from blockstore.units import GIB, MIB

MAP_SIZE = 512 * MIB
_BATCH = 120


def volume(number: int) -> Volume:
    """One that is available, on three nodes that nobody has heard of."""
    members = tuple(Member(ReplicaId(f"rep-{3 * number + n:017x}"), NodeId(f"node-{n:017x}")) for n in range(3))
    return Volume(
        id=VolumeId(f"vol-{number:017x}"),
        name=f"volume-{number}",
        size_bytes=GIB,
        state=VolumeState.AVAILABLE,
        created_at_ms=1,
        segments=(Segment(SegmentNumber(0), GIB, Configuration(1, members)),),
    )


def restored(number: int, snapshot: Snapshot) -> Volume:
    """One that comes from a snapshot, and does not go on."""
    source = Source(snapshot.id, snapshot.root, snapshot.size_bytes, paused=True)
    return replace(volume(number), source=source, origin=snapshot.id)


def completed(number: int, of: Volume) -> Snapshot:
    return Snapshot(
        id=SnapshotId(f"snap-{number:017x}"),
        volume=of.id,
        volume_name=of.name,
        size_bytes=GIB,
        state=SnapshotState.COMPLETED,
        created_at_ms=1 + number,
        sealed_at_ms=1 + number,
        completed_at_ms=1 + number,
        generation=1 + number,
        touched=True,
        started=True,
        root=f"{number:064x}",
        description="what a nightly job writes of each of them",
        tags={"job": "nightly", "keep": "30d"},
        statistics=Statistics(number, number, number, number),
    )


def pending(number: int, of: Volume) -> Snapshot:
    """Sealed, and of nobody's interest yet."""
    return replace(
        completed(number, of),
        state=SnapshotState.PENDING,
        completed_at_ms=0,
        touched=False,
        started=False,
        pinned=True,
        root="",
    )


async def fill(directory: Path, volumes: list[Volume], snapshots: list[Snapshot], prune_number: int = 0) -> None:
    """The records in the metastore of a control that does not run."""
    store = open_embedded(directory, MAP_SIZE)
    records = {f"volumes/{each.id}": encode(each) for each in volumes}
    records |= {f"snapshots/{each.id}": encode(each) for each in snapshots}
    records["snapshots.store"] = encode(Store("the-cluster", "the-repository", prune_number))
    left = list(records.items())
    while left:
        assert await store.transact({}, dict(left[:_BATCH])) is not None
        left = left[_BATCH:]
    await store.close()
