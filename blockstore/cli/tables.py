"""What control answers as tables for people. Pure: messages in, things for rich to print out.

Cells are plain text, never markup: names and reasons come from users and other machines.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from blockstore.cli import documents
from blockstore.rpc import control_pb2 as pb
from blockstore.units import BLOCK_SIZE, format_size

_COLORS = {
    "available": "green", "in-use": "green", "up": "green", "serving": "green", "healthy": "green",
    "completed": "green", "pending": "yellow", "active": "green",
    "creating": "yellow", "deleting": "yellow", "catching-up": "yellow", "filling": "yellow", "opening": "yellow",
    "damaged": "yellow",
    "warning": "yellow", "degraded": "yellow", "unknown": "yellow", "full": "red",
    "error": "red", "down": "red", "unavailable": "red", "failed": "red", "fenced": "red",
}  # fmt: skip

_COPIED = ("ID", "SNAPSHOT")
"""Columns that are whole also in a narrow terminal: ids are there to be copied."""


def state(word: str) -> Text:
    """A state in its color."""
    return Text(word, style=_COLORS.get(word, ""))


def grid(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """A table without lines; the columns whose title ends in `>` stand to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        right = column.endswith(">")
        table.add_column(
            column.removesuffix(">"),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=column in _COPIED,
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def pairs(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Names and values, one a line."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), value if isinstance(value, Text) else Text(value))
    return table


def volumes(values: Sequence[pb.Volume]) -> RenderableType:
    if not values:
        return Text("no volumes; create one: cairn volume create --name db --size 10G")
    restored = any(each.HasField("source") for each in values)
    return grid(
        ("ID", "NAME", "SIZE>", "STATE", "FRONT-END", "CREATED", *(("SOURCE",) if restored else ())),
        [
            (
                each.id,
                each.name,
                format_size(each.size_bytes),
                state(documents.volume_state(each)),
                each.attachment.front_end or "-",
                documents.time_text(each.created_at_ms) or "",
                *((source_line(each),) if restored else ()),
            )
            for each in values
        ],
    )


def source_line(value: pb.Volume) -> str:
    """Where the blocks of a restored volume come from, and how far that is; empty where it needs no source."""
    if not value.HasField("source"):
        return ""
    return f"{value.source.snapshot}, {hydration_line(value.hydration)}"


def hydration_line(value: pb.Hydration) -> str:
    """How far the hydration is, how fast, and what keeps it."""
    done, total = value.blocks_done * BLOCK_SIZE, value.blocks_total * BLOCK_SIZE
    share = f" ({100 * done / total:.0f}%)" if total else ""
    parts = [f"{format_size(done)} of {format_size(total)} hydrated{share}" if total else "not hydrated yet"]
    parts += ["paused"] if value.paused else [f"{format_size(value.rate_now_bytes)}/s"] if value.rate_now_bytes else []
    parts += [f"at most {format_size(value.rate_bytes)}/s"] if value.rate_bytes else []
    return ", ".join([*parts, *([value.why] if value.why else [])])


def volume(value: pb.Volume) -> RenderableType:
    """All of one volume."""
    rows: list[tuple[str, str | Text]] = [
        ("id", value.id),
        ("name", value.name or "-"),
        ("size", f"{format_size(value.size_bytes)} ({value.size_bytes:,} bytes)"),
        ("state", state(documents.volume_state(value))),
        ("created", documents.time_text(value.created_at_ms) or "-"),
        ("epoch", str(value.epoch)),
    ]
    rows += [("reason", value.reason)] if value.reason else []
    rows += [("growing to", format_size(value.growing_to_bytes))] if value.growing_to_bytes else []
    rows += [("source", source_line(value))] if value.HasField("source") else []
    rows += [("warning", Text(text, style="yellow")) for text in value.warnings]
    rows += [("tag", f"{key}={text}") for key, text in sorted(value.tags.items())]
    if value.HasField("attachment"):
        rows += _attachment(value.attachment)
    return Group(pairs(rows), *_segments(value.segments))


def _attachment(value: pb.Attachment) -> list[tuple[str, str | Text]]:
    mode = ", read-only" if value.read_only else ""
    since = documents.time_text(value.since_ms)
    attached = f"{value.front_end} ({documents.attachment_state(value)}{mode}, epoch {value.epoch}, since {since})"
    whose = [("attached for", value.client)] if value.client else []
    return [("attached to", attached), *whose, *(("uri", uri) for uri in value.uris)]


def _segments(values: Sequence[pb.Segment]) -> Iterator[RenderableType]:
    """The replicas of each, under its number and size where there are several."""
    for each in values:
        yield Text()
        if len(values) > 1:
            yield Text(f"segment {each.number}: {format_size(each.size_bytes)}")
        yield _segment(each)


def _segment(value: pb.Segment) -> Table:
    return grid(
        ("REPLICA", "NODE", "ZONE", "ADDRESS"),
        [(each.replica, each.node, each.zone, each.address or "-") for each in value.configuration.members],
    )


def nodes(values: Sequence[pb.Node]) -> RenderableType:
    if not values:
        return Text("no nodes; start them: cairn node run --zone ZONE --control HOST:PORT")
    return grid(
        ("ID", "ZONE", "STATE", "USED>", "CAPACITY>", "REPLICAS>", "ADDRESS"),
        [
            (
                each.id,
                each.zone,
                node_state(each),
                format_size(each.used_bytes),
                format_size(each.capacity_bytes),
                str(each.replicas),
                each.address,
            )
            for each in values
        ],
    )


def node_state(value: pb.Node) -> Text:
    text = state("down" if not value.up else "full" if value.full else "up")
    return text.append(", draining", style="yellow") if value.draining else text


def node(value: pb.Node) -> RenderableType:
    """All of one node."""
    share = f" ({100 * value.used_bytes / value.capacity_bytes:.0f}%)" if value.capacity_bytes else ""
    return pairs(
        [
            ("id", value.id),
            ("zone", value.zone),
            ("state", node_state(value)),
            ("address", value.address),
            ("capacity", format_size(value.capacity_bytes)),
            ("used", format_size(value.used_bytes) + share),
            ("replicas", str(value.replicas)),
            ("last heartbeat", documents.time_text(value.last_heartbeat_ms) or "not since control started"),
        ]
    )


def status(value: pb.StatusResponse) -> RenderableType:
    """Health first, with what is wrong and why; then volumes with their replicas, nodes and front-ends."""
    parts: list[RenderableType] = [_health(value)]
    for title, part in (
        ("VOLUMES", volume_health(value.volumes) if value.volumes else None),
        ("HYDRATION", _hydrating(value)),
        ("NODES", nodes(list(value.nodes))),
        ("FRONT-ENDS", _front_ends(value) if value.front_ends else Text("no front-end; start one: cairn nbd run")),
        ("CONTROLS", _controls(value) if len(value.controls) > 1 else None),
    ):
        parts += [Text(), Text(title, style="bold underline"), part] if part else []
    return Group(*parts)


def _controls(value: pb.StatusResponse) -> RenderableType:
    """In the order in which they take over."""
    return grid(("ADDRESS", "STATE"), [(each.address, state(documents.control_state(each))) for each in value.controls])


def _hydrating(value: pb.StatusResponse) -> RenderableType | None:
    """Volumes that still come from a snapshot; None where there are none."""
    rows = [
        (each.volume.name or each.volume.id, source_line(each.volume))
        for each in value.volumes
        if each.volume.HasField("source")
    ]
    return grid(("VOLUME", "SOURCE"), rows) if rows else None


def _health(value: pb.StatusResponse) -> RenderableType:
    if not value.problems:
        return state("healthy" if value.healthy else "degraded")
    worst = max(value.problems, key=lambda each: each.severity)
    head = state("healthy" if value.healthy else documents.severity(worst))
    problems = grid(
        ("PROBLEM", "SUBJECT", "WHY"),
        [(state(documents.severity(each)), each.subject, each.message) for each in value.problems],
    )
    return Group(head, Text(), problems)


def volume_health(values: Sequence[pb.VolumeHealth]) -> RenderableType:
    """Each volume with its replicas."""
    return grid(
        ("VOLUME", "STATE", "NODE", "ZONE", "REPLICA", "LAG>", "ON DISK>", "WHY"),
        [row for each in values for row in _replica_rows(each)],
    )


def _replica_rows(value: pb.VolumeHealth) -> list[tuple[str | Text, ...]]:
    """One row for each replica; the volume stands in the first, further segments where they begin."""
    word = value.serving or documents.volume_state(value.volume)
    name: tuple[str | Text, ...] = (value.volume.name or value.volume.id, state(word))
    replicas: list[tuple[str | Text, ...]] = [
        (each.node, each.zone, _replica_state(each), f"{each.lag_records:,}", format_size(each.file_bytes), each.why)
        for each in value.replicas
    ]
    numbers = [each.segment for each in value.replicas]
    heads = ["" if now == before else f"  segment {now}" for before, now in pairwise(numbers)]
    rest = [(head, "", *each) for head, each in zip(heads, replicas[1:], strict=True)]
    return [(*name, *first) for first in replicas[:1] or [("",) * 6]] + rest


def _replica_state(value: pb.ReplicaHealth) -> Text:
    text = state(value.state)
    if value.state == "filling" and value.extents_total:
        text.append(f" {100 * value.extents_done / value.extents_total:.0f}%")
    if value.seconds_left:
        text.append(f", {value.seconds_left:.0f} s left")
    return text.append(", newcomer") if value.replaces else text


def troubles(value: pb.VolumeHealth) -> RenderableType | None:
    """The replicas that are not as they should be, and why; None where all are."""
    lines = [
        Text(f"{each.replica} on {each.node} is {each.state}: {each.why}", style="yellow")
        for each in value.replicas
        if each.state != "up" and not each.replaces
    ]
    return Group(*lines) if lines else None


def _front_ends(value: pb.StatusResponse) -> RenderableType:
    return grid(
        ("ID", "STATE", "VOLUMES>", "NBD", "ADDRESS"),
        [
            (each.id, state("up" if each.up else "down"), str(each.volumes), " ".join(each.uris), each.address)
            for each in value.front_ends
        ],
    )


def attached(value: pb.Volume, commands: Sequence[str]) -> RenderableType:
    """A volume that is served: where, and what to type."""
    lines = [*value.attachment.uris, "", "Try:", *(f"  {command}" for command in commands)]
    head = f"{value.id} is attached" + (", read-only" if value.attachment.read_only else "")
    return Text("\n".join([head, *lines]), no_wrap=True, overflow="ignore")
