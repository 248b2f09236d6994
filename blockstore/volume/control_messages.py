"""What control and a front-end tell each other about a volume: the ticket to open it, and how it does."""

from collections.abc import Iterable
from typing import Final

from blockstore.domain import (
    Configuration,
    Member,
    NodeId,
    Replacement,
    ReplicaId,
    SegmentNumber,
    SnapshotId,
    VolumeId,
    check_id,
)
from blockstore.errors import InvalidRequest
from blockstore.replica_codec import from_position, to_position
from blockstore.replication.status import MemberStatus
from blockstore.rpc import control_pb2 as pb
from blockstore.units import BLOCK_SIZE, MAX_VOLUME_SIZE, Epoch
from blockstore.volume.open_volume import OpenVolume
from blockstore.volume.source_client import Source
from blockstore.volume.ticket import Ticket

#: SHA-256.
_ROOT_BYTES: Final = 32
#: A member that lacks fewer is resent them within a moment.
_LAGGING_RECORDS: Final = 1000


def to_tickets(message: pb.OpenTicket) -> list[Ticket]:
    """One for each segment, in the order of the volume's blocks.

    Raises InvalidRequest where there is none, or their sizes are not the volume's.
    """
    sizes = [segment.size_bytes for segment in message.segments]
    if sizes:
        sizes[-1] = message.size_bytes - sum(sizes[:-1])
    if not sizes or min(sizes) <= 0 or any(size % BLOCK_SIZE for size in sizes):
        raise InvalidRequest(f"{message.volume} of {message.size_bytes} bytes with segments of {sizes} bytes")
    return [_to_ticket(message, segment, size) for segment, size in zip(message.segments, sizes, strict=True)]


def _to_ticket(message: pb.OpenTicket, segment: pb.Segment, size_bytes: int) -> Ticket:
    members = _everyone(segment)
    return Ticket(
        volume=VolumeId(message.volume),
        segment=SegmentNumber(segment.number),
        size_bytes=size_bytes,
        epoch=Epoch(message.epoch),
        configuration=to_configuration(segment.configuration),
        addresses=addresses_of([segment]),
        known={ReplicaId(member.replica): to_position(member.known) for member in members},
        accept_loss=message.accept_loss,
        loss_epochs=tuple(map(Epoch, message.loss_epochs)),
    )


def to_source(message: pb.Source) -> Source:
    """Raises InvalidRequest where it names no snapshot, or no root."""
    if len(message.root) != _ROOT_BYTES or not 0 < message.size_bytes <= MAX_VOLUME_SIZE:
        raise InvalidRequest(f"a source with a root of {len(message.root)} bytes, of {message.size_bytes} bytes")
    snapshot = SnapshotId(check_id("snap", message.snapshot))
    return Source(snapshot, message.root, message.size_bytes, tuple(message.addresses))


def to_configuration(message: pb.Configuration) -> Configuration:
    """Of a segment, as control has it."""
    change = message.replacement
    return Configuration(
        message.number,
        tuple(_to_member(each) for each in message.members),
        tuple(_to_member(each) for each in message.old_members),
        Replacement(_to_member(change.newcomer), ReplicaId(change.replaces), change.reason)
        if message.HasField("replacement")
        else None,
    )


def addresses_of(segments: Iterable[pb.Segment]) -> dict[ReplicaId, str]:
    """Where the members are now; none for a node that never registered."""
    return {
        ReplicaId(member.replica): member.address
        for segment in segments
        for member in _everyone(segment)
        if member.address
    }


def _everyone(segment: pb.Segment) -> list[pb.Member]:
    configuration = segment.configuration
    newcomer = [configuration.replacement.newcomer] if configuration.HasField("replacement") else []
    return [*configuration.members, *configuration.old_members, *newcomer]


def member_reports(volume: OpenVolume) -> list[pb.MemberReport]:
    """How each member does, for control."""
    return [
        pb.MemberReport(
            replica=member.replica,
            connected=member.connected,
            whole=member.whole,
            matched=from_position(member.matched),
            lag_records=member.lag_records,
            full=member.full,
            extents_done=member.extents_done,
            extents_total=member.extents_total,
            degraded_why=volume.link_trouble(member.replica) or degraded_why(member),
            damaged=member.damaged,
            left_out=member.foreign,
        )
        for member in volume.status().members
    ]


def degraded_why(member: MemberStatus) -> str:
    """Why a connected member is not as good as the others; empty where it is."""
    if member.left_out:
        return member.left_out
    if not member.whole:
        return "it is being filled from its peers"
    if member.damaged:
        return "it has lost content, and is filled anew once a quorum of the others is whole and sound"
    if member.full:
        return "its disk is full"
    return "it is catching up" if member.lag_records > _LAGGING_RECORDS else ""


def _to_member(message: pb.Member) -> Member:
    return Member(ReplicaId(message.replica), NodeId(message.node))
