"""Snapshots and the object store as JSON documents; the rules are those of blockstore.cli.documents."""

from collections.abc import Sequence

from blockstore.cli.documents import Document, time_text, word_of
from blockstore.rpc import snapshot_pb2 as pb


def snapshot_state(value: pb.Snapshot) -> str:
    """pending, completed, error or deleting."""
    return word_of(pb.SnapshotState.Name(value.state), "SNAPSHOT_STATE_")


def snapshot(value: pb.Snapshot) -> Document:
    return {
        "id": value.id,
        "volume": value.volume or None,
        "volume_name": value.volume_name,
        "size_bytes": value.size_bytes,
        "state": snapshot_state(value),
        "reason": value.reason,
        "description": value.description,
        "tags": dict(sorted(value.tags.items())),
        "created_at": time_text(value.created_at_ms),
        "sealed_at": time_text(value.sealed_at_ms),
        "completed_at": time_text(value.completed_at_ms),
        "parent": value.parent or None,
        "barrier": value.barrier or None,
        "generation": value.generation,
        "pause_us": value.pause_us,
        "progress": progress(value.progress) if value.HasField("progress") else None,
        "statistics": statistics(value.statistics) if value.HasField("statistics") else None,
        "root": value.root.hex() or None,
        "used_by": list(value.used_by),
        "uris": list(value.uris),
    }


def snapshots(values: Sequence[pb.Snapshot]) -> Document:
    return {"snapshots": [snapshot(each) for each in values]}


def progress(value: pb.ShipProgress) -> Document:
    return {
        "bytes_done": value.bytes_done,
        "bytes_total": value.bytes_total,
        "bytes_stored": value.bytes_stored,
        "rate_bytes": value.rate_bytes,
        "why": value.why,
    }


def statistics(value: pb.SnapshotStatistics) -> Document:
    return {
        "logical_bytes": value.logical_bytes,
        "changed_bytes": value.changed_bytes,
        "deduplicated_bytes": value.deduplicated_bytes,
        "stored_bytes": value.stored_bytes,
    }


def problem(value: pb.StoreProblem) -> Document:
    return {"object": value.object, "message": value.message, "snapshots": list(value.snapshots)}


def byte_range(value: pb.ByteRange) -> Document:
    return {"offset": value.offset, "size": value.size, "zero": value.zero}


def daemon(value: pb.StoreDaemon) -> Document:
    return {
        "id": value.id,
        "address": value.address,
        "up": value.up,
        "store": value.store,
        "repository": value.repository,
    }


def plan(value: pb.PrunePlan) -> Document:
    return {
        "objects_deleted": value.objects_deleted,
        "packs_repacked": value.packs_repacked,
        "bytes_freed": value.bytes_freed,
        "bytes_copied": value.bytes_copied,
        "bytes_kept": value.bytes_kept,
    }


def usage(value: pb.SnapshotUsage | None) -> Document:
    """Null where the object store was not asked or does not have it."""
    return {
        "logical_bytes": value.logical_bytes if value else None,
        "own_bytes": value.own_bytes if value else None,
        "shared_bytes": value.shared_bytes if value else None,
    }


def store_statistics(value: pb.StoreStatisticsResponse) -> Document:
    return {
        "objects": value.objects,
        "stored_bytes": value.stored_bytes,
        "unique_bytes": value.unique_bytes,
        "referenced_bytes": value.referenced_bytes,
        "dedupe_ratio": ratio(value.referenced_bytes, value.unique_bytes),
        "compression_ratio": ratio(value.unique_bytes, value.stored_bytes),
        "snapshots": [{"snapshot": each.snapshot, **usage(each)} for each in value.snapshots],
    }


def ratio(before: int, after: int) -> float | None:
    """How many bytes became one; None where there are none."""
    return round(before / after, 3) if after else None
