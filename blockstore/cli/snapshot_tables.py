"""Snapshots and the object store as tables for people; the rules are those of blockstore.cli.tables."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from blockstore.cli.documents import time_text
from blockstore.cli.lineage import lineage
from blockstore.cli.snapshot_documents import ratio, snapshot_state
from blockstore.cli.tables import grid, pairs, state
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import format_size

_Pairs = list[tuple[str, str | Text]]


def snapshots(values: Sequence[pb.Snapshot]) -> RenderableType:
    if not values:
        return Text("no snapshots; take one: cairn snapshot create VOLUME")
    return grid(
        ("ID", "VOLUME", "SIZE>", "STATE", "CREATED", "CHANGED>", "STORED>", "DESCRIPTION"),
        [
            (
                each.id,
                volume_of(each),
                format_size(each.size_bytes),
                state_with_share(each),
                time_text(each.created_at_ms) or "",
                format_size(each.statistics.changed_bytes) if each.HasField("statistics") else "-",
                format_size(each.statistics.stored_bytes) if each.HasField("statistics") else "-",
                each.description,
            )
            for each in values
        ],
    )


def volume_of(value: pb.Snapshot) -> str:
    """Whose snapshot it is, by name where it had one."""
    return value.volume_name or value.volume or "(imported)"


def state_with_share(value: pb.Snapshot) -> Text:
    """Its state; while it is shipped, with how much of it is."""
    text = state(snapshot_state(value))
    if value.state == pb.SNAPSHOT_STATE_PENDING and value.progress.bytes_total:
        text.append(f" {100 * value.progress.bytes_done / value.progress.bytes_total:.0f}%")
    return text


def snapshot(value: pb.Snapshot, commands: Sequence[str] = ()) -> RenderableType:
    """All of one snapshot. commands: to look into it."""
    rows: _Pairs = [
        ("id", value.id),
        ("volume", f"{value.volume_name} ({value.volume})" if value.volume_name else volume_of(value)),
        ("size", f"{format_size(value.size_bytes)} ({value.size_bytes:,} bytes)"),
        ("state", state_with_share(value)),
    ]
    rows += _given(("reason", value.reason), ("description", value.description))
    rows += [("tag", f"{key}={text}") for key, text in sorted(value.tags.items())]
    rows += _given(
        ("created", time_text(value.created_at_ms) or ""),
        ("sealed", time_text(value.sealed_at_ms) or ""),
        ("completed", time_text(value.completed_at_ms) or ""),
        ("writes stood still", f"{value.pause_us / 1000:.1f} ms" if value.pause_us else ""),
        ("change of", value.parent),
        ("of one instant with", value.barrier),
    )
    if value.HasField("progress"):
        rows += _progress(value.progress)
    if value.HasField("statistics"):
        rows += _statistics(value.statistics)
    rows += [("needed by", each) for each in value.used_by]
    rows += _given(("root", value.root.hex()))
    rows += [("uri", each) for each in value.uris]
    if not commands:
        return pairs(rows)
    tried = "\n".join(["", "Look into it:", *(f"  {command}" for command in commands)])
    return Group(pairs(rows), Text(tried, no_wrap=True, overflow="ignore"))


def _given(*rows: tuple[str, str]) -> _Pairs:
    return [(name, text) for name, text in rows if text]


def _progress(value: pb.ShipProgress) -> _Pairs:
    rate = f", {format_size(value.rate_bytes)}/s" if value.rate_bytes else ""
    shipped = f"{format_size(value.bytes_done)} of {format_size(value.bytes_total)}{rate}"
    return _given(("shipped", shipped), ("stored", format_size(value.bytes_stored)), ("waits", value.why))


def _statistics(value: pb.SnapshotStatistics) -> _Pairs:
    return [
        ("logical", f"{format_size(value.logical_bytes)} that a restore brings back"),
        ("changed", format_size(value.changed_bytes)),
        ("deduplicated", format_size(value.deduplicated_bytes)),
        ("stored", f"{format_size(value.stored_bytes)} compressed and encrypted"),
    ]


def tree(values: Sequence[pb.Snapshot], usage: Mapping[str, pb.SnapshotUsage]) -> RenderableType:
    """The lineage, with what each snapshot holds: own bytes go with it, shared ones are needed by others too."""
    if not values:
        return snapshots(values)
    return grid(
        ("SNAPSHOT", "VOLUME", "CREATED", "STATE", "LOGICAL>", "OWN>", "SHARED>"),
        [
            (
                row.drawing + row.snapshot.id,
                volume_of(row.snapshot),
                time_text(row.snapshot.created_at_ms) or "",
                state_with_share(row.snapshot),
                *_sizes(row.snapshot, usage.get(row.snapshot.id)),
            )
            for row in lineage(values)
        ],
    )


def _sizes(snapshot: pb.Snapshot, usage: pb.SnapshotUsage | None) -> tuple[str, str, str]:
    if usage is not None:
        return format_size(usage.logical_bytes), format_size(usage.own_bytes), format_size(usage.shared_bytes)
    known = snapshot.HasField("statistics")
    return format_size(snapshot.statistics.logical_bytes) if known else "-", "-", "-"


def problems(values: Sequence[pb.StoreProblem]) -> RenderableType:
    return grid(
        ("OBJECT", "PROBLEM", "SNAPSHOTS"), [(each.object, each.message, " ".join(each.snapshots)) for each in values]
    )


def plan(value: pb.PrunePlan, done: bool) -> RenderableType:
    """What a prune does, or did."""
    return pairs(
        [
            ("frees" if not done else "freed", format_size(value.bytes_freed)),
            ("objects deleted", f"{value.objects_deleted:,}"),
            ("packs repacked", f"{value.packs_repacked:,} ({format_size(value.bytes_copied)} copied)"),
            ("kept", format_size(value.bytes_kept)),
        ]
    )


def store(daemons: Sequence[pb.StoreDaemon]) -> RenderableType:
    if not daemons:
        return Text("no snapshotd; start one: cairn snapshotd run --store URL")
    return grid(
        ("ID", "STATE", "ADDRESS", "STORE", "REPOSITORY"),
        [(each.id, state("up" if each.up else "down"), each.address, each.store, each.repository) for each in daemons],
    )


def store_statistics(value: pb.StoreStatisticsResponse) -> RenderableType:
    """The whole store, then each snapshot's part in it."""
    rows: _Pairs = [
        ("objects", f"{value.objects:,}"),
        ("stored", format_size(value.stored_bytes)),
        ("different blocks", _beside(value.unique_bytes, value.stored_bytes)),
        ("blocks of snapshots", _beside(value.referenced_bytes, value.unique_bytes)),
    ]
    if not value.snapshots:
        return pairs(rows)
    each_snapshot = grid(
        ("SNAPSHOT", "LOGICAL>", "OWN>", "SHARED>"),
        [
            (each.snapshot, *(format_size(size) for size in (each.logical_bytes, each.own_bytes, each.shared_bytes)))
            for each in value.snapshots
        ],
    )
    return Group(pairs(rows), Text(), each_snapshot)


def _beside(size: int, smaller: int) -> str:
    """A size, and how many times the line above it that is."""
    times = ratio(size, smaller)
    return format_size(size) + (f" ({times:.2f} times that)" if times else "")
