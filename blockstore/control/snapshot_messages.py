"""The catalog's records of snapshots as the messages of snapshot.proto, and the one way back.

Requests are checked where they arrive.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from blockstore.control.records import check_tags
from blockstore.control.snapshot_records import (
    Snapshot,
    SnapshotState,
    Statistics,
    StoreDaemon,
    check_description,
    check_root,
)
from blockstore.domain import SnapshotId, VolumeId, check_id
from blockstore.rpc import snapshot_pb2

SNAPSHOT_STATES: Final[Mapping[SnapshotState, "snapshot_pb2.SnapshotState.ValueType"]] = {
    SnapshotState.PENDING: snapshot_pb2.SNAPSHOT_STATE_PENDING,
    SnapshotState.COMPLETED: snapshot_pb2.SNAPSHOT_STATE_COMPLETED,
    SnapshotState.ERROR: snapshot_pb2.SNAPSHOT_STATE_ERROR,
    SnapshotState.DELETING: snapshot_pb2.SNAPSHOT_STATE_DELETING,
}


def bare_message(snapshot: Snapshot) -> snapshot_pb2.Snapshot:
    """What stands in its record."""
    return snapshot_pb2.Snapshot(
        id=snapshot.id,
        volume=snapshot.volume,
        volume_name=snapshot.volume_name,
        size_bytes=snapshot.size_bytes,
        state=SNAPSHOT_STATES[snapshot.state],
        reason=snapshot.reason,
        description=snapshot.description,
        tags=dict(snapshot.tags),
        created_at_ms=snapshot.created_at_ms,
        sealed_at_ms=snapshot.sealed_at_ms,
        completed_at_ms=snapshot.completed_at_ms,
        parent=snapshot.parent,
        barrier=snapshot.barrier,
        generation=snapshot.generation,
        statistics=_statistics_message(snapshot) if snapshot.root else None,
        root=bytes.fromhex(snapshot.root),
        pause_us=snapshot.pause_us,
    )


def full_message(
    snapshot: Snapshot, progress: snapshot_pb2.ShipProgress | None, users: Iterable[VolumeId]
) -> snapshot_pb2.Snapshot:
    """All that is known of it."""
    message = bare_message(snapshot)
    message.used_by.extend(users)
    if progress is not None:
        message.progress.CopyFrom(progress)
    return message


def whole_snapshot(message: snapshot_pb2.Snapshot, now_ms: int) -> Snapshot:
    """The record of one that is whole in the object store. Raises InvalidRequest."""
    check_tags(message.tags)
    check_description(message.description)
    return Snapshot(
        id=SnapshotId(check_id("snap", message.id)),
        volume=VolumeId(check_id("vol", message.volume) if message.volume else ""),
        volume_name=message.volume_name,
        size_bytes=message.size_bytes,
        state=SnapshotState.COMPLETED,
        created_at_ms=message.created_at_ms or now_ms,
        description=message.description,
        tags=dict(message.tags),
        barrier=message.barrier,
        sealed_at_ms=message.sealed_at_ms or message.created_at_ms or now_ms,
        generation=message.generation,
        parent=message.parent,
        completed_at_ms=message.completed_at_ms or now_ms,
        root=check_root(message.root),
        statistics=statistics_of(message.statistics),
    )


def statistics_of(message: snapshot_pb2.SnapshotStatistics) -> Statistics:
    """As a record."""
    return Statistics(message.logical_bytes, message.changed_bytes, message.deduplicated_bytes, message.stored_bytes)


def daemon_message(daemon: StoreDaemon, up: bool) -> snapshot_pb2.StoreDaemon:
    """A daemon, and whether its lease holds."""
    return snapshot_pb2.StoreDaemon(
        id=daemon.id, address=daemon.address, up=up, store=daemon.store, repository=daemon.repository
    )


def _statistics_message(snapshot: Snapshot) -> snapshot_pb2.SnapshotStatistics:
    return snapshot_pb2.SnapshotStatistics(
        logical_bytes=snapshot.statistics.logical_bytes,
        changed_bytes=snapshot.statistics.changed_bytes,
        deduplicated_bytes=snapshot.statistics.deduplicated_bytes,
        stored_bytes=snapshot.statistics.stored_bytes,
    )
