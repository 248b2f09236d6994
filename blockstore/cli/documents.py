"""What control answers as JSON documents: the keys are documented in docs/cli.md, and stay.

Pure. A time is an RFC 3339 text in UTC, null where there is none; an absent thing is null, a number
of bytes says so in its name. Keys may be added; none is renamed, removed or given another meaning.
"""

import json
from datetime import UTC, datetime
from typing import Any

from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import replica_pb2
from blockstore.units import BLOCK_SIZE, MAX_GENERATION

Document = dict[str, Any]


def text_of(document: Document, compact: bool = False) -> str:
    """As it is printed; compact: on one line."""
    return json.dumps(document, indent=None if compact else 2, ensure_ascii=False)


def time_text(milliseconds: int) -> str | None:
    """Milliseconds since 1970 as RFC 3339 in UTC; None for 0."""
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def volume_state(volume: pb.Volume) -> str:
    """creating, available, in-use, deleting or error."""
    return word_of(pb.VolumeState.Name(volume.state), "VOLUME_STATE_")


def attachment_state(attachment: pb.Attachment) -> str:
    """attaching, attached or detaching."""
    return word_of(pb.AttachmentState.Name(attachment.state), "ATTACHMENT_STATE_")


def severity(problem: pb.Problem) -> str:
    """warning, degraded or unavailable."""
    return word_of(pb.Severity.Name(problem.severity), "SEVERITY_")


def word_of(name: str, prefix: str) -> str:
    """An enum value's name without the enum's, as it is written for people and programs."""
    return name.removeprefix(prefix).lower().replace("_", "-")


def position(value: replica_pb2.Position) -> Document:
    return {"epoch": value.epoch, "sequence": value.sequence}


def volume(value: pb.Volume) -> Document:
    return {
        "id": value.id,
        "name": value.name,
        "size_bytes": value.size_bytes,
        "state": volume_state(value),
        "reason": value.reason,
        "tags": dict(sorted(value.tags.items())),
        "created_at": time_text(value.created_at_ms),
        "epoch": value.epoch,
        "attachment": attachment(value.attachment) if value.HasField("attachment") else None,
        "segments": [segment(each) for each in value.segments],
        "segment_size_bytes": value.segment_size_bytes,
        "growing_to_bytes": value.growing_to_bytes,
        "warnings": list(value.warnings),
        "source": source(value.source) if value.HasField("source") else None,
        "hydration": hydration(value.hydration) if value.HasField("hydration") else None,
    }


def source(value: pb.Source) -> Document:
    return {
        "snapshot": value.snapshot,
        "root": value.root.hex(),
        "size_bytes": value.size_bytes,
        "addresses": list(value.addresses),
    }


def hydration(value: pb.Hydration) -> Document:
    return {
        "blocks_total": value.blocks_total,
        "blocks_done": value.blocks_done,
        "rate_bytes": value.rate_bytes,
        "rate_now_bytes": value.rate_now_bytes,
        "paused": value.paused,
        "why": value.why,
    }


def attachment(value: pb.Attachment) -> Document:
    return {
        "front_end": value.front_end,
        "epoch": value.epoch,
        "state": attachment_state(value),
        "read_only": value.read_only,
        "since": time_text(value.since_ms),
        "uris": list(value.uris),
        "client": value.client or None,
    }


def segment(value: pb.Segment) -> Document:
    return {
        "number": value.number,
        "size_bytes": value.size_bytes,
        "configuration": value.configuration.number,
        "members": [member(each) for each in value.configuration.members],
        "old_members": [member(each) for each in value.configuration.old_members],
        "replacement": replacement(value.configuration.replacement)
        if value.configuration.HasField("replacement")
        else None,
    }


def replacement(value: pb.Replacement) -> Document:
    return {"newcomer": member(value.newcomer), "replaces": value.replaces, "reason": value.reason}


def member(value: pb.Member) -> Document:
    return {
        "replica": value.replica,
        "node": value.node,
        "address": value.address,
        "zone": value.zone,
        "known": position(value.known),
    }


def volumes(values: list[pb.Volume]) -> Document:
    return {"volumes": [volume(each) for each in values]}


def node(value: pb.Node) -> Document:
    return {
        "id": value.id,
        "address": value.address,
        "zone": value.zone,
        "up": value.up,
        "full": value.full,
        "draining": value.draining,
        "capacity_bytes": value.capacity_bytes,
        "used_bytes": value.used_bytes,
        "replicas": value.replicas,
        "last_heartbeat": time_text(value.last_heartbeat_ms),
    }


def nodes(values: list[pb.Node]) -> Document:
    return {"nodes": [node(each) for each in values]}


def front_end(value: pb.FrontEndInfo) -> Document:
    return {
        "id": value.id,
        "address": value.address,
        "uris": list(value.uris),
        "up": value.up,
        "volumes": value.volumes,
        "last_heartbeat": time_text(value.last_heartbeat_ms),
    }


def replica(value: pb.ReplicaHealth) -> Document:
    return {
        "replica": value.replica,
        "segment": value.segment,
        "node": value.node,
        "zone": value.zone,
        "state": value.state,
        "end": position(value.end),
        "lag_records": value.lag_records,
        "extents_done": value.extents_done,
        "extents_total": value.extents_total,
        "rate_bytes": value.rate_bytes or None,
        "seconds_left": round(value.seconds_left, 1) or None,
        "replaces": value.replaces or None,
        "waits": value.waits or None,
        "file_bytes": value.file_bytes,
        "why": value.why,
        "bad_blocks_found": value.bad_blocks_found,
        "bad_blocks_repaired": value.bad_blocks_repaired,
        "damage": value.damage,
        "scrub": scrub(value.scrub) if value.HasField("scrub") else None,
    }


def scrub(value: replica_pb2.ScrubStatus) -> Document:
    """The pass under way or the last one; generation is null for the current content."""
    return {
        "number": value.number,
        "running": value.running,
        "ended": value.ended,
        "began_at": time_text(value.began_ms),
        "last_whole_pass_ended_at": time_text(value.ended_ms),
        "extents_total": value.extents_total,
        "extents_done": value.extents_done,
        "extents_damaged": value.extents_damaged,
        "extents_bad": value.extents_bad,
        "extents_compared": value.extents_compared,
        "extents_not_compared": value.extents_not_compared,
        "extents_differing": value.extents_differing,
        "remark": value.why,
        "differences": [
            {
                "block": each.block,
                "byte": each.block * BLOCK_SIZE,
                "generation": None if each.generation == MAX_GENERATION else each.generation,
                "peer": each.peer,
                "sequence": each.sequence,
                "what": each.what,
            }
            for each in value.divergences
        ],
    }


def status(value: pb.StatusResponse) -> Document:
    return {
        "healthy": value.healthy,
        "problems": [
            {"severity": severity(each), "subject": each.subject, "message": each.message} for each in value.problems
        ],
        "volumes": [
            {
                **volume(each.volume),
                "serving": each.serving or None,
                "clients": each.clients,
                "replicas": [replica(one) for one in each.replicas],
            }
            for each in value.volumes
        ],
        "nodes": [node(each) for each in value.nodes],
        "front_ends": [front_end(each) for each in value.front_ends],
        "controls": [{"address": each.address, "state": control_state(each)} for each in value.controls],
    }


def control_state(value: pb.ControlInfo) -> str:
    """active, or standing-by."""
    return "active" if value.active else "standing-by"
